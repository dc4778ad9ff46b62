"""What must be as it was when a run is resumed: config, data, models, ledger.

Settings that decide nothing (where a run is computed, what it shows) may change. Raises on the
first difference, before anything is written; replaying the events (`npd.control.resume`) is later.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from npd.config import RunConfig
from npd.config.checks import problems
from npd.config.load import dump_config
from npd.config.sources import flat
from npd.control.run_record import read_record, recorded_config
from npd.errors import ConfigError, DataError, ModelError, NpdError
from npd.models.files import model_fingerprint
from npd.redaction import comparable
from npd.store.layout import RunLayout
from npd.store.ledger import marked_events, recorded_events
from npd.types import role_of
from npd.workers import Recorded

if TYPE_CHECKING:  # who only reads a run loads no torch
    from npd.data.inputs import RunInputs

# How much is computed at a time and by which kernels: the same numbers, to float noise.
_COMPUTATION = (
    *("train.activation_checkpointing", "train.compile", "train.deterministic", "train.shard"),
    *("loss.impl", "loss.chunk"),
    *("score.row_tokens", "score.head_chunk", "score.compile", "generate.batch_size"),
    "eval.batch_size",
)
# What the forecast decides at the start of a run, and how the config asks for that.
_DECIDED: tuple[tuple[str, str, str | None], ...] = (
    ("train", "activation_checkpointing", "auto"),
    ("loss", "chunk", None),
    ("score", "row_tokens", "auto"),
    ("score", "head_chunk", "auto"),
    ("runtime", "share", "auto"),
    ("generate", "batch_size", "auto"),
    ("generate", "shard_size", "auto"),
    ("generate", "shards_in_flight", "auto"),
)
# How servers are reached.
_SERVER_ACCESS = ("urls", "admin_urls", "launch", "api_key_env", "request_timeout", "patience")
# What may change when a run is resumed: where it runs and what it leaves, not what it is.
_MAY_CHANGE = (
    *_COMPUTATION,
    *("train.gpus", "score.gpus", "generate.gpus"),
    *("runtime.", "observe.", "checkpoint.keep", "checkpoint.every_minutes", "run_dir", "name"),
    *(f"{section}.{key}" for section in ("generate", "score") for key in _SERVER_ACCESS),
    *("generate.refresh_timeout", "generate.probe_tolerance", "generate.seeded"),
)


def as_recorded(config: RunConfig) -> RunConfig:
    """The config, `auto` being what it was when the run was started; as it is without a record.

    Raises:
        ConfigError: that contradicts what the config asks for now.
    """
    undecided = [
        (section, name)
        for section, name, auto in _DECIDED
        if getattr(getattr(config, section), name) == auto
    ]
    if not undecided:
        return config
    try:
        old = recorded_config(RunLayout(config.directory))
    except NpdError:  # opening the run reports that
        return config
    old = old.model_copy(update={"runtime": old.runtime.model_copy(update={"share": _share(old)})})
    for section, name in undecided:
        known = {name: getattr(getattr(old, section), name)}
        filled = getattr(config, section).model_copy(update=known)
        config = config.model_copy(update={section: filled})
    if (found := problems(config)) and not problems(old):
        raise ConfigError(f"{old.directory} was started otherwise, and cannot go on so: {found[0]}")
    return config


def _share(config: RunConfig) -> str:
    """How a run shares its device. Runs from before there was a choice recorded none."""
    return "phases" if config.has_phases else "together"


def check_resumable(config: RunConfig) -> None:
    """Check that the run to resume was started with this config, and that its ledger is there.

    Raises:
        ConfigError: it was not, or the ledger is missing or older than the files of the directory.
    """
    layout = RunLayout(config.directory)
    _check_config(config, layout)
    _check_ledger(layout)


def _check_config(config: RunConfig, layout: RunLayout) -> None:
    old, new = decisive_settings(recorded_config(layout)), decisive_settings(config)
    changed = [key for key in new if new[key] != old.get(key)]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{layout.root} was started with {key}={old.get(key)!r}, now it is {new[key]!r}: "
            f"resume with the same config (--set {key}={json.dumps(old.get(key))}), or start a new "
            "run (--set name=...)"
        )


def check_fingerprints(config: RunConfig, prepared: RunInputs, layout: RunLayout) -> None:
    stored = read_record(layout)["fingerprints"]
    for what, now in fingerprints(config, prepared).items():
        if stored[what] != now:
            kind, what = (DataError, "prompts") if what == "data" else (ModelError, what)
            raise kind(
                f"the {what} changed since {layout.root} was started: bring back what it was, or "
                "start a new run (--set name=...)"
            )


def _check_ledger(layout: RunLayout) -> None:
    """Check that the ledger is there and not older than the files of the directory.

    A run that was killed before its first event has no ledger, and no such files.
    """
    there, known = recorded_events(layout.ledger_db), marked_events(layout.ledger_db)
    made = layout.first_made() if there == 0 else None
    if there >= known and made is None:
        return
    name = layout.ledger_db.name
    what = f"ends at event {there} of {known} or more" if there else "is missing or empty"
    beside = f", beside {made}" if made is not None else ""
    raise ConfigError(
        f"{layout.ledger_db} {what}{beside}: without it the finished work is unknown; bring {name} "
        f"back together with its {name}-wal and {name}-shm, or start a new run (--set name=...)"
    )


def decisive_settings(config: RunConfig) -> dict[str, Any]:
    """The values that decide what a run does, by dotted path."""
    # LoRA and teachers as a whole: their keys are there or not. Where a teacher is served is free.
    passed_over = (*_MAY_CHANGE, "train.lora.", "teachers")
    # Likely secrets are masked in the record; a change shows in the prompts' fingerprint.
    every = flat(comparable(dump_config(config)))
    values = {k: v for k, v in every if not k.startswith(passed_over)}
    values["train.lora"] = config.train.lora and config.train.lora.model_dump(mode="json")
    values["teachers"] = {name: teacher.model for name, teacher in config.teachers.items()}
    # `auto` depends on runtime.kind, which may change; what it comes to may not.
    values["schedule.overlap"] = config.is_overlapped
    values["runtime.share"] = _share(config)
    values["generate.shard_size"] = config.shard_size
    values["generate.shards_in_flight"] = config.generate.num_in_flight
    return values


def recorded_models(config: RunConfig, layout: RunLayout) -> tuple[Recorded, ...]:
    """The run's models with the fingerprints of its start, for workers that load one later."""
    stored = read_record(layout)["fingerprints"]
    return tuple(
        Recorded(what, model, stored[what])
        for what, model in _models(config).items()
        if model is not None and stored.get(what) is not None
    )


def fingerprints(config: RunConfig, prepared: RunInputs) -> dict[str, str | None]:
    found = {what: model and model_fingerprint(model) for what, model in _models(config).items()}
    return {"data": prepared.data_fingerprint, **found}


def _models(config: RunConfig) -> dict[str, str | None]:
    models = {"student": config.student, "teacher": config.teacher}
    return models | {role_of(name): teacher.model for name, teacher in config.teachers.items()}
