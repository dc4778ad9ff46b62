"""The near-policy loss without a [N, V] tensor: value, metrics and gradients, chunk by chunk.

The forward pass makes the gradients at once (three head matmuls, nothing recomputed), so that a
chunk's logits are dropped before the next chunk's exist. A chunk's row of V logits is reduced to
the teacher's k ids plus one log-sum-exp of the rest; the loss and its gradient live on those k + 1
numbers, and the same exponentials spread the gradient back over the rest. Sums over tokens and the
head's gradient are accumulated in float32 whatever the compute type.
Does not check its arguments; `npd.train.loss` does.

Dimensions: N tokens, C tokens of a chunk, d hidden size, V vocabulary, K support, B = K + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from npd.head import Head
from npd.train.divergence import NOTHING, Rule, Support, kd_of_buckets
from npd.train.tokens import Targets, TokenValues, agreement, metric_sums

# Rows of the head whose gradient exists in the compute type at once: large enough for any device's
# matmul, small enough for an allocator to reuse.
_HEAD_BLOCK = 8192


@dataclass(slots=True, eq=False)
class Gradients:
    """Sums under construction: d loss / d hidden, weight and bias; None where nobody asks."""

    hidden_Nd: Tensor | None
    weight_Vd: Tensor | None
    bias_V: Tensor | None

    @property
    def is_asked(self) -> bool:
        """Whether any of them is."""
        return not (self.hidden_Nd is None and self.weight_Vd is None and self.bias_V is None)


class _Scratch:
    """Room for two chunks of float logits, used over and over.

    Fresh memory for every chunk costs more on CPU than the arithmetic done in it. Each half is
    also lent out in the compute type, at a time when its float content is not needed.
    """

    def __init__(self, chunk: int, head: Head, dtype: torch.dtype) -> None:
        self._width = head.weight.shape[0]
        self._halves = [head.weight.new_empty(chunk * self._width, dtype=dtype) for _ in range(2)]

    def half(self, index: int, rows: int, dtype: torch.dtype) -> Tensor:
        """Half 0 or 1 as a tensor [rows, V] of `dtype`, content undefined."""
        flat, numel = self._halves[index], rows * self._width
        used = math.ceil(numel * dtype.itemsize / flat.dtype.itemsize)
        return flat[:used].view(dtype)[:numel].view(rows, self._width)


@dataclass(frozen=True, slots=True, eq=False)
class _Rest:
    """A chunk's logits outside the support: exp(logit - shift) in `exps_CV`, 0 inside it."""

    exps_CV: Tensor
    total_C: Tensor
    top_C: Tensor
    log_sum_C: Tensor
    entropy_C: Tensor


