"""The one asyncio loop: events in, decisions recorded, actions out.

Consumes: events from running actions. Produces: tasks, one an action, and the ledger's rows.
Waits for: the first of the running tasks. Unblocked by: any task's end, or a request to stop.
An event and everything decided upon it are recorded in one transaction before any of it is carried
out, several events in one where they come at once; a crash at any moment is repaired by replaying
the events (`_replay`). Holds what is under way, nothing of samples that have left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from npd.control import codec
from npd.control import events as ev
from npd.control.damage import needed_samples
from npd.control.dispatch import Dispatcher
from npd.control.monitor import Monitor
from npd.control.place import Folder, Place
from npd.control.plan import Plan
from npd.control.repair import repair
from npd.control.replay import Maker, Makers, makers_of, retold
from npd.errors import RunError
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.types import Segment


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended: `done`, or interrupted (resumable), after so many steps."""

    step: int
    is_done: bool


class Controller:
    """Drives one run from its first event, or from wherever its ledger stands, to its end."""

    def __init__(
        self,
        plan: Plan,
        dispatcher: Dispatcher,
        ledger: Ledger,
        layout: RunLayout,
        monitor: Monitor,
        *,
        keep_checkpoints: int = 1,
        place: Place | None = None,
    ) -> None:
        self._plan, self._dispatcher = plan, dispatcher
        self._ledger, self._layout, self._monitor = ledger, layout, monitor
        self._running: dict[asyncio.Task[ev.Event], ev.Action] = {}
        self._ended: asyncio.Queue[asyncio.Task[ev.Event]] = asyncio.Queue()
        self._keep, self._place = keep_checkpoints, place or Folder()
        self._segments: dict[int, Segment] = {}
        self._num_shards = 0
        self._makers: Makers = {}
        # The plan's step is what has been decided; this is what has been trained.
        self._trained = 0
        self._covered: frozenset[int] = frozenset()
        self._stop: ev.Stop | None = None
        self._interrupted = asyncio.Event()

    def interrupt(self) -> None:
        """Finish what is running, start nothing new, save, and end."""
        self._monitor.message("stopping: waiting for running work, then saving (again to stop now)")
        self._interrupted.set()

    async def run(self, num_prompts: int, *, has_heldout: bool) -> Ending:
        """Run to the end.

        Raises:
            RunError: nothing gets through the filters, or a worker cannot be kept alive.
        """
        outstanding = self._replay()
        await self._dispatcher.load()
        await self._repair()
        if has_heldout and not self._plan.is_stopped:
            await self._dispatcher.prepare_heldout()
        if self._trained:
            await self._dispatcher.restore()
        if self._plan.is_stopped:
            return await self._finish()
        is_new = outstanding is None
        first = self._take([ev.Started(num_prompts)]) if outstanding is None else outstanding
        assert first, "a run that has not stopped has something to do"
        self._monitor.message("run started" if is_new else f"resumed at step {self._trained}")
        try:
            return await self._loop(first)
        finally:
            await self._cancel()

    async def _repair(self) -> None:
        is_over = self._plan.is_stopped
        # What a loss of power left the ledger without belongs to another history.
        self._place.forget(self._layout.snapshots, self._plan.version)
        saved = self._ledger.last_checkpoint()
        self._place.forget(self._layout.checkpoints, saved.step if saved else 0)
        versions = range(self._plan.oldest_version_needed, self._plan.version + 1)
        made = await repair(
            self._makers_of,
            self._dispatcher,
            self._ledger,
            self._layout,
            versions=() if is_over else versions,
            is_over=is_over,
            place=self._place,
        )
        for what in made:
            self._monitor.message(what)
        self._makers.clear()

    def _makers_of(self, shards: AbstractSet[int]) -> Collection[Maker]:
        if not shards <= self._covered:
            self._makers = makers_of(shards, self._ledger, self._plan)
            self._covered = frozenset(shards)
        return self._makers.values()

    async def _loop(self, actions: list[ev.Action]) -> Ending:
        self._launch(actions)
        while self._running:
            ended = await self._next_ended()
            failed = [task for task in ended if task.exception() is not None]
            self._launch(self._take([task.result() for task in ended if task not in failed]))
            if self._stop is not None:
                return await self._finish()
            for task in failed:
                task.result()
        await self._dispatcher.save_now(self._trained)
        self._ledger.add_checkpoint(self._trained, self._layout.checkpoint(self._trained))
        return Ending(self._trained, is_done=False)

    def _launch(self, actions: list[ev.Action]) -> None:
        for action in actions:
            if isinstance(action, ev.Stop):
                self._stop = action
            elif not isinstance(action, ev.Retire) and not self._interrupted.is_set():
                task = asyncio.create_task(self._dispatcher.run(action))
                task.add_done_callback(self._ended.put_nowait)
                self._running[task] = action

    async def _next_ended(self) -> list[asyncio.Task[ev.Event]]:
        """The tasks that have ended, at least one.

        In the order they were launched, so that ties do not depend on the event loop.
        """
        ended = {await self._ended.get()}
        while not self._ended.empty():
            ended.add(self._ended.get_nowait())
        ordered = [task for task in self._running if task in ended]
        for task in ordered:
            del self._running[task]
        return ordered

    async def _finish(self) -> Ending:
        await self._cancel()
        student = await self._export() if self._trained else None
        if self._stop is not None and self._stop.failed:
            counts = ", ".join(
                f"{reason} {count}" for (_, reason), count in self._ledger.reasons().items()
            )
            so_far = "" if student is None else f", from the student so far in {student}"
            raise RunError(
                f"the run stopped at step {self._trained}: {self._stop.reason} ({counts}). Start a "
                f"new run{so_far}, with a looser filter (filter.*) or, if most are truncated, a "
                "larger generate.max_new_tokens"
            )
        return Ending(self._trained, is_done=True)

    async def _export(self) -> Path:
        await self._dispatcher.export()
        self._place.bring(self._layout.student)
        return self._layout.student

    async def _cancel(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        self._running.clear()

    def _take(self, events: Sequence[ev.Event]) -> list[ev.Action]:
        """Decide upon events, and record all of it before anything is carried out."""
        taken: list[tuple[ev.Event, list[ev.Action]]] = []
        with self._ledger.transaction():
            for event in events:
                if not self._plan.is_stopped:
                    taken.append((event, self._plan.handle(event)))
                    self._book(*taken[-1])
        for event, actions in taken:
            self._monitor.note(event, actions, self._plan)
        if any(isinstance(event, ev.SnapshotPublished | ev.CheckpointSaved) for event, _ in taken):
            self._prune()
        return [action for _, actions in taken for action in actions]

    def _book(self, event: ev.Event, actions: list[ev.Action]) -> None:
        kind, payload = codec.encode(event)
        self._ledger.append_event(kind, {**payload, "digest": codec.digest(actions)})
        self._book_event(event)
        for action in actions:
            self._book_action(action)

    def _book_event(self, event: ev.Event) -> None:
        match event:
            case ev.SnapshotPublished(version, step, checksum):
                self._ledger.add_snapshot(version, step, self._layout.snapshot(version), checksum)
            case ev.CheckpointSaved(step):
                self._ledger.add_checkpoint(step, self._layout.checkpoint(step))
            case ev.ShardGenerated(shard):
                self._ledger.set_shard(shard, "generated")
            case ev.ShardScored(shard):
                self._ledger.set_shard(shard, "scored")
            case ev.SegmentTrained(report):
                self._trained = report.steps[-1].step
                segment = self._segments.pop(report.segment)
                self._ledger.add_segment(segment)
                self._ledger.add_uses(ref.sample_id for ref in segment.refs)

    def _book_action(self, action: ev.Action) -> None:
        match action:
            case ev.Generate(shard, version, asks):
                if shard >= self._num_shards:  # a second try asks for the same samples
                    samples = [(a.sample_id, a.prompt, version) for a in asks]
                    self._ledger.add_samples(shard, samples)
                    self._num_shards = shard + 1
            case ev.Train(segment):
                self._segments[segment.index] = segment
            case ev.Retire(samples):
                self._ledger.set_outcomes(samples)

    def _replay(self) -> list[ev.Action] | None:
        """Bring the plan to where the ledger's events leave it; returns what was under way.

        None when there is no event yet. Of what is done, what made shards that are still needed is
        kept (`_makers`).
        """
        pending: dict[tuple[str, int], ev.Action] | None = None
        saved = [row.step for row in self._ledger.checkpoints() if self._place.has(row.path)]
        self._covered = frozenset(needed_samples(self._ledger, saved))
        for event, actions in retold(self._ledger, self._plan):
            if isinstance(event, ev.SegmentTrained):
                self._trained = event.report.steps[-1].step
                del self._segments[event.report.segment]
            pending = pending or {}
            done = pending.pop(ev.key(event), None)
            is_made = not isinstance(event, ev.ShardFailed)
            if is_made and isinstance(done, Maker) and done.shard in self._covered:
                self._makers[ev.key(done)] = done
            for action in actions:
                self._remember(action, pending)
            self._stop = next((a for a in actions if isinstance(a, ev.Stop)), None)
            self._monitor.note(event, actions, self._plan, is_replay=True)
        if pending is None:
            return None
        self._monitor.resumed(self._plan)
        return list(pending.values())

    def _remember(self, action: ev.Action, pending: dict[tuple[str, int], ev.Action]) -> None:
        """A decision that is recorded already: it is under way until its event comes."""
        if not isinstance(action, ev.Retire):
            pending[ev.key(action)] = action
        if isinstance(action, ev.Train):
            self._segments[action.segment.index] = action.segment
        elif isinstance(action, ev.Generate):
            self._num_shards = max(self._num_shards, action.shard + 1)

    def _prune(self) -> None:
        """Point LATEST at the newest snapshot; remove those nobody needs, and old checkpoints."""
        self._place.point(self._layout.snapshots, self._plan.version)
        oldest = self._plan.oldest_version_needed
        self._place.prune(self._layout.snapshots, range(oldest, self._plan.version + 1))
        saved = [row.step for row in self._ledger.checkpoints()][-self._keep :]
        self._place.prune(self._layout.checkpoints, saved)
