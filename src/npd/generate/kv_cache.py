"""The cache of a batch of rows: buffers of keys, values and recurrent states, written in place.

Promises: the next token of every row is written to the same column, `end`. A row's tokens are in
the columns just before `end`, with padding to their left. A row can be reassigned to another prompt
at any time, without changing other rows. Layers with a sliding window are cached in full. Recurrent
and convolutional layers keep one state for each row, which has no columns. Models with layers of
another kind decode one row at a time (`LoneCache`).

Dimensions: B rows, H key heads, C columns of a buffer, P prompt length, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from npd.errors import ModelError

# Free columns of a new buffer. Copying a full buffer costs about an eighth of a decode step.
_ROOM = 64
# The tensors of a layer that have columns.
_COLUMNS = ("keys", "values")


class Cache(Protocol):
    """The cache as the decode loop uses it. Columns from `start` up to `end` are in use.

    With `has_states`, padding before a prompt would change a layer's state. Without `has_columns`,
    no layer takes a mask.
    """

    start: int
    end: int
    has_states: bool
    has_columns: bool

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
    """Buffers of every layer, keys and values [B, H, C, D] and states [B, ...].

    `end` is at least `width`, the longest prompt. `kinds` are transformers' classes for the layers
    of a prompt's cache; without them every layer has keys and values only.
    """

    def __init__(self, num_rows: int, width: int, kinds: Sequence[_Kind] = ()) -> None:
        from transformers.cache_utils import Cache as ModelCache

        self.num_rows, self.start, self.end = num_rows, 0, width
        self.capacity = width + _ROOM
        self.layers: list[Any] = []
        self.model_cache = ModelCache(layers=self.layers)
        self._kinds = kinds
        self.has_states = any(kind.has_states for kind in kinds)
        self.has_columns = not kinds or any(kind.has_columns for kind in kinds)

    def new_prompts(self) -> Any:
        """A cache without windows, which keeps every column of every layer."""
        from transformers import DynamicCache
        from transformers.cache_utils import Cache as ModelCache

        if not self._kinds:
            return DynamicCache()
        return ModelCache(layers=[kind.make() for kind in self._kinds])

    def put(
        self, prompts: Any, which: Sequence[int], rows: Sequence[int], *, is_last: bool
    ) -> None:
        """Copy prompts to the last columns of rows; frees each layer after its last copy.

        Raises:
            ModelError: the model has put nothing in its cache, or only in some attention layers.
        """
        device = _device_of(prompts.layers)
        chosen, targets = (torch.tensor(list(i), device=device) for i in (which, rows))
        for index, source in enumerate(prompts.layers):
            if index == len(self.layers):
                self.layers.append(_row_layer(self, source))
            layer = self.layers[index]
            for (kept, name), (given, _) in zip(_tensors(layer), _tensors(source), strict=True):
                buffer, states = kept[name], given[name]
                if name in _COLUMNS:
                    buffer = buffer[:, :, self.end - states.shape[2] : self.end]
                buffer.index_copy_(0, targets, states[chosen])
                if is_last:
                    given[name] = None

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
        picked = None if rows is None else torch.tensor(rows, device=_device_of(self.layers))
        for kept, name in (slot for layer in self.layers for slot in _tensors(layer)):
            has_columns = name in _COLUMNS
            old = kept[name][:, :, begin : self.end] if has_columns else kept[name]
            old = old if picked is None else old[picked]
            if has_columns:
                kept[name] = old.new_empty((*old.shape[:2], self.capacity, old.shape[3]))
                kept[name][:, :, :length] = old
            else:
                kept[name] = old
        self.num_rows = self.num_rows if rows is None else len(rows)
        self.start, self.end = self.start - begin, length


class LoneCache:
    """The cache of a single row: the model's own cache."""

    has_states = has_columns = True

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
        assert list(which) == list(rows) == [0], "this cache has a single row"
        self.model_cache = prompts if is_last else copy.deepcopy(prompts)
        self.end = prompts.get_seq_length()

    def advance(self) -> None:
        """Move `end` to the next column."""
        self.end += 1

    def keep(self, rows: Sequence[int] | None, length: int) -> None:
        """A no-op: the model's cache grows on demand, and `put` replaces it."""


