"""What is missing or damaged of a run's files, and needed: looks, changes nothing.

One want leads to another: a snapshot is made by repeating segments, which takes their shards; a
shard is made with its snapshot.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

from npd.control import events as ev
from npd.errors import StoreError
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.shards import Kind, verify_shard
from npd.store.snapshots import is_whole

Maker: TypeAlias = ev.Generate | ev.Score


@dataclass(frozen=True, slots=True)
class Damage:
    """What has to be made again: `shards` with their makers, snapshots with their `steps`.

    `needed` are the samples, by shard, that something goes on with.
    """

    shards: tuple[tuple[Maker, Path], ...]
    steps: dict[int, int]
    needed: dict[int, set[int]]

    @property
    def versions(self) -> list[int]:
        """The snapshots, lost or not, that something of it belongs to; oldest first."""
        return sorted({action.version for action, _ in self.shards} | set(self.steps))

    def of(self, version: int) -> list[tuple[Maker, Path]]:
        """The shards of a snapshot, rollouts before their scores."""
        found = [item for item in self.shards if item[0].version == version]
        return sorted(found, key=lambda item: isinstance(item[0], ev.Score))


def survey(
    makers: Sequence[Maker], ledger: Ledger, layout: RunLayout, wanted: Collection[int]
) -> Damage:
    """Everything to be made again so that `wanted` snapshots and all needed samples are there."""
    published = {row.version: row.step for row in ledger.snapshots()}
    saved = [row.step for row in ledger.checkpoints() if is_whole(row.path)]

    @cache
    def is_lost(version: int) -> bool:
        return version in published and not is_whole(layout.snapshot(version))

    @cache
    def is_broken(path: Path, kind: Kind) -> bool:
        try:
            verify_shard(path, kind)
        except StoreError:
            return True
        return False

    lost: set[int] = set()
    while True:
        steps = {version: published[version] for version in lost}
        needed = _needed_samples(ledger, saved, min(steps.values(), default=None))
        files = [(maker, *_file(maker, layout)) for maker in makers if maker.shard in needed]
        broken = [(maker, path) for maker, path, kind in files if is_broken(path, kind)]
        more = set(filter(is_lost, {*wanted, *(maker.version for maker, _ in broken)}))
        if more == lost:
            return Damage(tuple(broken), steps, needed)
        lost = more


def _file(maker: Maker, layout: RunLayout) -> tuple[Path, Kind]:
    if isinstance(maker, ev.Score):
        return layout.scored(maker.shard), "scored"
    return layout.rollouts(maker.shard), "rollouts"


def _needed_samples(ledger: Ledger, saved: Sequence[int], until: int | None) -> dict[int, set[int]]:
    """By shard, samples that are live, and those of segments the trainer has to repeat.

    It goes back to the newest checkpoint in `saved`, and first to one not after `until`.
    """
    start = max((step for step in saved if until is None or step <= until), default=0)
    refs = (
        ref
        for segment in ledger.segments_after(start)
        for step in segment.steps
        for rows in step.ranks
        for row in rows
        for ref in row.samples
    )
    needed: dict[int, set[int]] = {}
    live = [(row.shard, row.sample_id) for row in ledger.samples("live")]
    for shard, sample_id in (*live, *((ref.shard, ref.sample_id) for ref in refs)):
        needed.setdefault(shard, set()).add(sample_id)
    return needed
