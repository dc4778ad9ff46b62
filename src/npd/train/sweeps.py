"""Two sweeps over a chunk's logits, in plain torch: what the chunked loss does with each of them.

`reduce` turns each row's logits outside the teacher's support into four numbers; `spread` writes
the gradient over the logits. Both work on a few rows at a time in the accumulation type, so that
what they hold stays in a CPU's cache and is small beside the chunk itself. Promises to treat the
support as absent (no exponential, no maximum, no gradient from the rest) and to write every logit.
Does not know about losses: numbers of rows and buckets in, gradients of them out.

Dimensions: C tokens of a chunk, V vocabulary, K support size, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from npd.head import Head
from npd.train.divergence import NOTHING, Support

# Logits of a block, of which two copies exist in float32. On CPU 2 x 4 MiB: any smaller block is
# no faster (1 to 64 rows of 49,152: the same time); elsewhere as many as hide a kernel's launch.
_BLOCK = {"cpu": 2**20}
_BLOCK_ELSEWHERE = 2**24


@dataclass(frozen=True, slots=True, eq=False)
class Rest:
    """A chunk's logits outside the support, row by row [C].

    `top_C` is the largest, `log_sum_C` their log-sum-exp and `entropy_C` the entropy (nats) of
    their softmax; `is_some_C` is False where there are none (then NOTHING, NOTHING, 0).
    """

    is_some_C: Tensor
    top_C: Tensor
    log_sum_C: Tensor
    entropy_C: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Slopes:
    """What `spread` writes: d loss by what the matmul gave for the support and the label.

    For the rest, `outside_C` is d loss / d log_sum_C, which every logit gets its part of.
    """

    inside_CK: Tensor
    outside_C: Tensor
    labels_C: Tensor
    label_C: Tensor


class Sweeper(Protocol):
    """Who goes over a chunk. `logits_CV` is what the matmul gave: no bias, scale or softcap yet."""

    def reduce(
        self, logits_CV: Tensor, head: Head, support: Support | None, inside_CK: Tensor
    ) -> Rest:
        """Reduce what is outside the support, whose finished logits are `inside_CK`."""

    def spread(
        self,
        logits_CV: Tensor,
        head: Head,
        support: Support | None,
        inside_CK: Tensor,
        rest: Rest,
        slopes: Slopes,
        bias_V: Tensor | None,
    ) -> None:
        """Put the gradient in place of `logits_CV`; add that of the bias to `bias_V`."""


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


class TorchSweeper:
    """Both sweeps with torch's own operations, on any device and in any type."""

    def reduce(
        self, logits_CV: Tensor, head: Head, support: Support | None, inside_CK: Tensor
    ) -> Rest:
        """The softmax of a block is all that is needed: its largest value is 1 / sum of exps."""
        top, total, spread = (inside_CK.new_empty(len(logits_CV)) for _ in range(3))
        for rows, logits, probs in _blocks(logits_CV, head, support, inside_CK):
            torch.amax(logits, dim=-1, out=top[rows])
            torch.softmax(logits, dim=-1, out=probs)
            total[rows] = probs.amax(dim=-1).reciprocal_()
            probs.mul_(logits.sub_(top[rows, None]))
            torch.sum(probs, dim=-1, out=spread[rows])
        is_some = ~(top <= NOTHING / 2)  # NaN counts as something, so that it is seen
        log_total = total.log_()
        log_sum = torch.where(is_some, top + log_total, NOTHING)
        return Rest(is_some, top, log_sum, torch.where(is_some, log_total - spread, 0.0))

    def spread(
        self,
        logits_CV: Tensor,
        head: Head,
        support: Support | None,
        inside_CK: Tensor,
        rest: Rest,
        slopes: Slopes,
        bias_V: Tensor | None,
    ) -> None:
        """The same softmax again, which costs less than keeping it."""
        outside_C1 = (slopes.outside_C * head.scale)[:, None]
        for rows, logits, probs in _blocks(logits_CV, head, support, inside_CK):
            torch.softmax(logits, dim=-1, out=probs)
            probs.mul_(outside_C1[rows])
            if head.softcap is not None:
                # Blanked logits are far below what tanh gives: their share is 0 already.
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
    """Blocks of rows: which, finished logits [R, V] without the support, and room for as many."""
    num_rows, width = logits_CV.shape
    numel = _BLOCK.get(logits_CV.device.type, _BLOCK_ELSEWHERE)
    step = max(1, min(num_rows, numel // width))
    room = [inside_CK.new_empty((step, width)) for _ in range(2)]
    if support is not None:
        # Stand-ins of entries that do not exist repeat an id of their row, so every write to a
        # place writes the same number: blank, or what was there if the row has no support at all.
        blank_CK = torch.where(support.some_N1, NOTHING, inside_CK)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        logits, probs = (half[: rows.stop - start] for half in room)
        _finish(logits.copy_(logits_CV[rows]), head.bias, head)
        if support is not None:
            logits.scatter_(-1, support.ids_NK[rows], blank_CK[rows])
        yield rows, logits, probs
