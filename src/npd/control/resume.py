"""Resumes a run: replays its events, finds missing and damaged files, and regenerates them.

A changed setting, data or model was refused before (`npd.control.resume_checks`).

1. `replay`: a new plan handles every recorded event and must make the recorded decisions. Then the
   plan has the state in which the run stopped, and `Replayed` holds the unfinished actions.
2. `find_missing`: the shards and snapshots that are needed and are missing or damaged. Reads only.
3. `regenerate`: repeats the actions that produced these files, oldest snapshot first.

A shard follows from its seeds and its snapshot, so regenerating it gives the same samples. A
snapshot comes from the trainer, which repeats recorded segments: exactly on a CPU, on a GPU with
`train.deterministic`. Text that a server
generated is not regenerated: it would differ from the lengths and versions in the ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from npd import __version__
from npd.config import RunConfig
from npd.errors import RunError, StoreError
from npd.remote.artifact_store import ArtifactStore
from npd.schedule import events as ev
from npd.schedule.plan import Plan
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger, recorded_events
from npd.store.shards import Kind
from npd.text import counted
from npd.types import SampleStats, Segment

if TYPE_CHECKING:  # so that reading a run does not import torch
    from npd.control.dispatcher import Dispatcher
    from npd.control.run_directory import OpenRun

Producer: TypeAlias = ev.Generate | ev.Score
"""The action that produced a shard's file."""
Producers: TypeAlias = dict[tuple[str, int], Producer]
ProducersOf: TypeAlias = Callable[[AbstractSet[int]], Collection[Producer]]

# 1. Replay.


def recorded(ledger: Ledger) -> Iterator[ev.Event]:
    """Each recorded event.

    Raises:
        StoreError: an event is not in the form that this version of npd writes.
    """
    for seq, kind, payload in ledger.events():
        yield _decoded(ledger, seq, kind, payload)[0]


def _decoded(
    ledger: Ledger, seq: int, kind: str, payload: dict[str, Any]
) -> tuple[ev.Event, object]:
    """An event, and the recorded digest of its actions."""
    try:
        expected = payload.pop("digest")
        return ev.decode(kind, payload), expected
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"event {seq} of {ledger.path} is not in the form that npd {__version__} writes "
            f"({type(error).__name__}): use the npd that wrote it, or start a new run"
        ) from error


def replay_events(ledger: Ledger, plan: Plan) -> Iterator[tuple[ev.Event, list[ev.Action]]]:
    """Each event, and the actions that `plan`, a new plan, decides on it.

    Raises:
        RunError: the recorded decisions differ from this plan's.
    """
    for seq, kind, payload in ledger.events():
        event, expected = _decoded(ledger, seq, kind, payload)
        actions = plan.handle(event)
        if ev.digest(actions) != expected:
            raise RunError(
                f"event {seq} of {ledger.path} leads to other decisions than recorded: the run was "
                "made by another version of npd or with another config; resume with that one"
            )
        yield event, actions


@dataclass(slots=True)
class Replayed:
    """The state of a run after its recorded events; `add` takes them in order."""

    shards: frozenset[int]
    """The shards whose producers are kept; the producers of all shards would not fit in memory."""
    is_new: bool = True
    """Whether there was no event yet."""
    unfinished: dict[tuple[str, int], ev.Action] = field(default_factory=dict)
    """Actions decided but not done, by `events.key`."""
    producers: Producers = field(default_factory=dict)
    segments: dict[int, Segment] = field(default_factory=dict)
    """Segments decided but not trained, by index."""
    trained: int = 0
    """Optimiser steps trained."""
    num_shards: int = 0
    stop: ev.Stop | None = None

    def add(self, event: ev.Event, actions: Sequence[ev.Action]) -> None:
        """Add the next event and its actions."""
        self.is_new = False
        done = self.unfinished.pop(ev.key(event), None)
        has_failed = isinstance(event, ev.ShardFailed)
        if isinstance(done, Producer) and done.shard in self.shards and not has_failed:
            self.producers[ev.key(done)] = done
        if isinstance(event, ev.SegmentTrained):
            self.trained = event.report.steps[-1].step
            del self.segments[event.report.segment]
        for action in actions:
            self._decided(action)

    def _decided(self, action: ev.Action) -> None:
        match action:
            case ev.Finalize():
                return
            case ev.Train(segment):
                self.segments[segment.index] = segment
            case ev.Generate(shard):
                self.num_shards = max(self.num_shards, shard + 1)
            case ev.Stop():
                self.stop = action
        self.unfinished[ev.key(action)] = action


