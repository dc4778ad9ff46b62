"""The near-policy loss without a [N, V] tensor: value, metrics and gradients, chunk by chunk.

The forward pass also computes the gradients (three head matmuls, without recomputation), so a
chunk's logits are freed before the next chunk's exist. They are in one buffer of the compute dtype,
which two passes process. The first pass reduces each row to the teacher's k ids plus one
log-sum-exp of the tail; loss and gradient are functions of those k + 1 numbers. The second pass
overwrites the logits with their gradient. The passes are a parameter (`LogitsPasses`): plain torch
in small blocks of rows (`npd.train.logits_passes`), or fused kernels (`npd.train.triton_passes`).
Both share targets, divergences, metrics and matmuls. Sums over tokens and the head's gradient are
accumulated in float32 for any compute dtype. Does not check its arguments; `npd.train.loss` does.

Dimensions: N tokens, C tokens of a chunk, d hidden size, V vocabulary, K support, B = K + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from npd.models.kernels import NOTHING
from npd.models.kernels.products import add_wide_product, has_wide_products
from npd.models.lm_head import Head
from npd.models.loading import autocast
from npd.train.kd_divergence import LossSpec, kd_of_buckets
from npd.train.logits_passes import LogitGrads, LogitsPasses, TailStats, finish
from npd.train.loss_targets import Support, Targets
from npd.train.step_metrics import TokenValues, agreement, metric_sums, overlap

# Rows of the head per matmul of its gradient in the compute dtype, where products are not wide.
# Large enough for an efficient matmul, small enough for the allocator (on CPU: the cache) to reuse.
_HEAD_BLOCK = {"cpu": 2048}
_HEAD_BLOCK_ELSEWHERE = 8192


@dataclass(slots=True, eq=False)
class Gradients:
    """Accumulated gradients: d loss / d hidden, weight and bias; None if not required."""

    hidden_Nd: Tensor | None
    weight_Vd: Tensor | None
    bias_V: Tensor | None

    @property
    def is_required(self) -> bool:
        """Whether any gradient is required."""
        return not (self.hidden_Nd is None and self.weight_Vd is None and self.bias_V is None)


def chunked_loss(
    hidden_Nd: Tensor,
    head: Head,
    targets: Targets,
    spec: LossSpec,
    scale: Tensor,
    chunk: int,
    passes: LogitsPasses,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`scale` times the weighted sum of token losses, gradient attached, and the metric sums."""
    grads = _empty_gradients(hidden_Nd, head, targets.weights_N.dtype)
    loss = targets.weights_N.new_zeros(())
    sums: dict[str, Tensor] = {}
    with torch.no_grad(), autocast(hidden_Nd.device, is_on=False):
        # Cast a tied or master weight once, not once per chunk.
        cast = Head(head.weight.to(hidden_Nd.dtype), head.bias, head.scale, head.softcap)
        # On CPU, allocating memory for every chunk would cost more than its arithmetic.
        buffer = cast.weight.new_empty(min(chunk, len(hidden_Nd)), len(cast.weight))
        for start in range(0, max(len(hidden_Nd), 1), chunk):
            part = slice(start, start + chunk)
            value, found = _chunk(
                hidden_Nd, cast, part, targets.rows(part), spec, scale, grads, buffer, passes
            )
            loss += value
            sums = {name: sums.get(name, 0.0) + item for name, item in found.items()}
    if grads.is_required:
        loss = _Attach.apply(  # type: ignore[no-untyped-call]
            hidden_Nd, head.weight, head.bias, loss, grads
        )
    return loss, sums


def _chunk(
    hidden_Nd: Tensor,
    head: Head,
    part: slice,
    targets: Targets,
    spec: LossSpec,
    scale: Tensor,
    grads: Gradients,
    buffer: Tensor,
    passes: LogitsPasses,
) -> tuple[Tensor, dict[str, Tensor]]:
    hidden_Cd, support = hidden_Nd[part], targets.support
    logits_CV = torch.mm(hidden_Cd, head.weight.t(), out=buffer[: len(hidden_Cd)])
    dtype = targets.weights_N.dtype
    label_C = finish(logits_CV, targets.labels_N[:, None], head, dtype)[:, 0]
    inside_CK = label_C.new_empty((len(label_C), 0))
    if support is not None:
        inside_CK = finish(logits_CV, support.ids_NK, head, dtype)
    tail = passes.tail_stats(logits_CV, head, support, inside_CK)
    valid_CK = inside_CK if support is None else torch.where(support.valid_NK, inside_CK, NOTHING)
    buckets_CB = torch.cat([valid_CK, tail.log_sum_C[:, None]], dim=-1)
    value, bucket_grads_CB, found = _token_losses(
        buckets_CB, label_C, tail, targets, spec, scale, with_grads=grads.is_required
    )
    if bucket_grads_CB is not None:
        logit_grads = _logit_grads(
            bucket_grads_CB, inside_CK, label_C, tail, targets, spec, scale, head
        )
        passes.write_grads(logits_CV, head, support, inside_CK, tail, logit_grads, grads.bias_V)
        _accumulate(grads, logits_CV, hidden_Cd, head, part)
    return value, metric_sums(targets, found)


