"""`npd.run`: starts or resumes a run from a file, a preset, a mapping or a config.

Converts its arguments to settings for `npd.control.run`; does nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, Unpack

from npd.config import RunConfig
from npd.config.load import Settings, dump_config, load_config
from npd.config.run import RunKeywords
from npd.config.smoke import smoke_settings
from npd.control.preflight import prepare
from npd.control.report_data import RunResult
from npd.control.run import run as run_config
from npd.errors import ConfigError
from npd.observe.live import SilentView, View
from npd.observe.trackers import Callback

Source: TypeAlias = RunConfig | Settings | str | Path | Mapping[str, Any]


def run(
    config: Source | None = None,
    *,
    preset: str | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    resume: bool = False,
    smoke: bool = False,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    view: View | None = None,
    **values: Unpack[RunKeywords],
) -> RunResult:
    """Distil: run a config to its end, or resume the run in its directory.

    `config`: a YAML file, a preset's name, a mapping, a `RunConfig`, or a `load_config` result.
    Without `config`, the config consists of `preset` and `values`: `run(preset="npd", student=...,
    teacher=..., data=...)`. `values` (`train={"lr": 2e-5}`) override a config, and `overrides`
    (`["train.lr=2e-5"]` or `{"train.lr": 2e-5}`) override both.

    `resume` continues a stopped run. `smoke` runs every stage in four steps on a few short samples,
    in `<name>-smoke`. `callbacks` are called on steps and evaluations. `progress` shows a panel on
    a terminal, and a few lines a minute elsewhere; `view` replaces it.

    Raises:
        InputError: config, data, models or directory cannot be used; nothing was started.
        RunError: the run failed; its work is kept, and `resume` continues from there.
    """
    if smoke and resume:
        raise ConfigError("a smoke run cannot be resumed: leave out either smoke or resume")
    settings = as_settings(config, preset, overrides, values)
    if smoke:
        prepare(settings.config)  # the full run must fit its models and data too
        settings = smoke_settings(settings)
    return run_config(
        settings.config,
        resume=resume,
        view=view if view is not None or progress else SilentView(),
        origins=settings.origins,
        notes=settings.notes,
        callbacks=callbacks,
    )


def as_settings(
    config: Source | None,
    preset: str | None,
    overrides: Sequence[str] | Mapping[str, Any],
    values: Mapping[str, Any],
) -> Settings:
    """The settings for the arguments of `run`.

    Raises:
        ConfigError: the arguments contradict each other, or a value is invalid.
    """
    if preset is not None:
        if config is not None:
            raise ConfigError(
                "give either config or preset: a file or mapping can name its own preset "
                f"(`preset: {preset}`)"
            )
        return load_config({"preset": preset, **values}, overrides)
    if config is None:
        return load_config(values, overrides)
    if isinstance(config, str | Path | Mapping):
        return load_config(config, overrides, values=values)
    settings = config if isinstance(config, Settings) else Settings(_checked(config), {})
    if not values and not overrides:
        return settings
    return load_config(dump_config(settings.config), overrides, values=values)


def _checked(config: object) -> RunConfig:
    if isinstance(config, RunConfig):
        return config
    raise ConfigError(
        f"{type(config).__name__} is not a config: give a file, a preset's name, a mapping, a "
        "RunConfig, or the result of npd.load_config"
    )
