"""What a run is made of: strict, frozen, complete. Import-light (no torch), nothing computed twice.

A `RunConfig` states each value once; whatever follows from others is a property. Everything that
can be known to be impossible without loading data or a model is refused here, with the remedy.
Reading YAML, presets and `--set` is `npd.settings`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Dtype = Literal["float32", "bfloat16"]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True
    )


class DataConfig(_Section):
    """Where prompts come from and how long they may be (token counts)."""

    train: str | None = None
    """JSONL or Parquet file, or a Hugging Face dataset name (`name` or `name:config`)."""
    split: str = "train"
    """Split of a Hugging Face dataset; files have none."""
    heldout: str | None = None
    """Held-out prompts, same forms as `train`; None takes `heldout_size` off the end of `train`."""
    heldout_split: str = "test"
    heldout_size: Annotated[int, Field(ge=0)] = 64
    limit: Positive | None = None
    """Use only the first so many training prompts."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames: our column name -> the data's, e.g. `{prompt: question, completion: answer}`."""
    system: str | None = None
    """System message put before every conversation that has none."""
    max_prompt_tokens: Positive = 1024
    on_long_prompt: Literal["error", "drop"] = "error"
    on_bad_record: Literal["error", "drop"] = "error"
    """What to do with an empty or malformed record: stop with its line, or drop and count it."""


class GenerateConfig(_Section):
    """Who writes the responses, and how they are sampled."""

    source: Literal["student", "teacher", "dataset"] = "student"
    engine: Literal["transformers"] = "transformers"
    samples_per_prompt: Positive = 1
    max_new_tokens: Positive = 512
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """0 is greedy. At 1 with top_p 1 the samples are the snapshot's own distribution."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    batch_size: Positive = 32
    """Sequences decoded together."""
    shard_size: Positive = 32
    """Samples asked for, stored and scored together."""
    workers: Positive = 1
    dtype: Dtype = "bfloat16"


class ScoreConfig(_Section):
    """What is kept of the teacher at each response position."""

    engine: Literal["transformers"] = "transformers"
    top_k: Positive = 10
    row_tokens: Positive = 4096
    """Tokens of one packed prefill."""
    head_chunk: Positive = 512
    """Response positions whose logits exist at once."""
    student_pass: Literal["auto", "always"] = "auto"
    """`auto` takes the student's conditional NLL from the rollout where the rollout has it."""
    workers: Positive = 1
    dtype: Dtype = "bfloat16"


class FilterConfig(_Section):
    """Which samples are trained on. The pre-filters run before the teacher is paid for."""

    name: Literal["none", "delta_ifd", "random", "teacher_nll", "overlap", "length"] = "delta_ifd"
    ratio: Literal["nll", "ppl"] = "nll"
    bounds: Literal["fixed", "quantile"] = "fixed"
    low: float = 0.0
    high: float = 0.8
    low_quantile: Share = 0.05
    high_quantile: Share = 0.95
    history: Positive = 512
    """Most recent scored samples whose quantiles set the bounds."""
    tolerance: Annotated[float, Field(ge=0.0)] = 0.05
    """Slack below `low`; 0 is the paper's rule to the letter."""
    min_nll: Annotated[float, Field(ge=0.0)] = 0.05
    """Below this conditional NLL (nats/token, both models) the ratio says nothing: keep."""
    keep: Share | None = None
    """Share a control keeps; None keeps as many as delta_ifd would of the same samples."""
    drop_truncated: bool = True
    min_response_tokens: Positive = 4
    max_repeat: Share = 0.5
    """Largest share of repeated 4-grams."""


class LossConfig(_Section):
    """L = (1 - kd_weight) * CE + kd_weight * KD, on response tokens, token mean over the step."""

    kd_weight: Share = 0.9
    target: Literal["topk", "renorm", "tail", "sampled"] = "topk"
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Mixture of the generalised JSD (towards 0 forward, towards 1 reverse)."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    impl: Literal["chunked", "reference"] = "chunked"
    chunk: Positive = 1024
    """Response positions whose logits exist at once."""