def _token_losses(
    buckets_CB: Tensor,
    label_C: Tensor,
    tail: TailStats,
    targets: Targets,
    spec: LossSpec,
    scale: Tensor,
    *,
    with_grads: bool,
) -> tuple[Tensor, Tensor | None, TokenValues]:
    """The chunk's loss, its gradient with respect to the k + 1 buckets, and the metric values."""
    support, kd, logit_grads = targets.support, None, None
    with torch.set_grad_enabled(with_grads):
        buckets = buckets_CB.detach().requires_grad_(with_grads)
        ce = buckets.logsumexp(dim=-1) - label_C
        token = ce if spec.kd_weight < 1.0 else torch.zeros_like(ce)
        if support is not None:
            kd = kd_of_buckets(F.log_softmax(buckets, dim=-1), support, spec)
            token = (1.0 - spec.kd_weight) * token + spec.kd_weight * kd
        value = scale * (targets.weights_N * token).sum()
        if with_grads:
            (logit_grads,) = torch.autograd.grad(value, buckets)
    found = _values(buckets_CB, ce.detach(), kd, tail, support)
    return value.detach(), logit_grads, found


def _values(
    buckets_CB: Tensor,
    ce_C: Tensor,
    kd_C: Tensor | None,
    tail: TailStats,
    support: Support | None,
) -> TokenValues:
    logprobs = F.log_softmax(buckets_CB, dim=-1)
    probs = logprobs.exp()
    entropy = probs[:, -1] * tail.entropy_C - (probs * logprobs).sum(dim=-1)
    if support is None or kd_C is None:
        return TokenValues(ce_C, entropy)
    inside = buckets_CB[:, :-1]
    mass = probs[:, :-1].sum(dim=-1)
    agrees = agreement(torch.maximum(tail.top_C, inside.amax(dim=-1)), inside, support)
    return TokenValues(
        ce_C, entropy, kd_C.detach(), mass, agrees, overlap(tail.top_C, inside, support)
    )


def _logit_grads(
    bucket_grads_CB: Tensor,
    inside_CK: Tensor,
    label_C: Tensor,
    tail: TailStats,
    targets: Targets,
    spec: LossSpec,
    scale: Tensor,
    head: Head,
) -> LogitGrads:
    """The gradient with respect to the matmul's result, from that of the buckets and the label."""
    label = (spec.kd_weight - 1.0) * scale * targets.weights_N * _finish_grad(label_C, head)
    inside = bucket_grads_CB[:, :-1]
    if targets.support is not None:
        inside = torch.where(targets.support.valid_NK, inside, 0.0) * _finish_grad(inside_CK, head)
    in_tail = torch.where(tail.is_some_C, bucket_grads_CB[:, -1], 0.0)
    return LogitGrads(inside, in_tail, targets.labels_N, label)


def _finish_grad(logits: Tensor, head: Head) -> Tensor:
    """d logits / d (hidden @ weight.T), from the logits."""
    if head.softcap is None:
        return torch.full_like(logits, head.scale)
    return (1.0 - (logits / head.softcap).square()) * head.scale


def _accumulate(
    grads: Gradients, d_logits_CV: Tensor, hidden_Cd: Tensor, head: Head, part: slice
) -> None:
    if grads.hidden_Nd is not None:
        torch.mm(d_logits_CV, head.weight, out=grads.hidden_Nd[part])
    if grads.weight_Vd is not None:
        _add_product(grads.weight_Vd, d_logits_CV, hidden_Cd)


def _add_product(total_Vd: Tensor, d_logits_CV: Tensor, hidden_Cd: Tensor) -> None:
    if total_Vd.dtype == hidden_Cd.dtype:
        total_Vd.addmm_(d_logits_CV.t(), hidden_Cd)
        return
    if has_wide_products(hidden_Cd):
        add_wide_product(total_Vd, d_logits_CV.t(), hidden_Cd)
        return
    # On CPU, adding a narrow type to a wide one makes a wide copy; keep it small.
    length = _HEAD_BLOCK.get(total_Vd.device.type, _HEAD_BLOCK_ELSEWHERE)
    for start in range(0, len(total_Vd), length):
        block = slice(start, start + length)
        total_Vd[block] += d_logits_CV[:, block].t() @ hidden_Cd


def _empty_gradients(hidden_Nd: Tensor, head: Head, dtype: torch.dtype) -> Gradients:
    def like(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if tensor is None or not (tensor.requires_grad and torch.is_grad_enabled()):
            return None
        return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)

    hidden = like(hidden_Nd, hidden_Nd.dtype)
    return Gradients(hidden, like(head.weight, dtype), like(head.bias, dtype))


class _Attach(torch.autograd.Function):
    """Attaches the precomputed gradients to the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: Tensor,
        grads: Gradients,
    ) -> Tensor:
        ctx.save_for_backward(grads.hidden_Nd, grads.weight_Vd, grads.bias_V)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scales copies of the gradients: with a graph that is kept, every pass starts from them.

        For the usual factor 1 there is no copy, but only on a CPU: elsewhere reading the factor
        waits for the device.
        """
        grads = ctx.saved_tensors
        if upstream.device.type != "cpu" or bool(upstream != 1.0):
            grads = [None if grad is None else grad * upstream for grad in grads]
        out = (
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return (*out, None, None)
