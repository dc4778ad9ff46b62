"""Config values that have no effect, or probably an unintended one. They are noted, not refused.

Only values that differ from their default count. The caller reports only values that a user set,
because a preset may hold values for a filter or a loss that an override has replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from npd.config.paths import is_data_file
from npd.config.run import RunValues

_EVAL = "eval.every_steps eval.max_new_tokens eval.batch_size eval.num_samples"
_CLIENT = "request_timeout patience api_key_env"


def idle_values(c: RunValues) -> dict[str, str]:
    """Keys with a non-default value that has no effect, each with the reason.

    >>> from npd.config import RunConfig
    >>> idle_values(RunConfig(student="s", teacher="t", loss={"beta": 0.1}))
    {'loss.beta': 'loss.divergence is forward'}
    """
    found: dict[str, str] = {}
    for is_idle, keys, why in (*_filter(c), *_loss(c), *_generate(c), *_run(c)):
        for key in keys.split() if is_idle else ():
            if not _is_default(c, key):
                found.setdefault(key, why)
    return found


def doubts(c: RunValues) -> Iterator[tuple[str, str]]:
    """Keys with a value that is allowed but probably not intended, each with its effect."""
    is_own = c.generate.source == "student"
    if is_own and c.generate.temperature == 0.0:
        uses = ", and so does delta_ifd" if c.needs_ifd else ""
        yield (
            "generate.temperature",
            "0 is greedy decoding, but near-policy training needs samples of the student's own "
            f"distribution{uses}: set it to 1",
        )
    if is_own and c.loss.kd_weight == 0.0:
        yield (
            "loss.kd_weight",
            "0 trains the student on its own text without the teacher: set generate.source to "
            "teacher or dataset, or the weight above 0",
        )
    if c.train.deterministic and c.is_overlapped:
        yield (
            "train.deterministic",
            "cannot decide which samples a step gets, as that depends on timing while stages "
            "overlap: set schedule.overlap: false for runs that are equal bit for bit",
        )
    if c.train.warmup == 1.0:
        yield "train.warmup", "1 is the whole run: only the last step has the full train.lr"


def _is_default(c: RunValues, key: str) -> bool:
    *sections, name = key.split(".")
    section: Any = c
    for each in sections:
        section = getattr(section, each)
    field = type(section).model_fields[name]
    return bool(getattr(section, name) == field.get_default(call_default_factory=True))


def _filter(c: RunValues) -> Iterator[tuple[bool, str, str]]:
    f, named = c.filter, f"filter.name is {c.filter.name}"
    reads_bounds = c.needs_ifd
    if c.filter.keep is not None:
        named = f"filter.keep sets the share that {c.filter.name} keeps"
    by_ifd = "filter.bounds filter.ratio filter.min_nll filter.tolerance"
    yield not reads_bounds, f"{by_ifd} filter.low filter.high", named
    yield not reads_bounds, "filter.low_quantile filter.high_quantile", named
    yield (
        f.bounds == "quantile",
        "filter.low filter.high filter.tolerance",
        "filter.bounds is quantile",
    )
    yield f.bounds == "fixed", "filter.low_quantile filter.high_quantile", "filter.bounds is fixed"
    yield f.name != "outlier", "filter.deviations filter.usual_nll", named
    uses_history = f.name == "outlier" or (reads_bounds and f.bounds == "quantile")
    yield not uses_history, "filter.history", f"{named}, and filter.bounds {f.bounds}"


def _loss(c: RunValues) -> Iterator[tuple[bool, str, str]]:
    loss = c.loss
    no_kd = "loss.target loss.divergence loss.temperature loss.beta"
    yield loss.kd_weight == 0.0, no_kd, "loss.kd_weight is 0"
    yield loss.divergence != "jsd", "loss.beta", f"loss.divergence is {loss.divergence}"
    yield loss.skip_after == 0.0, "loss.skip_tokens", "loss.skip_after is 0"
    yield loss.impl == "reference", "loss.chunk", "loss.impl is reference"
    yield not c.needs_teacher, "teacher teachers", "nothing in this run uses a teacher"


def _generate(c: RunValues) -> Iterator[tuple[bool, str, str]]:
    g = c.generate
    sampling = "generate.temperature generate.top_p"
    yield g.source == "dataset", sampling, "generate.source is dataset"
    yield g.temperature == 0.0, "generate.top_p", "generate.temperature is 0"
    for name, section in (("generate", g), ("score", c.score)):
        keys = " ".join(f"{name}.{key}" for key in _CLIENT.split())
        yield not section.is_served, keys, f"{name}.engine is transformers"
    yield not g.is_served, "generate.refresh_timeout", "generate.engine is transformers"
    here = "score.head_chunk score.compile"
    yield c.score.is_served, here, f"score.engine is {c.score.engine}"
    only_served = "generate.refresh_timeout generate.seeded generate.shards_in_flight"
    yield not g.is_served, only_served, "generate.engine is transformers"
    yield g.temperature == 0.0, "generate.seeded", "generate.temperature is 0"


def _run(c: RunValues) -> Iterator[tuple[bool, str, str]]:
    refresh = c.schedule.refresh
    yield refresh.drift is None, "schedule.refresh.min_steps", "schedule.refresh.drift is not set"
    yield refresh.is_never, "schedule.max_lag", "schedule.refresh is never"
    unread = f"{_EVAL} data.heldout data.heldout_size"
    yield c.eval.source == "none", unread, "eval.source is none"
    for key, source in (("data.split", c.data.train), ("data.heldout_split", c.data.heldout)):
        yield (
            is_data_file(source or ""),
            key,
            f"{key.replace('_split', '').replace('split', 'train')} is a file",
        )
    has_none = c.data.heldout is None and c.data.heldout_size == 0
    yield has_none, f"{_EVAL} eval.source", "data.heldout_size is 0: no prompt is held out"
    yield c.data.heldout is not None, "data.heldout_size", "data.heldout names the prompts"
    yield c.data.heldout is None, "data.heldout_split", "data.heldout is not set"
    is_small = c.train.ranks == 1 and (c.runtime.device == "cpu" or c.train.dtype == "float32")
    yield is_small, "train.shard", "train.ranks is 1"
    gpus = "train.gpus score.gpus generate.gpus"
    yield c.runtime.kind != "local", gpus, f"runtime.kind is {c.runtime.kind}"
    is_fixed = c.runtime.device == "cpu" or c.runtime.names_one_gpu
    yield is_fixed, gpus, f"runtime.device is {c.runtime.device}"
    yield c.has_phases, "schedule.refresh.in_flight", "runtime.share is phases: none is in flight"
    ray = "runtime.ray.address runtime.ray.gpus runtime.ray.start_timeout"
    yield c.runtime.kind != "ray", ray, f"runtime.kind is {c.runtime.kind}"
