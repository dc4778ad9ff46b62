"""The three workers: a room's engine joined to the run directory. They hold models, decide nothing.

A task is carried out once: what a worker finds already written, whole and for the same task, it
does not make again. Results are files, written whole or not at all; only scalars are returned.
Each class is built inside its own process by the factory of the same name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from npd.config import RunConfig
from npd.store.layout import RunLayout
from npd.workers.tasks import GenerateTask, ScoreTask, generated_stats, scored_stats

__all__ = ["Factory", "GenerateTask", "ScoreTask", "generated_stats", "scored_stats"]


@dataclass(frozen=True, slots=True)
class Factory:
    """Builds one worker inside its process; `role` is generator, scorer or trainer."""

    role: str
    config: RunConfig
    root: Path

    def __call__(self) -> object:
        """The worker, its models loaded."""
        return self.build(RunLayout(self.root))

    def build(self, layout: RunLayout) -> object:
        """The same with the files of `layout`."""
        if self.role == "generator":
            from npd.workers.generator import GeneratorWorker

            return GeneratorWorker(self.config, layout)
        if self.role == "scorer" and self.config.score.ranks > 1:
            from npd.workers.ranked import ScorerRank

            return ScorerRank(self.config, layout)
        if self.role == "scorer":
            from npd.workers.scorer import ScorerWorker

            return ScorerWorker(self.config, layout)
        assert self.role == "trainer", self.role
        from npd.workers.trainer import TrainerWorker

        return TrainerWorker(self.config, layout)
