"""What a run is made of: strict, frozen, complete. Import-light (no torch), nothing computed twice.

A `RunConfig` states each value once; whatever follows from others is a property. Everything that
can be known to be impossible without loading data or a model is refused here, with the remedy.
Reading YAML, presets and `--set` is `npd.settings`.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, model_validator

from npd.fields import Section
from npd.rules import rank_problems, served_problems
from npd.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    FilterConfig,
    GenerateConfig,
    LoraConfig,
    LossConfig,
    ObserveConfig,
    Refresh,
    RuntimeConfig,
    ScheduleConfig,
    ScoreConfig,
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
    "Refresh",
    "RunConfig",
    "RuntimeConfig",
    "ScheduleConfig",
    "ScoreConfig",
    "ServedConfig",
    "TrainConfig",
]

Model = Annotated[str, AfterValidator(os.path.expanduser)]


class RunConfig(Section):
    """A whole run. `student`, `teacher`: Hugging Face model directories or names."""

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

    @model_validator(mode="after")
    def _check_combination(self) -> RunConfig:
        rules = (_schedule_problems, _refresh_problems, _size_problems, _meaning_problems)
        found = [problem for rule in rules for problem in rule(self)]
        found += served_problems(self.generate, self.score, self.loss, self.schedule, self.runtime)
        found += rank_problems(self.train, self.runtime)
        problems = [message for is_broken, message in found if is_broken]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _schedule_problems(c: RunConfig) -> list[tuple[bool, str]]:
    schedule = c.schedule
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
            window is not None and window < c.train.batch_size,
            f"schedule.window ({window}) must hold at least one train.batch_size "
            f"({c.train.batch_size})",
        ),
        (
            window is not None
            and window < 2 * c.generate.shard_size
            and c.is_overlapped
            and c.generate.source == "student",
            f"schedule.window ({window}) must hold two generate.shard_size "
            f"({c.generate.shard_size}) for stages to overlap: lower generate.shard_size or set "
            "schedule.overlap: false",
        ),
    ]


def _refresh_problems(c: RunConfig) -> list[tuple[bool, str]]:
    schedule, refresh = c.schedule, c.schedule.refresh
    at_epochs = refresh.at_epochs or ()
    rules = (refresh.every_steps, refresh.at_epochs, refresh.drift)
    return [
        (
            sum(rule is not None for rule in rules) > 1,
            "schedule.refresh takes one of every_steps, at_epochs and drift",
        ),
        (
            c.generate.source != "student" and not refresh.is_never,
            f"generate.source {c.generate.source} never samples the student: "
            "set schedule.refresh: never",
        ),
        (
            refresh.at_epochs is not None and schedule.epochs is None,
            "schedule.refresh.at_epochs needs schedule.epochs",
        ),
        (
            any(epoch % schedule.reuse != 0 for epoch in at_epochs) and schedule.window == "all",
            f"schedule.refresh.at_epochs must be multiples of schedule.reuse ({schedule.reuse}) "
            "while schedule.window is all: in between nobody would sample the new snapshot",
        ),
        (
            list(at_epochs) != sorted(set(at_epochs)),
            "schedule.refresh.at_epochs must rise: list each epoch once, in order",
        ),
        (
            any(epoch >= (schedule.epochs or math.inf) for epoch in at_epochs),
            "schedule.refresh.at_epochs beyond schedule.epochs - 1 are never reached: with "
            f"{schedule.epochs} epochs list earlier ones, or set schedule.refresh: never",
        ),
        (
            refresh.drift is not None and (c.generate.temperature, c.generate.top_p) != (1.0, 1.0),
            "schedule.refresh.drift needs samples of the policy itself: set "
            "generate.temperature: 1 and generate.top_p: 1, or refresh by every_steps",
        ),
    ]


def _size_problems(c: RunConfig) -> list[tuple[bool, str]]:
    return [
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
            c.filter.min_response_tokens > c.generate.max_new_tokens,
            f"filter.min_response_tokens ({c.filter.min_response_tokens}) rejects everything: "
            f"lower it to generate.max_new_tokens ({c.generate.max_new_tokens}) or below",
        ),
    ]


def _meaning_problems(c: RunConfig) -> list[tuple[bool, str]]:
    return [
        (
            c.needs_teacher and c.teacher is None,
            "this run needs a teacher: set `teacher`, or loss.kd_weight: 0 with filter.name: none "
            "and eval.source: completion (or none)",
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
        (
            c.loss.target == "topk" and c.loss.divergence != "forward",
            f"loss.divergence {c.loss.divergence} needs whole distributions, which topk does not "
            "give: set loss.target: tail or renorm",
        ),
        (
            c.loss.target == "sampled" and c.loss.temperature != 1.0,
            f"loss.target sampled has no whole distribution to put at loss.temperature "
            f"({c.loss.temperature:g}): set loss.temperature: 1, or another target",
        ),
        (
            c.generate.source == "dataset" and c.generate.samples_per_prompt > 1,
            "generate.source dataset has one completion a prompt: set "
            "generate.samples_per_prompt: 1",
        ),
        (
            c.filter.keep is not None and c.filter.name in ("none", "delta_ifd"),
            f"filter.keep is the share a control keeps, and filter.name {c.filter.name} is none: "
            "leave it out, or set filter.name: random",
        ),
        (
            c.name in ("", ".", "..") or any(mark in c.name for mark in "/\\"),
            f"name ({c.name!r}) must be a plain directory name: put a path in run_dir",
        ),
        (
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", c.runtime.device) is None,
            f"runtime.device ({c.runtime.device!r}) must be auto, cpu, cuda or cuda:N",
        ),
    ]
