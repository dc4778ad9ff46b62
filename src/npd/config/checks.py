"""Cross-section validation: each rule relates several settings and states a remedy."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Iterator

from npd.config.length import DEFAULT_EPOCHS, RULES, best_reuse, points_at
from npd.config.paths import is_data_file
from npd.config.run import RunValues
from npd.config.server_checks import (
    device_problems,
    engine_problems,
    in_flight_problems,
    ranks_problems,
    ray_problems,
    servers_problems,
)
from npd.text import shown, shown_path

_LONGEST_NAME = 200  # bytes; file systems take 255, and suffixes are added


class ImpossibleError(ValueError):
    """Values that contradict each other: `problems`, one line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def problems(c: RunValues) -> list[str]:
    """The problems of `c`, one line each with the remedy; empty if `c` is valid."""
    checks = (
        *(_length_problems, _window_problems, _share_problems),
        *(_refresh_problems, _at_epochs_problems, _at_steps_problems, in_flight_problems),
        *(_token_limit_problems, _sampling_problems, _mix_problems, _heldout_problems),
        *(_teacher_problems, _rate_problems, _determinism_problems, _filter_problems),
        *(_loss_problems, _name_problems),
        *(_shared_problems, servers_problems, engine_problems),
        *(ranks_problems, device_problems, ray_problems),
    )
    return [problem for check in checks for problem in check(c)]


def _set(**values: object) -> str:
    """Shell-quoted `--set a.b=c` for each value; `a__b` stands for `a.b`."""
    texts = [f"{key.replace('__', '.')}={_text(value)}" for key, value in values.items()]
    return " ".join(f"--set {shlex.quote(text)}" for text in texts)


def _text(value: object) -> str:
    if isinstance(value, list):
        return str(value) if len(value) != 1 else str(value[0])
    return "null" if value is None else str(value)


