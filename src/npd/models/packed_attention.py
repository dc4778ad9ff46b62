"""The attention function of packed rows: causal within each document, never across documents.

Promises exact results on every device, including layers with windows. Raises an error without
document boundaries, with a mask from other code, and for attention features that it does not
implement. Does not build boundaries or load models.

Dimensions: T tokens of a row, Hq and Hkv query and key-value heads, D head size.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, lru_cache
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npd.errors import ModelError
from npd.models.device import CPU, CUDA, capability, is_pinnable, kind_of

ATTENTION = "npd_packed"
"""The name of the packed attention in transformers."""
WINDOWED = "npd_packed_windowed"
"""The name for models with windows, for which transformers passes the window in place of a mask."""
_VARLEN = "torch.nn.attention.varlen"
# What torch's kernel, FlashAttention-2, can do: types, head sizes, GPUs from Ampere on; and what of
# its arguments causal attention needs. They came with torch 2.11, and `enable_gqa` with 2.12.
_HALF = (torch.float16, torch.bfloat16)
_LARGEST_HEAD, _HEAD_MULTIPLE, _LEAST_CAPABILITY = 256, 8, (8, 0)
_NEEDED_OPTIONS = frozenset({"window_size", "scale"})
# Optional arguments of transformers' layers besides scale and mask.
_NOT_PLAIN = {
    "softcap": "attention scores that are capped (softcap)",
    "s_aux": "attention sinks (s_aux)",
    "position_bias": "an attention bias by position (position_bias)",
}


_log = logging.getLogger(__name__)


class UnsupportedAttentionError(ModelError):
    """A layer's attention has unsupported features; callers prepend the subject."""


class Shared(NamedTuple):
    """The layout of documents with a shared prefix: the prefix once, then each document's rest.

    `take` [E] are the row's positions with each document expanded; `keep` [T] are the positions of
    the row's own tokens in that expansion.
    """

    take: Tensor
    keep: Tensor


class Boundaries:
    """The boundaries of a row's documents, `cu_seqlens` (0, ..., T), as one opaque object.

    torch.compile would specialise on a tuple's length and recompile for each number of documents.
    With `shared` they are the boundaries of the expanded documents.
    """

    __slots__ = ("cu_seqlens", "shared")

    def __init__(self, cu_seqlens: tuple[int, ...], shared: Shared | None = None) -> None:
        self.cu_seqlens, self.shared = cu_seqlens, shared


class Window(NamedTuple):
    """A layer's attention window in tokens of the document, the token itself included.

    A sliding window holds the last `size` tokens. With chunks, a token sees its own chunk only.
    """

    size: int
    is_chunked: bool = False


# Not an argument of the model, because some architectures do not pass it on to every layer, and
# others to functions that have an argument of that name.
_ROW: ContextVar[Boundaries | None] = ContextVar("npd_row", default=None)


@contextmanager
def row_of(bounds: Boundaries | None) -> Iterator[None]:
    """Run a packed model on a row with these boundaries within the block, in this thread."""
    token = _ROW.set(bounds)
    try:
        yield
    finally:
        _ROW.reset(token)


def row_boundaries() -> Boundaries | None:
    """The boundaries of the row that a packed model runs on; None outside `row_of`."""
    return _ROW.get()


def same_row() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a checkpointed forward pass and of its recomputation, which need one row.

    For `context_fn` of `torch.utils.checkpoint`. Autograd may recompute in another thread.
    """
    return nullcontext(), row_of(_ROW.get())


@lru_cache(maxsize=1)
def registered_attention() -> Callable[..., Any]:
    """`packed_attention` of the current row for transformers, excluded from torch.compile."""

    def of_row(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return packed_attention(*args, **kwargs | {"cu_seqlens": row_boundaries()})

    disabled: Callable[..., Any] = torch.compiler.disable(of_row)  # type: ignore[no-untyped-call]
    return disabled


class Request(NamedTuple):
    """What decides how a layer's attention is computed. `has_window`: it cuts a document."""

    device: str
    dtype: torch.dtype
    head_size: int
    value_size: int
    has_window: bool = False
    has_dropout: bool = False


class Ability(NamedTuple):
    """What a device and this torch have: the compute capability of one of NVIDIA's GPUs (None of
    other devices), and the options of torch's variable-length attention (none: there is no such).
    """

    capability: tuple[int, int] | None
    options: frozenset[str] = frozenset()


class Choice(NamedTuple):
    """One variable-length kernel for all documents, or one SDPA call for each, and `why`.

    `shares_heads`: several query heads may have one key head, without a copy for each.
    """

    is_varlen: bool
    shares_heads: bool
    why: str | None = None


