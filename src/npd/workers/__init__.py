"""The three workers: generator, scorer and trainer, which read and write the run directory.

Workers own the models and make no decisions. Tasks are idempotent: a worker reuses a complete
result of the same task instead of recomputing it. Results are files, written completely or not at
all; calls return scalars only. `Factory` builds a worker inside its own process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from npd.config import RunConfig
from npd.errors import ModelError
from npd.models import device
from npd.models.files import model_fingerprint
from npd.store.layout import RunLayout
from npd.workers.tasks import GenerateTask, ScoreTask, generated_stats, scored_stats

__all__ = ["Factory", "GenerateTask", "Recorded", "ScoreTask", "generated_stats", "scored_stats"]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A model of a run: its role ("teacher"), its path, and its checksum at the run's start."""

    role: str
    path: str
    fingerprint: str

    def check(self) -> None:
        """Raise ModelError if the model has changed since the run was started."""
        try:
            now = model_fingerprint(self.path)
        except OSError:
            now = "unreadable"
        if now not in (None, self.fingerprint):
            raise ModelError(
                f"the {self.role} {self.path} changed since the run was started: restore it and "
                "resume, or start a new run (--set name=...)"
            )


@dataclass(frozen=True, slots=True)
class Factory:
    """Builds one worker inside its process; `role` is generator, scorer or trainer.

    Every start checks `models`: a restarted worker must not continue with different ones.
    """

    role: str
    config: RunConfig
    root: Path
    models: tuple[Recorded, ...] = ()

    def __call__(self) -> object:
        """The worker, with its models loaded."""
        return self.build(RunLayout(self.root))

    def build(self, layout: RunLayout) -> object:
        """The worker on the files of `layout`. Raises ModelError if a model was replaced."""
        self._prepare_process()
        for model in self.models:
            model.check()
        if self.role == "generator":
            from npd.workers.generator import GeneratorWorker

            return GeneratorWorker(self.config, layout)
        if self.role == "scorer" and self.config.score.ranks > 1:
            from npd.workers.scorer import ScorerRank

            return ScorerRank(self.config, layout)
        if self.role == "scorer":
            from npd.workers.scorer import ScorerWorker

            return ScorerWorker(self.config, layout)
        assert self.role == "trainer", self.role
        from npd.workers.trainer import TrainerWorker

        return TrainerWorker(self.config, layout)

    def _prepare_process(self) -> None:
        """Set what the process of one worker reads once, and choose the device that it names."""
        runtime, train = self.config.runtime, self.config.train
        if runtime.kind != "inline":
            # On this machine `auto` means that there is no GPU; on Ray a worker finds out.
            is_cpu = runtime.kind == "local" and runtime.device == "auto"
            name = device.CPU if is_cpu else runtime.device
            device.set_variables(name, is_deterministic=train.deterministic)
        device.use(runtime.device)