def replay(run: OpenRun, plan: Plan) -> Replayed:
    """Bring a new plan to the state after the run's events; updates the monitor's counts too.

    Raises:
        RunError: the recorded decisions differ from this plan's.
        StoreError: an event is not in the form that this version of npd writes.
    """
    saved = [row.step for row in run.ledger.checkpoints() if run.artifacts.has(row.path)]
    replayed = Replayed(frozenset(needed_samples(run.ledger, saved)))
    for event, actions in replay_events(run.ledger, plan):
        replayed.add(event, actions)
        run.monitor.note(event, actions, plan, is_replay=True)
    if not replayed.is_new:
        run.monitor.resumed(plan)
    return replayed


def _producers_of(shards: AbstractSet[int], ledger: Ledger, config: RunConfig) -> Producers:
    """The producers of these shards, from another replay."""
    replayed = Replayed(frozenset(shards))
    for event, actions in replay_events(ledger, Plan(config)):
        replayed.add(event, actions)
    return replayed.producers


def finished_at(config: RunConfig, layout: RunLayout) -> int | None:
    """The last step of a finished run; None if the run is not finished or has no student.

    A run that gave up (no sample passed the filters) is not finished. A run whose recorded
    decisions differ from this plan's is not finished either; resuming reports the difference.
    """
    if not (layout.student.is_dir() and recorded_events(layout.ledger_db)):
        return None
    plan = Plan(config)
    is_done = False
    with Ledger.reader(layout.ledger_db) as ledger, suppress(RunError):
        for _, actions in replay_events(ledger, plan):
            is_done = any(isinstance(a, ev.Stop) and not a.failed for a in actions)
    return plan.step if is_done else None


def _recorded_stats(shards: Collection[int], ledger: Ledger) -> dict[int, SampleStats]:
    """The recorded stats of the samples of these shards after generation, by sample id."""
    found: dict[int, SampleStats] = {}
    for _, kind, payload in ledger.events():
        if kind == "ShardGenerated" and payload["shard"] in shards:
            payload.pop("digest", None)
            event = ev.decode(kind, payload)
            assert isinstance(event, ev.ShardGenerated)
            found |= {stats.sample_id: stats for stats in event.stats}
    return found


# 2. Find missing files. Needs are transitive: regenerating a snapshot repeats segments and so needs
# their shards; regenerating a shard needs its snapshot.


@dataclass(frozen=True, slots=True)
class MissingShard:
    """A shard file to regenerate, with its producer and the snapshots that it needs."""

    producer: Producer
    path: Path
    versions: frozenset[int]

    @property
    def newest(self) -> int:
        """The newest of its snapshots."""
        return max(self.versions)


@dataclass(frozen=True, slots=True)
class MissingFiles:
    """The files to regenerate: `shards`, and snapshots by version with their `steps`.

    `needed`: the samples that the run still reads, by shard. `checkpoints`: existing but damaged
    checkpoints, by step.
    """

    shards: tuple[MissingShard, ...]
    steps: dict[int, int]
    needed: dict[int, set[int]]
    checkpoints: dict[int, Path]

    @property
    def versions(self) -> list[int]:
        """The snapshots, missing or not, that regeneration needs; oldest first."""
        return sorted({shard.newest for shard in self.shards} | set(self.steps))

    def of(self, version: int) -> list[MissingShard]:
        """The shards whose newest snapshot is `version`, rollouts before scores."""
        found = [shard for shard in self.shards if shard.newest == version]
        return sorted(found, key=lambda shard: isinstance(shard.producer, ev.Score))


