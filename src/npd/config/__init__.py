"""`RunConfig`: every setting of a run, strict, frozen and complete. Imports no torch.

A config is validated on creation: each value by its section, then across sections
(`npd.config.checks`). The preflight makes the checks that need data or a model. `npd.config.load`
reads YAML, presets and `--set`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

from pydantic import ValidationError, ValidationInfo, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from npd.config.base import LaunchConfig, ServedConfig
from npd.config.checks import ImpossibleError, problems
from npd.config.data_sections import DataConfig, EvalConfig, SourceConfig
from npd.config.run import RunKeywords, RunValues
from npd.config.sections import (
    CheckpointConfig,
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
from npd.redaction import learn

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
    "SourceConfig",
    "TeacherConfig",
    "TrainConfig",
]


class RunConfig(RunValues):
    """The config of a run. `student`, `teacher`: Hugging Face model directories or names.

    In Python a section may be a mapping. Raises ConfigError, with the same messages as the command
    line, for a value or a combination that is not allowed.
    """

    if TYPE_CHECKING:  # pydantic's own signature would refuse mappings for sections

        def __init__(self, **values: Unpack[RunKeywords]) -> None: ...

    @classmethod
    def from_preset(cls, preset: str, /, **values: Unpack[RunKeywords]) -> RunConfig:
        """A preset's config with `values` on top; see `npd.presets`.

        Raises:
            ConfigError: there is no preset of that name, or a value is not allowed.
        """
        # `load` imports this module; only this method and `_explain_errors` import `load`.
        from npd.config.load import load_config

        return load_config({"preset": preset, **values}).config

    @model_validator(mode="after")
    def _check_combination(self) -> RunConfig:
        learn(self.model_dump(mode="json"))
        if found := problems(self):
            raise ImpossibleError(found)
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _explain_errors(
        cls, values: Any, handler: ModelWrapValidatorHandler[RunConfig], info: ValidationInfo
    ) -> RunConfig:
        from npd.config.load import explain, plain

        learn(values)  # before a secret can get into a message
        try:
            return handler(plain(values) if isinstance(values, Mapping) else values)
        except ValidationError as error:
            raise explain(error, info.context) from error
