"""A smoke run: a whole run of somebody's own config, made tiny, before money is spent on it.

Promises: every stage of the config is passed through with its own models, engines, servers and
data, in a directory of its own (`<name>-smoke`) that the next smoke run replaces. Rows stay as few
as the samples, so that it says nothing of memory or speed at full size.
"""

from __future__ import annotations

from typing import Any

from npd.config import RunConfig
from npd.config.load import Settings, dump_config, nested
from npd.config.sources import SMOKE, flat

# A refresh in the middle, and a step on either side that is not the first.
_STEPS, _REFRESH_AT = 4, 2
_SHARD, _REUSE, _TOKENS, _HELDOUT, _PROMPTS = 2, 2, 16, 4, 64
# Beyond any sample: a filter runs and keeps all, so that there is something to train on.
_NO_BOUND = 1e9


def smoke_settings(settings: Settings) -> Settings:
    """The settings of the tiny run; what it changes has the origin `--smoke`."""
    config = settings.config
    values = dict(flat(dump_config(config)))
    changed = {k: v for k, v in _changes(config).items() if values.get(k, ...) != v}
    lost = [key for key in values if any(key.startswith(f"{new}.") for new in changed)]
    kept = {key: value for key, value in values.items() if key not in lost}
    tiny = RunConfig.model_validate(nested(kept | changed))
    leaves = [path for path, _ in flat(dump_config(tiny))]
    origins = {path: settings.origins.get(path, "default") for path in leaves}
    origins |= {path: SMOKE for path in leaves if path in changed}
    return Settings(tiny, origins)


def _changes(config: RunConfig) -> dict[str, Any]:
    return {
        **_directory(config),
        **_amounts(config),
        **_refresh(config),
        **_open_filter(config),
        "eval.max_new_tokens": min(config.eval.max_new_tokens, _TOKENS),
        "eval.num_samples": min(config.eval.num_samples, 2),
        "eval.every_steps": None,
        "checkpoint.every_steps": None,
        "checkpoint.every_minutes": None,
    }


def _directory(config: RunConfig) -> dict[str, Any]:
    root = config.run_dir
    # `.` and `/` have no name.
    moved = None if root is None else str(root.parent / f"{root.name or 'run'}-smoke")
    return {"name": f"{config.name}-smoke", "run_dir": moved}


def _amounts(config: RunConfig) -> dict[str, Any]:
    """Few samples, but one for every worker in each half of the run."""
    generate, schedule = config.generate, config.schedule
    workers = max(2, generate.workers, config.score.workers, config.train.ranks)
    batch = _SHARD * workers
    window: int | str = schedule.window
    if isinstance(window, int):
        window = batch if window <= config.train.batch_size else 2 * batch
    few = {} if config.teachers else {"data.limit": min(config.data.limit or _PROMPTS, _PROMPTS)}
    if config.data.heldout is None and config.data.heldout_size:
        few["data.heldout_size"] = min(config.data.heldout_size, _HELDOUT)
    return {
        **few,
        "data.heldout_limit": min(config.data.heldout_limit or _HELDOUT, _HELDOUT),
        "generate.max_new_tokens": min(generate.max_new_tokens, _TOKENS),
        "generate.samples_per_prompt": min(generate.samples_per_prompt, 2),
        "generate.shard_size": _SHARD,
        "train.batch_size": batch,
        "schedule.epochs": None,
        "schedule.steps": _STEPS,
        "schedule.reuse": min(schedule.reuse, _REUSE),
        "schedule.window": window,
        "schedule.segment_steps": min(schedule.segment_steps, 2),
    }


def _refresh(config: RunConfig) -> dict[str, Any]:
    refresh, path = config.schedule.refresh, "schedule.refresh"
    if refresh.is_never:
        return {}
    none: dict[str, Any] = dict.fromkeys((f"{path}.at_epochs", f"{path}.drift"))
    if refresh.every_steps is not None:
        return none | {f"{path}.every_steps": min(refresh.every_steps, _REFRESH_AT)}
    return none | {f"{path}.at_steps": [_REFRESH_AT]}


def _open_filter(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = {
        "filter.drop_truncated": False,
        "filter.min_response_tokens": 1,
        "filter.max_repeat": 1.0,
    }
    if config.filter.name == "delta_ifd":
        return found | {
            "filter.bounds": "fixed",
            "filter.low": -_NO_BOUND,
            "filter.high": _NO_BOUND,
        }
    if config.filter.name == "outlier":
        return found | {"filter.usual_nll": _NO_BOUND}
    return found if config.filter.name == "none" else found | {"filter.keep": 1.0}
