"""All settings of a run, and the properties derived from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias, TypedDict, TypeVar

from pydantic import Field

from npd.config.base import Directory, LaunchConfig, Section, ServedConfig
from npd.config.data_sections import DataConfig, EvalConfig
from npd.config.sections import (
    CheckpointConfig,
    FilterConfig,
    GenerateConfig,
    LossConfig,
    Model,
    NamedTeacher,
    ObserveConfig,
    RuntimeConfig,
    ScheduleConfig,
    ScoreConfig,
    TeacherConfig,
    TrainConfig,
)
from npd.types import DEFAULT_TEACHER

_Served = TypeVar("_Served", bound=ServedConfig)


class RunValues(Section):
    """All settings of a run, before cross-section validation, and the values derived from them."""

    name: str = "npd"
    """Name of the run; its directory is `runs/<name>`."""
    run_dir: Directory | None = None
    """Run directory; None is `runs/<name>`."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed for everything random: order of prompts, sampling, shuffles, dropout."""
    student: Model
    """The model to train: a Hugging Face directory or name."""
    teacher: Model | None = None
    """The model to learn from. It must share the student's vocabulary."""
    teachers: dict[str, NamedTeacher] = Field(default_factory=dict)
    """More teachers by name, e.g. `{math: DIR}`. A prompt names one in its `teacher` column; other
    prompts use `teacher`."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Only for models that you trust."""
    data: DataConfig = DataConfig()
    generate: GenerateConfig = GenerateConfig()
    score: ScoreConfig = ScoreConfig()
    filter: FilterConfig = FilterConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.run_dir if self.run_dir is not None else Path("runs") / self.name

    @property
    def shared_url(self) -> str | None:
        """The URL through which workers exchange files; None: the run directory."""
        shared = self.runtime.shared
        return None if shared is None else f"{shared.rstrip('/')}/{self.name}"

    @property
    def needs_scores(self) -> bool:
        """Whether the teacher scores samples (in plain SFT it does not)."""
        return self.loss.kd_weight > 0.0 or self.filters_by_scores

    @property
    def filters_by_scores(self) -> bool:
        """Whether the filter needs the teacher's scores."""
        return self.needs_ifd or self.filter.name in ("teacher_nll", "overlap", "outlier")

    @property
    def needs_ifd(self) -> bool:
        """Whether Δ-IFD is computed, which needs the student and passes over responses alone."""
        controls = ("random", "teacher_nll", "overlap", "length")
        matched = self.filter.name in controls and self.filter.keep is None
        return self.filter.name == "delta_ifd" or matched

    @property
    def needs_student_pass(self) -> bool:
        """Whether the snapshot must prefill whole samples, not only responses alone."""
        is_in_rollout = self.generate.source == "student"
        uses_nll = self.needs_ifd or self.filter.name == "outlier"
        is_missing = self.filter.name == "overlap" or (uses_nll and not is_in_rollout)
        return is_missing or (uses_nll and self.score.student_pass == "always")

    @property
    def needs_teacher(self) -> bool:
        """Whether any teacher model is loaded."""
        return self.trains_by_teacher or self.evaluates_teacher

    @property
    def trains_by_teacher(self) -> bool:
        """Whether a teacher scores or writes training samples."""
        return self.needs_scores or self.generate.source == "teacher"

    @property
    def evaluates_teacher(self) -> bool:
        """Whether a teacher scores held-out text."""
        return self.eval.source == "teacher" or (
            self.eval.source == "completion" and bool(self.teacher_models)
        )

    @property
    def teacher_models(self) -> dict[str, str]:
        """The model of each teacher by name; `teacher` has the name `default`."""
        own = {} if self.teacher is None else {DEFAULT_TEACHER: self.teacher}
        return own | {name: teacher.model for name, teacher in self.teachers.items()}

    @property
    def named_gpus(self) -> dict[str, tuple[int, ...]]:
        """The GPUs that sections name for their processes, by section, where one does."""
        sections = {"train": self.train.gpus, "score": self.score.gpus}
        named = {**sections, "generate": self.generate.gpus}
        return {name: gpus for name, gpus in named.items() if gpus}

    @property
    def launches(self) -> dict[str, LaunchConfig]:
        """Every `launch` that is set, by section: `generate`, `score`, `teachers.math`."""
        found = {"generate": self.generate.launch, "score": self.score.launch}
        found |= {f"teachers.{name}": teacher.launch for name, teacher in self.teachers.items()}
        return {where: launch for where, launch in found.items() if launch is not None}

    def with_launches(self, updates: Mapping[str, Mapping[str, object]]) -> Self:
        """The config with other values in `launch` sections, by the names of `launches`."""
        changed: dict[str, Any] = {}
        teachers = dict(self.teachers)
        for where, values in updates.items():
            launch = {"launch": self.launches[where].model_copy(update=values)}
            if where in ("generate", "score"):
                changed[where] = getattr(self, where).model_copy(update=launch)
            else:
                name = where.removeprefix("teachers.")
                teachers[name] = teachers[name].model_copy(update=launch)
        return self.model_copy(update={**changed, "teachers": teachers})

    def score_of(self, teacher: str) -> ScoreConfig:
        """`score` with the servers of this teacher."""
        return self._with_servers_of(teacher, self.score)

    def generate_of(self, teacher: str) -> GenerateConfig:
        """`generate` with the servers of this teacher, for responses that it writes."""
        return self._with_servers_of(teacher, self.generate)

    def _with_servers_of(self, teacher: str, section: _Served) -> _Served:
        named = self.teachers.get(teacher)
        if named is None:
            return section
        urls, launch = (named.urls, named.launch) if section.is_served else ((), None)
        return section.model_copy(update={"urls": urls, "launch": launch})

    @property
    def is_overlapped(self) -> bool:
        """Whether stages run at the same time."""
        overlap = self.schedule.overlap
        if overlap == "auto":
            return self.runtime.kind != "inline" and not self.has_phases
        return overlap

    @property
    def has_phases(self) -> bool:
        """Whether one role at a time has its models on the device."""
        return self.runtime.share == "phases"

    @property
    def shard_size(self) -> int:
        """Samples in a shard; with `window: all` the most there may be (`sized` has the number)."""
        window = self.schedule.window
        return self._shard_size(None if window == "all" else window)

    def _shard_size(self, window: int | None) -> int:
        given = self.generate.shard_size
        if isinstance(given, int):
            return given
        if not self.generate.is_served:
            return _SHARD
        servers = self.generate.num_servers
        return served_shard(window, servers, is_overlapped=self.is_overlapped)

    @property
    def decided(self) -> dict[str, str]:
        """What `auto` comes to where the config alone decides, by dotted path."""
        is_known = self.schedule.window != "all" or not self.generate.is_served
        shard = str(self.shard_size) if is_known else f"up to {self.shard_size}, by the prompts"
        found = {
            "batch_size": str(self.generate.at_once),
            "shard_size": shard,
            "shards_in_flight": str(self.generate.num_in_flight),
        }
        return {
            f"generate.{key}": text
            for key, text in found.items()
            if getattr(self.generate, key) == "auto"
        }

    def sized(self, num_prompts: int) -> Self:
        """The config with numbers in place of `auto` in `generate`, for `num_prompts` prompts."""
        window = self.schedule.window
        if window == "all":
            window = num_prompts * self.generate.samples_per_prompt
        sizes = {
            "batch_size": self.generate.at_once,
            "shard_size": self._shard_size(window),
            "shards_in_flight": self.generate.num_in_flight,
        }
        return self.model_copy(update={"generate": self.generate.model_copy(update=sizes)})

    @property
    def max_response_tokens(self) -> int:
        """The maximum response length of a sample; a response may be a completion of the data."""
        own = self.data.max_completion_tokens if self.generate.source == "dataset" else None
        return self.generate.max_new_tokens if own is None else own

    @property
    def max_sample_tokens(self) -> int:
        """The maximum sample length, prompt and response together."""
        return self.data.max_prompt_tokens + self.max_response_tokens

    @property
    def max_read_tokens(self) -> int:
        """The maximum length of a text a teacher scores: a sample, or a held-out response with its
        prompt."""
        heldout = 0 if self.eval.source == "none" else self.eval.max_new_tokens
        return self.data.max_prompt_tokens + max(self.max_response_tokens, heldout)

    def num_requests(self, num_prompts: int) -> int | None:
        """Samples requested over the whole run; None if `steps` sets its length."""
        if self.schedule.epochs is None:
            return None
        passes = math.ceil(self.schedule.epochs / self.schedule.reuse)
        return num_prompts * self.generate.samples_per_prompt * passes