def find_missing(
    run: OpenRun, producers_of: ProducersOf, versions: Collection[int], *, is_over: bool
) -> MissingFiles:
    """The files to regenerate so that snapshots `versions` and all needed samples exist."""
    ledger, layout, artifacts = run.ledger, run.layout, run.artifacts
    published = {row.version: row.step for row in ledger.snapshots()}
    there = {row.step: row.path for row in ledger.checkpoints() if artifacts.has(row.path)}
    saved = [step for step, path in there.items() if artifacts.is_whole(path)]

    @cache
    def is_lost(version: int) -> bool:
        return version in published and not artifacts.is_whole(layout.snapshot(version))

    @cache
    def is_broken(path: Path, kind: Kind) -> bool:
        return not artifacts.is_whole(path, kind)

    lost: set[int] = set()
    while True:
        steps = {version: published[version] for version in lost}
        until = min(steps.values(), default=None)
        needed = needed_samples(ledger, saved, until=until, is_over=is_over)
        producers = [made for made in producers_of(needed.keys()) if made.shard in needed]
        # A scored shard holds its rollouts, so their own file is no longer read.
        scored = {made.shard for made in producers if isinstance(made, ev.Score)}
        scored -= {shard for shard in scored if is_broken(layout.scored(shard), "scored")}
        producers = [p for p in producers if isinstance(p, ev.Score) or p.shard not in scored]
        files = [(producer, *_file(producer, layout)) for producer in producers]
        broken = [
            MissingShard(producer, path, _versions(producer, layout, artifacts))
            for producer, path, kind in files
            if is_broken(path, kind)
        ]
        more = set(filter(is_lost, set(versions).union(*(shard.versions for shard in broken))))
        if more == lost:
            damaged = {step: path for step, path in there.items() if step not in saved}
            return MissingFiles(tuple(broken), steps, needed, damaged)
        lost = more


def _versions(producer: Producer, layout: RunLayout, artifacts: ArtifactStore) -> frozenset[int]:
    """The snapshots that generated a shard's samples: several if servers refreshed within it."""
    versions = {producer.version}
    if isinstance(producer, ev.Score):
        versions |= artifacts.versions(layout.rollouts(producer.shard))
    return frozenset(versions)


def _file(producer: Producer, layout: RunLayout) -> tuple[Path, Kind]:
    if isinstance(producer, ev.Score):
        return layout.scored(producer.shard), "scored"
    return layout.rollouts(producer.shard), "rollouts"


def needed_samples(
    ledger: Ledger, saved: Sequence[int], *, until: int | None = None, is_over: bool = False
) -> dict[int, set[int]]:
    """By shard, the samples of segments to repeat, and (unless `is_over`) the live samples.

    The trainer repeats segments from the newest checkpoint in `saved` that is not after `until`.
    """
    start = max((step for step in saved if until is None or step <= until), default=0)
    needed: dict[int, set[int]] = {}
    for segment in ledger.segments_after(start):
        for ref in segment.refs:
            needed.setdefault(ref.shard, set()).add(ref.sample_id)
    for row in [] if is_over else ledger.samples("live"):
        needed.setdefault(row.shard, set()).add(row.sample_id)
    return needed


# 3. Regenerate.


