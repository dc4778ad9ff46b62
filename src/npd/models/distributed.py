"""Process groups: the ranks that share one model, their rendezvous and collectives.

With one rank every method is a no-op; it may be in a group of its own, which needs no network.
Gathered values are the same on every rank. All ranks must call the methods in the same order, or
they deadlock. Ranks on one machine use a file as rendezvous, and the loopback interface. Ranks on
several machines use a port of the first rank's machine and its network, which must be trusted,
because torch.distributed has no authentication.
"""

from __future__ import annotations

import atexit
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from npd.errors import ConfigError, InputError
from npd.models.device import CPU, collective_backend, num_gpus, use
from npd.store.files import remove

T = TypeVar("T")
# This machine's address for other machines; set by a runtime that spans several.
ADDRESS = "NPD_NODE_ADDRESS"
_TCP = "tcp://"
_LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True, slots=True)
class DistContext:
    """A process group of `size` ranks; this process is number `rank`.

    With one rank, `is_group` says whether torch has a process group for it.
    """

    rank: int = 0
    size: int = 1
    is_group: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and evaluates."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order; for small picklable values only."""
        if self.size == 1:
            return [value]
        import torch

        out: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(out, value)
        return out

    def from_rank0(self, decide: Callable[[], T]) -> T:
        """The result of `decide` on rank 0, which is the same decision for all ranks."""
        return self.gather(decide() if self.is_first else None)[0]  # type: ignore[return-value]

    def all_or_raise(self, work: Callable[[], T]) -> T:
        """Run `work`, which has no collectives, on all ranks; returns this rank's result.

        Raises:
            InputError: `work` failed on a rank; all ranks raise the same error, which names it.
        """
        found, error = _outcome(work)
        outcomes = self.gather((socket.gethostname(), error))
        if error is not None and all(other is not None for _, other in outcomes):
            raise error
        for rank, (machine, other) in enumerate(outcomes):
            if other is not None:
                raise type(other)(f"rank {rank}, on {machine}: {other}")
        return found  # type: ignore[return-value]

    def close(self) -> None:
        """Leave the process group."""
        if self.is_group:
            import torch

            torch.distributed.destroy_process_group()


def _outcome(work: Callable[[], T]) -> tuple[T | None, InputError | None]:
    try:
        return work(), None
    except InputError as error:
        return None, error


class Rendezvous:
    """Joins one of `size` ranks to its process group; `setting` names the setting of `size`."""

    def __init__(self, size: int, *, device: str, call_timeout: float, setting: str) -> None:
        self._size, self._device, self._setting = size, device, setting
        # Longer than the controller's timeout, so that the controller reports a lost rank first.
        self._timeout = 2 * call_timeout
        self._hosted: Any = None
        self._address: str | None = None
        self._dist = DistContext()

    def open(self) -> str:
        """Open a store on this machine for ranks on other machines; returns its address."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        address = os.environ.get(ADDRESS, _LOOPBACK)
        self._hosted = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return f"{_TCP}{address}:{self._hosted.port}"

    def join(self, rank: int, address: str) -> DistContext:
        """Join the group at `address`; see `connect`."""
        self._address = address
        self._dist = connect(
            address,
            rank=rank,
            size=self._size,
            device=self._device,
            timeout=self._timeout,
            store=self._hosted if rank == 0 else None,
            setting=self._setting,
        )
        return self._dist

    def leave(self) -> None:
        """Leave the group, and remove the rendezvous file."""
        self._dist.close()
        if self._address is not None and not self._address.startswith(_TCP):
            remove(Path(self._address))


def connect(
    address: str,
    *,
    rank: int,
    size: int,
    device: str,
    timeout: float,
    store: Any = None,
    setting: str = "train.ranks",
) -> DistContext:
    """Join the other ranks at `address`: the path of a new file, or the first rank's TCP address.

    An address can be used only once. `setting` names the setting of `size`, for messages.

    Raises:
        ConfigError: a rank has no GPU although it needs one, or torch has no collectives for it.
    """
    import torch

    kind = torch.device(device).type
    limit = timedelta(seconds=timeout)
    store = store if store is not None else _store(address, size, limit)
    store.set_timeout(limit)  # torch's default is five minutes; an autoscaler may take longer
    _check_devices(store, kind, rank, size, setting)
    is_remote = address.startswith(_TCP)
    interface = _interface(os.environ.get(ADDRESS, _LOOPBACK)) if is_remote else _loopback()
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"):
        if interface is not None:
            os.environ.setdefault(variable, interface)
    torch.distributed.init_process_group(
        collective_backend(kind), store=store, rank=rank, world_size=size, timeout=limit
    )
    return DistContext(rank, size, is_group=True)


def connect_alone(device: str) -> DistContext:
    """This process as the only rank of a group, for libraries that work on groups only.

    A group that the process is in already stays as it is. Otherwise the new one ends with the
    process.
    """
    import torch
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    use(device)  # groups and streams are those of the current device
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            collective_backend(torch.device(device).type), store=HashStore(), rank=0, world_size=1
        )
        atexit.register(_end_group)
    return DistContext(is_group=True)


def _end_group() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def mesh_of(dist: DistContext, device: str) -> Any:
    """The device mesh of the group's ranks: of this process alone, in whatever group it is."""
    import torch
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    assert dist.is_group, "a mesh needs a process group"
    kind = torch.device(device).type
    if torch.distributed.get_world_size() == dist.size:
        return init_device_mesh(kind, (dist.size,))
    me = torch.distributed.get_rank()
    own = torch.distributed.new_group(
        [me], use_local_synchronization=True, backend=collective_backend(kind)
    )
    return DeviceMesh.from_group(own, kind)


def _store(address: str, size: int, timeout: timedelta) -> Any:
    from torch.distributed import FileStore, TCPStore  # type: ignore[attr-defined]

    if not address.startswith(_TCP):
        return FileStore(address, size)
    host, _, port = address.removeprefix(_TCP).rpartition(":")
    return TCPStore(host, int(port), is_master=False, timeout=timeout)


def _check_devices(store: Any, kind: str, rank: int, size: int, setting: str) -> None:
    is_there = kind == CPU or num_gpus(kind) > 0
    store.set(f"device-{rank}", kind if is_there else CPU)
    kinds = [store.get(f"device-{other}").decode() for other in range(size)]
    if len(set(kinds)) > 1 or not is_there:
        without = ", ".join(str(other) for other, found in enumerate(kinds) if found == CPU)
        raise ConfigError(
            f"{setting} {size} needs a GPU for each rank, but there is none for rank {without}: "
            f"lower {setting}, or set runtime.device: cpu"
        )


def _loopback() -> str:
    """The loopback interface: `lo`, or `lo0`."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _interface(address: str) -> str | None:
    """The network interface with `address`; None if the system does not report it."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                try:
                    found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                except OSError:
                    continue  # an interface without an address
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    except (ImportError, OSError):
        pass
    return None
