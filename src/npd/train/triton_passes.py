"""The two passes over a chunk's logits as Triton kernels; each reads the chunk once.

Same contract as `npd.train.logits_passes.TorchPasses`. Matmuls, buckets, targets, divergences and
metrics stay with the chunked loss. The logits of support ids are set to -inf, which the kernels
treat as masked. Tested on CPU against the other implementations with Triton's interpreter
(`TRITON_INTERPRET=1`). The only module that imports triton, and at import, because kernels are
decorated functions: import it inside a function and expect an ImportError.

Dimensions: C tokens of a chunk, V vocabulary, K support size.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from npd.models.lm_head import Head
from npd.train.logits_passes import LogitGrads, TailStats
from npd.train.loss_targets import NOTHING, Support

# Logits that a program holds at a time, and its warps.
_BLOCK, _WARPS = 4096, 8
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def can_run(device: torch.device) -> bool:
    """Whether kernels can run on tensors of `device`: on CUDA, or anywhere when interpreted."""
    return device.type == "cuda" or bool(triton.knobs.runtime.interpret)


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
        top, total, moment = (inside_CK.new_empty(len(logits_CV)) for _ in range(3))
        with _on(logits_CV.device):
            _tail_stats[(len(logits_CV),)](
                logits_CV, top, total, moment, **_shared(logits_CV, head, top.dtype)
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
        shared = _shared(logits_CV, head, tail.top_C.dtype)
        grid = (len(logits_CV), triton.cdiv(logits_CV.shape[1], shared["BLOCK"]))
        rows = (tail.log_sum_C, slopes.tail_C, slopes.labels_C, slopes.label_C)
        with _on(logits_CV.device):
            _write_grads[grid](logits_CV, *(row.contiguous() for row in rows), **shared)
        if support is not None:
            is_label = (support.ids_NK == slopes.labels_C[:, None]) & support.valid_NK
            inside = slopes.inside_CK + torch.where(is_label, slopes.label_C[:, None], 0.0)
            logits_CV.scatter_add_(-1, support.ids_NK, inside.to(logits_CV.dtype))
        if bias_V is not None:
            bias_V += logits_CV.sum(dim=0, dtype=bias_V.dtype)


def _on(device: torch.device) -> Any:
    """Make the tensors' device current, because kernels launch on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _shared(logits_CV: Tensor, head: Head, dtype: torch.dtype) -> dict[str, Any]:
    assert logits_CV.is_contiguous()
    width = logits_CV.shape[1]
    return {
        "bias": logits_CV if head.bias is None else head.bias.contiguous(),
        "WIDTH": width,
        "SCALE": head.scale,
        "SOFTCAP": head.softcap or 1.0,
        "HAS_BIAS": head.bias is not None,
        "HAS_SOFTCAP": head.softcap is not None,
        "NOTHING": NOTHING,
        "TYPE": _TYPES[dtype],
        "BLOCK": min(_BLOCK, triton.next_power_of_2(width)),
        "num_warps": _WARPS,
    }


@triton.jit
def _finished(
    logits, bias, row, columns, WIDTH, SCALE, SOFTCAP, HAS_BIAS, HAS_SOFTCAP, NOTHING, TYPE
):
    """A block's finished logits, and a mask of those outside the support."""
    there = columns < WIDTH
    value = tl.load(logits + row * WIDTH + columns, mask=there, other=float("-inf")).to(TYPE)
    in_tail = value != float("-inf")
    if HAS_BIAS:
        value += tl.load(bias + columns, mask=there, other=0.0).to(TYPE)
    value *= SCALE
    if HAS_SOFTCAP:
        decay = tl.exp(-2.0 * tl.abs(value / SOFTCAP))  # tanh without overflow
        value = tl.where(value < 0.0, -SOFTCAP, SOFTCAP) * (1.0 - decay) / (1.0 + decay)
    return tl.where(in_tail, value, NOTHING), in_tail


@triton.jit
def _tail_stats(
    logits,
    top_out,
    total_out,
    moment_out,
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
    """A row's maximum, sum of e^(z - max) and sum of e^(z - max) (z - max), outside the support."""
    row = tl.program_id(0).to(tl.int64)
    zero = tl.zeros((), dtype=TYPE)
    top, total, moment = zero + NOTHING, zero, zero
    for start in range(0, WIDTH, BLOCK):
        value, in_tail = _finished(
            logits, bias, row, start + tl.arange(0, BLOCK), WIDTH, SCALE, SOFTCAP,
            HAS_BIAS, HAS_SOFTCAP, NOTHING, TYPE,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(value, axis=0))
        shrunk = tl.exp(top - new_top)
        moment = shrunk * (moment + total * (top - new_top))
        exps = tl.where(in_tail, tl.exp(value - new_top), 0.0)
        total = shrunk * total + tl.sum(exps, axis=0)
        moment += tl.sum(tl.where(in_tail, exps * (value - new_top), 0.0), axis=0)
        top = new_top
    tl.store(top_out + row, top)
    tl.store(total_out + row, total)
    tl.store(moment_out + row, moment)


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
    value, in_tail = _finished(
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
