"""Sharding of the student over the ranks of a trainer (FSDP2), and its gathering.

Parameters and optimiser state are sharded: each layer separately, the other parameters together.
All ranks must call the collective functions in the same order, or they deadlock. Does not compute,
write files, or assign rows to ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from npd.models.distributed import DistContext
from npd.models.kernels.compile import layers_of
from npd.models.lm_head import Head


def shard(objective: nn.Module, model: Any, dist: DistContext, device: str) -> None:
    """Shard the parameters over the ranks and move them to their devices, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (dist.size,))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def gather(tensor: Tensor) -> Tensor:
    """The full tensor of `tensor`, which may be sharded."""
    full: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def gathered_head(head: Head) -> Head:
    """`head` with its full weight on every rank; `head` itself if it is not sharded.

    All ranks must call it. The ranks have different tokens, so the gradient is averaged over them,
    as FSDP2 does for all other parameters.
    """
    if not hasattr(head.weight, "full_tensor"):
        return head
    bias = None if head.bias is None else _Gather.apply(head.bias)  # type: ignore[no-untyped-call]
    weight = _Gather.apply(head.weight)  # type: ignore[no-untyped-call]
    return Head(weight, bias, head.scale, head.softcap)


class _Gather(torch.autograd.Function):
    """Forward: gathers a sharded parameter. Backward: reduce-scatters the mean of the gradients."""

    @staticmethod
    def forward(ctx: Any, sharded: Any) -> Tensor:
        ctx.mesh, ctx.placements = sharded.device_mesh, sharded.placements
        return gather(sharded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        own = DTensor.from_local(grad, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return own.redistribute(placements=ctx.placements) / ctx.mesh.size()


def gather_all(tensors: Mapping[str, Tensor], dist: DistContext, device: str) -> dict[str, Tensor]:
    """The full tensors on the first rank, moved to `device`; an empty mapping on the others.

    Tensors are gathered one at a time, so that the other ranks never need memory for more than one.
    """
    out = {}
    for name, tensor in tensors.items():
        whole = gather(tensor.detach())
        if dist.is_first:
            out[name] = whole.to(device)
    return out


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of the full tensor `whole`, sharded like `like`; without communication."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def with_params(model: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A copy of `model` whose parameters are `tensors`, by name; tied parameters stay tied.

    No parameter of `model` is copied, so `model` may be on the meta device. Parameters that
    `tensors` lacks are shared with `model`.
    """
    memo = {
        id(p): nn.Parameter(tensors.get(name, p), requires_grad=p.requires_grad)
        for name, p in model.named_parameters()
    }
    return copy.deepcopy(model, memo)


def to_meta(model: Any) -> Any:
    """A copy of `model` with its parameters on the meta device: shapes without memory."""
    return with_params(model, {name: p.detach().to("meta") for name, p in model.named_parameters()})