async def restore_files(
    run: OpenRun, plan: Plan, dispatcher: Dispatcher, replayed: Replayed
) -> list[str]:
    """After a replay: remove files newer than the ledger, and regenerate needed missing files.

    Returns a message for each regenerated kind of file. Clears the producers of `replayed`.

    Raises:
        RunError: a file cannot be regenerated.
        StoreError: a regenerated file would differ from the original.
    """
    # A power loss can lose recorded events, which makes files newer than the ledger useless.
    run.artifacts.drop_newer(run.layout.snapshots, plan.version)
    saved = run.ledger.last_checkpoint()
    run.artifacts.drop_newer(run.layout.checkpoints, saved.step if saved else 0)

    def producers_of(shards: AbstractSet[int]) -> Collection[Producer]:
        if not shards <= replayed.shards:
            replayed.producers = _producers_of(shards, run.ledger, run.config)
            replayed.shards = frozenset(shards)
        return replayed.producers.values()

    is_over = plan.is_stopped
    versions = range(plan.oldest_version_needed, plan.version + 1)
    found = await regenerate(
        run, dispatcher, producers_of, versions=() if is_over else versions, is_over=is_over
    )
    replayed.producers.clear()
    return found


async def regenerate(
    run: OpenRun,
    dispatcher: Dispatcher,
    producers_of: ProducersOf,
    *,
    versions: Collection[int] = (),
    is_over: bool = False,
) -> list[str]:
    """Repeat the actions that produced the needed shards that are missing or damaged.

    Snapshots `versions`, and snapshots that shards need, are published again, oldest first, because
    a snapshot needs shards of earlier ones. A finished run (`is_over`) needs only the samples that
    the trainer repeats. Returns a message for each regenerated kind of file. Errors are as in
    `restore_files`.
    """
    missing = find_missing(run, producers_of, versions, is_over=is_over)
    if not dispatcher.rewrites_exactly:
        _check_is_reproducible(missing)
    dispatcher.pass_over(missing.checkpoints)
    lost = {s.producer.shard for s in missing.shards if isinstance(s.producer, ev.Generate)}
    stats = _recorded_stats(lost, run.ledger) if lost else {}
    found = []
    for version in missing.versions:
        if version in missing.steps:
            await dispatcher.republish(version, missing.steps[version])
            found.append(f"regenerated: snapshot v{version}, which was missing or damaged")
        for shard in missing.of(version):
            needed = missing.needed[shard.producer.shard]
            run.artifacts.remove(shard.path)
            event = await _produce(shard, dispatcher, needed)
            if isinstance(event, ev.ShardGenerated):
                _check_is_same(shard.path, event, stats, needed)
    if missing.shards:
        found.append(
            f"regenerated: {counted(len(missing.shards), 'missing or damaged shard file')}"
        )
    return found


def _check_is_reproducible(missing: MissingFiles) -> None:
    for shard in missing.shards:
        if isinstance(shard.producer, ev.Generate):
            raise StoreError(
                f"{shard.path} is missing or damaged, and a server cannot generate the same text "
                "again: restore the file, or start a new run"
            )


async def _produce(
    shard: MissingShard, dispatcher: Dispatcher, needed: set[int]
) -> ev.ShardGenerated | ev.ShardScored:
    """Run the shard's producer, and repeat it after each loss of the worker."""
    cause = ""
    for _ in range(dispatcher.max_tries):
        event = await dispatcher.run(shard.producer)
        if isinstance(event, ev.ShardGenerated | ev.ShardScored):
            lost = [f"sample {i}: {reason}" for i, reason in event.failed if i in needed]
            if not lost:
                return event
            cause = lost[0]
            break
        assert isinstance(event, ev.ShardFailed)
        cause = event.error
    raise RunError(
        f"{shard.path} could not be regenerated: {cause}; fix the cause and use --resume"
    )


def _check_is_same(
    path: Path, event: ev.ShardGenerated, recorded: Mapping[int, SampleStats], needed: set[int]
) -> None:
    """Check that regenerated samples equal the recorded ones, since another device may differ."""
    for stats in event.stats:
        before = recorded.get(stats.sample_id)
        if stats.sample_id in needed and before != stats:
            raise StoreError(
                f"{path} was lost, and this machine generates another sample {stats.sample_id} "
                "(another device, library version or generate.batch_size): resume as it was, or "
                "start a new run"
            )
