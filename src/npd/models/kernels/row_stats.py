"""Statistics of rows of logits by a Triton kernel that reads them once.

For the loss: the maximum, and what log-sum-exp and entropy follow from. For the scorer also the
maxima of groups of columns, in which a top-k is found. Logits of -inf are masked: they count in
nothing. Tested on CPU with Triton's interpreter (`TRITON_INTERPRET=1`). Imports triton as it is
imported, because kernels are decorated functions: import it inside a function and expect an
ImportError.

Dimensions: C rows, V columns, G groups of columns.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from npd.models.kernels import NOTHING

# Logits that a program holds at a time, and its warps.
_BLOCK, _WARPS = 4096, 8
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class RowStats(NamedTuple):
    """Of each row: the maximum, sum of e^(z - max), sum of e^(z - max) (z - max), group maxima."""

    top_C: Tensor
    total_C: Tensor
    moment_C: Tensor
    maxima_CG: Tensor | None

    @property
    def log_sum_C(self) -> Tensor:
        """Log-sum-exp, -inf for a row that is masked as a whole."""
        return self.top_C + self.total_C.log()


def can_run(device: torch.device) -> bool:
    """Whether kernels can run on tensors of `device`: on CUDA, or anywhere when interpreted."""
    return device.type == "cuda" or bool(triton.knobs.runtime.interpret)


def row_stats(
    logits_CV: Tensor,
    dtype: torch.dtype,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    group: int = 0,
) -> RowStats:
    """The statistics in `dtype` of softcap(scale * (logits + bias)).

    With `group`, a power of two, also the maxima of so many columns at a time, the last of which
    may be fewer; masked ones are NOTHING. None if a row is shorter than half a group.
    """
    options = constants(logits_CV, dtype, bias_V=bias_V, scale=scale, softcap=softcap)
    has_maxima = 0 < group <= options["BLOCK"]
    top, total, moment = (logits_CV.new_empty(len(logits_CV), dtype=dtype) for _ in range(3))
    groups = triton.cdiv(logits_CV.shape[1], group) if has_maxima else 0
    maxima = logits_CV.new_empty((len(logits_CV), groups), dtype=dtype)
    with on(logits_CV.device):
        _row_stats[(len(logits_CV),)](
            logits_CV, top, total, moment, maxima, **options,
            GROUP=group if has_maxima else 1, HAS_MAXIMA=has_maxima,
        )  # fmt: skip
    return RowStats(top, total, moment, maxima if has_maxima else None)


def on(device: torch.device) -> Any:
    """Make the tensors' device current, because kernels launch on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def constants(
    logits_CV: Tensor,
    dtype: torch.dtype,
    *,
    bias_V: Tensor | None,
    scale: float,
    softcap: float | None,
) -> dict[str, Any]:
    """The arguments by which kernels finish logits, and their block of columns."""
    assert logits_CV.is_contiguous()
    width = logits_CV.shape[1]
    return {
        "bias": logits_CV if bias_V is None else bias_V.contiguous(),
        "WIDTH": width,
        "SCALE": scale,
        "SOFTCAP": softcap or 1.0,
        "HAS_BIAS": bias_V is not None,
        "HAS_SOFTCAP": softcap is not None,
        "NOTHING": NOTHING,
        "TYPE": _TYPES[dtype],
        "BLOCK": min(_BLOCK, triton.next_power_of_2(width)),
        "num_warps": _WARPS,
    }


@triton.jit
def finished(
    logits, bias, row, columns, WIDTH, SCALE, SOFTCAP, HAS_BIAS, HAS_SOFTCAP, NOTHING, TYPE
):
    """A block's finished logits, and a mask of those that are not masked."""
    there = columns < WIDTH
    value = tl.load(logits + row * WIDTH + columns, mask=there, other=float("-inf")).to(TYPE)
    is_some = value != float("-inf")
    if HAS_BIAS:
        value += tl.load(bias + columns, mask=there, other=0.0).to(TYPE)
    value *= SCALE
    if HAS_SOFTCAP:
        decay = tl.exp(-2.0 * tl.abs(value / SOFTCAP))  # tanh without overflow
        value = tl.where(value < 0.0, -SOFTCAP, SOFTCAP) * (1.0 - decay) / (1.0 + decay)
    return tl.where(is_some, value, NOTHING), is_some


@triton.jit
def _row_stats(
    logits,
    top_out,
    total_out,
    moment_out,
    maxima_out,
    bias,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NOTHING: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MAXIMA: tl.constexpr,
):
    """One row, with a running maximum."""
    row = tl.program_id(0).to(tl.int64)
    zero = tl.zeros((), dtype=TYPE)
    top, total, moment = zero + NOTHING, zero, zero
    for start in range(0, WIDTH, BLOCK):
        value, is_some = finished(
            logits, bias, row, start + tl.arange(0, BLOCK), WIDTH, SCALE, SOFTCAP,
            HAS_BIAS, HAS_SOFTCAP, NOTHING, TYPE,
        )  # fmt: skip
        if HAS_MAXIMA:
            groups = (WIDTH + GROUP - 1) // GROUP
            place = start // GROUP + tl.arange(0, BLOCK // GROUP)
            highest = tl.max(tl.reshape(value, (BLOCK // GROUP, GROUP)), axis=1)
            tl.store(maxima_out + row * groups + place, highest, mask=place < groups)
            block_top = tl.max(highest, axis=0)
        else:
            block_top = tl.max(value, axis=0)
        new_top = tl.maximum(top, block_top)
        shrunk = tl.exp(top - new_top)
        moment = shrunk * (moment + total * (top - new_top))
        exps = tl.where(is_some, tl.exp(value - new_top), 0.0)
        total = shrunk * total + tl.sum(exps, axis=0)
        moment += tl.sum(tl.where(is_some, exps * (value - new_top), 0.0), axis=0)
        top = new_top
    tl.store(top_out + row, top)
    tl.store(total_out + row, total)
    tl.store(moment_out + row, moment)