class Kernel(NamedTuple):
    """A `Choice` and its kernel; None is SDPA."""

    varlen: Callable[..., Any] | None
    shares_heads: bool


def window_of(*, config: Any, local_size: int | None = None, **_: Any) -> Window | None:
    """The mask function for transformers: a layer type's window; None is causal attention."""
    if local_size is None:
        return None
    is_chunked = local_size == getattr(config, "attention_chunk_size", None) and (
        local_size != getattr(config, "sliding_window", None)
    )
    return Window(local_size, is_chunked)


def check_rotation(config: Any, longest: int) -> None:
    """Refuse texts of `longest` tokens if the model's rotary frequencies depend on the batch.

    Such a model (`longrope`, `dynamic`) changes the frequencies of all texts in a batch when one
    exceeds its original length.

    Raises:
        ModelError: the frequencies depend on the batch, and `longest` exceeds the original length.
    """
    for limit in _rotation_limits(config):
        if longest > limit:
            raise ModelError(
                f"a text of {longest} tokens exceeds the model's original context of {limit}, "
                "beyond which its rotary positions depend on other texts in the batch: lower "
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
    attention_mask: Window | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document: query [1, Hq, T, D], key and value [1, Hkv, T, D].

    `attention_mask` is a result of `window_of`. A model that builds no masks passes its window as
    `sliding_window`.

    Uses variable-length kernels where they can do it (see `choose`), and one SDPA call for each
    document elsewhere. Raises if the boundaries are missing, so documents never mix silently.
    """
    bounds: Boundaries | None = kwargs.get("cu_seqlens")
    assert bounds is not None, "packed attention was called without document boundaries"
    assert attention_mask is None or isinstance(attention_mask, Window), (
        "packed attention builds no mask and takes none"
    )
    check_plain(kwargs)
    window = attention_mask
    if window is None and kwargs.get("sliding_window"):
        window = Window(kwargs["sliding_window"])
    cu_seqlens = bounds.cu_seqlens
    check_rotation(getattr(module, "config", None), _longest(cu_seqlens))
    if bounds.shared is not None:
        # Only attention works on expanded documents; its results for a shared prefix are equal. All
        # other work, which dominates at such lengths, is done once per shared token.
        query, key, value = (x.index_select(2, bounds.shared.take) for x in (query, key, value))
    out = _within_documents(query, key, value, cu_seqlens, window, scaling, dropout)
    return out if bounds.shared is None else out.index_select(1, bounds.shared.keep), None


def check_plain(options: Mapping[str, Any]) -> None:
    """Check the arguments that a layer passes to its attention.

    Raises:
        UnsupportedAttentionError: the layer needs more than scale and mask.
    """
    for feature, what in _NOT_PLAIN.items():
        if options.get(feature) is not None:
            raise UnsupportedAttentionError(f"has {what}, which npd does not apply")


def _longest(cu_seqlens: tuple[int, ...]) -> int:
    return max(end - start for start, end in pairwise(cu_seqlens))


def _within_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: tuple[int, ...],
    window: Window | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    query, key, value = _narrowed(query, key, value)
    if window is not None and window.is_chunked:
        cu_seqlens, window = _chunks(cu_seqlens, window.size), None
    is_cut = window is not None and _longest(cu_seqlens) > window.size
    sizes = query.shape[-1], value.shape[-1]
    kernel = kernel_for(Request(str(query.device), query.dtype, *sizes, is_cut, dropout > 0))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and not kernel.shares_heads:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    if kernel.varlen is not None:
        return _varlen(kernel.varlen, query, key, value, cu_seqlens, window, scaling)
    outputs = []
    for start, end in pairwise(cu_seqlens):
        band = _band(end - start, window, query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=band,
                dropout_p=dropout,
                is_causal=band is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    # Contiguous, like transformers' own functions: some models view it in another shape.
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _chunks(cu_seqlens: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Boundaries of the documents' chunks, so that chunked attention is attention within these."""
    starts = (range(start, end, size) for start, end in pairwise(cu_seqlens))
    return (*chain.from_iterable(starts), cu_seqlens[-1])


def _band(length: int, window: Window | None, device: torch.device) -> Tensor | None:
    """The mask [L, L] of a document's window; None for plain causal attention."""
    if window is None or length <= window.size:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window.size)


@lru_cache(maxsize=64)
def kernel_for(request: Request) -> Kernel:
    """The kernel for a request here; a reason against the fast one is logged once.

    Not for float32, which the user chose.
    """
    varlen = varlen_kernel()
    options = frozenset() if varlen is None else frozenset(inspect.signature(varlen).parameters)
    choice = choose(request, Ability(capability(request.device), options))
    if choice.why is not None and request.dtype != torch.float32:
        _warn(choice.why)
    return Kernel(varlen if choice.is_varlen else None, choice.shares_heads)


