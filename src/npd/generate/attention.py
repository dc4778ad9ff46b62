"""Attention for decoding: query heads that share keys go through SDPA as one longer query.

Promises: the numbers of transformers' own SDPA path (to float noise), without copying each key for
every query head that reads it, which halves a decode step on CPU. Everything but the one-token step
of grouped-query models is left to transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ATTENTION = "npd_decode"


@contextmanager
def decode_attention(model: Any) -> Iterator[None]:
    """Decode with `model` in here, whatever attention it was loaded with (also the packed one)."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    before = model.config._attn_implementation
    # Eager is only ever somebody's choice, or all that the architecture can do.
    if before == "eager":
        yield
        return
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.set_attn_implementation(_ATTENTION)
    try:
        with without_cudnn_attention():
            yield
    finally:
        model.set_attn_implementation(before)


class _Blocks:
    """How many blocks are open, in all threads, and whether cuDNN was allowed before the first."""

    lock, count, was_on = Lock(), 0, True


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """SDPA without cuDNN, in the whole process, until the last such block of any thread ends.

    Newer GPUs prefer cuDNN, which plans anew for each shape; in decoding every token is one. The
    other kernels take any length.
    """
    cuda = torch.backends.cuda
    with _Blocks.lock:
        if _Blocks.count == 0:
            _Blocks.was_on = cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
            cuda.enable_cudnn_sdp(False)
        _Blocks.count += 1
    try:
        yield
    finally:
        with _Blocks.lock:
            _Blocks.count -= 1
            if _Blocks.count == 0:
                cuda.enable_cudnn_sdp(_Blocks.was_on)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Query [B, Hq, Q, D], key, value [B, Hkv, T, D], mask [B, 1, Q, T] or None: [B, Q, Hq, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    num_rows, num_heads, num_queries, size = query.shape
    num_shared = key.shape[1]
    if num_queries > 1 or num_shared == num_heads or kwargs.get("position_bias") is not None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    grouped = query.reshape(num_rows, num_shared, num_heads // num_shared, size)
    out = F.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(num_rows, 1, num_heads, value.shape[-1]), None
