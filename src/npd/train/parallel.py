"""How the student is spread over the ranks of a trainer, and is whole again.

Promises: every function is called by all ranks in the same order, or they wait for each other for
ever. Parameters and optimiser state are sharded (FSDP2), each layer by itself and the rest
together. Does not compute, write files, or decide who trains on what.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from npd.head import Head
from npd.train.compiled import layers_of
from npd.world import World


def shard(objective: nn.Module, model: Any, world: World, device: str) -> None:
    """Spread the parameters over the ranks and onto their devices, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (world.size,))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded."""
    whole: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def whole_head(head: Head) -> Head:
    """`head` with all of its weight on every rank, if it is sharded; all ranks must call.

    Each rank has tokens of its own, so that gradients are averaged over the ranks as FSDP2 averages
    those of everything else. (Ranks with the same tokens have the same gradient, and so its mean.)
    """
    if not hasattr(head.weight, "full_tensor"):
        return head
    bias = None if head.bias is None else _Whole.apply(head.bias)  # type: ignore[no-untyped-call]
    weight = _Whole.apply(head.weight)  # type: ignore[no-untyped-call]
    return Head(weight, bias, head.scale, head.softcap)


class _Whole(torch.autograd.Function):
    """All of a sharded parameter; backwards, each rank's part of the mean of the gradients."""

    @staticmethod
    def forward(ctx: Any, sharded: Any) -> Tensor:
        ctx.mesh, ctx.placements = sharded.device_mesh, sharded.placements
        return full(sharded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        own = DTensor.from_local(grad, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return own.redistribute(placements=ctx.placements) / ctx.mesh.size()


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

    No parameter of `model` is copied, so that it may be an empty one or share nothing; those that
    `tensors` lacks stay as they are.
    """
    memo = {
        id(p): nn.Parameter(tensors.get(name, p), requires_grad=p.requires_grad)
        for name, p in model.named_parameters()
    }
    return copy.deepcopy(model, memo)


def hollow(model: Any) -> Any:
    """A copy of `model` with parameters that have a shape and no memory."""
    return filled(model, {name: p.detach().to("meta") for name, p in model.named_parameters()})
