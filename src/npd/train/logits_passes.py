"""The chunked loss's two passes over a chunk's logits, in plain torch.

`tail_stats` reduces each row's logits outside the teacher's support to four numbers.
`write_grads` overwrites the logits with their gradient. Both process a few rows at a time in the
accumulation dtype, so that their buffers fit a CPU's cache and are small beside the chunk. Both
mask the support, so it does not affect maximum, sum or gradient of the tail. Every logit is
overwritten. Independent of the loss.

Dimensions: C tokens of a chunk, V vocabulary, K support size, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from npd.models.kernels import NOTHING
from npd.models.lm_head import Head
from npd.train.loss_targets import Support

# Logits of a block, of which two float32 copies exist. On CPU 2 x 4 MiB: smaller blocks are no
# faster (1 to 64 rows of 49,152 take the same time). On GPUs large enough to hide kernel launches.
_BLOCK = {"cpu": 2**20}
_BLOCK_ELSEWHERE = 2**24


@dataclass(frozen=True, slots=True, eq=False)
class TailStats:
    """Statistics of each row's logits outside the support [C].

    `top_C` is the largest logit, `log_sum_C` the log-sum-exp and `entropy_C` the entropy (nats) of
    the softmax. `is_some_C` is False for rows without such logits (then NOTHING, NOTHING, 0).
    """

    is_some_C: Tensor
    top_C: Tensor
    log_sum_C: Tensor
    entropy_C: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LogitGrads:
    """Gradients with respect to the matmul's result, for the support and for the label.

    For all other logits, `tail_C` is d loss / d log_sum_C, which `write_grads` distributes.
    """

    inside_CK: Tensor
    tail_C: Tensor
    labels_C: Tensor
    label_C: Tensor


class LogitsPasses(Protocol):
    """The two passes. `logits_CV` is the matmul's result, before bias, scale and softcap."""

    def tail_stats(
        self, logits_CV: Tensor, head: Head, support: Support | None, inside_CK: Tensor
    ) -> TailStats:
        """Reduce the logits outside the support; `inside_CK` are the finished logits inside it."""

    def write_grads(
        self,
        logits_CV: Tensor,
        head: Head,
        support: Support | None,
        inside_CK: Tensor,
        tail: TailStats,
        slopes: LogitGrads,
        bias_V: Tensor | None,
    ) -> None:
        """Overwrite `logits_CV` with its gradient; add the bias's gradient to `bias_V`."""


def finish(logits_CV: Tensor, ids_CK: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """The logits at some ids [C, K], with the head's bias, scale and softcap, in `dtype`."""
    picked = logits_CV.gather(-1, ids_CK).to(dtype)
    bias = None if head.bias is None else head.bias[ids_CK]
    return _finish(picked, bias, head)


def _finish(logits: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """Bias, scale and softcap, in place."""
    if bias is not None:
        logits.add_(bias)
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


class TorchPasses:
    """Both passes with torch operations, for any device and dtype."""

    def tail_stats(
        self, logits_CV: Tensor, head: Head, support: Support | None, inside_CK: Tensor
    ) -> TailStats:
        """Needs only a block's softmax, whose largest value is 1 / the sum of exponentials."""
        top, total, moment = (inside_CK.new_empty(len(logits_CV)) for _ in range(3))
        for rows, logits, probs in _blocks(logits_CV, head, support, inside_CK):
            torch.amax(logits, dim=-1, out=top[rows])
            torch.softmax(logits, dim=-1, out=probs)
            total[rows] = probs.amax(dim=-1).reciprocal_()
            probs.mul_(logits.sub_(top[rows, None]))
            torch.sum(probs, dim=-1, out=moment[rows])
        is_some = ~(top <= NOTHING / 2)  # True for NaN, so that NaN propagates
        log_total = total.log_()
        log_sum = torch.where(is_some, top + log_total, NOTHING)
        return TailStats(is_some, top, log_sum, torch.where(is_some, log_total - moment, 0.0))

    def write_grads(
        self,
        logits_CV: Tensor,
        head: Head,
        support: Support | None,
        inside_CK: Tensor,
        tail: TailStats,
        slopes: LogitGrads,
        bias_V: Tensor | None,
    ) -> None:
        """Recomputes the softmax, which costs less than keeping it."""
        tail_C1 = (slopes.tail_C * head.scale)[:, None]
        for rows, logits, probs in _blocks(logits_CV, head, support, inside_CK):
            torch.softmax(logits, dim=-1, out=probs)
            probs.mul_(tail_C1[rows])
            if head.softcap is not None:
                # Masked logits are far below the range of tanh, and their softmax is 0 anyway.
                slope = logits.div_(head.softcap).clamp_(min=-1.0).square_().neg_().add_(1.0)
                probs.mul_(slope)
            if support is not None:
                probs.scatter_add_(-1, support.ids_NK[rows], slopes.inside_CK[rows])
            probs.scatter_add_(-1, slopes.labels_C[rows, None], slopes.label_C[rows, None])
            if bias_V is not None:
                bias_V += probs.sum(dim=0)
            logits_CV[rows] = probs


def _blocks(
    logits_CV: Tensor, head: Head, support: Support | None, inside_CK: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows: the slice, finished logits [R, V] with the support masked, and a buffer."""
    num_rows, width = logits_CV.shape
    numel = _BLOCK.get(logits_CV.device.type, _BLOCK_ELSEWHERE)
    step = max(1, min(num_rows, numel // width))
    room = [inside_CK.new_empty((step, width)) for _ in range(2)]
    if support is not None:
        # Missing entries repeat an id of their row, so duplicate writes agree: all write the mask,
        # or the logit itself if the row has no support.
        blank_CK = torch.where(support.some_N1, NOTHING, inside_CK)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        logits, probs = (half[: rows.stop - start] for half in room)
        _finish(logits.copy_(logits_CV[rows]), head.bias, head)
        if support is not None:
            logits.scatter_(-1, support.ids_NK[rows], blank_CK[rows])
        yield rows, logits, probs
