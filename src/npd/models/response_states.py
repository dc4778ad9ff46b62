"""The hidden states that predict response tokens, for (context, response) pairs in packed rows.

Promises: a response's states do not depend on other documents in the row, nor on whether its
context is shared (to float noise). Does not apply the LM head.

Dimensions: L tokens of a response, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from npd.models.device import on_device
from npd.models.loading import PackedBatch, hidden_states, pack_documents
from npd.models.packed_attention import Shared
from npd.types import IntArray

Pair: TypeAlias = tuple[IntArray, IntArray]

# Sharing a shorter context saves less than the expanded layout for attention costs.
_MIN_SHARED = 16
# Limit of the expanded documents in attention, in multiples of a row's tokens. Above it attention
# would need more memory than the layers.
_MAX_LAID_OUT = 4


@dataclass(frozen=True, slots=True)
class _Group:
    """Pairs (by index) that share one context."""

    context: IntArray
    members: list[int] = field(default_factory=list)


def response_hidden(
    model: Any, pairs: Sequence[Pair], row_tokens: int, *, share: bool = False
) -> Iterator[tuple[list[int], Tensor]]:
    """The hidden states that predict each response, with many (context, response) pairs per row.

    Yields, for each row, the indices of its pairs and their states [sum of L, d] in that order.
    State t of a response precedes its token t, so the first is at the context's last token, and the
    response's last token is not an input. A pair longer than `row_tokens` gets a separate row. With
    `share`, equal contexts in a row are processed once, as long as the row's expanded documents
    have at most 4 times its tokens.
    """
    assert all(len(context) and len(response) for context, response in pairs)
    groups = _groups(pairs, row_tokens if share else 0)
    sizes = [(_size(group, pairs), _laid_out(group, pairs)) for group in groups]
    for row in _first_fit(sizes, row_tokens):
        chosen = [groups[i] for i in row]
        batch, positions = _lay_out(chosen, pairs, model.device)
        members = [member for group in chosen for member in group.members]
        yield members, hidden_states(model, batch)[positions]


def _groups(pairs: Sequence[Pair], capacity: int) -> list[_Group]:
    """Pairs grouped by context, as many as fit in a row; short contexts are not grouped."""
    groups: list[_Group] = []
    open_groups: dict[bytes, tuple[_Group, int, int]] = {}
    for index, (context, response) in enumerate(pairs):
        key, own = context.tobytes(), len(response) - 1
        group, used, laid_out = open_groups.get(key, (None, 0, 0))
        is_full = used + own > capacity or laid_out + len(context) + own > _MAX_LAID_OUT * capacity
        if group is None or is_full or len(context) < _MIN_SHARED:
            group, used, laid_out = _Group(context), len(context), 0
            groups.append(group)
        group.members.append(index)
        open_groups[key] = group, used + own, laid_out + len(context) + own
    return groups


def _size(group: _Group, pairs: Sequence[Pair]) -> int:
    return len(group.context) + sum(len(pairs[i][1]) - 1 for i in group.members)


def _laid_out(group: _Group, pairs: Sequence[Pair]) -> int:
    return sum(len(group.context) + len(pairs[i][1]) - 1 for i in group.members)


def _lay_out(
    groups: Sequence[_Group], pairs: Sequence[Pair], device: torch.device
) -> tuple[PackedBatch, Tensor]:
    """A row of groups, and the positions of its states, pair by pair."""
    pieces: list[IntArray] = []
    position_ids, positions, take, lengths = [], [], [], []
    start = 0
    for group in groups:
        size = len(group.context)
        before = np.arange(start, start + size)
        pieces.append(group.context)
        position_ids.append(np.arange(size))
        start += size
        for index in group.members:
            own = pairs[index][1][:-1]
            inside = np.arange(start, start + len(own))
            pieces.append(own)
            position_ids.append(np.arange(size, size + len(own)))
            positions.append(np.concatenate([before[-1:], inside]))
            take.append(np.concatenate([before, inside]))
            lengths.append(size + len(own))
            start += len(own)
    where = on_device(torch.from_numpy(np.concatenate(positions)), device)
    if sum(lengths) == start:  # nothing is shared
        return pack_documents([np.concatenate(pair) for pair in _fed(groups, pairs)], device), where
    ids, at = (torch.from_numpy(np.concatenate(x).astype(np.int64)) for x in (pieces, position_ids))
    laid = np.concatenate(take)
    # The first occurrence of each token of the row in the expanded layout.
    keep = np.unique(laid, return_index=True)[1]
    shared = Shared(*(on_device(torch.from_numpy(x), device) for x in (laid, keep)))
    bounds = (0, *accumulate(lengths))
    row = PackedBatch(on_device(ids[None], device), on_device(at[None], device), bounds, shared)
    return row, where


def _fed(groups: Sequence[_Group], pairs: Sequence[Pair]) -> Iterator[Pair]:
    return ((group.context, pairs[i][1][:-1]) for group in groups for i in group.members)


def _first_fit(sizes: Sequence[tuple[int, int]], capacity: int) -> list[list[int]]:
    """First fit, longest first: for each row the indices of `sizes` (input and expanded tokens)."""
    rows: list[tuple[int, int, list[int]]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
        fed, laid_out = sizes[index]
        fits = (
            r
            for r, (used, spread, _) in enumerate(rows)
            if used + fed <= capacity and spread + laid_out <= _MAX_LAID_OUT * capacity
        )
        found = next(fits, len(rows))
        used, spread, row = rows[found] if found < len(rows) else (0, 0, [])
        rows[found : found + 1] = [(used + fed, spread + laid_out, [*row, index])]
    return [row for _, _, row in rows]