def build_cache(config: Any, num_rows: int, width: int) -> tuple[Cache, int]:
    """A cache for a model, and its number of rows: `num_rows`, or 1 if rows cannot share a cache.

    `width` is the length of the longest prompt in tokens.
    """
    from transformers import DynamicCache

    kinds = [_kind_of(layer) for layer in DynamicCache(config=config).layers]
    known = [kind for kind in kinds if kind is not None]
    if len(known) < len(kinds):
        return LoneCache(config), 1
    is_plain = not any(kind.has_states for kind in known)
    return RowCache(num_rows, width, () if is_plain else known), num_rows


class _Kind(NamedTuple):
    """A kind of cache layer of transformers: a maker without a window, and what it holds."""

    make: Callable[[], Any]
    has_states: bool
    has_columns: bool


def _kind_of(layer: Any) -> _Kind | None:
    """The kind of a layer of a model's own cache; None if rows cannot share it."""
    from transformers import cache_utils as known

    states = getattr(layer, "number_of_states", None)
    options = {} if states is None else {"number_of_states": states}

    def named(*names: str) -> bool:
        return any(type(layer) is getattr(known, name, None) for name in names)

    if named("DynamicLayer", "DynamicSlidingWindowLayer"):
        return _Kind(known.DynamicLayer, has_states=False, has_columns=True)
    if named("LinearAttentionLayer"):
        make = partial(known.LinearAttentionLayer, **options)
        return _Kind(make, has_states=True, has_columns=False)
    if named(
        "LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"
    ):
        make = partial(known.LinearAttentionAndFullAttentionLayer, **options)
        return _Kind(make, has_states=True, has_columns=True)
    return None


def _tensors(layer: Any) -> Iterator[tuple[dict[Any, Any], Any]]:
    """Where a layer keeps its tensors: a dictionary and a key of it, in a fixed order."""
    # Some releases keep one tensor for each kind of state, others a dictionary of them.
    for owner in (vars(layer), *(part for part in vars(layer).values() if isinstance(part, dict))):
        yield from ((owner, name) for name, value in owner.items() if isinstance(value, Tensor))


def _device_of(layers: Sequence[Any]) -> torch.device:
    for kept, name in (slot for layer in layers for slot in _tensors(layer)):
        device: torch.device = kept[name].device
        return device
    raise _outside()


def _outside() -> ModelError:
    return ModelError(
        "this architecture keeps a state outside of its cache, and cannot generate in process: set "
        "generate.engine: vllm, or choose another model"
    )


class _RowLayer:
    """An attention layer of a `RowCache`, with the interface that transformers' layers expect.

    The methods ignore extra arguments, because newer releases of transformers pass more of them.
    """

    is_sliding = False
    is_compileable = False

    _owner: RowCache
    keys: Tensor
    values: Tensor

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


def _row_layer(owner: RowCache, like: Any) -> Any:
    """The layer of `owner` for prompts that fill the cache layer `like`; its buffers are zeros.

    Raises:
        ModelError: the model has left its layer of keys empty.
    """
    has_columns = hasattr(like, "keys")
    if has_columns and like.keys is None:
        raise _outside()
    own: Any = type(like)
    kind = _row_class(own) if has_columns else own
    layer = kind.__new__(kind)
    vars(layer).update(vars(like))
    parts = {name: {**part} for name, part in vars(like).items() if isinstance(part, dict)}
    vars(layer).update(parts)
    for kept, name in _tensors(layer):
        _, *shape = kept[name].shape
        if name in _COLUMNS:
            shape[1] = owner.capacity
        # Zeros, because masked columns are multiplied by 0, and NaN times 0 is NaN.
        kept[name] = kept[name].new_zeros((owner.num_rows, *shape))
    if has_columns:
        layer._owner = owner
    return layer


@cache
def _row_class(kind: Any) -> Any:
    """`_RowLayer` as a subclass of a kind of transformers' cache layers."""
    return type("RowLayer", (_RowLayer, kind), {})