class TrainConfig(_Section):
    """The optimiser and what a step is made of."""

    lr: Annotated[float, Field(gt=0.0)] = 1e-5
    min_lr: Annotated[float, Field(ge=0.0)] = 1e-6
    warmup: Share = 0.0
    """Share of the run over which lr rises linearly from 0."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    batch_size: Positive = 64
    """Samples a step; they are packed into as many rows as they need."""
    row_tokens: Positive = 32768
    """Capacity of a packed row: what one forward and backward pass holds."""
    dtype: Dtype = "bfloat16"
    """Compute type; weights and optimiser state stay float32."""
    activation_checkpointing: bool = False


class Refresh(_Section):
    """When the generating snapshot is replaced; exactly one rule, or none of them (never)."""

    every_steps: Positive | None = None
    at_epochs: tuple[Positive, ...] | None = None
    drift: Annotated[float, Field(gt=0.0)] | None = None
    """Refresh when the mean KL(theta || gen) of a segment passes this (nats per token)."""
    min_steps: Positive = 1
    """Fewest steps between two refreshes by drift."""

    @property
    def is_never(self) -> bool:
        """Whether the first snapshot writes everything."""
        return self.every_steps is None and self.at_epochs is None and self.drift is None


def _parse_refresh(value: Any) -> Any:
    return {} if value == "never" else value


class ScheduleConfig(_Section):
    """Four numbers that span the family of methods, and how long the run is."""

    epochs: Positive | None = None
    """Passes over the prompts, counted in trained samples; or else `steps`."""
    steps: Positive | None = None
    """Optimiser steps; prompts repeat as needed."""
    window: Positive | Literal["all"] = "all"
    """Samples kept live."""
    reuse: Positive = 5
    """Times a sample is trained on."""
    refresh: Annotated[Refresh, BeforeValidator(_parse_refresh)] = Refresh(at_epochs=(5,))
    max_lag: Annotated[int, Field(ge=0)] = 1
    """Snapshots a sample may be behind and still be trained on."""
    overlap: bool | Literal["auto"] = "auto"
    """Whether stages run at the same time; auto: yes with several processes, no inline."""
    segment_steps: Positive = 8
    """Steps handed to the trainer at once."""
    max_tries: Positive = 3


class RuntimeConfig(_Section):
    """Where workers live."""

    kind: Literal["inline", "local"] = "local"
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    threads: Positive | None = None
    """CPU threads a worker may use; None shares the machine's cores out."""
    call_timeout: Annotated[float, Field(gt=0.0)] = 3600.0
    """Seconds after which a worker that has not answered counts as lost."""


class EvalConfig(_Section):
    """Held-out evaluation: at the start, every so many steps, and at the end."""

    every_steps: Positive | None = None
    source: Literal["teacher", "completion", "none"] = "teacher"
    """Whose responses the held-out KL is measured on."""
    max_new_tokens: Positive = 64
    batch_size: Positive = 32
    num_samples: Annotated[int, Field(ge=0)] = 4
    """Student responses shown in the report."""


class CheckpointConfig(_Section):
    """When the trainer's state is saved for `--resume` (also at the end of the run)."""

    every_steps: Positive | None = 100
    keep: Positive = 1


class ObserveConfig(_Section):
    """What a run leaves for people to look at."""

    trackers: tuple[Literal["tensorboard"], ...] = ()
    report: bool = True
    trace: bool = True
    """Write trace.json for Perfetto (the spans themselves are always kept)."""


