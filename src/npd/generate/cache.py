"""Keys and values of rows that are decoded together: buffers that are written in place.

Promises: every row's next token goes to the same place, `end`, so a row's text is the last places
before it, and what lies to the left of it is padding; a row can be given to another prompt at any
time, without touching the others. Layers with a window are kept in full here. What recurrent layers
keep has no places, so a model with such layers is decoded one row at a time (`LoneCache`).

Dimensions: B rows, H key heads, C places of a buffer, P prompt length, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from npd.errors import ModelError

# Places that a buffer has left when it is made: each time they are used up it is copied once, about
# what an eighth of a step costs.
_ROOM = 64


class Cache(Protocol):
    """What the decode loop asks of a cache. `start` and `end`: the places that are in use."""

    start: int
    end: int

    @property
    def model_cache(self) -> Any:
        """What the model is given as `past_key_values`."""

    def new_prompts(self) -> Any:
        """An empty cache for prompts that are read by themselves, then `put` into rows."""

    def put(
        self, prompts: Any, which: Sequence[int], rows: Sequence[int], *, is_last: bool
    ) -> None:
        """Row `rows[i]` becomes prompt `which[i]` of `prompts` (each [n, H, P, D]; P <= `end`),
        which are not needed any more if `is_last`."""

    def advance(self) -> None:
        """A token of every row was written at `end`."""

    def move(self, rows: Sequence[int] | None, length: int) -> None:
        """Keep the last `length` places of `rows` (None: of all); `end` becomes `length`."""

    @property
    def is_full(self) -> bool:
        """Whether no token can be written before the next `move`."""


class RowCache:
    """Buffers [B, H, C, D] of every layer; `end` is at least `width`, the longest prompt."""

    def __init__(self, num_rows: int, width: int) -> None:
        from transformers.cache_utils import Cache as ModelCache

        self.num_rows, self.start, self.end = num_rows, 0, width
        self.capacity = width + _ROOM
        self.layers: list[Any] = []
        self.model_cache = ModelCache(layers=self.layers)

    def new_prompts(self) -> Any:
        """One that keeps every place, also of layers with a window."""
        from transformers import DynamicCache

        return DynamicCache()

    def put(
        self, prompts: Any, which: Sequence[int], rows: Sequence[int], *, is_last: bool
    ) -> None:
        """Copy prompts to the last places of rows; the last time one layer at a time is held
        twice."""
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
        """Go to the next place."""
        self.end += 1

    @property
    def is_full(self) -> bool:
        """Whether the buffers end here."""
        return self.end == self.capacity

    def move(self, rows: Sequence[int] | None, length: int) -> None:
        """To new buffers, with room for tokens to come; one layer at a time is held twice."""
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
    """The cache of one row: whatever the model keeps."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self.start = self.end = 0
        self.model_cache: Any = None
        self.is_full = False

    def new_prompts(self) -> Any:
        """One with the layers that the model asks for."""
        from transformers import DynamicCache

        return DynamicCache(config=self._config)

    def put(
        self, prompts: Any, which: Sequence[int], rows: Sequence[int], *, is_last: bool
    ) -> None:
        """Take the one prompt, or a copy, where others begin with the same."""
        assert list(which) == list(rows) == [0], "recurrent layers are decoded one row at a time"
        self.model_cache = prompts if is_last else copy.deepcopy(prompts)
        self.end = prompts.get_seq_length()

    def advance(self) -> None:
        """Go to the next place."""
        self.end += 1

    def move(self, rows: Sequence[int] | None, length: int) -> None:
        """Nothing: it grows by itself, and is replaced as a whole."""


def build_cache(config: Any, num_rows: int, width: int) -> tuple[Cache, int]:
    """A cache for a model, and how many rows it has: `num_rows`, or 1 where layers are recurrent.

    `width` is the length of the longest prompt.

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
            f"a model of type {config.model_type} has no attention layer, and cannot write in "
            "process: let a server write, with generate.engine vllm or sglang"
        )
    return LoneCache(config), 1


class _RowLayer:
    """One layer of a `RowCache`, as transformers' attention layers use it."""

    is_sliding = False

    def __init__(self, owner: RowCache, like: Any) -> None:
        self._owner = owner
        shape = (owner.num_rows, like.keys.shape[1], owner.capacity)
        # Zeros: what is left of a prompt is never seen, but not a number times 0 would be.
        self.keys = like.keys.new_zeros((*shape, like.keys.shape[3]))
        self.values = like.values.new_zeros((*shape, like.values.shape[3]))
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Never needed: the buffers are made before the first token."""

    def update(self, keys: Tensor, values: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """Write one token of each row [B, H, 1, D] at `end`; what is in use, it included."""
        start, end = self._owner.start, self._owner.end
        self.keys[:, :, end : end + 1] = keys
        self.values[:, :, end : end + 1] = values
        return self.keys[:, :, start : end + 1], self.values[:, :, start : end + 1]

    def get_seq_length(self) -> int:
        """Places in use."""
        return self._owner.end - self._owner.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Places that queries see, and where the first is."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


@cache
def _row_layer() -> Any:
    """The class above, as one of transformers' own: its cache looks for that."""
    from transformers.cache_utils import CacheLayerMixin

    return type("RowLayer", (_RowLayer, CacheLayerMixin), {})
