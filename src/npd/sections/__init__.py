"""The sections of a config: every value, its default, its bounds and its meaning.

Each is valid by itself; which values make sense together is `npd.config`. Import-light, no torch.
"""

from __future__ import annotations

from npd.sections.data import DataConfig, EvalConfig
from npd.sections.generate import GenerateConfig
from npd.sections.runtime import CheckpointConfig, ObserveConfig, RayConfig, RuntimeConfig
from npd.sections.schedule import Refresh, ScheduleConfig
from npd.sections.score import FilterConfig, ScoreConfig
from npd.sections.teachers import Model, NamedTeacher, TeacherConfig
from npd.sections.train import LoraConfig, LossConfig, TrainConfig, chunk_for

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "FilterConfig",
    "GenerateConfig",
    "LoraConfig",
    "LossConfig",
    "Model",
    "NamedTeacher",
    "ObserveConfig",
    "RayConfig",
    "Refresh",
    "RuntimeConfig",
    "ScheduleConfig",
    "ScoreConfig",
    "TeacherConfig",
    "TrainConfig",
    "chunk_for",
]
