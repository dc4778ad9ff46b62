"""Looks over a run before it is started: config, models, data, memory, servers.

Promises: one line a check, each failure with its remedy, and none hides another; nothing is
started, written or changed, here or on a server (at `runtime.shared` a small object is put, and
removed at once). What passes here can still fail later: sizes are estimates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from npd.config import RunConfig
from npd.doctor.checks import Check, fail, ok
from npd.errors import NpdError

__all__ = ["Check", "examine"]


def examine(source: str, overrides: Sequence[str] = ()) -> Iterator[Check]:
    """Every check of a config, in the order in which a run would stumble over them."""
    from npd.settings import load_config

    try:
        config = load_config(source, overrides).config
    except NpdError as error:
        yield fail("config", str(error))
        return
    yield ok("config", f"{source} resolves; the run is kept in {config.directory}")
    yield from _examine(config)


def _examine(config: RunConfig) -> Iterator[Check]:
    from npd.doctor.gpus import rank_checks
    from npd.doctor.inputs import input_checks, run_directory_checks
    from npd.doctor.launches import launch_checks
    from npd.doctor.memory import memory_checks
    from npd.doctor.reach import server_checks
    from npd.doctor.served import served_checks

    sound = set()
    for check in input_checks(config):
        yield check
        if check.status != "FAIL":
            sound.add(check.what)
    yield from run_directory_checks(config)
    yield from rank_checks(config)
    if "student" in sound:
        yield from memory_checks(config)
    yield from served_checks(config)
    yield from launch_checks(config)
    yield from server_checks(config, sound)