def chunked_loss(
    hidden_Nd: Tensor, head: Head, targets: Targets, rule: Rule, scale: Tensor, chunk: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """`scale` times the weighted sum of token losses, gradient attached, and the metric sums."""
    grads = _empty_gradients(hidden_Nd, head, targets.weights_N.dtype)
    loss = targets.weights_N.new_zeros(())
    sums: dict[str, Tensor] = {}
    with torch.no_grad(), torch.autocast(hidden_Nd.device.type, enabled=False):
        # A tied or master weight is cast once, not once a chunk.
        cast = Head(head.weight.to(hidden_Nd.dtype), head.bias, head.scale, head.softcap)
        scratch = _Scratch(min(chunk, len(hidden_Nd)), cast, loss.dtype)
        for start in range(0, max(len(hidden_Nd), 1), chunk):
            part = slice(start, start + chunk)
            value, found = _chunk(
                hidden_Nd, cast, part, targets.rows(part), rule, scale, grads, scratch
            )
            loss += value
            sums = {name: sums.get(name, 0.0) + item for name, item in found.items()}
    if grads.is_asked:
        loss = _Attach.apply(  # type: ignore[no-untyped-call]
            hidden_Nd, head.weight, head.bias, loss, grads
        )
    return loss, sums


def _chunk(
    hidden_Nd: Tensor,
    head: Head,
    part: slice,
    targets: Targets,
    rule: Rule,
    scale: Tensor,
    grads: Gradients,
    scratch: _Scratch,
) -> tuple[Tensor, dict[str, Tensor]]:
    hidden_Cd, support = hidden_Nd[part], targets.support
    logits_CV, slope_CV = _logits(hidden_Cd, head, scratch, keep_slope=grads.is_asked)
    label_C = logits_CV.gather(-1, targets.labels_N[:, None])[:, 0]
    inside_CK = _take_inside(logits_CV, support)
    rest = _reduce(logits_CV, scratch)
    buckets_CB = torch.cat([inside_CK, rest.log_sum_C[:, None]], dim=-1)
    value, slopes_CB, found = _token_losses(buckets_CB, label_C, rest, targets, rule, scale)
    if grads.is_asked:
        label_slope_C = (rule.kd_weight - 1.0) * scale * targets.weights_N
        d_logits_CV = _spread(rest, slopes_CB, label_slope_C, targets, rule)
        if slope_CV is not None:
            d_logits_CV.mul_(slope_CV)
        if head.scale != 1.0:
            d_logits_CV.mul_(head.scale)
        _accumulate(grads, d_logits_CV, hidden_Cd, head, part, scratch)
    return value, metric_sums(targets, found)


def _logits(
    hidden_Cd: Tensor, head: Head, scratch: _Scratch, *, keep_slope: bool
) -> tuple[Tensor, Tensor | None]:
    dtype = torch.promote_types(hidden_Cd.dtype, torch.float32)
    logits = scratch.half(0, len(hidden_Cd), dtype)
    if dtype == hidden_Cd.dtype:
        torch.mm(hidden_Cd, head.weight.t(), out=logits)
    else:
        narrow = scratch.half(1, len(hidden_Cd), hidden_Cd.dtype)
        logits.copy_(torch.mm(hidden_Cd, head.weight.t(), out=narrow))
    if head.bias is not None:
        logits.add_(head.bias)
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap is None:
        return logits, None
    logits.div_(head.softcap).tanh_()
    slope = 1.0 - logits.square() if keep_slope else None
    return logits.mul_(head.softcap), slope


def _take_inside(logits_CV: Tensor, support: Support | None) -> Tensor:
    """The logits of the support [C, K], which are blanked out of `logits_CV` in place."""
    if support is None:
        return logits_CV.new_empty((len(logits_CV), 0))
    taken = logits_CV.gather(-1, support.ids_NK)
    # Stand-ins of entries that do not exist repeat an id of their row, so every write to a place
    # writes the same number: blank, or what was there where the row has no support at all.
    logits_CV.scatter_(-1, support.ids_NK, torch.where(support.some_N1, NOTHING, taken))
    return torch.where(support.valid_NK, taken, NOTHING)


def _reduce(logits_CV: Tensor, scratch: _Scratch) -> _Rest:
    """One pass of exponentials over what is left; `logits_CV` is used up."""
    top = logits_CV.amax(dim=-1)
    is_some = ~(top <= NOTHING / 2)  # NaN counts as something, so that it is seen
    shift = torch.where(is_some, top, 0.0)
    exps = scratch.half(1, len(logits_CV), logits_CV.dtype)
    torch.exp(logits_CV.sub_(shift[:, None]), out=exps)
    total = exps.sum(dim=-1)
    safe = torch.where(is_some, total, 1.0)
    spread = torch.einsum("cv,cv->c", exps, logits_CV) / safe
    log_sum = torch.where(is_some, shift + safe.log(), NOTHING)
    return _Rest(exps, safe, top, log_sum, safe.log() - spread)


def _token_losses(
    buckets_CB: Tensor, label_C: Tensor, rest: _Rest, targets: Targets, rule: Rule, scale: Tensor
) -> tuple[Tensor, Tensor, TokenValues]:
    """The chunk's loss, its gradient in the k + 1 buckets, and the values for the metrics."""
    support, kd = targets.support, None
    with torch.enable_grad():
        buckets = buckets_CB.detach().requires_grad_()
        ce = buckets.logsumexp(dim=-1) - label_C
        token = ce if rule.kd_weight < 1.0 else torch.zeros_like(ce)
        if support is not None:
            kd = kd_of_buckets(F.log_softmax(buckets, dim=-1), support, rule)
            token = (1.0 - rule.kd_weight) * token + rule.kd_weight * kd
        value = scale * (targets.weights_N * token).sum()
        (slopes,) = torch.autograd.grad(value, buckets)
    found = _values(buckets_CB, ce.detach(), kd, rest, support)
    return value.detach(), slopes, found


def _values(
    buckets_CB: Tensor, ce_C: Tensor, kd_C: Tensor | None, rest: _Rest, support: Support | None
) -> TokenValues:
    logprobs = F.log_softmax(buckets_CB, dim=-1)
    probs = logprobs.exp()
    entropy = probs[:, -1] * rest.entropy_C - (probs * logprobs).sum(dim=-1)
    if support is None or kd_C is None:
        return TokenValues(ce_C, entropy)
    inside = buckets_CB[:, :-1]
    best = torch.maximum(rest.top_C, inside.amax(dim=-1))
    mass = probs[:, :-1].sum(dim=-1)
    return TokenValues(ce_C, entropy, kd_C.detach(), mass, agreement(best, inside, support))


def _spread(
    rest: _Rest, slopes_CB: Tensor, label_slope_C: Tensor, targets: Targets, rule: Rule
) -> Tensor:
    """d loss / d logits [C, V] from the gradient in the buckets, in place of the exponentials."""
    out_CV = rest.exps_CV.mul_((slopes_CB[:, -1] / rest.total_C)[:, None])
    if targets.support is not None:
        inside = torch.where(targets.support.valid_NK, slopes_CB[:, :-1], 0.0)
        out_CV.scatter_add_(-1, targets.support.ids_NK, inside)
    if rule.kd_weight < 1.0:
        out_CV.scatter_add_(-1, targets.labels_N[:, None], label_slope_C[:, None])
    return out_CV


def _accumulate(
    grads: Gradients,
    d_logits_CV: Tensor,
    hidden_Cd: Tensor,
    head: Head,
    part: slice,
    scratch: _Scratch,
) -> None:
    d_cast_CV = d_logits_CV
    if d_logits_CV.dtype != hidden_Cd.dtype:
        d_cast_CV = scratch.half(0, len(hidden_Cd), hidden_Cd.dtype).copy_(d_logits_CV)
    if grads.bias_V is not None:
        grads.bias_V += d_logits_CV.sum(dim=0)
    if grads.hidden_Nd is not None:
        grads.hidden_Nd[part] = d_cast_CV @ head.weight
    if grads.weight_Vd is not None:
        _add_product(grads.weight_Vd, d_cast_CV, hidden_Cd)


def _add_product(total_Vd: Tensor, d_logits_CV: Tensor, hidden_Cd: Tensor) -> None:
    if total_Vd.dtype == hidden_Cd.dtype:
        total_Vd.addmm_(d_logits_CV.t(), hidden_Cd)
        return
    # Adding a narrow type to a wide one makes a wide copy on CPU: keep that copy small.
    for start in range(0, len(total_Vd), _HEAD_BLOCK):
        block = slice(start, start + _HEAD_BLOCK)
        total_Vd[block] += d_logits_CV[:, block].t() @ hidden_Cd


def _empty_gradients(hidden_Nd: Tensor, head: Head, dtype: torch.dtype) -> Gradients:
    def like(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if tensor is None or not (tensor.requires_grad and torch.is_grad_enabled()):
            return None
        return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)

    hidden = like(hidden_Nd, hidden_Nd.dtype)
    return Gradients(hidden, like(head.weight, dtype), like(head.bias, dtype))


class _Attach(torch.autograd.Function):
    """Gives a loss the gradients that were computed with it."""

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
        out = (
            None if grad is None else (grad * upstream).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*out, None, None)
