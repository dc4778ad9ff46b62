"""Ranks that work on one model together: how they meet, and what they tell each other.

Promises: a world of one does nothing at all; what is gathered is the same on every rank; every
method is called by all ranks in the same order, or they wait for each other for ever. Ranks of one
machine meet at a file and talk over its loopback interface. Ranks of several meet at the first
one's address, and talk over the network that it is on: torch.distributed asks nobody for a key, so
that must be one you trust.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from npd.errors import ConfigError, InputError
from npd.store.files import remove

T = TypeVar("T")
# The address that other machines know this one by; set by a runtime that spans several.
ADDRESS = "NPD_NODE_ADDRESS"
_TCP = "tcp://"
_LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True, slots=True)
class World:
    """`size` ranks that work together; this process is number `rank`."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and evaluates."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Each rank's value, in the order of ranks; small picklable things only."""
        if self.size == 1:
            return [value]
        import torch

        out: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(out, value)
        return out

    def decided(self, decide: Callable[[], T]) -> T:
        """What the first rank finds, so that no two ranks go different ways."""
        return self.gather(decide() if self.is_first else None)[0]  # type: ignore[return-value]

    def agreed(self, work: Callable[[], T]) -> T:
        """What `work` gives this rank, once all have done it. None waits for another within it.

        Raises:
            InputError: `work` failed on a rank; the same on all, and it names that rank.
        """
        found, error = _outcome(work)
        told = self.gather((socket.gethostname(), error))
        if error is not None and all(other is not None for _, other in told):
            raise error
        for rank, (machine, other) in enumerate(told):
            if other is not None:
                raise type(other)(f"rank {rank}, on {machine}: {other}")
        return found  # type: ignore[return-value]

    def close(self) -> None:
        """Leave the world."""
        if self.size > 1:
            import torch

            torch.distributed.destroy_process_group()


def _outcome(work: Callable[[], T]) -> tuple[T | None, InputError | None]:
    try:
        return work(), None
    except InputError as error:
        return None, error


class Meeting:
    """How one of `size` ranks comes into its world and leaves it; `setting` names their number."""

    def __init__(self, size: int, *, device: str, call_timeout: float, setting: str) -> None:
        self._size, self._device, self._setting = size, device, setting
        # Longer than the controller waits, which is the one to say what has become of a rank.
        self._timeout = 2 * call_timeout
        self._hosted: Any = None
        self._place: str | None = None
        self._world = World()

    def host(self) -> str:
        """Open a place on this machine where ranks of other machines can come to this one."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        address = os.environ.get(ADDRESS, _LOOPBACK)
        self._hosted = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return f"{_TCP}{address}:{self._hosted.port}"

    def join(self, rank: int, place: str) -> World:
        """Meet the others at `place`: a new file, or where the first one hosts. See `connect`."""
        self._place = place
        self._world = connect(
            place,
            rank=rank,
            size=self._size,
            device=self._device,
            timeout=self._timeout,
            store=self._hosted if rank == 0 else None,
            setting=self._setting,
        )
        return self._world

    def leave(self) -> None:
        """Leave the world. A model may keep hold of the file it was met at, so that goes too."""
        self._world.close()
        if self._place is not None and not self._place.startswith(_TCP):
            remove(Path(self._place))


def connect(
    place: str,
    *,
    rank: int,
    size: int,
    device: str,
    timeout: float,
    store: Any = None,
    setting: str = "train.ranks",
) -> World:
    """Meet the other ranks at `place`: a new file, or where one hosts; for one life of a group.

    `setting` is where their number comes from, for messages.

    Raises:
        ConfigError: some rank has no GPU although it should, or others have one.
    """
    import torch

    kind = torch.device(device).type
    limit = timedelta(seconds=timeout)
    store = store if store is not None else _store(place, size, limit)
    store.set_timeout(limit)  # torch's own is five minutes, less than an autoscaler may take
    _check_devices(store, kind, rank, size, setting)
    is_far = place.startswith(_TCP)
    interface = _interface(os.environ.get(ADDRESS, _LOOPBACK)) if is_far else _loopback()
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if interface is not None:
            os.environ.setdefault(variable, interface)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=limit
    )
    return World(rank, size)


def _store(place: str, size: int, timeout: timedelta) -> Any:
    from torch.distributed import FileStore, TCPStore  # type: ignore[attr-defined]

    if not place.startswith(_TCP):
        return FileStore(place, size)
    address, _, port = place.removeprefix(_TCP).rpartition(":")
    return TCPStore(address, int(port), is_master=False, timeout=timeout)


def _check_devices(store: Any, kind: str, rank: int, size: int, setting: str) -> None:
    import torch

    is_there = kind == "cpu" or torch.cuda.is_available()
    store.set(f"device-{rank}", kind if is_there else "cpu")
    kinds = [store.get(f"device-{other}").decode() for other in range(size)]
    if len(set(kinds)) > 1 or not is_there:
        without = ", ".join(str(other) for other, found in enumerate(kinds) if found == "cpu")
        raise ConfigError(
            f"{setting} {size} takes a GPU for each rank, but there is none for rank {without}: "
            f"lower {setting}, or set runtime.device: cpu"
        )


def _loopback() -> str:
    """The network interface of this machine alone: `lo`, or `lo0`."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _interface(address: str) -> str | None:
    """The network interface that has `address`; None where the system does not tell."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                try:
                    asked = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                except OSError:
                    continue  # an interface without an address
                if socket.inet_ntoa(asked[20:24]) == address:
                    return name
    except (ImportError, OSError):
        pass
    return None
