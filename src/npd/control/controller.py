"""The asyncio loop of a run: takes events, records decisions, launches actions.

Consumes: events from running actions, and the time since the last checkpoint. Produces: one task
per action, and the ledger's rows. Waits for: the first running task to end. Unblocked by: the end
of any task, the time of a checkpoint, or a request to stop.
An event and the actions decided on it are recorded in one transaction before any of the actions
starts; events that arrive together share a transaction. After a crash at any moment the events are
replayed (`resume`). Keeps only running actions, and nothing about finalized samples.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from npd.control.dispatcher import Dispatcher
from npd.control.resume import replay, restore_files
from npd.control.run_directory import OpenRun
from npd.errors import RunError
from npd.schedule import events as ev
from npd.schedule.plan import Plan
from npd.types import Segment


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended: done, or interrupted and resumable, after `step` optimiser steps."""

    step: int
    is_done: bool


class Controller:
    """Drives one run to its end, from its first event or from the end of its ledger."""

    def __init__(self, run: OpenRun, plan: Plan, dispatcher: Dispatcher) -> None:
        self._run, self._plan, self._dispatcher = run, plan, dispatcher
        self._ledger, self._layout, self._monitor = run.ledger, run.layout, run.monitor
        self._artifacts = run.artifacts
        self._running: dict[asyncio.Task[ev.Event], ev.Action] = {}
        self._ended: asyncio.Queue[asyncio.Task[ev.Event]] = asyncio.Queue()
        self._segments: dict[int, Segment] = {}
        self._num_shards = 0
        # Optimiser steps trained; the plan's step counts steps decided.
        self._trained = 0
        self._clock: asyncio.Task[ev.Event] | None = None
        self._copied_at = 0
        self._stop: ev.Stop | None = None
        self._interrupted = asyncio.Event()

    def interrupt(self) -> None:
        """Wait for running work, start nothing new, save, and end."""
        wait = self._monitor.wait_text()
        self._monitor.message(
            f"stopping: waiting for running work, then saving ({wait}; Ctrl-C again stops at once)"
        )
        self._interrupted.set()

    async def run(self) -> Ending:
        """Run to the end.

        Raises:
            RunError: no sample passes the filters, or a worker cannot be kept alive.
        """
        is_new, unfinished = await self._recover()
        if not self._plan.is_stopped:
            await self._dispatcher.prepare_heldout()
        if self._trained:
            writes = [a.step for a in unfinished if isinstance(a, ev.WriteCheckpoint)]
            await self._dispatcher.restore(() if self._plan.is_stopped else writes)
        if self._plan.is_stopped:
            return await self._finish()
        num_prompts = len(self._run.inputs.prompts)
        first = self._take([ev.Started(num_prompts)]) if is_new else unfinished
        assert first, "a run that has not stopped has an action to launch"
        self._monitor.message("run started" if is_new else f"resumed at step {self._trained}")
        try:
            return await self._loop(first)
        finally:
            await self._cancel()

    async def _recover(self) -> tuple[bool, list[ev.Action]]:
        """Replay the events, load the workers, regenerate missing files.

        Returns whether the run is new, and the actions that are decided but not done.
        """
        replayed = replay(self._run, self._plan)
        self._trained, self._segments = replayed.trained, replayed.segments
        self._num_shards, self._stop = replayed.num_shards, replayed.stop
        saved = self._ledger.last_checkpoint()
        self._copied_at = saved.step if saved else 0
        await self._dispatcher.load()
        for line in await restore_files(self._run, self._plan, self._dispatcher, replayed):
            self._monitor.message(line)
        return replayed.is_new, list(replayed.unfinished.values())

    async def _loop(self, actions: list[ev.Action]) -> Ending:
        self._launch(actions)
        self._start_clock()
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
            elif not isinstance(action, ev.Finalize) and not self._interrupted.is_set():
                task = asyncio.create_task(self._dispatcher.run(action))
                task.add_done_callback(self._ended.put_nowait)
                self._running[task] = action

    async def _next_ended(self) -> list[asyncio.Task[ev.Event]]:
        """Wait for a task to end; returns all ended tasks.

        They are in launch order, so that ties do not depend on the event loop.
        """
        ended = {await self._ended.get()}
        while not self._ended.empty():
            ended.add(self._ended.get_nowait())
        ordered = [task for task in self._running if task in ended]
        for task in ordered:
            del self._running[task]
        if self._clock is None or self._clock not in ended:
            return ordered
        if self._trained > self._copied_at:
            return [*ordered, self._clock]
        self._start_clock()
        return ordered

    def _start_clock(self) -> None:
        """Tell the plan when `checkpoint.every_minutes` have passed from now."""
        self._stop_clock()
        minutes = self._run.config.checkpoint.every_minutes
        if minutes is not None:
            self._clock = asyncio.create_task(_checkpoint_due(60 * minutes))
            self._clock.add_done_callback(self._ended.put_nowait)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.remove_done_callback(self._ended.put_nowait)
            self._clock.cancel()

    async def _finish(self) -> Ending:
        await self._cancel()
        student = await self._export() if self._trained else None
        if self._stop is not None and self._stop.failed:
            counts = ", ".join(
                f"{reason} {count}" for (_, reason), count in self._ledger.reasons().items()
            )
            origin = "" if student is None else f" from the student in {student}"
            raise RunError(
                f"the run stopped at step {self._trained}: {self._stop.reason} ({counts}). Start a "
                f"new run{origin}, with a looser filter (filter.*) or, if most samples are "
                "truncated, a larger generate.max_new_tokens"
            )
        return Ending(self._trained, is_done=True)

    async def _export(self) -> Path:
        await self._dispatcher.export()
        self._artifacts.fetch(self._layout.student)
        return self._layout.student

    async def _cancel(self) -> None:
        for task in self._running:
            task.cancel()
        self._stop_clock()
        await asyncio.gather(*self._running, return_exceptions=True)
        self._running.clear()

    def _take(self, events: Sequence[ev.Event]) -> list[ev.Action]:
        """Decide on events, and record events and decisions before any action starts."""
        taken: list[tuple[ev.Event, list[ev.Action]]] = []
        with self._ledger.transaction():
            for event in events:
                if not self._plan.is_stopped:
                    taken.append((event, self._plan.handle(event)))
                    self._record(*taken[-1])
        for event, actions in taken:
            self._monitor.note(event, actions, self._plan)
        if any(isinstance(event, ev.SnapshotPublished | ev.CheckpointSaved) for event, _ in taken):
            self._prune()
        return [action for _, actions in taken for action in actions]

    def _record(self, event: ev.Event, actions: list[ev.Action]) -> None:
        kind, payload = ev.encode(event)
        self._ledger.append_event(kind, {**payload, "digest": ev.digest(actions)})
        self._record_event(event)
        for action in actions:
            self._record_action(action)

    def _record_event(self, event: ev.Event) -> None:
        match event:
            case ev.SnapshotPublished(version, step, checksum):
                self._ledger.add_snapshot(version, step, self._layout.snapshot(version), checksum)
            case ev.CheckpointCopied(step):
                self._copied_at = step
                self._start_clock()
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

    def _record_action(self, action: ev.Action) -> None:
        match action:
            case ev.Generate(shard, version, requests):
                if shard >= self._num_shards:  # the first attempt, not a retry
                    samples = [(r.sample_id, r.prompt, version) for r in requests]
                    self._ledger.add_samples(shard, samples)
                    self._num_shards = shard + 1
            case ev.Train(segment):
                self._segments[segment.index] = segment
            case ev.Finalize(samples):
                self._ledger.set_outcomes(samples)

    def _prune(self) -> None:
        """Point LATEST at the newest snapshot; remove unneeded snapshots and old checkpoints."""
        self._artifacts.set_latest(self._layout.snapshots, self._plan.version)
        oldest = self._plan.oldest_version_needed
        self._artifacts.prune(self._layout.snapshots, range(oldest, self._plan.version + 1))
        saved = [row.step for row in self._ledger.checkpoints()][
            -self._run.config.checkpoint.keep :
        ]
        self._artifacts.prune(self._layout.checkpoints, saved)


async def _checkpoint_due(seconds: float) -> ev.Event:
    await asyncio.sleep(seconds)
    return ev.CheckpointDue()