class RunConfig(_Section):
    """A whole run. `student`, `teacher`: Hugging Face model directories or names."""

    name: str = "npd"
    run_dir: Path | None = None
    """Where the run is kept; None is `runs/<name>`."""
    seed: int = 0
    student: str
    teacher: str | None = None
    trust_remote_code: bool = False
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
    def needs_scores(self) -> bool:
        """Whether samples go past the teacher at all (plain SFT: no)."""
        by_teacher = self.filter.name in ("teacher_nll", "overlap")
        return self.loss.kd_weight > 0.0 or self.needs_ifd or by_teacher

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
        ask = self.filter.name == "overlap" or (self.needs_ifd and not untempered)
        return ask or (self.needs_ifd and self.score.student_pass == "always")

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher model is loaded at all."""
        return self.needs_scores or self.generate.source == "teacher" or self._evaluates_teacher

    @property
    def _evaluates_teacher(self) -> bool:
        return self.eval.source == "teacher" or (
            self.eval.source == "completion" and self.teacher is not None
        )

    @property
    def is_overlapped(self) -> bool:
        """Whether stages run at the same time."""
        overlap = self.schedule.overlap
        return self.runtime.kind != "inline" if overlap == "auto" else overlap

    @property
    def max_sample_tokens(self) -> int:
        """The longest a sample can get, prompt and response together."""
        return self.data.max_prompt_tokens + self.generate.max_new_tokens

    def num_asks(self, num_prompts: int) -> int | None:
        """Samples asked for over the whole run; None when `steps` bounds it instead."""
        if self.schedule.epochs is None:
            return None
        passes = math.ceil(self.schedule.epochs / self.schedule.reuse)
        return num_prompts * self.generate.samples_per_prompt * passes

    @model_validator(mode="after")
    def _check_combination(self) -> RunConfig:
        problems = [message for broken, message in _impossible(self) if broken]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _impossible(c: RunConfig) -> list[tuple[bool, str]]:
    """Each combination that cannot work, and what to do about it."""
    schedule, refresh = c.schedule, c.schedule.refresh
    rules = (refresh.every_steps, refresh.at_epochs, refresh.drift)
    fixed_text = c.generate.source != "student"
    window = schedule.window if isinstance(schedule.window, int) else None
    return [
        (
            (schedule.epochs is None) == (schedule.steps is None),
            "set exactly one of schedule.epochs and schedule.steps",
        ),
        (
            schedule.epochs is not None and schedule.epochs % schedule.reuse != 0,
            f"schedule.epochs ({schedule.epochs}) must be a multiple of schedule.reuse "
            f"({schedule.reuse}): each sample is trained on that often",
        ),
        (
            sum(rule is not None for rule in rules) > 1,
            "schedule.refresh takes one of every_steps, at_epochs and drift",
        ),
        (
            fixed_text and not refresh.is_never,
            f"generate.source {c.generate.source} never samples the student: "
            "set schedule.refresh: never",
        ),
        (
            refresh.at_epochs is not None and schedule.epochs is None,
            "schedule.refresh.at_epochs needs schedule.epochs",
        ),
        (
            any(epoch % schedule.reuse != 0 for epoch in refresh.at_epochs or ())
            and window is None,
            f"schedule.refresh.at_epochs must be multiples of schedule.reuse ({schedule.reuse}) "
            "while schedule.window is all: in between nobody would sample the new snapshot",
        ),
        (
            window is not None and window < c.train.batch_size,
            f"schedule.window ({window}) must hold at least one train.batch_size "
            f"({c.train.batch_size})",
        ),
        (
            c.needs_teacher and c.teacher is None,
            "this run needs a teacher: set `teacher`, or loss.kd_weight: 0 with filter.name: none "
            "and eval.source: completion (or none)",
        ),
        (
            c.max_sample_tokens > c.train.row_tokens,
            f"train.row_tokens ({c.train.row_tokens}) must hold the longest sample: "
            f"data.max_prompt_tokens + generate.max_new_tokens = {c.max_sample_tokens}",
        ),
        (
            c.needs_scores and c.max_sample_tokens > c.score.row_tokens,
            f"score.row_tokens ({c.score.row_tokens}) must hold the longest sample: "
            f"data.max_prompt_tokens + generate.max_new_tokens = {c.max_sample_tokens}",
        ),
        (
            c.train.min_lr > c.train.lr,
            f"train.min_lr ({c.train.min_lr}) is above train.lr ({c.train.lr})",
        ),
        (
            c.filter.low > c.filter.high or c.filter.low_quantile >= c.filter.high_quantile,
            "the filter's lower bound is above its upper one",
        ),
        (
            c.loss.target == "sampled" and c.loss.divergence != "forward",
            "loss.target sampled estimates the forward divergence only: set loss.divergence "
            "forward, or another target",
        ),
    ]