@cache
def _warn(why: str) -> None:
    _log.warning("attention is computed document by document, which is slower: %s", why)


def choose(request: Request, ability: Ability) -> Choice:
    """How attention is computed, by what the kernels can do.

    Capped scores, sinks and position biases are refused before (`check_plain`).

    >>> a100 = Ability((8, 0), frozenset({"window_size", "scale", "enable_gqa"}))
    >>> choose(Request("cuda:0", torch.bfloat16, 128, 128), a100)
    Choice(is_varlen=True, shares_heads=True, why=None)
    """
    if kind_of(request.device) == CPU:
        return Choice(is_varlen=False, shares_heads=True)
    why = _why_not_varlen(request, ability)
    if why is None:
        return Choice(is_varlen=True, shares_heads="enable_gqa" in ability.options)
    # Of SDPA's kernels only flash attention shares heads. The one that is next best does not, and
    # the plain one that does holds all scores at once.
    is_flash = (
        (ability.capability or (0, 0)) >= _LEAST_CAPABILITY
        and request.dtype in _HALF
        and request.head_size == request.value_size <= _LARGEST_HEAD
        and not request.has_window
    )
    return Choice(is_varlen=False, shares_heads=is_flash, why=why)


def _why_not_varlen(request: Request, ability: Ability) -> str | None:
    kind, size, width = kind_of(request.device), request.head_size, request.value_size
    if kind != CUDA or ability.capability is None:
        return f"torch's variable-length kernel was tried on NVIDIA's GPUs only, not on this {kind}"
    if ability.capability < _LEAST_CAPABILITY:
        found, least = (".".join(map(str, c)) for c in (ability.capability, _LEAST_CAPABILITY))
        return f"the GPU has compute capability {found}, and the kernel needs {least}"
    if not ability.options >= _NEEDED_OPTIONS:
        return f"torch {torch.__version__} has no variable-length kernel with windows, 2.11 has"
    if request.dtype not in _HALF:
        return f"the kernel has no {request.dtype}"
    if request.has_dropout:
        return "the model has attention dropout, and the kernel has none"
    if size > _LARGEST_HEAD or size % _HEAD_MULTIPLE:
        return f"heads have {size} values, and the kernel takes multiples of 8 up to 256"
    # Narrower values are padded, as DeepSeek's.
    return f"values are wider ({width}) than keys ({size})" if width > size else None


def _narrowed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's type if it is on: rotary embeddings of float32 weights return float32.

    SDPA would do the same for every document; variable-length kernels ignore autocast.
    """
    kind = tensors[0].device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) for tensor in tensors)


@lru_cache(maxsize=4)
def varlen_kernel(module: str = _VARLEN) -> Callable[..., Any] | None:
    """torch's variable-length attention; None if it is missing or has no suitable causal option.

    The first releases that have it take `is_causal` and no `window_size` or `scale`.
    """
    try:
        kernel: Callable[..., Any] = importlib.import_module(module).varlen_attn
    except (ImportError, AttributeError):
        return None
    return kernel if set(inspect.signature(kernel).parameters) >= _NEEDED_OPTIONS else None


def _varlen(
    kernel: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: tuple[int, ...],
    window: Window | None,
    scaling: float | None,
) -> Tensor:
    longest = _longest(cu_seqlens)
    bounds = _on_device(cu_seqlens, str(query.device))
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    options: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    # window_size is how many tokens to the left and to the right are seen beside the token itself,
    # -1 for all; the default (-1, -1) is not causal.
    left = -1 if window is None or longest <= window.size else window.size - 1
    options |= {"scale": scaling, "window_size": (left, 0)}
    # Kernels need values as wide as keys; DeepSeek's are narrower.
    width, more = v.shape[-1], q.shape[-1] - v.shape[-1]
    v = F.pad(v, (0, more)) if more > 0 else v
    out = kernel(q, k, v, bounds, bounds, longest, longest, **options)[..., :width]
    assert isinstance(out, Tensor)
    return out[None]


@lru_cache(maxsize=4)
def _on_device(cu_seqlens: tuple[int, ...], device: str) -> Tensor:
    # All layers of a forward pass use the same boundaries, so one copy to the device serves all.
    # From pageable memory the copy would wait until the device has finished earlier work. A tensor
    # made in inference mode, as by an evaluation, could not be used in training afterwards.
    with torch.inference_mode(False):
        bounds = torch.tensor(cu_seqlens, dtype=torch.int32, pin_memory=is_pinnable(device))
        return bounds.to(device, non_blocking=True)
