"""The two passes over a chunk's logits as Triton kernels; each reads the chunk once.

Same contract as `npd.train.logits_passes.TorchPasses`. Matmuls, buckets, targets, divergences and
metrics stay with the chunked loss. The logits of support ids are set to -inf, which the kernels
treat as masked. Tested on CPU against the other implementations with Triton's interpreter
(`TRITON_INTERPRET=1`). Imports triton as it is imported, because kernels are decorated functions:
import it inside a function and expect an ImportError.

Dimensions: C tokens of a chunk, V vocabulary, K support size.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from npd.models.kernels import NOTHING
from npd.models.kernels.row_stats import constants, finished, on, row_stats
from npd.models.lm_head import Head
from npd.train.logits_passes import LogitGrads, TailStats
from npd.train.loss_targets import Support


class TritonPasses:
    """Both passes as kernels, with the contract of `LogitsPasses`."""

    def tail_stats(
        self, logits_CV: Tensor, head: Head, support: Support | None, inside_CK: Tensor
    ) -> TailStats:
        """One pass with a running maximum; masks the support in `logits_CV`."""
        if support is not None:
            # Missing entries repeat an id of their row, so duplicate writes agree.
            taken = logits_CV.gather(-1, support.ids_NK)
            logits_CV.scatter_(-1, support.ids_NK, torch.where(support.some_N1, -math.inf, taken))
        top, total, moment, _ = row_stats(
            logits_CV, inside_CK.dtype, bias_V=head.bias, scale=head.scale, softcap=head.softcap
        )
        is_some = ~(top <= NOTHING / 2) | total.isnan()
        safe = torch.where(is_some, total, 1.0)
        log_sum = torch.where(is_some, top + safe.log(), NOTHING)
        entropy = torch.where(is_some, safe.log() - moment / safe, 0.0)
        return TailStats(is_some, top, log_sum, entropy)

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
        """One pass writes the gradients of tail and labels; then the support's are added."""
        shared = constants(
            logits_CV, tail.top_C.dtype, bias_V=head.bias, scale=head.scale, softcap=head.softcap
        )
        grid = (len(logits_CV), triton.cdiv(logits_CV.shape[1], shared["BLOCK"]))
        rows = (tail.log_sum_C, slopes.tail_C, slopes.labels_C, slopes.label_C)
        with on(logits_CV.device):
            _write_grads[grid](logits_CV, *(row.contiguous() for row in rows), **shared)
        if support is not None:
            is_label = (support.ids_NK == slopes.labels_C[:, None]) & support.valid_NK
            inside = slopes.inside_CK + torch.where(is_label, slopes.label_C[:, None], 0.0)
            logits_CV.scatter_add_(-1, support.ids_NK, inside.to(logits_CV.dtype))
        if bias_V is not None:
            bias_V += logits_CV.sum(dim=0, dtype=bias_V.dtype)


@triton.jit
def _write_grads(
    logits,
    log_sums,
    outside,
    labels,
    label_slopes,
    bias,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NOTHING: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite a block's logits with their gradient; 0 in the support, else part of `outside`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value, in_tail = finished(
        logits, bias, row, columns, WIDTH, SCALE, SOFTCAP, HAS_BIAS, HAS_SOFTCAP, NOTHING, TYPE
    )
    log_sum = tl.load(log_sums + row)
    slope = tl.exp(value - log_sum) * tl.load(outside + row) * SCALE
    if HAS_SOFTCAP:
        level = tl.maximum(value / SOFTCAP, -1.0)  # masked logits are far below
        slope *= 1.0 - level * level
    slope += tl.where(columns == tl.load(labels + row), tl.load(label_slopes + row), 0.0)
    slope = tl.where(in_tail, slope, 0.0)
    tl.store(logits + row * WIDTH + columns, slope, mask=columns < WIDTH)
