"""The one attention function of packed rows: causal, and never across documents.

Promises: exact on every device, and loud where it cannot be: without boundaries, with a mask, or
for a model whose attention does more than it implements. Does not build boundaries or load models.

Dimensions: T tokens of a row, Hq and Hkv query and key-value heads, D head size.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npd.errors import ModelError

ATTENTION = "npd_packed"
"""The name it is registered under with transformers."""
_VARLEN = "torch.nn.attention.varlen"


class Shared(NamedTuple):
    """How documents that begin alike lie in a row: their beginning once, then what is their own.

    `take` [E] are the row's positions with each document laid out whole; `keep` [T] where in those
    E places the row's own tokens are found.
    """

    take: Tensor
    keep: Tensor


class Boundaries:
    """Where documents of a row begin and end, `cu_seqlens` (0, ..., T), as one thing.

    A tuple's length would be compiled in: with each number of documents torch.compile began anew.
    With `shared` they are the boundaries of documents laid out whole.
    """

    __slots__ = ("cu_seqlens", "shared")

    def __init__(self, cu_seqlens: tuple[int, ...], shared: Shared | None = None) -> None:
        self.cu_seqlens, self.shared = cu_seqlens, shared


@lru_cache(maxsize=1)
def registered_attention() -> Callable[..., Any]:
    """`packed_attention` for transformers, the same each time; torch.compile leaves it as it is."""
    disabled: Callable[..., Any] = torch.compiler.disable(packed_attention)  # type: ignore[no-untyped-call]
    return disabled


def check_rotation(config: Any, longest: int) -> None:
    """Refuse texts of `longest` tokens where a model rotates all of a batch by the longest one.

    Above its original length such a model (`longrope`, `dynamic`) changes the frequencies of
    every text that lies beside the long one.

    Raises:
        ModelError: as said.
    """
    for limit in _rotation_limits(config):
        if longest > limit:
            raise ModelError(
                f"a text of {longest} tokens is longer than the {limit} up to which this model's "
                "rotary positions do not depend on the texts beside it: lower "
                "data.max_prompt_tokens or generate.max_new_tokens"
            )


def _rotation_limits(config: Any) -> Iterator[int]:
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # One set, or one for each type of layer.
    for rope in [found, *(part for part in found.values() if isinstance(part, Mapping))]:
        if rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic"):
            name = "original_max_position_embeddings"
            yield rope.get(name) or getattr(config, name, None) or config.max_position_embeddings


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document: query [1, Hq, T, D], key and value [1, Hkv, T, D].

    Variable-length kernels on CUDA (half precision, where torch has them), one SDPA call a document
    elsewhere. Raises when the boundaries are missing, so that documents cannot mix silently.
    """
    bounds: Boundaries | None = kwargs.get("cu_seqlens")
    window = kwargs.get("sliding_window")
    assert bounds is not None, "packed attention was called without document boundaries"
    cu_seqlens = bounds.cu_seqlens
    assert attention_mask is None, "packed attention builds no mask and takes none"
    for feature in ("softcap", "s_aux"):
        if kwargs.get(feature) is not None:
            raise ModelError(
                f"this model's attention uses {feature} (logit capping or sinks), which packed "
                "attention does not apply: choose a model without it"
            )
    longest = max(end - start for start, end in pairwise(cu_seqlens))
    check_rotation(getattr(module, "config", None), longest)
    if window is not None and longest > window:
        raise ModelError(
            f"a document of {longest} tokens is longer than the model's sliding window ({window}), "
            "which packed attention does not apply: lower data.max_prompt_tokens or "
            "generate.max_new_tokens"
        )
    if bounds.shared is not None:
        # Attention alone sees documents whole, and its rows of a shared beginning come out alike:
        # what is saved is everything else, by far the most of the work at such lengths.
        query, key, value = (x.index_select(2, bounds.shared.take) for x in (query, key, value))
    out = _within_documents(query, key, value, cu_seqlens, longest, scaling, dropout)
    return out if bounds.shared is None else out.index_select(1, bounds.shared.keep), None


def _within_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: tuple[int, ...],
    longest: int,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    query, key, value = _narrowed(query, key, value)
    kernel = kernel_for(query.device)
    if kernel is not None and query.dtype != torch.float32:
        return _varlen(kernel, query, key, value, cu_seqlens, longest, scaling)
    outputs = [
        F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, end in pairwise(cu_seqlens)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def kernel_for(device: torch.device) -> Callable[..., Any] | None:
    """The variable-length attention for half precision on `device`; None where documents are
    taken one by one."""
    return varlen_kernel() if device.type == "cuda" else None


def _narrowed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In autocast's type, where it is on: rotary positions of float32 weights give float32 back.

    SDPA would do the same, for every document; variable-length kernels know nothing of autocast.
    """
    kind = tensors[0].device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) for tensor in tensors)


@lru_cache(maxsize=4)
def varlen_kernel(module: str = _VARLEN) -> Callable[..., Any] | None:
    """torch's variable-length attention; None where it is missing or cannot be causal our way.

    The first releases that have it take `is_causal` and no `window_size` or `scale`.
    """
    try:
        kernel: Callable[..., Any] = importlib.import_module(module).varlen_attn
    except (ImportError, AttributeError):
        return None
    return kernel if {"window_size", "scale"} <= set(inspect.signature(kernel).parameters) else None


def _varlen(
    kernel: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: tuple[int, ...],
    longest: int,
    scaling: float | None,
) -> Tensor:
    bounds = _on_device(cu_seqlens, str(query.device))
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    repeats = q.shape[1] // k.shape[1]
    options: dict[str, Any] = {}
    if repeats > 1 and _shares_heads(kernel):
        options["enable_gqa"] = True
    elif repeats > 1:  # releases before it has this option
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    # window_size is (left, right); the default (-1, -1) is not causal.
    options |= {"scale": scaling, "window_size": (-1, 0)}
    out = kernel(q, k, v, bounds, bounds, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out[None]


@lru_cache(maxsize=4)
def _shares_heads(kernel: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(kernel).parameters


@lru_cache(maxsize=4)
def _on_device(cu_seqlens: tuple[int, ...], device: str) -> Tensor:
    # Every layer of a forward pass asks for the same boundaries; one copy to the device serves all.
    # From pageable memory the copy would wait until the device has done all it was asked before.
    # What is made in inference mode, as by an evaluation, could not be used in training after it.
    with torch.inference_mode(False):
        bounds = torch.tensor(cu_seqlens, dtype=torch.int32, pin_memory=device.startswith("cuda"))
        return bounds.to(device, non_blocking=True)
