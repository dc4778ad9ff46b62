"""The run directory: a new one with its record (config.json), or the one to go on with.

Promises: no run is overwritten, and none goes on with another config, other data or other models.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from npd import __version__
from npd.config import RunConfig
from npd.control.preparation import Prepared, model_fingerprint
from npd.control.teaching import role_of
from npd.errors import ConfigError, DataError, ModelError
from npd.layers import flat
from npd.resuming import resume_command
from npd.served import looks_secret
from npd.settings import dump_config
from npd.store.files import is_temporary, read_json, write_json
from npd.store.layout import RunLayout
from npd.versions import versions

_HIDDEN = "***"
# What may differ when a run is resumed: where it runs and what it leaves, not what it is.
_REACHING = ("urls", "admin_urls", "launch", "api_key_env", "request_timeout", "patience")
_FREE = (
    *("runtime.", "observe.", "checkpoint.keep", "run_dir", "name"),
    *(f"{section}.{key}" for section in ("generate", "score") for key in _REACHING),
    *("generate.refresh_timeout", "generate.probe_tolerance"),
)


def open_directory(
    config: RunConfig, prepared: Prepared, *, resume: bool, origins: Mapping[str, str]
) -> RunLayout:
    """The run directory, new with its config.json, or checked to be the one to go on with.

    Raises:
        ConfigError: it holds a run already, or (resuming) none or another one.
    """
    layout = RunLayout(config.directory)
    if layout.config_json.exists():
        if not resume:
            raise ConfigError(
                f"{layout.root} holds a run already: go on with it "
                f"({resume_command(dump_config(config), origins)}), or choose another place (--set "
                "name=... or --set run_dir=...)"
            )
        _check_same(config, prepared, layout)
        layout.create()
        return layout
    if resume:
        raise ConfigError(f"{layout.root} holds no run to resume: start it without --resume")
    if layout.root.exists() and not all(map(is_temporary, layout.root.iterdir())):
        raise ConfigError(f"{layout.root} is not empty and not a run: choose another run_dir")
    record = {
        "config": _without_secrets(dump_config(config)),
        "origins": dict(origins),
        "versions": versions(),
        "num_prompts": len(prepared.prompts),
        "dropped": prepared.dropped,
        "fingerprints": _fingerprints(config, prepared),
    }
    if config.shared_url is not None:
        record["shared"] = secrets.token_hex(8)
    # First, so that a disk that is full already leaves nothing that could not be gone on with.
    write_json(layout.config_json, record)
    layout.create()
    return layout


def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """A dumped config that may be read by all, as run directories are; resuming needs no more."""
    for section in (values["generate"], values["score"], *values["teachers"].values()):
        environment = (section["launch"] or {}).get("env", {})
        environment |= {name: _HIDDEN for name in environment if looks_secret(name)}
    return values


def load_run(layout: RunLayout) -> RunConfig:
    """The config a run directory was made with."""
    if not layout.config_json.exists():
        raise ConfigError(
            f"{layout.root} is not a run directory (it has no config.json): give the directory "
            "that npd run wrote, e.g. runs/npd"
        )
    record = read_json(layout.config_json)
    try:
        config = RunConfig.model_validate(record["config"])
    except (KeyError, TypeError, ValidationError) as error:
        raise ConfigError(
            f"{layout.config_json} is not what npd run writes: give a run directory, made by this "
            f"version of npd ({__version__})"
        ) from error
    return config.model_copy(update={"run_dir": layout.root})


def _check_same(config: RunConfig, prepared: Prepared, layout: RunLayout) -> None:
    old, new = _decisive(load_run(layout)), _decisive(config)
    changed = [key for key in new if new[key] != old.get(key)]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{layout.root} was started with {key}={old.get(key)!r}, now it is {new[key]!r}: "
            f"resume with the same config (--set {key}={json.dumps(old.get(key))}), or start a new "
            "run (--set name=...)"
        )
    stored = read_json(layout.config_json)["fingerprints"]
    for what, now in _fingerprints(config, prepared).items():
        if stored[what] != now:
            kind, what = (DataError, "prompts") if what == "data" else (ModelError, what)
            raise kind(
                f"the {what} changed since {layout.root} was started: bring back what it was, or "
                "start a new run (--set name=...)"
            )


def _fingerprints(config: RunConfig, prepared: Prepared) -> dict[str, str | None]:
    models = {"student": config.student, "teacher": config.teacher}
    models |= {role_of(name): teacher.model for name, teacher in config.teachers.items()}
    found = {what: model and model_fingerprint(model) for what, model in models.items()}
    return {"data": prepared.data_fingerprint, **found}


def _decisive(config: RunConfig) -> dict[str, Any]:
    """The values that decide what a run does, by dotted path."""
    # LoRA and teachers as a whole: their keys are there or not. Where a teacher is served is free.
    passed_over = (*_FREE, "train.lora.", "teachers")
    values = {k: v for k, v in flat(dump_config(config)) if not k.startswith(passed_over)}
    values["train.lora"] = config.train.lora and config.train.lora.model_dump(mode="json")
    values["teachers"] = {name: teacher.model for name, teacher in config.teachers.items()}
    # `auto` depends on runtime.kind, which may change; what it comes to may not.
    values["schedule.overlap"] = config.is_overlapped
    return values
