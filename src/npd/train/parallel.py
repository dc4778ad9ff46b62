"""Ranks of a trainer: how they meet, how the student is spread over them, and is whole again.

Promises: a world of one does nothing at all; what is gathered is the same on every rank; every
method is called by all ranks in the same order, or they wait for each other for ever. Parameters
and optimiser state are sharded (FSDP2), each layer by itself and the rest together.
Does not compute, write files, or decide who trains on what.
"""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from npd.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """`size` ranks that train one student together; this process is number `rank`."""

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
        out: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(out, value)
        return out

    def decided(self, decide: Callable[[], T]) -> T:
        """What the first rank finds, so that no two ranks go different ways."""
        return self.gather(decide() if self.is_first else None)[0]  # type: ignore[return-value]

    def close(self) -> None:
        """Leave the world."""
        if self.size > 1:
            torch.distributed.destroy_process_group()


def connect(meeting: Path, *, rank: int, size: int, device: str, timeout: float) -> World:
    """Meet the other ranks at the file `meeting`, one for each life of the group.

    Raises:
        ConfigError: some rank has no GPU although it should, or others have one.
    """
    store = torch.distributed.FileStore(str(meeting), size)  # type: ignore[attr-defined]
    kind = torch.device(device).type
    _check_devices(store, kind, rank, size)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, _loopback())
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    return World(rank, size)


def _loopback() -> str:
    """The network interface of this machine alone: `lo`, or `lo0`."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _check_devices(store: Any, kind: str, rank: int, size: int) -> None:
    is_there = kind == "cpu" or torch.cuda.is_available()
    store.set(f"device-{rank}", kind if is_there else "cpu")
    kinds = [store.get(f"device-{other}").decode() for other in range(size)]
    if len(set(kinds)) > 1 or not is_there:
        without = ", ".join(str(other) for other, found in enumerate(kinds) if found == "cpu")
        raise ConfigError(
            f"train.ranks {size} takes a GPU for each rank, but there is none for rank {without}: "
            "lower train.ranks, or set runtime.device: cpu"
        )


def shard(objective: nn.Module, model: Any, world: World, device: str) -> None:
    """Spread the parameters over the ranks and onto their devices, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (world.size,))
    layers = set(model._no_split_modules or ())
    for module in reversed(list(model.modules())):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded."""
    whole: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def gathered(tensors: Mapping[str, Tensor], world: World, device: str) -> dict[str, Tensor]:
    """All of each tensor on the first rank, moved to `device`; nothing on the others.

    One after the other, so that a rank holds one whole tensor at a time.
    """
    out = {}
    for name, tensor in tensors.items():
        whole = full(tensor.detach())
        if world.is_first:
            out[name] = whole.to(device)
    return out


def spread(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `whole`, laid out as `like` is; without communication."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def filled(model: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A copy of `model` whose parameters are `tensors`, by name; what is tied stays tied.

    No parameter of `model` is copied, so that it may be an empty one or share nothing.
    """
    memo = {
        id(p): nn.Parameter(tensors[name], requires_grad=p.requires_grad)
        for name, p in model.named_parameters()
    }
    return copy.deepcopy(model, memo)


def hollow(model: Any) -> Any:
    """A copy of `model` with parameters that have a shape and no memory."""
    return filled(model, {name: p.detach().to("meta") for name, p in model.named_parameters()})
