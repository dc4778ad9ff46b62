"""Matrix products of half-precision factors whose result is float32, without rounding between.

`torch.mm` and `torch.addmm` take `out_dtype` on CUDA only, and only in some releases and on some
GPUs. Whether they do is asked once of each device, by a product of a few numbers. Elsewhere callers
have their own way. Not for code that torch.compile traces, which does not know the argument.

Dimensions: M rows, N columns, K summed over.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from npd.models.out_of_memory import is_out_of_memory

_HALF = (torch.bfloat16, torch.float16)
# The least side that every matmul kernel takes.
_SIDE = 16


def has_wide_products(factor: Tensor) -> bool:
    """Whether products of factors like this one can come out in float32."""
    if factor.dtype not in _HALF or torch.compiler.is_compiling():
        return False
    return factor.device.type == "cuda" and accepts(factor.device, factor.dtype)


@cache
def accepts(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's products take `out_dtype` there: both are tried once."""
    with torch.inference_mode(mode=False), torch.no_grad():
        factor = torch.zeros(_SIDE, _SIDE, device=device, dtype=dtype)
        total = torch.zeros(_SIDE, _SIDE, device=device)
        try:
            add_wide_product(total, factor, factor)
            return wide_product(factor, factor).dtype == torch.float32
        except (TypeError, RuntimeError) as error:  # no such argument, no such kernel
            if is_out_of_memory(error):
                raise
            return False


def wide_product(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """The float32 product [M, N]; only where `has_wide_products`."""
    return torch.mm(left_MK, right_KN, out_dtype=torch.float32)


def add_wide_product(total_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """Add the product to the float32 `total_MN`, in place; only where `has_wide_products`."""
    torch.addmm(total_MN, left_MK, right_KN, out_dtype=torch.float32, out=total_MN)
