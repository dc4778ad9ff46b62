"""The generator: writes shards of rollouts."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from npd.chat import Chat
from npd.config import RunConfig
from npd.names import DEFAULT_TEACHER
from npd.store.layout import RunLayout
from npd.store.shards import read_rollouts, write_rollouts
from npd.store.snapshots import latest, verify
from npd.types import Failed, Rollout
from npd.workers.tasks import GenerateTask, ShardResult, generated_stats

if TYPE_CHECKING:
    from npd.generate.served import Surroundings

_log = logging.getLogger(__name__)


class GeneratorWorker:
    """Writes shards of rollouts: the student's snapshots, the teacher, or the data itself."""

    def __init__(self, config: RunConfig, layout: RunLayout) -> None:
        from npd.workers.writers import build_writer

        chat = Chat.load(config.student, trust_remote_code=config.trust_remote_code)
        self._layout = layout
        self._config = config
        self._notes: list[str] = []
        self._is_student = config.generate.source == "student"
        around = partial(_surroundings, config, layout, self._notes.append)
        self._engine = build_writer(config, chat, around)

    def refresh(self, version: int) -> ShardResult:
        """Take up snapshot `version`, so that it need not be done within a shard; only notes."""
        self._load(version)
        return ShardResult((), notes=self._take_notes())

    def generate(self, task: GenerateTask) -> ShardResult:
        """Write the shard, unless it is there already; returns its samples' scalars."""
        path = self._layout.rollouts(task.shard)
        rollouts = read_rollouts(path) if path.exists() else []
        failed: tuple[Failed, ...] = ()
        if not self._is_of(rollouts, task):
            self._load(task.version)
            found = self._engine.generate(task.asks)
            rollouts = [item for item in found if isinstance(item, Rollout)]
            failed = tuple(item for item in found if isinstance(item, Failed))
            write_rollouts(path, rollouts)
        return ShardResult(tuple(map(generated_stats, rollouts)), failed, self._take_notes())

    def _take_notes(self) -> tuple[str, ...]:
        notes, self._notes[:] = tuple(self._notes), []
        return notes

    def _is_of(self, rollouts: Sequence[Rollout], task: GenerateTask) -> bool:
        """Whether a file's rollouts are the task's.

        Another task's file is one that a lost power supply kept while the ledger forgot it.
        """
        ids = [rollout.sample_id for rollout in rollouts]
        versions = {rollout.version for rollout in rollouts}
        may_be_newer = self._config.schedule.refresh.in_flight != "finish"
        return ids == [ask.sample_id for ask in task.asks] and (
            versions == {task.version} or (may_be_newer and min(versions) >= task.version)
        )

    def _load(self, version: int) -> None:
        held = self._engine.version
        may_be_newer = self._config.schedule.refresh.in_flight != "finish"
        if may_be_newer and held is not None and held > version:
            return  # a refresh came before the task did; its samples carry what wrote them
        if self._is_student and held != version:
            snapshot = self._layout.snapshot(version)
            verify(snapshot)
            self._engine.load(snapshot, version)

    def ready(self) -> None:
        """Nothing: the first call of a worker builds it, and that takes long enough to be seen."""

    def close(self) -> None:
        """Let go of the model."""
        self._engine.close()


def _surroundings(
    config: RunConfig, layout: RunLayout, tell: Callable[[str], None], teacher: str | None
) -> Surroundings | None:
    """What a generator by servers must know of the run; `teacher`: the name of the one it runs."""
    if config.generate.engine == "transformers":
        return None
    from npd.generate.served import Surroundings

    def told(note: str) -> None:
        _log.info(note)
        tell(note)

    def newest() -> tuple[Path, int] | None:
        version = latest(layout.snapshots)
        return None if version is None else (layout.snapshot(version), version)

    name = "" if teacher in (None, DEFAULT_TEACHER) else f"-{teacher}"
    return Surroundings(
        log=layout.logs / f"server-{config.generate.engine}{name}.log",
        context=config.max_sample_tokens,
        in_flight=config.schedule.refresh.in_flight,
        newest=newest,
        tell=told,
        run=f"{zlib.crc32(str(layout.root.resolve()).encode()):08x}",
        probes=layout.probes,
    )