def _length_problems(c: RunValues) -> Iterator[str]:
    """`schedule.epochs`, `steps` and `reuse`."""
    schedule = c.schedule
    epochs, steps, reuse = schedule.epochs, schedule.steps, schedule.reuse
    if (epochs is None) == (steps is None):
        one = _set(schedule__epochs=DEFAULT_EPOCHS)
        if epochs is not None:
            one = _set(schedule__epochs=None, schedule__steps=steps)
        yield f"set exactly one of schedule.epochs and schedule.steps: {one}"
    elif epochs is not None and epochs % reuse != 0:
        more = -(-epochs // reuse) * reuse
        points = schedule.refresh.at_epochs or () if schedule.window == "all" else ()
        fewer = best_reuse(epochs, reuse, (point for point in points if point < epochs))
        yield (
            f"schedule.epochs ({epochs}) must be a multiple of schedule.reuse ({reuse}), since "
            f"each sample is trained on {reuse} times: either {_set(schedule__epochs=more)} or "
            f"{_set(schedule__reuse=fewer)}"
        )


def _window_problems(c: RunValues) -> Iterator[str]:
    """`schedule.window` must hold a batch, and two shards if stages overlap."""
    window, batch, shard = c.schedule.window, c.train.batch_size, c.shard_size
    if not isinstance(window, int):
        return
    overlaps = c.is_overlapped and c.generate.source == "student"
    if window < batch:
        yield (
            f"schedule.window ({window}) must hold at least one train.batch_size ({batch}): "
            f"{_set(schedule__window=max(batch, 2 * shard) if overlaps else batch)}"
        )
    elif window < 2 * shard and overlaps:
        yield (
            f"schedule.window ({window}) must hold two generate.shard_size ({shard}) for stages to "
            f"overlap: either {_set(generate__shard_size=max(1, window // 2))} or "
            f"{_set(schedule__overlap='false')}"
        )


def _share_problems(c: RunValues) -> Iterator[str]:
    """`runtime.share: phases`: one device, and one stage at a time."""
    if not c.has_phases:
        return
    together = _set(runtime__share="together")
    if c.schedule.overlap is True:
        yield (
            "schedule.overlap: true runs stages at the same time, runtime.share: phases one after "
            f"another: {_set(schedule__overlap='auto')} or {together}"
        )
    if c.runtime.kind == "ray":
        yield (
            "runtime.share: phases is for one device, and Ray gives each worker GPUs of its own: "
            f"{together}"
        )
    for section in ("train", "score"):
        ranks = getattr(c, section).ranks
        if ranks > 1:
            yield (
                f"runtime.share: phases is for one device, but {section}.ranks is {ranks}: "
                f"{_set(**{f'{section}__ranks': 1})} or {together}"
            )


def _refresh_problems(c: RunValues) -> Iterator[str]:
    """`schedule.refresh`: at most one rule, and only for text that the student writes."""
    refresh, generate = c.schedule.refresh, c.generate
    given = [rule for rule in RULES if getattr(refresh, rule) is not None]
    if len(given) > 1:
        others = _set(**{f"schedule__refresh__{rule}": None for rule in given[1:]})
        yield (
            "schedule.refresh takes only one of every_steps, at_epochs, at_steps and drift: "
            f"{others}"
        )
    if generate.source != "student" and not refresh.is_never:
        yield (
            f"generate.source {generate.source} never samples the student: "
            f"{_set(schedule__refresh='never')}"
        )
    if refresh.drift is not None and (generate.temperature, generate.top_p) != (1.0, 1.0):
        yield (
            "schedule.refresh.drift needs samples from the policy's own distribution: "
            f"either {_set(generate__temperature=1, generate__top_p=1)} or "
            f"{_set(schedule__refresh__every_steps=50)}"
        )


def _at_epochs_problems(c: RunValues) -> Iterator[str]:
    """`schedule.refresh.at_epochs`: inside the run, ascending, multiples of `schedule.reuse`."""
    schedule, key = c.schedule, "schedule.refresh.at_epochs"
    points, epochs, reuse = schedule.refresh.at_epochs, schedule.epochs, schedule.reuse
    if not points or (epochs is None) == (schedule.steps is None):
        return
    if epochs is None:
        half = points_at([0.5], schedule.steps or 1)
        rules = {"schedule__refresh__at_epochs": None, "schedule__refresh__at_steps": half or None}
        yield f"{key} needs schedule.epochs, but schedule.steps is set: {_set(**rules)}"
        return
    unit = reuse if schedule.window == "all" and epochs % reuse == 0 else 1
    inside = points_at((point / epochs for point in points if point < epochs), epochs, unit=unit)
    remedy = _set(schedule__refresh="never")
    if inside:
        remedy = _set(schedule__refresh__at_epochs=inside)
    if schedule.window == "all" and any(point % reuse != 0 for point in points):
        yield (
            f"{key} must be multiples of schedule.reuse ({reuse}) if schedule.window is all, since "
            f"a snapshot in between would write no sample: {remedy}"
        )
    if not _is_rising(points):
        yield f"{key} must be in ascending order, each epoch once: {remedy}"
    if max(points) >= epochs:
        yield f"{key} must be at most schedule.epochs - 1 ({epochs - 1}): {remedy}"


def _at_steps_problems(c: RunValues) -> Iterator[str]:
    """`schedule.refresh.at_steps`: inside the run, ascending."""
    key, points, steps = "schedule.refresh.at_steps", c.schedule.refresh.at_steps, c.schedule.steps
    if not points:
        return
    never = _set(schedule__refresh="never")
    if steps is None:
        yield f"{key} needs schedule.steps, but schedule.epochs is set: {never}"
    inside = sorted({point for point in points if steps is None or point < steps})
    remedy = _set(schedule__refresh__at_steps=inside) if inside else never
    if not _is_rising(points):
        yield f"{key} must be in ascending order, each step once: {remedy}"
    if steps is not None and max(points) >= steps:
        yield f"{key} must be at most schedule.steps - 1 ({steps - 1}): {remedy}"


def _is_rising(points: tuple[int, ...]) -> bool:
    return list(points) == sorted(set(points))


def _token_limit_problems(c: RunValues) -> Iterator[str]:
    """Packed rows must hold the longest sample, and the filter must accept some length."""
    limit = "generate.max_new_tokens"
    if c.generate.source == "dataset" and c.data.max_completion_tokens is not None:
        limit = "data.max_completion_tokens"
    longest = c.max_sample_tokens
    rows = {"train": c.train.row_tokens}
    if c.needs_scores:
        rows["score"] = c.score.least_row_tokens
    for section, row_tokens in rows.items():
        if longest > row_tokens:
            yield (
                f"{section}.row_tokens ({row_tokens}) must hold the longest sample: "
                f"data.max_prompt_tokens + {limit} = {longest}: "
                f"{_set(**{f'{section}__row_tokens': longest})}"
            )
    fewest = c.filter.min_response_tokens
    if fewest > c.max_response_tokens:
        yield (
            f"filter.min_response_tokens ({fewest}) is above {limit} ({c.max_response_tokens}), so "
            "it rejects every sample: "
            f"{_set(filter__min_response_tokens=c.max_response_tokens)}"
        )


def _sampling_problems(c: RunValues) -> Iterator[str]:
    """`generate.temperature` and `samples_per_prompt`."""
    g = c.generate
    if 0.0 < g.temperature < 0.01:
        yield (
            f"generate.temperature ({g.temperature:g}) is so low that it is greedy or overflows: "
            f"{_set(generate__temperature=0)}, or at least 0.01"
        )
    if g.samples_per_prompt == 1:
        return
    if g.source == "dataset":
        yield (
            "generate.source dataset has one completion per prompt: set "
            "generate.samples_per_prompt: 1"
        )
    elif g.temperature == 0.0:
        yield (
            f"generate.samples_per_prompt ({g.samples_per_prompt}) with generate.temperature 0 "
            "gives identical responses: "
            f"{_set(generate__samples_per_prompt=1)}, or {_set(generate__temperature=1)}"
        )


def _mix_problems(c: RunValues) -> Iterator[str]:
    """`data.mix`: in place of `data.train`, with a weight for every source or for none."""
    mix = c.data.mix
    if mix and c.data.train is not None:
        yield "data.mix holds the training prompts, and data.train too: --set data.train=null"
    without = [name for name, source in mix.items() if source.weight is None]
    if without and len(without) < len(mix):
        yield (
            f"data.mix.{without[0]} has no weight, and other sources have one: set "
            f"data.mix.{without[0]}.weight, or leave all weights out"
        )


def _heldout_problems(c: RunValues) -> Iterator[str]:
    """Held-out prompts must not be the training prompts."""
    data = c.data
    if data.train is None or data.train != data.heldout:
        return
    if is_data_file(data.train) or data.split == data.heldout_split:
        yield (
            f"data.heldout is the same as data.train ({shown_path(data.train)}): leave "
            "data.heldout out to draw data.heldout_size prompts from data.train"
        )


def _teacher_problems(c: RunValues) -> Iterator[str]:
    """Settings that need a teacher if none is set."""
    if c.needs_teacher and not c.teacher_models:
        yield (
            f"this run needs a teacher: set `teacher` or `teachers` (for {_teacher_uses(c)}), or "
            "loss.kd_weight: 0 with filter.name: none and eval.source: completion (or none)"
        )
    if c.loss.skip_after > 0.0 and not c.needs_scores:
        yield (
            f"loss.skip_after {c.loss.skip_after:g} needs a teacher's probability of each token, "
            "but no teacher scores the samples: set loss.skip_after: 0, or loss.kd_weight above 0"
        )


def _teacher_uses(c: RunValues) -> str:
    """The settings that need a teacher."""
    uses = {
        f"loss.kd_weight {c.loss.kd_weight:g}": c.loss.kd_weight > 0.0,
        f"filter.name {c.filter.name}": c.filters_by_scores,
        "generate.source teacher": c.generate.source == "teacher",
        "eval.source teacher": c.eval.source == "teacher",
    }
    return ", ".join(use for use, is_so in uses.items() if is_so)


def _rate_problems(c: RunValues) -> Iterator[str]:
    """`train.lr` falls to `train.min_lr`."""
    if c.train.min_lr > c.train.lr:
        yield (
            f"train.min_lr ({c.train.min_lr}) is above train.lr ({c.train.lr}): "
            f"{_set(train__min_lr=f'{c.train.lr / 10:.3g}')}"
        )


def _determinism_problems(c: RunValues) -> Iterator[str]:
    """torch has one such setting for a process, and drawing text on a GPU has no such algorithm."""
    if c.train.deterministic and c.runtime.kind == "inline" and c.is_overlapped:
        yield (
            "train.deterministic concerns a whole process, and with runtime.kind inline all stages "
            "are in one: set schedule.overlap: false, or runtime.kind: local"
        )


def _filter_problems(c: RunValues) -> Iterator[str]:
    """The filter's bounds, and `filter.keep`."""
    f = c.filter
    if f.low > f.high or f.low_quantile >= f.high_quantile:
        yield (
            "the filter's lower bound is above its upper bound: correct filter.low and "
            "filter.high, or filter.low_quantile and filter.high_quantile"
        )
    if f.keep is not None and f.name in ("none", "delta_ifd", "outlier"):
        yield (
            f"filter.keep applies to the control filters, but filter.name is {f.name}: leave "
            "filter.keep out, or set filter.name: random"
        )


def _loss_problems(c: RunValues) -> Iterator[str]:
    """`loss.target` with `loss.divergence` and `loss.temperature`."""
    loss = c.loss
    yield from target_problems(loss.target, loss.divergence, loss.temperature)
    if loss.target == "topk" and loss.divergence != "forward":
        yield (
            f"loss.divergence {loss.divergence} needs whole distributions, and loss.target topk "
            "has none: set loss.target: tail or renorm"
        )


def target_problems(target: str, divergence: str, temperature: float) -> Iterator[str]:
    """Combinations that the loss cannot compute; `npd.train.loss` checks them too."""
    if target == "sampled" and divergence != "forward":
        yield (
            "loss.target sampled estimates the forward divergence only: set loss.divergence: "
            "forward, or another target"
        )
    if target == "sampled" and temperature != 1.0:
        yield (
            "loss.target sampled has no whole distribution to apply loss.temperature "
            f"({temperature:g}) to: set loss.temperature: 1, or another target"
        )


def _name_problems(c: RunValues) -> Iterator[str]:
    """`name` must be a valid directory name."""
    is_plain = c.name not in ("", ".", "..") and not set(c.name) & set("/\\")
    is_short = len(c.name.encode(errors="replace")) <= _LONGEST_NAME
    if not (is_plain and is_short and c.name.isprintable()):
        yield (
            f"name ({shown(repr(c.name), 60)}) must be a plain directory name of at most "
            f"{_LONGEST_NAME} bytes: put a path in run_dir"
        )


def _shared_problems(c: RunValues) -> Iterator[str]:
    """`runtime.shared`, the URL by which machines exchange files, and `runtime.scratch`."""
    url, scratch = c.runtime.shared, c.runtime.scratch
    if not url and scratch is not None:
        yield (
            "runtime.scratch holds copies of files from runtime.shared, which is not set: set "
            "runtime.shared, or leave runtime.scratch out"
        )
    if url is None:
        return
    public = re.sub(r"//[^/]*@", "//***@", url)
    if not _is_storage_url(url):
        yield (
            f"runtime.shared ({public!r}) must be a URL like s3://bucket/folder; if all machines "
            "see the same folder: leave runtime.shared out and set run_dir to that folder"
        )
    elif not _has_folder(url):
        yield (
            f"runtime.shared ({public!r}) must name a bucket, or an absolute folder without any of "
            ".. * ? [ ]: s3://bucket/folder, file:///folder"
        )
    if re.match(r"[^/]*//[^/]*:[^/]*@", url) is not None:
        yield (
            f"runtime.shared ({public!r}) contains a password, which config.json would show: put "
            "it in the provider's credentials file, or in FSSPEC_<PROTOCOL>_PASSWORD"
        )
    if url and c.generate.urls and scratch is None and c.generate.source == "student":
        yield (
            "the servers at generate.urls load snapshots from their worker's copies: set "
            "runtime.scratch to a folder that the servers see at the same path"
        )


def _is_storage_url(text: str) -> bool:
    """Whether `text` is `protocol://...` without whitespace, and not a chain of protocols."""
    return re.fullmatch(r"[\w+.-]+://[^\s\x00-\x1f\x7f]*", text) is not None and "::" not in text


def _has_folder(url: str) -> bool:
    """Whether a URL names a folder below a root: a run removes files there, never from a root.

    `*`, `?` and brackets are refused, because some stores expand them as patterns.
    """
    protocol, _, path = url.partition("://")
    is_here = protocol in ("file", "local")
    if re.search(r"[*?\[\]]|(^|/)\.\.(/|$)", path) or (is_here and not path.startswith("/")):
        return False
    return posixpath.normpath(path).strip("/.") != ""
