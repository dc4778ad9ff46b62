"""What a run is made of: strict, frozen, complete. Import-light (no torch), nothing computed twice.

Everything that can be known to be impossible without loading data or a model is refused here, with
the remedy. Reading YAML, presets and `--set` is `npd.settings`.
"""

from __future__ import annotations

from pydantic import model_validator

from npd.config.combinations import problems
from npd.config.values import RunValues
from npd.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    FilterConfig,
    GenerateConfig,
    LoraConfig,
    LossConfig,
    ObserveConfig,
    RayConfig,
    Refresh,
    RuntimeConfig,
    ScheduleConfig,
    ScoreConfig,
    TeacherConfig,
    TrainConfig,
)
from npd.served import LaunchConfig, ServedConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "FilterConfig",
    "GenerateConfig",
    "LaunchConfig",
    "LoraConfig",
    "LossConfig",
    "ObserveConfig",
    "RayConfig",
    "Refresh",
    "RunConfig",
    "RuntimeConfig",
    "ScheduleConfig",
    "ScoreConfig",
    "ServedConfig",
    "TeacherConfig",
    "TrainConfig",
]


class RunConfig(RunValues):
    """A whole run. `student`, `teacher`: Hugging Face model directories or names."""

    @model_validator(mode="after")
    def _check_combination(self) -> RunConfig:
        if found := problems(self):
            raise ValueError("; ".join(found))
        return self
