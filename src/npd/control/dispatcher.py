"""Runs actions on the workers, and retries after the loss of a worker.

Consumes: actions. Produces: one event and one span per action.
Waits for: an idle generator or scorer, or the trainer's turn. Unblocked by: the worker's reply, or
its loss. A lost worker is restarted here. A generator's or scorer's shard is reported as
`ShardFailed`, and `SampleTracker.retry` decides whether it is requested again. A trainer returns to
its last checkpoint, repeats the segments recorded since, and then the call. A checkpoint that was
being written when the trainer was lost is copied again on the way, at its step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from npd.control.placement import WorkerSet
from npd.control.run_directory import OpenRun
from npd.errors import RunError, StoreError, WorkerLostError
from npd.observe.trace import Span, steady_time
from npd.runtime import Worker
from npd.schedule import events as ev
from npd.types import SampleRequest
from npd.workers import GenerateTask, ScoreTask
from npd.workers.tasks import ShardResult

T = TypeVar("T")
# Pauses between the questions whether a checkpoint is written: the first, and the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5
# A shorter wait of one checkpoint for another is not worth a line.
_TOLD_SECONDS = 5.0


class Dispatcher:
    """Runs actions on the workers, and reports each call to the run's monitor."""

    def __init__(self, run: OpenRun, workers: WorkerSet) -> None:
        self._run, self._config, self._workers = run, run.config, workers
        self._ledger, self._artifacts, self._monitor = run.ledger, run.artifacts, run.monitor
        self._heldout = tuple(run.inputs.heldout)
        self._generators: asyncio.Queue[Worker] = _queue(workers.generators)
        self._scorers: asyncio.Queue[Worker] = _queue(workers.scorers)
        self._trainer_turn = asyncio.Lock()
        self._is_trainer_behind = False
        self._damaged: set[int] = set()
        # Steps whose checkpoint was decided and is not known to be on disk.
        self._unsaved: set[int] = set()
        self._has_told_of_waiting = False
        self._served: dict[str, int] = {}

    @property
    def max_tries(self) -> int:
        """The number of attempts at a call whose worker is lost."""
        return self._config.schedule.max_tries

    @property
    def rewrites_exactly(self) -> bool:
        """Whether equal requests give equal samples; servers do not promise it."""
        return not self._config.generate.is_served

    async def load(self) -> None:
        """Make every worker load its models: in parallel, or in turn if they share a process."""
        workers = (*self._workers.generators, *self._workers.scorers, self._workers.trainer)
        loads = [self._load(worker) for worker in workers]
        if self._config.runtime.kind == "inline":
            for load in loads:
                await load
        else:
            await asyncio.gather(*loads)

    async def _load(self, worker: Worker) -> None:
        await self._retry_after_loss(
            lambda: self._call(worker, "ready", doing="load"), worker.restart
        )

    async def run(self, action: ev.Action) -> ev.Event:
        """Run `action`; returns its event."""
        match action:
            case ev.Generate():
                return await self._generate(action)
            case ev.Score():
                return await self._score(action)
            case ev.WriteCheckpoint(step):
                await self._until_saved(step)
                return ev.CheckpointSaved(step)
            case _:
                return await self._with_trainer(lambda: self._trainer_event(action))

    async def prepare_heldout(self) -> int:
        """Generate and score the held-out responses; returns their number of tokens.

        0 if there are no held-out prompts or no scorer.
        """
        if not (self._heldout and self._workers.scorers):
            return 0
        worker = self._workers.scorers[0]

        async def attempt() -> int:
            made = await self._call(worker, "prepare_heldout", self._heldout, doing="held-out")
            self._pass_on(worker, made.notes)
            return int(made.num_tokens)

        return await self._retry_after_loss(attempt, worker.restart)

    async def restore(self, unsaved: Collection[int] = ()) -> None:
        """Bring the trainer to the end of the ledger: the last checkpoint, then later segments.

        `unsaved` are the steps whose checkpoints were being written; they are copied on the way.
        """
        self._is_trainer_behind = True
        self._unsaved.update(unsaved)
        await self._with_trainer(_nothing)

    def pass_over(self, checkpoints: Mapping[int, Path]) -> None:
        """Mark these checkpoints, by step, as damaged, so that they are never restored."""
        for step, path in sorted(checkpoints.items()):
            self._damaged.add(step)
            self._monitor.message(f"{path} is damaged: using an earlier checkpoint")

    async def republish(self, version: int, step: int) -> str:
        """Publish the student after `step` again; returns the checksum.

        Requires a freshly started trainer, and leaves one that must catch up.
        """
        self._is_trainer_behind = True
        trainer = self._workers.trainer

        async def attempt() -> str:
            await self._catch_up(step)
            return str(await self._call(trainer, "publish", version, doing="publish"))

        async with self._trainer_turn:
            checksum = await self._retry_after_loss(attempt, trainer.restart)
            await trainer.restart()
        self._is_trainer_behind = True
        return checksum

    async def export(self) -> str:
        """Write the final student; returns its directory."""
        return str(await self._with_trainer(self._on_trainer("export", "export")))

    async def save_now(self, step: int) -> None:
        """Save the trainer outside the plan, after an interruption."""
        await self._with_trainer(lambda: self._copy(step))
        await self._until_saved(step)

    async def _generate(self, action: ev.Generate) -> ev.Event:
        prompts = self._run.inputs.prompts
        requests = tuple(
            SampleRequest(r.sample_id, r.seed, prompts[r.prompt]) for r in action.requests
        )
        task = GenerateTask(action.shard, action.version, requests)
        worker = await self._generators.get()
        try:
            await self._refresh(worker, action.version)
            made = await self._call(worker, "generate", task, doing="generate", shard=action.shard)
            self._pass_on(worker, made.notes)
            return ev.ShardGenerated(action.shard, made.stats, _reasons(made))
        except WorkerLostError as error:
            self._served.pop(worker.name, None)
            await worker.restart()
            return ev.ShardFailed(action.shard, "generate", str(error))
        finally:
            self._generators.put_nowait(worker)

    async def _refresh(self, worker: Worker, version: int) -> None:
        """Sync a snapshot to a generator's servers, in its own span: the first takes minutes."""
        generate = self._config.generate
        if not generate.is_served or self._served.get(worker.name) == version:
            return
        if generate.launch is not None and worker.name not in self._served:
            self._monitor.message(
                f"{worker.name}: starting its {generate.engine} server, see its log"
            )
        notes = (await self._call(worker, "refresh", version, doing="refresh")).notes
        self._pass_on(worker, notes)
        self._served[worker.name] = version

    async def _score(self, action: ev.Score) -> ev.Event:
        task = ScoreTask(action.shard, action.version, action.sample_ids)
        worker = await self._scorers.get()
        try:
            made = await self._call(worker, "score", task, doing="score", shard=action.shard)
            self._pass_on(worker, made.notes)
            return ev.ShardScored(action.shard, made.stats, _reasons(made))
        except WorkerLostError as error:
            await worker.restart()
            return ev.ShardFailed(action.shard, "score", str(error))
        finally:
            self._scorers.put_nowait(worker)

    def _pass_on(self, worker: Worker, notes: Sequence[str]) -> None:
        for note in notes:
            self._monitor.message(f"{worker.name}: {note}")

    async def _with_trainer(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Run `attempt` in the trainer's turn; a restarted trainer catches up first."""

        async def caught_up() -> T:
            if self._is_trainer_behind:
                await self._catch_up()
            return await attempt()

        async def recover() -> None:
            self._is_trainer_behind = True
            await self._workers.trainer.restart()

        async with self._trainer_turn:
            return await self._retry_after_loss(caught_up, recover)

    async def _retry_after_loss(
        self, attempt: Callable[[], Awaitable[T]], recover: Callable[[], Awaitable[None]]
    ) -> T:
        """Run `attempt`, and repeat it after each loss of its worker, up to `max_tries` times."""
        for tries_left in reversed(range(self.max_tries)):
            try:
                return await attempt()
            except WorkerLostError as error:
                if tries_left == 0:
                    raise RunError(
                        f"a worker was lost {self.max_tries} times in the same call: {error}. "
                        "Nothing recorded is lost: fix the cause and use --resume"
                    ) from error
                await recover()
        raise AssertionError("unreachable")

    async def _catch_up(self, until: int | None = None) -> None:
        """Bring a freshly started trainer to the end of the ledger, or to step `until`."""
        trainer = self._workers.trainer
        step = await self._restore_newest(until)
        unsaved = self._unsaved if until is None else set()
        if step in unsaved:
            await self._copy(step)
        for segment in self._ledger.segments_after(step):
            if until is not None and segment.steps[0].index > until:
                break
            await self._call(trainer, "train", segment, doing="redo", segment=segment.index)
            if segment.steps[-1].index in unsaved:
                await self._copy(segment.steps[-1].index)
        self._is_trainer_behind = False

    async def _copy(self, step: int) -> None:
        """Let the trainer copy its state after `step` and begin to write it, unless it is saved."""
        self._unsaved.add(step)
        if self._artifacts.is_whole(self._run.layout.checkpoint(step)):
            self._unsaved.discard(step)
            return
        waited = await self._call(self._workers.trainer, "checkpoint", step, doing="checkpoint")
        if waited > _TOLD_SECONDS and not self._has_told_of_waiting:
            self._has_told_of_waiting = True
            self._monitor.message(
                f"training waited {waited:.0f} s at step {step}, because the checkpoint before it "
                "was still being written: raise checkpoint.every_steps, or set it to null to save "
                "by time (checkpoint.every_minutes)"
            )

    async def _until_saved(self, step: int) -> None:
        """Wait until the copied state after `step` is saved; the trainer works between questions.

        A restarted trainer catches up first, which copies that state again.
        """
        trainer, pause, started = self._workers.trainer, _FIRST_PAUSE, steady_time()

        async def is_saved() -> bool:
            return step not in self._unsaved or (await trainer.call("is_saved", step)).value

        while not await self._with_trainer(is_saved):
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._unsaved.discard(step)
        self._monitor.saved(steady_time() - started)

    async def _restore_newest(self, until: int | None) -> int:
        """Restore the newest undamaged checkpoint that is not after `until`.

        Returns its step, or 0 if every segment has to be repeated.
        """
        trainer = self._workers.trainer
        for saved in reversed(self._ledger.checkpoints()):
            is_late = until is not None and saved.step > until
            if is_late or saved.step in self._damaged or not self._artifacts.has(saved.path):
                continue
            try:
                await self._call(trainer, "restore", saved.step, doing="restore")
            except StoreError as error:
                self._damaged.add(saved.step)
                self._monitor.message(f"{error}. Using an earlier checkpoint")
            else:
                return saved.step
        await self._call(trainer, "restore", 0, doing="restore")
        return 0

    def _on_trainer(self, method: str, doing: str, *args: Any) -> Callable[[], Awaitable[Any]]:
        return lambda: self._call(self._workers.trainer, method, *args, doing=doing)

    async def _trainer_event(self, action: ev.Action) -> ev.Event:
        trainer = self._workers.trainer
        match action:
            case ev.Train(segment):
                report = await self._call(
                    trainer, "train", segment, doing="train", segment=segment.index
                )
                return ev.SegmentTrained(report)
            case ev.Publish(version, step):
                checksum = await self._call(trainer, "publish", version, doing="publish")
                return ev.SnapshotPublished(version, step, checksum)
            case ev.Checkpoint(step):
                await self._copy(step)
                return ev.CheckpointCopied(step)
            case ev.Evaluate(step):
                report = await self._call(
                    trainer, "evaluate", step, self._heldout, doing="evaluate", step=step
                )
                return ev.Evaluated(report)
        raise AssertionError(f"not an action of the trainer: {action!r}")

    async def _call(self, worker: Worker, method: str, *args: Any, doing: str, **note: Any) -> Any:
        self._monitor.started(worker.name, doing)
        try:
            reply = await worker.call(method, *args)
        finally:
            self._monitor.started(worker.name, "idle")
        # All spans use this process's clock: machines' clocks differ and may be set during a run.
        ended = steady_time()
        self._monitor.span(
            Span(worker.name, doing, ended - (reply.ended - reply.started), ended, note)
        )
        return reply.value


def _reasons(made: ShardResult) -> tuple[tuple[int, str], ...]:
    return tuple((item.sample_id, item.reason) for item in made.failed)


async def _nothing() -> None: ...


def _queue(workers: Sequence[Worker]) -> asyncio.Queue[Worker]:
    queue: asyncio.Queue[Worker] = asyncio.Queue()
    for worker in workers:
        queue.put_nowait(worker)
    return queue
