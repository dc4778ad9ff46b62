"""The one asyncio loop: events in, decisions recorded, actions out.

Consumes: events from running actions. Produces: tasks, one an action, and the ledger's rows.
Waits for: the first of the running tasks. Unblocked by: any task's end, or a request to stop.
An event and everything decided upon it are recorded in one transaction before any of it is carried
out; a crash at any moment is repaired by replaying the events (`_replay`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from npd.control import events as ev
from npd.control.dispatch import Dispatcher
from npd.control.monitor import Monitor
from npd.control.place import Folder, Place
from npd.control.plan import Plan
from npd.control.repair import repair
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
        self._keep, self._place = keep_checkpoints, place or Folder()
        self._segments: dict[int, Segment] = {}
        self._shards: set[int] = set()
        self._makers: dict[tuple[str, int], ev.Generate | ev.Score] = {}
        # The plan's step is what has been decided; this is what has been trained.
        self._trained = 0
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
        made = await repair(
            self._makers.values(), self._dispatcher, self._ledger, self._layout, self._place
        )
        if made:
            self._monitor.message(f"{made} missing shard files were made again")
        self._makers.clear()
        if has_heldout and not self._plan.is_stopped:
            await self._dispatcher.prepare_heldout()
        if self._trained:
            await self._dispatcher.restore()
        if self._plan.is_stopped:
            return await self._finish()
        is_new = outstanding is None
        first = self._take(ev.Started(num_prompts)) if outstanding is None else outstanding
        assert first, "a run that has not stopped has something to do"
        self._monitor.message("run started" if is_new else f"resumed at step {self._trained}")
        try:
            return await self._loop(first)
        finally:
            await self._cancel()

    async def _loop(self, actions: list[ev.Action]) -> Ending:
        self._launch(actions)
        while self._running:
            done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            # In the order they were launched, so that ties do not depend on the event loop.
            for task in [task for task in self._running if task in done]:
                del self._running[task]
                if self._stop is None:
                    self._launch(self._take(task.result()))
            if self._stop is not None:
                return await self._finish()
        await self._dispatcher.save_now(self._trained)
        self._ledger.add_checkpoint(self._trained, self._layout.checkpoint(self._trained))
        return Ending(self._trained, is_done=False)

    def _launch(self, actions: list[ev.Action]) -> None:
        for action in actions:
            if isinstance(action, ev.Stop):
                self._stop = action
            elif not isinstance(action, ev.Retire) and not self._interrupted.is_set():
                self._running[asyncio.create_task(self._dispatcher.run(action))] = action

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

    def _take(self, event: ev.Event) -> list[ev.Action]:
        """Decide upon an event, and record both before anything is carried out."""
        actions = self._plan.handle(event)
        kind, payload = ev.encode(event)
        with self._ledger.transaction():
            self._ledger.append_event(kind, {**payload, "digest": ev.digest(actions)})
            self._book_event(event)
            for action in actions:
                self._book_action(action)
        self._monitor.note(event, actions, self._plan)
        if isinstance(event, ev.SnapshotPublished | ev.CheckpointSaved):
            self._prune()
        return actions

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
                self._ledger.add_uses(
                    ref.sample_id
                    for step in segment.steps
                    for rows in step.ranks
                    for row in rows
                    for ref in row.samples
                )

    def _book_action(self, action: ev.Action) -> None:
        match action:
            case ev.Generate(shard, version, asks):
                if shard not in self._shards:  # a second try asks for the same samples
                    samples = [(a.sample_id, a.prompt, version) for a in asks]
                    self._ledger.add_samples(shard, samples)
                    self._shards.add(shard)
            case ev.Train(segment):
                self._segments[segment.index] = segment
            case ev.Retire(samples):
                self._ledger.set_outcomes(samples)

    def _replay(self) -> list[ev.Action] | None:
        """Bring the plan to where the ledger's events leave it; returns what was under way.

        None when there is no event yet.
        """
        pending: dict[tuple[str, int], ev.Action] | None = None
        for seq, kind, payload in self._ledger.events():
            expected = payload.pop("digest")
            event = ev.decode(kind, payload)
            actions = self._plan.handle(event)
            if ev.digest(actions) != expected:
                raise RunError(
                    f"event {seq} of {self._ledger.path} led to other decisions than now: the run "
                    "was made by another version of npd or another config; resume with that one"
                )
            if isinstance(event, ev.SegmentTrained):
                self._trained = event.report.steps[-1].step
                del self._segments[event.report.segment]
            pending = pending or {}
            done = pending.pop(ev.key(event), None)
            if isinstance(done, ev.Generate | ev.Score):
                self._makers[ev.key(done)] = done
            pending |= {ev.key(a): a for a in actions if not isinstance(a, ev.Retire)}
            self._segments |= {
                a.segment.index: a.segment for a in actions if isinstance(a, ev.Train)
            }
            self._monitor.note(event, actions, self._plan, is_replay=True)
        if pending is None:
            return None
        self._shards = set(self._ledger.shards())
        return list(pending.values())

    def _prune(self) -> None:
        """Point LATEST at the newest snapshot; remove those nobody needs, and old checkpoints."""
        self._place.point(self._layout.snapshots, self._plan.version)
        oldest = self._plan.oldest_version_needed
        self._place.prune(self._layout.snapshots, range(oldest, self._plan.version + 1))
        saved = [row.step for row in self._ledger.checkpoints()][-self._keep :]
        self._place.prune(self._layout.checkpoints, saved)
