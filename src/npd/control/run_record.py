"""The record of a run: config.json, with the config, origins, versions and fingerprints.

Reading a record runs no code, wherever the directory came from: `trust_remote_code` in a record is
never followed, only what the user says now.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from npd import __version__
from npd.config import RunConfig
from npd.errors import ConfigError, StoreError
from npd.store.files import read_json
from npd.store.layout import RunLayout
from npd.text import shown_path


def load_run(layout: RunLayout) -> RunConfig:
    """The config a run directory was made with, `trust_remote_code` off whatever it was.

    A directory may come from anybody. Who trusts the Python code that its models bring says so:
    `load_run(layout).model_copy(update={"trust_remote_code": True})`. Servers that it would launch
    are commands of whoever wrote it, too: read them before running the config.

    Raises:
        ConfigError: it is no run directory, or one of another version of npd.
        StoreError: its config.json cannot be read.
    """
    return recorded_config(layout).model_copy(update={"trust_remote_code": False})


def recorded_config(layout: RunLayout) -> RunConfig:
    """The config as it was, for comparison with another one only. Errors as `load_run`."""
    record = read_record(layout)
    try:
        config = RunConfig.model_validate(_completed(record["config"]))
    except TypeError as error:
        raise _no_record(layout) from error
    except ConfigError as error:
        raise ConfigError(
            f"{layout.config_json} is not what npd run writes in this version ({__version__}): "
            f"{'; '.join(str(error).splitlines())}. Look at it with the version that wrote it, or "
            "start a new run"
        ) from error
    return config.model_copy(update={"run_dir": layout.root})


def _completed(config: Any) -> Any:
    """A recorded config, with what its run had where later versions have another default."""
    generate = config.get("generate") if isinstance(config, Mapping) else None
    if not isinstance(generate, Mapping):
        return config
    return {**config, "generate": {"shards_in_flight": 1, **generate}}


def read_record(layout: RunLayout) -> Mapping[str, Any]:
    """Everything in a run's config.json. Errors as `load_run`."""
    if not os.path.exists(layout.config_json):  # False for names that are too long too
        raise ConfigError(
            f"{shown_path(layout.root)} is not a run directory (it has no config.json): give the "
            "directory that npd run wrote, e.g. runs/npd"
        )
    record = read_json(layout.config_json)
    if not is_record(record):
        raise _no_record(layout)
    found: Mapping[str, Any] = record
    return found


def is_record(found: object) -> bool:
    """Whether this is what config.json of a run holds; that of a model is something else."""
    if not isinstance(found, dict):
        return False
    parts = ("config", "origins", "versions", "fingerprints")
    return all(isinstance(found.get(part), dict) for part in parts)


def clock_of(config: RunConfig) -> datetime | None:
    """The time that the chat template wrote into the prompts of the run in `config.directory`.

    None if it wrote none, or no record can be read: opening the run reports that.
    """
    try:
        written = read_record(RunLayout(config.directory)).get("clock")
        return None if written is None else datetime.fromisoformat(written)
    except (ConfigError, StoreError, TypeError, ValueError):
        return None


def _no_record(layout: RunLayout) -> ConfigError:
    return ConfigError(
        f"{layout.config_json} is not what npd run writes: give a run directory, made by this "
        f"version of npd ({__version__})"
    )
