"""Carries actions out: the right worker, in turn, and again when a worker was lost.

Consumes: actions. Produces: one event for each, and the span of time it took.
Waits for: an idle generator or scorer, or the trainer's turn. Unblocked by: the worker's reply, or
by its loss (then it is restarted; a shard's try has failed, the trainer goes back to its last
checkpoint and repeats the segments recorded since).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from npd.config import RunConfig
from npd.control import events as ev
from npd.control.crew import Crew
from npd.control.place import Folder, Place
from npd.errors import RunError, StoreError, WorkerLostError
from npd.observe.trace import Span
from npd.runtime import Worker
from npd.store.ledger import Ledger
from npd.types import Ask, EncodedPrompt
from npd.workers import GenerateTask, ScoreTask
from npd.workers.tasks import ShardResult

T = TypeVar("T")


class Dispatcher:
    """Runs actions on the crew.

    `on_start(worker, doing)`, `on_span` and `on_message` tell who does what, for people.
    """

    def __init__(
        self,
        config: RunConfig,
        crew: Crew,
        ledger: Ledger,
        *,
        prompts: Sequence[EncodedPrompt],
        heldout: Sequence[EncodedPrompt],
        on_start: Callable[[str, str], None],
        on_span: Callable[[Span], None],
        on_message: Callable[[str], None],
        place: Place | None = None,
    ) -> None:
        self._config, self._crew, self._ledger = config, crew, ledger
        self._place = place or Folder()
        self._prompts, self._heldout = prompts, tuple(heldout)
        self._on_start, self._on_span, self._on_message = on_start, on_span, on_message
        self._generators: asyncio.Queue[Worker] = _queue(crew.generators)
        self._scorers: asyncio.Queue[Worker] = _queue(crew.scorers)
        self._trainer_turn = asyncio.Lock()
        self._is_trainer_behind = False
        self._damaged: set[int] = set()
        self._held: dict[str, int] = {}

    @property
    def max_tries(self) -> int:
        """How often the same work is tried when its worker is lost."""
        return self._config.schedule.max_tries

    @property
    def rewrites_exactly(self) -> bool:
        """Whether the same asks give the same samples again: servers do not promise it."""
        return self._config.generate.engine == "transformers"

    async def load(self) -> None:
        """Have every worker load its models: at once, or in turn where they share a process."""
        crew = (*self._crew.generators, *self._crew.scorers, self._crew.trainer)
        loads = [self._load(worker) for worker in crew]
        if self._config.runtime.kind == "inline":
            for load in loads:
                await load
        else:
            await asyncio.gather(*loads)

    async def _load(self, worker: Worker) -> None:
        await self._persist(lambda: self._call(worker, "ready", doing="load"), worker.restart)

    async def run(self, action: ev.Action) -> ev.Event:
        """Carry `action` out; the event it ends in."""
        match action:
            case ev.Generate():
                return await self._generate(action)
            case ev.Score():
                return await self._score(action)
            case _:
                return await self._with_trainer(lambda: self._trainer_event(action))

    async def prepare_heldout(self) -> int:
        """Have the held-out responses written and scored; returns their tokens."""
        worker = self._crew.scorers[0]

        async def attempt() -> int:
            made = await self._call(worker, "prepare_heldout", self._heldout, doing="held-out")
            self._pass_on(worker, made.notes)
            return int(made.num_tokens)

        return await self._persist(attempt, worker.restart)

    async def restore(self) -> None:
        """Bring the trainer to where the ledger says it is: last checkpoint, then the redo log."""
        self._is_trainer_behind = True
        await self._with_trainer(_nothing)

    def pass_over(self, checkpoints: Mapping[int, Path]) -> None:
        """Never restore these, by step: they are damaged."""
        for step, path in sorted(checkpoints.items()):
            self._damaged.add(step)
            self._on_message(f"{path} is damaged. Going back further instead")

    async def republish(self, version: int, step: int) -> str:
        """Have the student as it was after `step` published again; returns the checksum.

        The trainer must be as it came. It is so again afterwards, and behind.
        """
        self._is_trainer_behind = True
        trainer = self._crew.trainer

        async def attempt() -> str:
            await self._catch_up(step)
            return str(await self._call(trainer, "publish", version, doing="publish"))

        async with self._trainer_turn:
            checksum = await self._persist(attempt, trainer.restart)
            await trainer.restart()
        self._is_trainer_behind = True
        return checksum

    async def export(self) -> str:
        """Write the final student; returns its directory."""
        return str(await self._with_trainer(self._on_trainer("export", "export")))

    async def save_now(self, step: int) -> None:
        """Save the trainer outside the plan, after an interruption."""
        await self._with_trainer(self._on_trainer("checkpoint", "checkpoint", step))

    async def _generate(self, action: ev.Generate) -> ev.Event:
        asks = tuple(Ask(a.sample_id, a.seed, self._prompts[a.prompt]) for a in action.asks)
        task = GenerateTask(action.shard, action.version, asks)
        worker = await self._generators.get()
        try:
            await self._refresh(worker, action.version)
            made = await self._call(worker, "generate", task, doing="generate", shard=action.shard)
            self._pass_on(worker, made.notes)
            return ev.ShardGenerated(action.shard, made.stats, _reasons(made))
        except WorkerLostError as error:
            self._held.pop(worker.name, None)
            await worker.restart()
            return ev.ShardFailed(action.shard, "generate", str(error))
        finally:
            self._generators.put_nowait(worker)

    async def _refresh(self, worker: Worker, version: int) -> None:
        """Have a generator by servers load a snapshot, in a span of its own: at first, minutes."""
        generate = self._config.generate
        if generate.engine == "transformers" or self._held.get(worker.name) == version:
            return
        if generate.launch is not None and worker.name not in self._held:
            self._on_message(f"{worker.name}: starting its {generate.engine} server, see its log")
        notes = (await self._call(worker, "refresh", version, doing="refresh")).notes
        self._pass_on(worker, notes)
        self._held[worker.name] = version

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
            self._on_message(f"{worker.name}: {note}")

    async def _with_trainer(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """The trainer's turn: caught up first where it was lost, and again after each loss."""

        async def caught_up() -> T:
            if self._is_trainer_behind:
                await self._catch_up()
            return await attempt()

        async def recover() -> None:
            self._is_trainer_behind = True
            await self._crew.trainer.restart()

        async with self._trainer_turn:
            return await self._persist(caught_up, recover)

    async def _persist(
        self, attempt: Callable[[], Awaitable[T]], recover: Callable[[], Awaitable[None]]
    ) -> T:
        """`attempt`, and again after each loss of its worker, up to `max_tries` times."""
        for tries_left in reversed(range(self.max_tries)):
            try:
                return await attempt()
            except WorkerLostError as error:
                if tries_left == 0:
                    raise RunError(
                        f"lost {self.max_tries} times at the same place: {error}. "
                        "Nothing recorded is lost: mend the cause and use --resume"
                    ) from error
                await recover()
        raise AssertionError("unreachable")

    async def _catch_up(self, until: int | None = None) -> None:
        """Bring a trainer that is as it came to where the ledger ends, or to step `until`."""
        trainer = self._crew.trainer
        step = await self._restore_newest(until)
        for segment in self._ledger.segments_after(step):
            if until is not None and segment.steps[0].index > until:
                break
            await self._call(trainer, "train", segment, doing="redo", segment=segment.index)
        self._is_trainer_behind = False

    async def _restore_newest(self, until: int | None) -> int:
        """Restore the newest checkpoint (not after `until`) that is whole; its step, or 0 to repeat
        everything."""
        trainer = self._crew.trainer
        for saved in reversed(self._ledger.checkpoints()):
            is_late = until is not None and saved.step > until
            if is_late or saved.step in self._damaged or not self._place.has(saved.path):
                continue
            try:
                await self._call(trainer, "restore", saved.step, doing="restore")
            except StoreError as error:
                self._damaged.add(saved.step)
                self._on_message(f"{error}. Going back further instead")
            else:
                return saved.step
        await self._call(trainer, "restore", 0, doing="restore")
        return 0

    def _on_trainer(self, method: str, doing: str, *args: Any) -> Callable[[], Awaitable[Any]]:
        return lambda: self._call(self._crew.trainer, method, *args, doing=doing)

    async def _trainer_event(self, action: ev.Action) -> ev.Event:
        trainer = self._crew.trainer
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
                await self._call(trainer, "checkpoint", step, doing="checkpoint")
                return ev.CheckpointSaved(step)
            case ev.Evaluate(step):
                report = await self._call(
                    trainer, "evaluate", step, self._heldout, doing="evaluate", step=step
                )
                return ev.Evaluated(report)
        raise AssertionError(f"not the trainer's to do: {action!r}")

    async def _call(self, worker: Worker, method: str, *args: Any, doing: str, **note: Any) -> Any:
        self._on_start(worker.name, doing)
        try:
            reply = await worker.call(method, *args)
        finally:
            self._on_start(worker.name, "idle")
        # A clock set back during the call must not end the run.
        ended = max(reply.started, reply.ended)
        self._on_span(Span(worker.name, doing, reply.started, ended, note))
        return reply.value


def _reasons(made: ShardResult) -> tuple[tuple[int, str], ...]:
    return tuple((item.sample_id, item.reason) for item in made.failed)


async def _nothing() -> None: ...


def _queue(workers: Sequence[Worker]) -> asyncio.Queue[Worker]:
    queue: asyncio.Queue[Worker] = asyncio.Queue()
    for worker in workers:
        queue.put_nowait(worker)
    return queue
