"""The values of a run, each stated once; whatever follows from others is a property."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from npd.fields import Section
from npd.names import DEFAULT_TEACHER
from npd.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    FilterConfig,
    GenerateConfig,
    LossConfig,
    Model,
    NamedTeacher,
    ObserveConfig,
    RuntimeConfig,
    ScheduleConfig,
    ScoreConfig,
    TrainConfig,
)


class RunValues(Section):
    """All values of a run, and what follows from them; not yet checked against each other."""

    name: str = "npd"
    """What the run is called; its directory is `runs/<name>`."""
    run_dir: Annotated[Path, AfterValidator(Path.expanduser)] | None = None
    """Where the run is kept; None is `runs/<name>`."""
    seed: int = 0
    """Decides every arbitrary choice: order of prompts, samples, shuffles, dropout."""
    student: Model
    """The model to train: a Hugging Face directory or name."""
    teacher: Model | None = None
    """The model to learn from; it shares the student's vocabulary."""
    teachers: dict[str, NamedTeacher] = Field(default_factory=dict)
    """More teachers by the name that prompts give in their `teacher` column, e.g. `{math: DIR}`.
    `teacher` is that of prompts that name none."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Only for models you trust."""
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
        """Where the run's workers exchange files; None: in the run directory."""
        shared = self.runtime.shared
        return None if shared is None else f"{shared.rstrip('/')}/{self.name}"

    @property
    def needs_scores(self) -> bool:
        """Whether samples go past the teacher at all (plain SFT: no)."""
        return self.loss.kd_weight > 0.0 or self.filters_by_scores

    @property
    def filters_by_scores(self) -> bool:
        """Whether the filter asks for what comes with a teacher's scores."""
        return self.needs_ifd or self.filter.name in ("teacher_nll", "overlap", "outlier")

    @property
    def needs_ifd(self) -> bool:
        """Whether the answer-alone and the student's passes are needed."""
        controls = ("random", "teacher_nll", "overlap", "length")
        matched = self.filter.name in controls and self.filter.keep is None
        return self.filter.name == "delta_ifd" or matched

    @property
    def needs_student_pass(self) -> bool:
        """Whether the snapshot must prefill whole samples (not only answers alone)."""
        untempered = self.generate.source == "student"
        by_nll = self.needs_ifd or self.filter.name == "outlier"
        ask = self.filter.name == "overlap" or (by_nll and not untempered)
        return ask or (by_nll and self.score.student_pass == "always")

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher model is loaded at all."""
        return self.trains_by_teacher or self.evaluates_teacher

    @property
    def trains_by_teacher(self) -> bool:
        """Whether a teacher reads or writes the samples that are trained on."""
        return self.needs_scores or self.generate.source == "teacher"

    @property
    def evaluates_teacher(self) -> bool:
        """Whether held-out text is read by a teacher."""
        return self.eval.source == "teacher" or (
            self.eval.source == "completion" and bool(self.teacher_models)
        )

    @property
    def teacher_models(self) -> dict[str, str]:
        """The model of each teacher by its name; that of `teacher` is called `default`."""
        own = {} if self.teacher is None else {DEFAULT_TEACHER: self.teacher}
        return own | {name: teacher.model for name, teacher in self.teachers.items()}

    def score_of(self, teacher: str) -> ScoreConfig:
        """`score`, its servers those of this teacher."""
        return self.score.model_copy(update=self._servers_of(teacher, self.score.engine))

    def generate_of(self, teacher: str) -> GenerateConfig:
        """`generate`, its servers those of this teacher, where teachers write."""
        return self.generate.model_copy(update=self._servers_of(teacher, self.generate.engine))

    def _servers_of(self, teacher: str, engine: str) -> dict[str, object]:
        named = self.teachers.get(teacher)
        if named is None:
            return {}
        if engine == "transformers":
            return {"urls": (), "launch": None}
        return {"urls": named.urls, "launch": named.launch}

    @property
    def is_overlapped(self) -> bool:
        """Whether stages run at the same time."""
        overlap = self.schedule.overlap
        return self.runtime.kind != "inline" if overlap == "auto" else overlap

    @property
    def max_sample_tokens(self) -> int:
        """The longest a sample can get, prompt and response together."""
        return self.data.max_prompt_tokens + self.generate.max_new_tokens

    @property
    def max_read_tokens(self) -> int:
        """The longest text a teacher reads: a sample, or a held-out response with its prompt."""
        heldout = 0 if self.eval.source == "none" else self.eval.max_new_tokens
        return self.data.max_prompt_tokens + max(self.generate.max_new_tokens, heldout)

    def num_asks(self, num_prompts: int) -> int | None:
        """Samples asked for over the whole run; None when `steps` bounds it instead."""
        if self.schedule.epochs is None:
            return None
        passes = math.ceil(self.schedule.epochs / self.schedule.reuse)
        return num_prompts * self.generate.samples_per_prompt * passes
