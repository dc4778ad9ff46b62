"""The KV cache of a batch of rows: buffers that are written in place.

Promises: the next token of every row is written to the same column, `end`. A row's tokens are in
the columns just before `end`, with padding to their left. A row can be reassigned to another prompt
at any time, without changing other rows. Layers with a sliding window are cached in full. The state
of recurrent layers has no columns, so models with such layers decode one row at a time
(`LoneCache`).

Dimensions: B rows, H key heads, C columns of a buffer, P prompt length, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from npd.errors import ModelError

# Free columns of a new buffer. Copying a full buffer costs about an eighth of a decode step.
_ROOM = 64


class Cache(Protocol):
    """The cache as the decode loop uses it. Columns from `start` up to `end` are in use."""

    start: int
    end: int

    @property
    def model_cache(self) -> Any:
        """The cache object that is passed to the model."""

    def new_prompts(self) -> Any:
        """An empty cache for a prefill, whose prompts are then `put` into rows."""

    def put(
        self, prompts: Any, which: Sequence[int], rows: Sequence[int], *, is_last: bool
    ) -> None:
        """Copy prompt `which[i]` of `prompts` to row `rows[i]`, for every i.

        Each layer of `prompts` is [n, H, P, D] with P <= `end`. With `is_last` they may be freed.
        """

    def advance(self) -> None:
        """Move `end` to the next column, after a token of every row was written."""

    def keep(self, rows: Sequence[int] | None, length: int) -> None:
        """Keep the last `length` columns of `rows` (None: all); `end` becomes `length`."""

    @property
    def is_full(self) -> bool:
        """Whether no token can be written before the next `keep`."""


class RowCache:
    """Buffers [B, H, C, D] of every layer; `end` is at least `width`, the longest prompt."""

    def __init__(self, num_rows: int, width: int) -> None:
        from transformers.cache_utils import Cache as ModelCache

        self.num_rows, self.start, self.end = num_rows, 0, width
        self.capacity = width + _ROOM
        self.layers: list[Any] = []
        self.model_cache = ModelCache(layers=self.layers)

    def new_prompts(self) -> Any:
        """A cache without windows, which keeps every column of every layer."""
        from transformers import DynamicCache

        return DynamicCache()

    def put(
        self, prompts: Any, which: Sequence[int], rows: Sequence[int], *, is_last: bool
    ) -> None:
        """Copy prompts to the last columns of rows; frees each layer after its last copy."""
        device = prompts.layers[0].keys.device
        chosen, targets = (torch.tensor(list(i), device=device) for i in (which, rows))
        for index, source in enumerate(prompts.layers):
            if index == len(self.layers):
                self.layers.append(_row_layer()(self, source))
            layer, begin = self.layers[index], self.end - source.keys.shape[2]
            for buffer, states in ((layer.keys, source.keys), (layer.values, source.values)):
                buffer[:, :, begin : self.end].index_copy_(0, targets, states[chosen])
            if is_last:
                source.keys = source.values = None

    def advance(self) -> None:
        """Move `end` to the next column."""
        self.end += 1

    @property
    def is_full(self) -> bool:
        """Whether the buffers have no free column."""
        return self.end == self.capacity

    def keep(self, rows: Sequence[int] | None, length: int) -> None:
        """Copy to new buffers with free columns, layer by layer to bound memory."""
        begin = self.end - length
        self.capacity = length + max(_ROOM, length // 4)
        picked = None if rows is None else torch.tensor(rows, device=self.layers[0].keys.device)
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)[:, :, begin : self.end]
                old = old if picked is None else old[picked]
                new = old.new_empty((*old.shape[:2], self.capacity, old.shape[3]))
                new[:, :, :length] = old
                setattr(layer, name, new)
        self.num_rows = self.num_rows if rows is None else len(rows)
        self.start, self.end = self.start - begin, length


class LoneCache:
    """The cache of a single row: the model's own cache."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self.start = self.end = 0
        self.model_cache: Any = None
        self.is_full = False

    def new_prompts(self) -> Any:
        """A cache with the layers of the model's own kind."""
        from transformers import DynamicCache

        return DynamicCache(config=self._config)

    def put(
        self, prompts: Any, which: Sequence[int], rows: Sequence[int], *, is_last: bool
    ) -> None:
        """Use the single prompt's cache; a copy if more rows will start from it."""
        assert list(which) == list(rows) == [0], "recurrent layers are decoded one row at a time"
        self.model_cache = prompts if is_last else copy.deepcopy(prompts)
        self.end = prompts.get_seq_length()

    def advance(self) -> None:
        """Move `end` to the next column."""
        self.end += 1

    def keep(self, rows: Sequence[int] | None, length: int) -> None:
        """A no-op: the model's cache grows on demand, and `put` replaces it."""


def build_cache(config: Any, num_rows: int, width: int) -> tuple[Cache, int]:
    """A cache for a model, and its number of rows: `num_rows`, or 1 with recurrent layers.

    `width` is the length of the longest prompt in tokens.

    Raises:
        ModelError: no layer of the model has attention.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=config).layers
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return RowCache(num_rows, width), num_rows
    if not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        raise ModelError(
            f"a model of type {config.model_type} has no attention layer, and cannot generate in "
            "process: set generate.engine: vllm"
        )
    return LoneCache(config), 1


class _RowLayer:
    """One layer of a `RowCache`, with the interface that transformers' attention layers expect.

    The methods ignore extra arguments, because newer releases of transformers pass more of them.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, owner: RowCache, like: Any) -> None:
        self._owner = owner
        shape = (owner.num_rows, like.keys.shape[1], owner.capacity)
        # Zeros, because masked columns are multiplied by 0, and NaN times 0 is NaN.
        self.keys = like.keys.new_zeros((*shape, like.keys.shape[3]))
        self.values = like.values.new_zeros((*shape, like.values.shape[3]))
        self.is_initialized = True

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """A no-op: the buffers exist before the first token."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token of each row [B, H, 1, D] at `end`; returns the columns in use with it."""
        start, end = self._owner.start, self._owner.end
        self.keys[:, :, end : end + 1] = key_states
        self.values[:, :, end : end + 1] = value_states
        return self.keys[:, :, start : end + 1], self.values[:, :, start : end + 1]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """The number of columns in use."""
        return self._owner.end - self._owner.start

    def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
        """The number of columns visible to queries, and the index of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, *_: Any, **__: Any) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # the name depends on the release of transformers


@cache
def _row_layer() -> Any:
    """`_RowLayer` as a subclass of transformers' cache layer, which its cache requires."""
    from transformers.cache_utils import CacheLayerMixin

    return type("RowLayer", (_RowLayer, CacheLayerMixin), {})