# `generate.shard_size: auto`, in process and the bounds of servers: four times the requests that a
# server has at once, so that others are left while the longest responses of a shard end.
_SHARD, _LARGEST_SHARD = 32, 1024


def served_shard(window: int | None, servers: int, *, is_overlapped: bool) -> int:
    """The default size of a shard that servers write, for a `window` of samples (None: any).

    A quarter of the window for each server leaves room for what is scored and trained on meanwhile.

    >>> served_shard(1024, 1, is_overlapped=True)
    256
    """
    if window is None:
        return _LARGEST_SHARD
    share = -(-window // (4 * servers if is_overlapped else servers))
    most = min(_LARGEST_SHARD, max(_SHARD, share), window // 2 if is_overlapped else window) or 1
    # One that divides the window leaves no small shard at its end.
    return next((size for size in range(most, most // 2, -1) if window % size == 0), most)


Keys: TypeAlias = Mapping[str, Any]


class RunKeywords(TypedDict, total=False):
    """The keyword arguments of `RunConfig` and `npd.run`. A section may be a mapping of its keys;
    settings with a default may be left out."""

    name: str
    run_dir: str | Path | None
    seed: int
    student: str | Path
    teacher: str | Path | None
    teachers: Mapping[str, str | Path | TeacherConfig | Keys]
    trust_remote_code: bool
    data: DataConfig | Keys | str | Path
    generate: GenerateConfig | Keys
    score: ScoreConfig | Keys
    filter: FilterConfig | Keys
    loss: LossConfig | Keys
    train: TrainConfig | Keys
    schedule: ScheduleConfig | Keys
    runtime: RuntimeConfig | Keys
    eval: EvalConfig | Keys
    checkpoint: CheckpointConfig | Keys
    observe: ObserveConfig | Keys
