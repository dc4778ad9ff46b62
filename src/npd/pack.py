"""Bin packing of documents into rows, and of rows onto ranks: pure functions of lengths.

Promises: every index is returned exactly once, no row exceeds the capacity, and equal lengths give
equal rows. Does not know tokens, attention or models. Capacity matters more than the algorithm:
rows of at least four times the longest document are more than 99 % full. `pack` sees all lengths
before the first row, `pack_stream` only a window of them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from npd.errors import InputError

# Bits per word of `_OpenRows`. Python shifts whole integers, so a query's cost grows with the word;
# with 1,024 both levels take under a microsecond up to a capacity of a million tokens.
_WORD_BITS = 1024
# Up to this many documents a sorted list of open rows takes half the time of bits.
_FEW = 1024


class _FewOpenRows:
    """Open rows in a list sorted by free room; among equal rows the latest comes first."""

    def __init__(self) -> None:
        self._rooms: list[int] = []
        self._rows: list[int] = []

    def add(self, room: int, row: int) -> None:
        position = bisect_left(self._rooms, room)
        self._rooms.insert(position, room)
        self._rows.insert(position, row)

    def take(self, length: int) -> tuple[int, int] | None:
        """Remove and return `(room, row)` of the row that `length` fits most tightly, if any."""
        position = bisect_left(self._rooms, length)
        if position == len(self._rooms):
            return None
        return self._rooms.pop(position), self._rows.pop(position)


class _OpenRows:
    """Open rows in bits by free room, for many rows; finds the tightest fit in constant time.

    Two levels of bits: `words` marks the rooms that have a row, `summary` the non-empty words.
    """

    def __init__(self, capacity: int) -> None:
        # A dict, because a list for each possible room (32,769) would take ten times as long to
        # create as packing the 64 documents of a step.
        self._by_room: defaultdict[int, list[int]] = defaultdict(list)
        self._words = [0] * (capacity // _WORD_BITS + 1)
        self._summary = 0

    def add(self, room: int, row: int) -> None:
        self._by_room[room].append(row)
        word, bit = divmod(room, _WORD_BITS)
        self._words[word] |= 1 << bit
        self._summary |= 1 << word

    def take(self, length: int) -> tuple[int, int] | None:
        """Remove and return `(room, row)` of the row that `length` fits most tightly, if any."""
        room = self._tightest(length)
        if room is None:
            return None
        rows = self._by_room[room]
        row = rows.pop()
        if not rows:
            self._forget(room)
        return room, row

    def _tightest(self, length: int) -> int | None:
        word, bit = divmod(length, _WORD_BITS)
        here = self._words[word] >> bit
        if here:
            return length + _lowest_bit(here)
        above = self._summary >> (word + 1)
        if not above:
            return None
        word += 1 + _lowest_bit(above)
        return word * _WORD_BITS + _lowest_bit(self._words[word])

    def _forget(self, room: int) -> None:
        word, bit = divmod(room, _WORD_BITS)
        self._words[word] ^= 1 << bit
        if not self._words[word]:
            self._summary ^= 1 << word


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack documents into rows by best-fit decreasing, in O(n log n).

    `lengths` are tokens, each at least 1. Returns the indices of each row, longest document first;
    equal lengths keep their order. Uses at most 11/9 of the fewest rows possible, plus one
    (Johnson 1974). Raises InputError for a document longer than `capacity`.

    >>> pack([3, 9, 5, 1], capacity=10)
    [[1, 3], [2, 0]]
    """
    known = list(map(int, lengths))  # numpy's integers are slow one by one
    _check(known, capacity)
    order = _longest_first(known)
    if known and sum(known) <= capacity:
        return [order]
    rows: list[list[int]] = []
    open_rows = _FewOpenRows() if len(known) <= _FEW else _OpenRows(capacity)
    # A row with less room than the shortest document is full and need not be searched.
    shortest = min(known, default=capacity)
    for index in order:
        length = known[index]
        room, row = open_rows.take(length) or (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if room - length >= shortest:
            open_rows.add(room - length, row)
    return rows


def pack_stream(
    lengths: Iterable[int], capacity: int, *, window: int = 1024
) -> Iterator[list[int]]:
    """Pack a stream of documents into rows, holding at most `window` documents.

    Each time the window is full, a row is yielded: the oldest document, then repeatedly the longest
    document that still fits (among equal ones the oldest). So no document waits for more than
    `window` rows. At the end of `lengths`, the documents in the window are packed as by `pack`.
    Errors are as in `pack`, raised when a document arrives.

    >>> list(pack_stream([3, 9, 5, 1], capacity=10, window=2))
    [[0], [1], [2, 3]]
    """
    assert window >= 1, "a window holds at least one document"
    arrived: deque[int] = deque()  # oldest first, including packed ones
    waiting: list[tuple[int, int]] = []  # (length, -index); the last one that fits is taken
    known: dict[int, int] = {}
    for index, length in enumerate(map(int, lengths)):
        _check_one(index, length, capacity)
        insort(waiting, (length, -index))
        arrived.append(index)
        known[index] = length
        if len(waiting) == window:
            while arrived[0] not in known:
                arrived.popleft()
            yield _oldest_and_longest(arrived.popleft(), known, waiting, capacity)
    remaining = list(known)
    yield from ([remaining[i] for i in row] for row in pack(list(known.values()), capacity))


def _oldest_and_longest(
    oldest: int, known: dict[int, int], waiting: list[tuple[int, int]], capacity: int
) -> list[int]:
    """Remove a row from `known` and `waiting`: `oldest`, then repeatedly the longest that fits."""
    position = bisect_left(waiting, (known[oldest], -oldest))
    row, room = [], capacity
    while position >= 0:
        length, negated = waiting.pop(position)
        row.append(-negated)
        del known[-negated]
        room -= length
        position = bisect_left(waiting, (room + 1,)) - 1
    return row


def _longest_first(lengths: list[int]) -> list[int]:
    """Indices by descending length; equal lengths keep their order."""
    if len(lengths) <= _FEW:
        return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    order: list[int] = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    return order


def _check(lengths: list[int], capacity: int) -> None:
    assert capacity >= 1, "a row holds at least one token"
    assert min(lengths, default=1) >= 1, "a document has at least one token"
    longest = max(lengths, default=0)
    if longest > capacity:
        _check_one(lengths.index(longest), longest, capacity)


def _check_one(index: int, length: int, capacity: int) -> None:
    assert length >= 1, "a document has at least one token"
    if length > capacity:
        raise InputError(
            f"document {index} has {length} tokens, but a row holds {capacity}: raise "
            "train.row_tokens, or limit prompts and responses"
        )


def efficiency(rows: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int) -> float:
    """Share of the rows' capacity that holds tokens, in [0, 1]; 1 if there are no rows."""
    if not rows:
        return 1.0
    return sum(lengths[index] for row in rows for index in row) / (len(rows) * capacity)


# The length at which attention takes as long as the products with the weights. In operations it is
# parameters / (layers x attention width): 36,000 tokens for 1.5B, 42,000 for 3B, 60,000 to 76,000
# for 8B and 7B students, fewer for small ones. Attention kernels reach about half the products'
# rate. A constant, because plans are repeated from lengths alone.
_ATTENTION_TOKENS = 20_000


def row_cost(lengths: Sequence[int]) -> float:
    """The time that a row of documents takes, in tokens of short documents.

    >>> row_cost([1000] * 20), row_cost([20_000])
    (21000.0, 40000.0)
    """
    return float(sum(n + n * n / _ATTENTION_TOKENS for n in lengths))


def balance(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Assign rows to ranks in turns of rows that cost alike, from the heaviest to the lightest.

    Ranks that share a student wait for each other in every layer of every row, so a step takes as
    long as the heaviest rows of its turns together; no other assignment takes less. Returns each
    rank's row indices, in the order of the turns. Every rank gets a row if there are enough; within
    a turn the rank with the least so far gets the heaviest.

    >>> balance([9, 2, 8, 1], ranks=2)
    [[0, 3], [2, 1]]
    """
    assert ranks >= 1, "there is at least one rank"
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for start in range(0, len(order), ranks):
        lightest_first = sorted(range(ranks), key=lambda rank: (loads[rank], rank))
        for rank, index in zip(lightest_first, order[start : start + ranks], strict=False):
            shares[rank].append(index)
            loads[rank] += costs[index]
    return shares
