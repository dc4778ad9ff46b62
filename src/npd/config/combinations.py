"""Which values of a run make no sense together: (is it so, what to do about it)."""

from __future__ import annotations

import math

from npd.config.exchange import sharing_problems
from npd.config.teaching import teacher_problems
from npd.config.values import RunValues
from npd.rules import rank_problems, runtime_problems, served_problems, teacher_rank_problems


def problems(c: RunValues) -> list[str]:
    """What is impossible about `c`, one line each with the remedy; none if it can be run."""
    rules = (
        *(_schedule_problems, _refresh_problems, _size_problems, _meaning_problems),
        sharing_problems,
    )
    found = [problem for rule in rules for problem in rule(c)]
    has_teacher = c.teacher is not None or not c.teachers
    found += served_problems(
        c.generate, c.score, c.loss, c.schedule, c.runtime, has_teacher=has_teacher
    )
    found += teacher_problems(c)
    found += rank_problems(c.train, c.runtime) + runtime_problems(c.runtime, c.train)
    found += teacher_rank_problems(c.score, c.generate, c.runtime)
    return [message for is_broken, message in found if is_broken]


def _schedule_problems(c: RunValues) -> list[tuple[bool, str]]:
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


def _refresh_problems(c: RunValues) -> list[tuple[bool, str]]:
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


def _size_problems(c: RunValues) -> list[tuple[bool, str]]:
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


def _teacher_uses(c: RunValues) -> str:
    """What asks for a teacher."""
    uses = {
        f"loss.kd_weight {c.loss.kd_weight:g}": c.loss.kd_weight > 0.0,
        f"filter.name {c.filter.name}": c.filters_by_scores,
        "generate.source teacher": c.generate.source == "teacher",
        "eval.source teacher": c.eval.source == "teacher",
    }
    return ", ".join(use for use, is_so in uses.items() if is_so)


def _meaning_problems(c: RunValues) -> list[tuple[bool, str]]:
    return [
        (
            c.needs_teacher and not c.teacher_models,
            f"this run needs a teacher: set `teacher` or `teachers` (for {_teacher_uses(c)}), or "
            "loss.kd_weight: 0 with filter.name: none and eval.source: completion (or none)",
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
            c.loss.skip_after > 0.0 and not c.needs_scores,
            f"loss.skip_after {c.loss.skip_after:g} asks how likely a teacher finds each token, "
            "and no teacher scores here: set loss.skip_after: 0, or loss.kd_weight above 0",
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
            c.filter.keep is not None and c.filter.name in ("none", "delta_ifd", "outlier"),
            f"filter.keep is the share a control keeps, and filter.name {c.filter.name} is none: "
            "leave it out, or set filter.name: random",
        ),
        (
            c.name in ("", ".", "..") or any(mark in c.name for mark in "/\\"),
            f"name ({c.name!r}) must be a plain directory name: put a path in run_dir",
        ),
    ]
