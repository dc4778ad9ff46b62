"""Sharding of the student over the ranks of a trainer (FSDP2), and its gathering.

Parameters and optimiser state are sharded: each layer separately, the other parameters together.
They stay float32; with a compute dtype, FSDP gathers them in it and reduces gradients in float32,
so no copy of the whole student in the compute dtype outlives a layer. All ranks must call the
collective functions in the same order, or they deadlock. Does not compute, write files, or assign
rows to ranks.

What ranks share is read once: the first rank loads the student and sends each its part, one tensor
at a time. The others build the same modules without memory (the meta device), so that a host holds
the whole student once. If an architecture cannot be built that way, or differs in any tensor from
what was loaded, every rank loads it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from npd.errors import ModelError, RunError
from npd.models.distributed import DistContext, mesh_of
from npd.models.kernels.compile import layers_of
from npd.models.lm_head import Head
from npd.models.loading import load_model, outline


def shard(
    objective: nn.Module,
    model: Any,
    dist: DistContext,
    device: str,
    dtype: torch.dtype | None,
    *,
    keeps_weights: bool = False,
) -> None:
    """Shard the parameters over the ranks and move them to their devices, in place.

    Layers and loss compute in `dtype`; None computes in the parameters' own. With `keeps_weights`
    the weights that a row's forward pass gathered stay for its backward pass.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = mesh_of(dist, device)
    inside = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32)
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, mp_policy=inside, reshard_after_forward=not keeps_weights)
    # A row brings the teacher's float32 log-probs, which must not be rounded.
    fully_shard(objective, mesh=mesh, mp_policy=replace(inside, cast_forward_inputs=False))


def recover(objective: nn.Module) -> None:
    """Bring a sharded module back to its start after a failed forward or backward pass.

    Raises:
        RunError: this torch cannot.
    """
    reset: Callable[[], None] | None = getattr(objective, "reset_iter_state", None)
    if reset is None:
        raise RunError(
            "the device is out of memory, and only torch 2.13 or newer can go on with smaller "
            "rows: lower train.row_tokens, or set train.activation_checkpointing: true"
        )
    reset()
    # It leaves gradients on unsharded parameters, to which the next backward pass would add.
    for module in _sharded(objective):
        module.unshard()
        for parameter in module.parameters():
            parameter.grad = None
        module.reshard()


def free_gathered(objective: nn.Module) -> None:
    """Free the weights that a forward pass without a backward pass gathered."""
    for module in _sharded(objective):
        module.reshard()


def _sharded(objective: nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    return (module for module in objective.modules() if isinstance(module, FSDPModule))


def is_kept_in_float32(model: Any) -> bool:
    """Whether the architecture demands float32 of some parameters that are in a bfloat16 model."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    pattern = "|".join(rf"(^|\.){name}($|\.)" for name in kept)
    names = (name for name, _ in model.named_parameters())
    return bool(pattern) and any(re.search(pattern, name) for name in names)


def gather(tensor: Tensor) -> Tensor:
    """The full tensor of `tensor`, which may be sharded; without a copy if one rank has it all."""
    full: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    if full is None:
        return tensor
    is_whole = tensor.device_mesh.size() == 1  # type: ignore[attr-defined]
    return tensor.to_local() if is_whole else full()  # type: ignore[attr-defined]


def gathered_head(head: Head, dtype: torch.dtype) -> Head:
    """`head` with its full weight in `dtype` on every rank; `head` itself if it is not sharded.

    All ranks must call it. The ranks have different tokens, so the gradient is averaged over them,
    in float32, as FSDP2 does for all other parameters.
    """
    if not hasattr(head.weight, "full_tensor"):
        return head

    def gathered(sharded: Tensor) -> Any:
        return _Gather.apply(sharded, dtype)  # type: ignore[no-untyped-call]

    bias = None if head.bias is None else gathered(head.bias)
    return Head(gathered(head.weight), bias, head.scale, head.softcap)


class _Gather(torch.autograd.Function):
    """Forward: gathers a sharded parameter. Backward: reduce-scatters the mean of the gradients."""

    @staticmethod
    def forward(ctx: Any, sharded: Any, dtype: torch.dtype) -> Tensor:
        ctx.mesh, ctx.placements, ctx.dtype = sharded.device_mesh, sharded.placements, sharded.dtype
        return gather(sharded.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        partial = [Partial()] * ctx.mesh.ndim
        own = DTensor.from_local(grad.to(ctx.dtype), ctx.mesh, partial, run_check=False)
        return own.redistribute(placements=ctx.placements) / ctx.mesh.size(), None


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


def load_student(
    path: str | Path, dist: DistContext, device: str, *, trust: bool, compute_dtype: str
) -> Any:
    """The student in float32; on ranks but the first perhaps without weights (on meta).

    It is checked as it will compute, in `compute_dtype`.

    Raises:
        ModelError: it cannot be loaded.
    """

    def load() -> Any:
        return load_model(
            path,
            role="student",
            device=device,
            trust_remote_code=trust,
            compute_dtype=compute_dtype,
        )

    if dist.size == 1:
        return load()
    model = dist.all_or_raise(lambda: load() if dist.is_first else _outline(path, trust))
    layouts = dist.gather(None if model is None else layout(model))
    if all(found == layouts[0] for found in layouts):
        return model
    return model if dist.is_first else load()


def _outline(path: str | Path, trust: bool) -> Any | None:
    try:
        return outline(path, trust_remote_code=trust, is_packed=True).float().eval()
    except ModelError:
        return None


def has_no_weights(model: nn.Module) -> bool:
    """Whether a rank has built the student without memory."""
    return any(parameter.is_meta for parameter in model.parameters())


def share_out(
    objective: nn.Module, whole: Mapping[str, Tensor], dist: DistContext, device: str
) -> None:
    """Give the ranks but the first, which have no weights, their parts of its tensors `whole`.

    `whole` are the `tensors_of` the objective before it was sharded.
    """
    if not dist.is_first:
        objective.to_empty(device=device)
    for name, own in sorted(tensors_of(objective).items()):
        if dist.is_first:
            full = whole[name].to(device).contiguous()
        else:
            full = torch.empty(own.shape, dtype=own.dtype, device=device)
        torch.distributed.broadcast(full, src=0)
        if not dist.is_first:
            _set(objective, name, own, full)


@torch.no_grad()
def _set(objective: nn.Module, name: str, own: Tensor, full: Tensor) -> None:
    if own.is_meta:  # no parameter and no buffer, so it was not moved
        module, _, attribute = name.rpartition(".")
        setattr(objective.get_submodule(module), attribute, full)
    else:
        own.copy_(shard_like(full, own))


def layout(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of a model, by name."""
    return {name: (tuple(t.shape), str(t.dtype)) for name, t in tensors_of(model).items()}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a model by name: parameters (tied ones once), buffers, plain attributes."""
    found: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    for prefix, module in model.named_modules():
        for name, value in (*module.named_buffers(recurse=False), *vars(module).items()):
            if isinstance(value, Tensor):
                found[f"{prefix}.{name}" if prefix else name] = value
    return found
