"""Looks over a run before it is started: config, models, data, memory, servers.

Promises: one line a check, each failure with its remedy, and none hides another. The first lines
are the checks of `npd run` (`npd.control.preflight`), in its order; the rest is looked at here
only. Nothing is started, written or changed, here or on a server (at `runtime.shared` a small
object is put, and removed at once). Where all else is sound the models are loaded, write eight
tokens and read them. What passes here can still fail later: sizes are estimates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from npd.config import RunConfig
from npd.environment import too_old, untested
from npd.errors import ConfigError
from npd.text import counted
from npd.types import Check

__all__ = ["examine", "summary", "to_json"]


def examine(
    source: str, overrides: Sequence[str] = (), *, gpus: str | None = None
) -> Iterator[Check]:
    """Every check of a config, in the order in which a run would stumble over them.

    `gpus`, such as `8x80GB`, asks about a machine that is not here: its memory and number of GPUs.
    """
    from npd.config.load import load_config

    try:
        settings = load_config(source, overrides)
    except ConfigError as error:
        for problem in error.problems:
            yield Check.fail("config", problem)
        return
    config = settings.config
    yield Check.ok("config", f"{source} resolves; the run is kept in {config.directory}")
    yield from (Check.ok("config", note) for note in settings.notes)
    yield from _examine(config, gpus)


def _examine(config: RunConfig, elsewhere: str | None) -> Iterator[Check]:
    from npd.control.devices.defaults import with_defaults
    from npd.control.devices.memory import parse_gpus
    from npd.control.preflight import Preflight, Start
    from npd.doctor.forecast import disk_checks, forecast_checks
    from npd.doctor.memory import memory_checks
    from npd.doctor.servers import launch_checks, server_checks, setting_checks
    from npd.doctor.trial import trial_checks

    gpus = None if elsewhere is None else parse_gpus(elsewhere)
    yield from _version_checks()
    preflight = Preflight(
        config, start=Start(), gpus=None if gpus is None else [gpu.name for gpu in gpus]
    )
    yield from preflight.checks()
    failed = preflight.failed
    if preflight.inputs is not None:
        has_gpu = None if gpus is None else config.runtime.device != "cpu"
        yield from forecast_checks(config, preflight.inputs, has_gpu=has_gpu)
    if "run directory" not in failed:
        yield from disk_checks(config)
    if failed.isdisjoint(("device", "gpus", "weights: student")):
        yield from memory_checks(config, gpus)
    yield from setting_checks(config)
    if gpus is None:
        can_place = failed.isdisjoint(("device", "gpus"))
        yield from launch_checks(with_defaults(config) if can_place else config, failed)
    yield from server_checks(config, failed)
    if not failed:
        yield from trial_checks(config if gpus is None else _on_this_device(config))


def _on_this_device(config: RunConfig) -> RunConfig:
    runtime = config.runtime.model_copy(update={"device": "auto"})
    return config.model_copy(update={"runtime": runtime})


def _version_checks() -> Iterator[Check]:
    """Libraries that are too old, or newer than any that npd was tested with."""
    old, new = too_old(), untested()
    yield from (Check.fail("versions", line) for line in old)
    yield from (Check.warn("versions", line) for line in new)
    if not old and not new:
        says = "no library is older than npd needs, or newer than it was tested with"
        yield Check.ok("versions", says)


def summary(checks: Sequence[Check]) -> str:
    """The last line: `2 of 14 checks failed, 1 warning`."""
    failed, warned = (sum(c.status == status for c in checks) for status in ("FAIL", "warn"))
    warnings = f", {counted(warned, 'warning')}" if warned else ""
    checked = counted(len(checks), "check")
    if failed:
        return f"{failed} of {checked} failed{warnings}"
    return f"nothing failed in {checked}{warnings}"


def to_json(checks: Sequence[Check]) -> dict[str, Any]:
    """The checks as plain JSON values."""
    return {
        "failed": sum(check.status == "FAIL" for check in checks),
        "checks": [{"status": c.status, "what": c.what, "says": c.says} for c in checks],
    }
