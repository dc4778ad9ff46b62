"""The generator worker: writes shards of rollouts."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from npd.config import GenerateConfig, RunConfig
from npd.data.chat_tokenizer import ChatTokenizer
from npd.errors import WorkerLostError
from npd.generate import Generator, TeachersGenerator, build_generator
from npd.models.device import free_cached, resolve_device
from npd.store.layout import RunLayout
from npd.store.shards import read_rollouts, write_rollouts
from npd.store.snapshots import latest, verify
from npd.types import DEFAULT_TEACHER, Failed, Rollout
from npd.workers.tasks import GenerateTask, ShardResult, generated_stats

if TYPE_CHECKING:
    from npd.generate.served import ServingContext

_log = logging.getLogger(__name__)


class GeneratorWorker:
    """Writes shards of rollouts by the student's snapshots, by the teacher, or from the data."""

    def __init__(self, config: RunConfig, layout: RunLayout) -> None:
        chat = ChatTokenizer.of_student(config)
        self._layout = layout
        self._config = config
        self._notes: list[str] = []
        self._is_student = config.generate.source == "student"
        serving = partial(_serving_context, config, layout, self._notes.append)
        self._engine = generator_for(config, chat, serving)
        self._threads = ThreadPoolExecutor(config.generate.num_in_flight, "shard")
        self._writing: dict[int, Future[ShardResult]] = {}

    def refresh(self, version: int) -> ShardResult:
        """Load snapshot `version` ahead of the next shard; the result contains only notes."""
        self._load(version)
        return ShardResult((), notes=self._take_notes())

    def generate(self, task: GenerateTask) -> ShardResult:
        """Write the shard unless its file exists; returns the scalars of its samples."""
        path = self._layout.rollouts(task.shard)
        rollouts = read_rollouts(path) if path.exists() else []
        failed: tuple[Failed, ...] = ()
        if not self._is_of(rollouts, task):
            self._load(task.version)
            found = self._engine.generate(task.requests)
            rollouts = [item for item in found if isinstance(item, Rollout)]
            failed = tuple(item for item in found if isinstance(item, Failed))
            write_rollouts(path, rollouts)
        return ShardResult(tuple(map(generated_stats, rollouts)), failed, self._take_notes())

    def begin(self, task: GenerateTask) -> None:
        """Start to write a shard, beside others if servers write; `collect` gives its result.

        Shards that are written together have the same version, which `refresh` has loaded.
        """
        self._writing[task.shard] = self._threads.submit(self.generate, task)

    def collect(self, shard: int, seconds: float) -> ShardResult | None:
        """The result of a shard that was begun, or None if it is not written yet.

        Waits until any shard is written, at most so many seconds.

        Raises:
            WorkerLostError: the worker was restarted since the shard was begun.
        """
        if shard not in self._writing:
            raise WorkerLostError(f"shard {shard} was lost in a restart: it is requested again")
        wait(self._writing.values(), seconds, FIRST_COMPLETED)
        if not self._writing[shard].done():
            return None
        return self._writing.pop(shard).result()

    def _take_notes(self) -> tuple[str, ...]:
        notes = []
        while self._notes:  # shards of other threads may add some
            notes.append(self._notes.pop(0))
        return tuple(notes)

    def _is_of(self, rollouts: Sequence[Rollout], task: GenerateTask) -> bool:
        """Whether a file's rollouts are the task's.

        After a power cut a shard's file may exist although the ledger has lost its task.
        """
        ids = [rollout.sample_id for rollout in rollouts]
        versions = {rollout.version for rollout in rollouts}
        may_be_newer = self._config.schedule.refresh.in_flight != "finish"
        return ids == [request.sample_id for request in task.requests] and (
            versions == {task.version} or (may_be_newer and min(versions) >= task.version)
        )

    def _load(self, version: int) -> None:
        loaded = self._engine.version
        may_be_newer = self._config.schedule.refresh.in_flight != "finish"
        if may_be_newer and loaded is not None and loaded > version:
            return  # a refresh preceded the task; samples carry their actual version
        if self._is_student and loaded != version:
            snapshot = self._layout.snapshot(version)
            verify(snapshot)
            self._engine.load(snapshot, version)

    def release(self) -> None:
        """Free the model for other workers on the device; the next call loads what it needs."""
        self._engine.release()
        free_cached()

    def ready(self) -> None:
        """No-op. The first call constructs the worker; loading gets its own span in traces."""

    def close(self) -> None:
        """Free the model, and stop launched servers; shards that are being written are lost."""
        try:
            self._engine.close()
        finally:
            self._threads.shutdown(cancel_futures=True)


def _serving_context(
    config: RunConfig, layout: RunLayout, notify: Callable[[str], None], teacher: str | None
) -> ServingContext | None:
    """The serving context of a generator for the student, or for the teacher named `teacher`."""
    if not config.generate.is_served:
        return None
    from npd.generate.served import ServingContext

    def log_and_notify(note: str) -> None:
        _log.info(note)
        notify(note)

    def newest() -> tuple[Path, int] | None:
        version = latest(layout.snapshots)
        return None if version is None else (layout.snapshot(version), version)

    name = "" if teacher in (None, DEFAULT_TEACHER) else f"-{teacher}"
    return ServingContext(
        log=layout.logs / f"server-{config.generate.engine}{name}.log",
        context=config.max_sample_tokens,
        in_flight=config.schedule.refresh.in_flight,
        newest=newest,
        notify=log_and_notify,
        run=f"{zlib.crc32(str(layout.root.resolve()).encode()):08x}",
        fingerprints=layout.probes,
    )


def generator_for(
    config: RunConfig,
    chat: ChatTokenizer,
    serving: Callable[[str | None], ServingContext | None],
    *,
    model: str | None = None,
) -> Generator:
    """The generator of a run's samples: the student, the data, or each prompt's own teacher.

    With `model`, that model is loaded and generates every sample. A single teacher is loaded at
    once, unless phases share the device; several are loaded at their first request. `serving`
    returns the context of the teacher with that name, or of the student (None).

    Raises:
        InputError, RunError: a model cannot be loaded or served.
    """

    def build(section: GenerateConfig, teacher: str | None, loads: str | None) -> Generator:
        writer = build_generator(
            section,
            stop_ids=stop_ids(config, chat, teacher),
            pad_id=chat.pad_id,
            vocab_size=chat.vocab_size,
            device=resolve_device(config.runtime.device),
            trust_remote_code=config.trust_remote_code,
            serving=serving(teacher),
        )
        with ExitStack() as undo:
            undo.callback(writer.close)
            if loads is not None:
                writer.load(Path(loads), 0)
            undo.pop_all()
        return writer

    models = config.teacher_models
    if config.generate.source == "dataset":
        limit = {"max_new_tokens": config.max_response_tokens}
        return build(config.generate.model_copy(update=limit), None, model)
    if config.generate.source != "teacher":
        return build(config.generate, None, model)
    if model is not None:
        name = min(models, key=lambda name: name != DEFAULT_TEACHER)
        return build(config.generate_of(name), name, model)
    writers = TeachersGenerator(lambda name: build(config.generate_of(name), name, models[name]))
    if len(models) == 1 and not config.has_phases:
        writers.open(*models)
    return writers


def stop_ids(config: RunConfig, chat: ChatTokenizer, teacher: str | None) -> frozenset[int]:
    """The end tokens of responses: the student's, and the teacher's if it generates them."""
    if teacher is None:
        return chat.stop_ids
    model = config.teacher_models[teacher]
    return (
        chat.stop_ids
        | ChatTokenizer.load(model, trust_remote_code=config.trust_remote_code).stop_ids
    )
