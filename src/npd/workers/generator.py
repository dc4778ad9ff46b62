"""The generator: writes shards of rollouts."""

from __future__ import annotations

from pathlib import Path

from npd.chat import Chat
from npd.config import RunConfig
from npd.modeling import resolve_device
from npd.store.layout import RunLayout
from npd.store.shards import read_rollouts, write_rollouts
from npd.store.snapshots import verify
from npd.types import SampleStats
from npd.workers.tasks import GenerateTask, generated_stats


class GeneratorWorker:
    """Writes shards of rollouts: the student's snapshots, the teacher, or the data itself."""

    def __init__(self, config: RunConfig, layout: RunLayout) -> None:
        from npd.generate import build_generator

        chat = Chat.load(config.student, trust_remote_code=config.trust_remote_code)
        self._layout = layout
        self._is_student = config.generate.source == "student"
        self._loaded: int | None = None
        self._engine = build_generator(
            config.generate,
            stop_ids=stop_ids(config, chat, is_teacher=config.generate.source == "teacher"),
            pad_id=chat.pad_id,
            vocab_size=chat.vocab_size,
            device=resolve_device(config.runtime.device),
            trust_remote_code=config.trust_remote_code,
        )
        if config.generate.source == "teacher":
            assert config.teacher is not None, "checked by the config"
            self._engine.load(Path(config.teacher), 0)

    def generate(self, task: GenerateTask) -> tuple[SampleStats, ...]:
        """Write the shard, unless it is there already; returns its samples' scalars."""
        path = self._layout.rollouts(task.shard)
        rollouts = read_rollouts(path) if path.exists() else []
        asked = [(ask.sample_id, task.version) for ask in task.asks]
        # Another task's file is one that a lost power supply kept while the ledger forgot it.
        if [(r.sample_id, r.version) for r in rollouts] != asked:
            self._load(task.version)
            rollouts = self._engine.generate(task.asks)
            write_rollouts(path, rollouts)
        return tuple(map(generated_stats, rollouts))

    def _load(self, version: int) -> None:
        if self._is_student and self._loaded != version:
            snapshot = self._layout.snapshot(version)
            verify(snapshot)
            self._engine.load(snapshot, version)
            self._loaded = version

    def ready(self) -> None:
        """Nothing: the first call of a worker builds it, and that takes long enough to be seen."""

    def close(self) -> None:
        """Let go of the model."""
        self._engine.close()


def stop_ids(config: RunConfig, chat: Chat, *, is_teacher: bool) -> frozenset[int]:
    """What ends a response: the student's end tokens, and the teacher's own where it writes."""
    if not is_teacher:
        return chat.stop_ids
    assert config.teacher is not None, "checked by the config"
    teacher = Chat.load(config.teacher, trust_remote_code=config.trust_remote_code)
    return chat.stop_ids | teacher.stop_ids
