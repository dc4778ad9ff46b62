"""Runs actions on the workers, and retries after the loss of a worker.

Consumes: actions. Produces: one event and one span per action.
Waits for: a generator with room, an idle scorer, or the trainer's turn; in phases, for the device.
Unblocked by: the worker's reply, or its loss. A lost worker is restarted here. A generator's or
scorer's shard is reported as `ShardFailed`, and `SampleTracker.retry` decides whether it is
requested again. A trainer returns to its last checkpoint, repeats the segments recorded since, and
then the call. A checkpoint that was being written when the trainer was lost is copied again on the
way, at its step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from npd.control.devices.placement import WorkerSet, with_models
from npd.control.devices.turns import DeviceTurns
from npd.control.monitor import Monitor
from npd.control.run_directory import OpenRun
from npd.errors import RunError, StoreError, WorkerLostError
from npd.observe.trace import Span, steady_time
from npd.runtime import Worker
from npd.schedule import events as ev
from npd.types import SampleRequest
from npd.workers import GenerateTask, ScoreTask
from npd.workers.tasks import ShardResult

T = TypeVar("T")
# How long a worker waits for a shard in one call; others are heard between calls.
_LOOK_SECONDS = 0.5
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
        # A worker's copies of files at `runtime.shared` are of one call at a time.
        is_cached = run.config.runtime.shared is not None
        self._num_in_flight = 1 if is_cached else run.config.generate.num_in_flight
        self._generators: asyncio.Queue[SharedGenerator] = _in_turn(
            [SharedGenerator(w, self._monitor, self._refresh) for w in workers.generators],
            self._num_in_flight,
        )
        self._scorers: asyncio.Queue[Worker] = _queue(workers.scorers)
        self._trainer_turn = asyncio.Lock()
        self._device: DeviceTurns | None = None
        if self._config.has_phases:
            self._device = DeviceTurns(with_models(workers, self._config), self._release)
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
            lambda: self._do(worker, "ready", doing="load"), worker.restart
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
        generator = await self._generators.get()
        worker, is_shared = generator.worker, self._num_in_flight > 1
        try:
            async with self._turn(worker):
                written = generator.write(task) if is_shared else self._write_alone(worker, task)
                made = await written
            self._pass_on(worker, made.notes)
            return ev.ShardGenerated(action.shard, made.stats, _reasons(made))
        except WorkerLostError as error:
            self._served.pop(worker.name, None)
            if not is_shared:
                await worker.restart()
            return ev.ShardFailed(action.shard, "generate", str(error))
        finally:
            self._generators.put_nowait(generator)

    async def _write_alone(self, worker: Worker, task: GenerateTask) -> ShardResult:
        await self._refresh(worker, task.version)
        made: ShardResult = await self._call(
            worker, "generate", task, doing="generate", shard=task.shard
        )
        return made

    async def _refresh(self, worker: Worker, version: int) -> None:
        """Sync a snapshot to a generator's servers, in its own span: the first takes minutes."""
        generate = self._config.generate
        if not generate.is_served or self._served.get(worker.name) == version:
            return
        if generate.launch is not None and worker.name not in self._served:
            share = generate.launch.memory
            taking = "" if share == "auto" else f" with {share:.0%} of its GPU"
            self._monitor.message(
                f"{worker.name}: starting its {generate.engine} server{taking}, see its log"
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
        # A later one is saved already: what was being written before it is not needed any more.
        unsaved.difference_update([older for older in unsaved if older < step])
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

    async def _release(self, worker: Worker) -> None:
        """Make a worker free its models; one that is lost in it is restarted and asked again."""
        self._served.pop(worker.name, None)

        async def recover() -> None:
            self._monitor.message(f"{worker.name} was lost as its models left the device")
            if worker is self._workers.trainer:
                self._is_trainer_behind = True
            await worker.restart()

        await self._retry_after_loss(lambda: self._do(worker, "release", doing="release"), recover)

    def _turn(self, worker: Worker) -> AbstractAsyncContextManager[None]:
        """Within the block the worker's role has the device, where roles take turns."""
        return nullcontext() if self._device is None else self._device.of(worker)

    async def _call(self, worker: Worker, method: str, *args: Any, doing: str, **note: Any) -> Any:
        async with self._turn(worker):
            return await self._do(worker, method, *args, doing=doing, **note)

    async def _do(self, worker: Worker, method: str, *args: Any, doing: str, **note: Any) -> Any:
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


# Generators with several shards at once.


class SharedGenerator:
    """A generator that has several shards at once, as its servers take many requests.

    Promises: shards that are written together are of one snapshot; the servers get another one only
    when none is in flight (with `in_flight: mix` they take a newer one themselves). A lost worker
    is restarted once, however many shards it had. Spans of one worker do not overlap: a shard's
    begins when the one that ended before it was done. `refresh` loads a snapshot.

    Waits for: shards of another snapshot, and the worker. Unblocked by: their end, or its loss.
    """

    def __init__(
        self, worker: Worker, monitor: Monitor, refresh: Callable[[Worker, int], Awaitable[None]]
    ) -> None:
        self.worker = worker
        self._monitor, self._refresh = monitor, refresh
        self._version: int | None = None
        self._num_writing = self._restarts = 0
        self._since = 0.0
        self._entering, self._recovering = asyncio.Lock(), asyncio.Lock()
        self._left = asyncio.Event()

    async def write(self, task: GenerateTask) -> ShardResult:
        """Write a shard beside others.

        Raises:
            WorkerLostError: the worker was lost, and is restarted.
        """
        async with self._turn(task.version):
            await self.worker.call("begin", task)
            made: ShardResult | None = None
            while made is None:
                made = (await self.worker.call("collect", task.shard, _LOOK_SECONDS)).value
            self._record(task.shard)
            return made

    @asynccontextmanager
    async def _turn(self, version: int) -> AsyncIterator[None]:
        """Wait until no shard of another snapshot is in flight, and load this one if need be."""
        async with self._entering:  # in the order of the tasks, so that none waits for ever
            while self._num_writing and self._version != version:
                self._left.clear()
                await self._left.wait()
            restarts = self._restarts
            if not self._num_writing:
                async with self._restarting_if_lost(restarts):
                    await self._refresh(self.worker, version)
                self._version, self._since = version, steady_time()
            self._num_writing += 1
        self._monitor.started(self.worker.name, "generate")
        try:
            async with self._restarting_if_lost(restarts):
                yield
        finally:
            self._num_writing -= 1
            self._left.set()
            if not self._num_writing:
                self._monitor.started(self.worker.name, "idle")

    @asynccontextmanager
    async def _restarting_if_lost(self, restarts: int) -> AsyncIterator[None]:
        """Restart the worker if it is lost, unless that was done since there were `restarts`."""
        try:
            yield
        except WorkerLostError:
            async with self._recovering:
                if restarts == self._restarts:
                    self._restarts += 1
                    await self.worker.restart()
                    self._since = steady_time()
            raise

    def _record(self, shard: int) -> None:
        now = steady_time()
        span = Span(self.worker.name, "generate", self._since, now, {"shard": shard})
        self._monitor.span(span)
        self._since = now


def _in_turn(generators: list[SharedGenerator], each: int) -> asyncio.Queue[SharedGenerator]:
    """A queue in which each generator waits for as many shards as it has at once."""
    queue: asyncio.Queue[SharedGenerator] = asyncio.Queue()
    for _ in range(each):
        for generator in generators:
            queue.put_nowait(generator)
    return queue
