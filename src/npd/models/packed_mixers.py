"""Recurrent and convolutional token mixers of packed rows: each document is mixed by itself.

Promises: a mixer of a packed model (Mamba, gated delta net, short convolution, RG-LRU) is called
on the documents of a row, one by one or in batches, so that no state crosses a boundary. Raises an
error without document boundaries. Decoding and the architecture's own code are unchanged. Does not
change attention, which `npd.models.packed_attention` does.

Dimensions: T tokens of a row, n documents of a batch, L length of its longest document.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from npd.models.device import CPU, on_device
from npd.models.packed_attention import Boundaries, row_boundaries

# The names of a layer's cache in the architectures and releases of transformers.
_CACHES = {"past_key_values", "past_key_value", "layer_past", "cache_params", "cache", "state"}
# On a GPU a document shares a batch with longer ones of at most this multiple of its length: less
# than half of it is padding, and few batches launch few kernels. On a CPU one document at a time is
# faster (Mamba's backward pass 10 times).
_MOST_PADDED = 2


class _Layout(NamedTuple):
    """A row's documents as padded batches.

    `batches` are index tensors [n, L] into the row; padding repeats a document's last token. `back`
    [T] are the places of the row's tokens in the concatenation of the flattened batches.
    """

    batches: tuple[Tensor, ...]
    back: Tensor


_IS_UNPACKED: ContextVar[bool] = ContextVar("npd_unpacked", default=False)


@contextmanager
def unpacked_mixers() -> Iterator[None]:
    """Let the mixers of packed models take whatever they are given within the block."""
    token = _IS_UNPACKED.set(True)
    try:
        yield
    finally:
        _IS_UNPACKED.reset(token)


def pack_mixers(model: Any) -> None:
    """Let the mixers of `model` keep documents apart while it runs packed rows."""
    for mixer in mixers_of(model):
        # Another class, as FSDP does it, and no other method: copies of the model have it too.
        mixer.__class__ = _packed(own_class(mixer))


def mixers_of(model: nn.Module) -> list[Any]:
    """The token mixers of `model` that are not attention.

    A token mixer takes a cache or owns a convolution. What contains one is a layer, and so are its
    class's other instances.
    """
    able = {name: module for name, module in model.named_modules() if name and _can_mix(module)}
    outer = {name[:i] for name in able for i, letter in enumerate(name) if letter == "."}
    layers = {type(module) for name, module in able.items() if name in outer}
    return [m for m in able.values() if type(m) not in layers and not _is_attention(m)]


def own_class(mixer: nn.Module) -> Any:
    """The architecture's own class of a mixer, packed or not."""
    kinds = type(mixer).__mro__
    return kinds[kinds.index(_PackedMixer) + 1] if _PackedMixer in kinds else kinds[0]


def _can_mix(module: nn.Module) -> bool:
    known = inspect.signature(own_class(module).forward).parameters
    owns_convolution = any(isinstance(child, nn.Conv1d) for child in module.children())
    return owns_convolution or not _CACHES.isdisjoint(known)


def _is_attention(module: nn.Module) -> bool:
    """Whether the module's own code looks up the registered attention, or keeps keys in a cache."""
    forward: Any = inspect.unwrap(own_class(module).forward)
    return not {"ALL_ATTENTION_FUNCTIONS", "update"}.isdisjoint(forward.__code__.co_names)


class _PackedMixer:
    """The part of a packed mixer's class that precedes the architecture's own class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The own forward: of each batch of documents in a packed row, unchanged elsewhere."""
        own: Callable[..., Any] = super().forward  # type: ignore[misc]
        bounds = None if _IS_UNPACKED.get() else row_boundaries()
        assert bounds or _IS_UNPACKED.get(), "packed mixer was called without document boundaries"
        if bounds is None or (bounds.shared is None and len(bounds.cu_seqlens) == 2):
            return own(*args, **kwargs)
        device = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).device
        most_padded = 1 if device.type == CPU else _MOST_PADDED
        return _by_document(own, _layout(bounds, str(device), most_padded), args, kwargs)


