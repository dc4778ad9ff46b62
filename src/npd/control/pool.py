"""The samples ready to be trained on, in the order they will be.

Least used first, then an order shuffled by the seed; so reuse goes in passes, like epochs, and the
choice depends on nothing but the samples and the seed. Holds references only, never text.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from npd.control.order import mix_each
from npd.types import SampleRef

# A place in the queue is one integer, which compares faster than a tuple: how often used, then
# where the shuffle puts it (63 bits, `mix`), then the sample.
_ID_BITS, _SHUFFLE_BITS = 63, 63
_ID = (1 << _ID_BITS) - 1
# Places in the queue of samples that are gone, before it is swept: so many more than there are of
# those to come.
_MAX_GONE = 64


@dataclass(slots=True)
class _Member:
    ref: SampleRef
    uses: int = 0


class Pool:
    """Live, scored and kept samples with how often each has been used."""

    def __init__(self, seed: int, reuse: int) -> None:
        self._seed = seed
        self._reuse = reuse
        self._members: dict[int, _Member] = {}
        self._queue: list[int] = []
        self._spent: list[int] = []
        self._fresh = 0
        self._available = 0
        self._uses_left = 0

    def __len__(self) -> int:
        """Samples held, those in training for the last time included."""
        return len(self._members)

    @property
    def num_fresh(self) -> int:
        """Samples never used yet."""
        return self._fresh

    @property
    def num_available(self) -> int:
        """Samples with uses left."""
        return self._available

    @property
    def uses_left(self) -> int:
        """Uses left over all samples."""
        return self._uses_left

    def add(self, refs: Sequence[SampleRef]) -> None:
        """New samples, unused."""
        for ref in refs:
            assert ref.sample_id not in self._members, f"sample {ref.sample_id} was added twice"
            self._members[ref.sample_id] = _Member(ref)
        self._fresh += len(refs)
        self._available += len(refs)
        self._uses_left += self._reuse * len(refs)
        self._push([ref.sample_id for ref in refs], 0)

    def take(self, count: int, *, reuse: bool) -> list[SampleRef]:
        """Use up to `count` samples once each; without `reuse`, only samples never used."""
        taken: list[_Member] = []
        queue, below = self._queue, _places(self._reuse if reuse else 1)
        while len(taken) < count and queue and queue[0] < below:
            member = self._members.get(heapq.heappop(queue) & _ID)
            if member is not None:
                taken.append(member)
        self._use(taken)
        return [member.ref for member in taken]

    def remove(self, sample_id: int) -> int:
        """Forget a sample; returns how often it was used."""
        member = self._members.pop(sample_id)
        self._fresh -= member.uses == 0
        self._available -= member.uses < self._reuse
        self._uses_left -= self._reuse - member.uses
        if len(self._queue) > 2 * self._available + _MAX_GONE:
            self._sweep()
        return member.uses

    def spent(self) -> list[int]:
        """Samples used `reuse` times and still held, by id."""
        self._spent = [sample_id for sample_id in self._spent if sample_id in self._members]
        return sorted(self._spent)

    def older_than(self, version: int) -> list[int]:
        """Samples written by a snapshot before `version`, by id."""
        return sorted(i for i, member in self._members.items() if member.ref.version < version)

    def _use(self, members: Sequence[_Member]) -> None:
        """One more use of each; they are out of the queue, and come back by how often used."""
        again: defaultdict[int, list[int]] = defaultdict(list)
        for member in members:
            self._fresh -= member.uses == 0
            member.uses += 1
            kept = again[member.uses] if member.uses < self._reuse else self._spent
            kept.append(member.ref.sample_id)
        self._uses_left -= len(members)
        for uses, sample_ids in again.items():
            self._push(sample_ids, uses)
        self._available -= len(members) - sum(map(len, again.values()))

    def _push(self, sample_ids: Sequence[int], uses: int) -> None:
        first, shuffled = _places(uses), mix_each((self._seed, uses), sample_ids)
        for sample_id, place in zip(sample_ids, shuffled, strict=True):
            heapq.heappush(self._queue, first | place << _ID_BITS | sample_id)

    def _sweep(self) -> None:
        """Take samples that are gone out of the queue; else those used often pile up in it."""
        self._queue = [place for place in self._queue if place & _ID in self._members]
        heapq.heapify(self._queue)


def _places(uses: int) -> int:
    """The first place in the queue of samples used so often."""
    return uses << _ID_BITS + _SHUFFLE_BITS
