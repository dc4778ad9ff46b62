"""What is missing or damaged of a run's files, and needed: looks, changes nothing.

One want leads to another: a snapshot is made by repeating segments, which takes their shards; a
shard is made with its snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from npd.control import events as ev
from npd.control.place import Place
from npd.control.replay import Maker
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.shards import Kind


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to be made again, by what once made it, with these snapshots."""

    maker: Maker
    path: Path
    versions: frozenset[int]

    @property
    def newest(self) -> int:
        """The newest of its snapshots."""
        return max(self.versions)


@dataclass(frozen=True, slots=True)
class Damage:
    """What has to be made again: `shards` with their makers, snapshots with their `steps`.

    `needed` are the samples, by shard, that something goes on with; `checkpoints` those that are
    there and damaged, by step.
    """

    shards: tuple[Shard, ...]
    steps: dict[int, int]
    needed: dict[int, set[int]]
    checkpoints: dict[int, Path]

    @property
    def versions(self) -> list[int]:
        """The snapshots, lost or not, that something of it rests on; oldest first."""
        return sorted({shard.newest for shard in self.shards} | set(self.steps))

    def of(self, version: int) -> list[Shard]:
        """The shards that rest on snapshots up to this one, rollouts before their scores."""
        found = [shard for shard in self.shards if shard.newest == version]
        return sorted(found, key=lambda shard: isinstance(shard.maker, ev.Score))


def survey(
    makers_of: Callable[[AbstractSet[int]], Collection[Maker]],
    ledger: Ledger,
    layout: RunLayout,
    place: Place,
    wanted: Collection[int],
    *,
    is_over: bool,
) -> Damage:
    """Everything to be made again so that `wanted` snapshots and all needed samples are there."""
    published = {row.version: row.step for row in ledger.snapshots()}
    there = {row.step: row.path for row in ledger.checkpoints() if place.has(row.path)}
    saved = [step for step, path in there.items() if place.is_whole(path)]

    @cache
    def is_lost(version: int) -> bool:
        return version in published and not place.is_whole(layout.snapshot(version))

    @cache
    def is_broken(path: Path, kind: Kind) -> bool:
        return not place.is_whole(path, kind)

    lost: set[int] = set()
    while True:
        steps = {version: published[version] for version in lost}
        until = min(steps.values(), default=None)
        needed = needed_samples(ledger, saved, until=until, is_over=is_over)
        makers = [maker for maker in makers_of(needed.keys()) if maker.shard in needed]
        # A scored shard holds its rollouts: nothing reads theirs any more.
        scored = {m.shard for m in makers if isinstance(m, ev.Score)}
        scored -= {shard for shard in scored if is_broken(layout.scored(shard), "scored")}
        makers = [m for m in makers if isinstance(m, ev.Score) or m.shard not in scored]
        files = [(maker, *_file(maker, layout)) for maker in makers]
        broken = [
            Shard(maker, path, _versions(maker, layout, place))
            for maker, path, kind in files
            if is_broken(path, kind)
        ]
        more = set(filter(is_lost, set(wanted).union(*(shard.versions for shard in broken))))
        if more == lost:
            damaged = {step: path for step, path in there.items() if step not in saved}
            return Damage(tuple(broken), steps, needed, damaged)
        lost = more


def _versions(maker: Maker, layout: RunLayout, place: Place) -> frozenset[int]:
    """The snapshots that wrote a shard's samples: two, around a refresh that servers had."""
    versions = {maker.version}
    if isinstance(maker, ev.Score):
        versions |= place.versions(layout.rollouts(maker.shard))
    return frozenset(versions)


def _file(maker: Maker, layout: RunLayout) -> tuple[Path, Kind]:
    if isinstance(maker, ev.Score):
        return layout.scored(maker.shard), "scored"
    return layout.rollouts(maker.shard), "rollouts"


def needed_samples(
    ledger: Ledger, saved: Sequence[int], *, until: int | None = None, is_over: bool = False
) -> dict[int, set[int]]:
    """By shard, samples of segments the trainer has to repeat, and (unless `is_over`) live ones.

    It goes back to the newest checkpoint in `saved`, and first to one not after `until`.
    """
    start = max((step for step in saved if until is None or step <= until), default=0)
    needed: dict[int, set[int]] = {}
    for segment in ledger.segments_after(start):
        for ref in segment.refs:
            needed.setdefault(ref.shard, set()).add(ref.sample_id)
    for row in [] if is_over else ledger.samples("live"):
        needed.setdefault(row.shard, set()).add(row.sample_id)
    return needed