@lru_cache(maxsize=64)
def _packed(own: type) -> type:
    """The class of packed mixers of class `own`; its name stays."""
    made = type(own.__name__, (_PackedMixer, own), {})
    # The number of batches and their shapes differ from row to row.
    made.forward = torch.compiler.disable(made.forward)  # type: ignore[attr-defined,no-untyped-call]
    return made


def _by_document(
    own: Callable[..., Any], layout: _Layout, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    length = len(layout.back)
    outputs = []
    for index in layout.batches:
        batch = [_documents(x, length, index) for x in args]
        named = {name: _documents(x, length, index) for name, x in kwargs.items()}
        outputs.append(_only_rows(own(*batch, **named), index.shape))
    return _row(outputs, layout.back)


def _documents(value: Any, length: int, index: Tensor) -> Any:
    """The documents at `index` [n, L] of each tensor [1, T, ...] in `value`; the rest unchanged."""
    if isinstance(value, tuple | list):
        return tuple(_documents(part, length, index) for part in value)
    if isinstance(value, Tensor) and value.shape[:2] == (1, length):
        return value[0].index_select(0, index.flatten()).reshape(*index.shape, *value.shape[2:])
    return value


def _only_rows(value: Any, shape: torch.Size) -> Any:
    """`value` without what is not a tensor [n, L, ...], such as the last state."""
    if isinstance(value, tuple | list):
        return tuple(_only_rows(part, shape) for part in value)
    return value if isinstance(value, Tensor) and value.shape[:2] == shape else None


def _row(outputs: Sequence[Any], back: Tensor) -> Any:
    """A tensor [1, T, ...] of the outputs [n, L, ...] of all batches; for tuples, a tuple."""
    if isinstance(outputs[0], tuple):
        return tuple(_row(parts, back) for parts in zip(*outputs, strict=True))
    if any(output is None for output in outputs):
        return None
    return torch.cat([output.flatten(0, 1) for output in outputs]).index_select(0, back)[None]


@lru_cache(maxsize=4)
def _layout(bounds: Boundaries, device: str, most_padded: int) -> _Layout:
    # All mixers of a forward pass, and of its recomputation, have the same boundaries.
    indices: list[NDArray[Any]] = []
    back, used = np.empty(bounds.cu_seqlens[-1], dtype=np.int64), 0
    for batch in _batches(bounds.cu_seqlens, most_padded):
        starts, ends = np.array(batch).T[..., None]
        places = starts + np.arange(int((ends - starts).max()))
        back[places[places < ends]] = used + np.flatnonzero(places < ends)
        used += places.size
        indices.append(np.minimum(places, ends - 1))
    # A tensor made in inference mode could not be used in training.
    with torch.inference_mode(False):
        batches = tuple(on_device(torch.from_numpy(index), device) for index in indices)
        into = on_device(torch.from_numpy(back), device)
        if bounds.shared is None:
            return _Layout(batches, into)
        take, keep = bounds.shared
        return _Layout(tuple(take[index] for index in batches), into[keep])


def _batches(cu_seqlens: Sequence[int], most_padded: int) -> list[list[tuple[int, int]]]:
    """The documents (first token, end) in batches, longest first; with `most_padded` 1 one by one.

    The longest of a batch has at most `most_padded` times the tokens of each.
    """
    spans = list(pairwise(cu_seqlens))
    if most_padded == 1:
        return [[span] for span in spans]
    batches: list[list[tuple[int, int]]] = []
    longest = 0
    for start, end in sorted(spans, key=lambda span: span[0] - span[1]):
        if (end - start) * most_padded < longest or not batches:
            batches.append([])
            longest = end - start
        batches[-1].append((start, end))
    return batches
