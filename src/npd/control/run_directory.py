"""The run directory: opened anew with its record (config.json), or to resume the run in it.

Promises: no run is overwritten, and none is resumed with another config, other data or models
(`npd.control.resume_checks`).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npd.config import RunConfig
from npd.config.load import dump_config
from npd.config.paths import why_unmakeable
from npd.config.sources import SMOKE, resume_command
from npd.control.resume_checks import (
    check_fingerprints,
    check_resumable,
    decisive_settings,
    fingerprints,
)
from npd.control.run_record import read_record, recorded_config
from npd.environment import versions
from npd.errors import ConfigError, InputError, RunError, StoreError
from npd.redaction import masked
from npd.remote.artifact_store import ArtifactStore, LocalStore
from npd.remote.objects import ObjectStore
from npd.remote.shared_folder import is_marked
from npd.schedule import events as ev
from npd.store.database import lock
from npd.store.files import is_temporary, read_json, remove, write_json
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.snapshots import MANIFEST, is_whole, verify
from npd.text import shown_path
from npd.types import role_of
from npd.workers import Recorded

if TYPE_CHECKING:  # who only reads a run loads no torch
    from npd.control.monitor import Monitor
    from npd.data.inputs import RunInputs

# Of each log, for an error that ends a run before it made anything: a traceback and what led to it.
_LAST_LINES = 40


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run whose directory and ledger are open: what its workers and its controller share.

    `artifacts` is where workers leave files for each other; `models` are the models with the
    fingerprints they had when the run was started.
    """

    config: RunConfig
    inputs: RunInputs
    layout: RunLayout
    ledger: Ledger
    monitor: Monitor
    artifacts: ArtifactStore = field(default_factory=LocalStore)
    models: tuple[Recorded, ...] = ()


def check_directory(config: RunConfig) -> None:
    """Check that the run can be kept where the config says: a folder of its own, or a new one.

    Raises:
        ConfigError: it cannot.
    """
    root, key = config.directory, "name" if config.run_dir is None else "run_dir"
    why = None
    if not os.path.lexists(root):
        why = why_unmakeable(root)
    elif not os.path.isdir(root):
        why = "is not a folder"
    if why is not None:
        raise ConfigError(f"the run directory {shown_path(root)} {why}: set {key} to another place")
    for role, model in {"student": config.student, **_teachers(config)}.items():
        is_model = os.path.isfile(Path(model) / "config.json")
        if is_model and root.resolve().is_relative_to(Path(model).resolve()):
            raise ConfigError(
                f"the run directory {shown_path(root)} is inside the {role} {shown_path(model)}: "
                f"set {key} to a place of its own"
            )


def _teachers(config: RunConfig) -> dict[str, str]:
    return {role_of(name): model for name, model in config.teacher_models.items()}


def check_writable(config: RunConfig) -> None:
    """Check that files can be written where the run is to be kept.

    Raises:
        ConfigError: they cannot.
    """
    root = config.directory.absolute()
    there = next(place for place in (root, *root.parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{there} cannot be written to: set run_dir to another place")


def is_free(directory: Path) -> bool:
    """Whether a new run can be kept here: nothing is there, except what a killed write left."""
    return not directory.exists() or all(map(is_temporary, directory.iterdir()))


def check_start(config: RunConfig, *, resume: bool, origins: Mapping[str, str]) -> None:
    """Check that the run directory is free for a new run, or holds a run to resume.

    Raises:
        ConfigError: it does not.
    """
    layout = RunLayout(config.directory)
    is_run = layout.config_json.exists()
    if resume and not is_run:
        raise ConfigError(f"{layout.root} holds no run to resume: start it without --resume")
    if resume:
        return
    if is_run:
        raise ConfigError(
            f"{layout.root} holds a run already: resume it "
            f"({_command_that_resumes(layout, config, origins)}), or choose another place "
            "(--set name=... or --set run_dir=...)"
        )
    if not is_free(layout.root):
        raise ConfigError(f"{layout.root} is not empty and not a run: choose another run_dir")


def open_directory(
    config: RunConfig, prepared: RunInputs, *, resume: bool, origins: Mapping[str, str]
) -> RunLayout:
    """The run directory, new with its config.json, or checked to be that of the run to resume.

    Raises:
        ConfigError: it holds a run already, or (resuming) none or another one.
        InputError: the data or a model changed since the run was started.
    """
    layout = RunLayout(config.directory)
    check_start(config, resume=resume, origins=origins)
    if resume:
        check_resumable(config)
        check_fingerprints(config, prepared, layout)
        layout.create()
        return layout
    record = {
        # To be read by all, as run directories are; resuming needs no more.
        "config": masked(dump_config(config)),
        "origins": dict(origins),
        "versions": versions(),
        "num_prompts": len(prepared.prompts),
        "num_heldout": len(prepared.heldout),
        "stop_ids": sorted(prepared.stop_ids),
        "clock": None if prepared.clock is None else prepared.clock.isoformat(),
        "dropped": prepared.dropped,
        "fingerprints": fingerprints(config, prepared),
    }
    if config.shared_url is not None:
        record["shared"] = secrets.token_hex(8)
    # First, so that a full disk leaves no directory that cannot be resumed.
    write_json(layout.config_json, record)
    layout.create()
    return layout


def _command_that_resumes(layout: RunLayout, config: RunConfig, origins: Mapping[str, str]) -> str:
    """As `config` would be resumed, or as the run was started where it was with another config."""
    given = dump_config(config)
    with suppress(InputError, StoreError):
        record = read_record(layout)
        started = record["config"]
        is_here = all(started.get(key) == given[key] for key in ("name", "run_dir"))
        if is_here and decisive_settings(recorded_config(layout)) != decisive_settings(config):
            return resume_command(started, record["origins"])
    return resume_command(given, origins)


def missing_folder(directory: Path) -> Path | None:
    """The outermost folder that must be created for this one; None if it is there."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    return missing[-1] if missing else None


def remove_unless_started(layout: RunLayout, outermost: Path | None, error: InputError) -> bool:
    """Remove the directory of a run that ended before it produced anything; whether it was removed.

    Only what npd created, folders up to `outermost` included, so that the same command works once
    its input is corrected. The last lines of the logs go with the error (`--debug` shows them).
    """
    if _has_results(layout):
        return False
    for log in sorted(layout.logs.glob("*.log")):
        if lines := log.read_text(errors="replace").splitlines()[-_LAST_LINES:]:
            error.add_note("\n".join([f"--- the last lines of {log.name}", *lines]))
    for path in layout.everything:
        remove(path)
    with suppress(RunError):
        layout.remove_temporary()
    with suppress(OSError):
        for folder in (layout.root, *layout.root.parents) if outermost is not None else ():
            folder.rmdir()
            if folder == outermost:
                break
    return True


def _has_results(layout: RunLayout) -> bool:
    """Whether a run generated, scored or trained anything; true if that cannot be read."""
    kinds = {kind.__name__ for kind in (ev.ShardGenerated, ev.ShardScored, ev.SegmentTrained)}
    if not layout.ledger_db.exists():
        return False
    try:
        with Ledger.reader(layout.ledger_db) as ledger:
            return any(kind in kinds for _, kind, _ in ledger.events())
    except RunError:
        return True


def has_student(layout: RunLayout) -> bool:
    """Whether every byte of the student is as it was written."""
    return is_whole(layout.student)


def has_report(layout: RunLayout) -> bool:
    """Whether the report is there and newer than the student; an older one is of a part."""
    try:
        written = layout.report_html.stat().st_mtime_ns
        return written >= (layout.student / MANIFEST).stat().st_mtime_ns
    except OSError:
        return False


def clear_smoke(config: RunConfig) -> None:
    """Remove the last smoke run of this config, at `runtime.shared` too; nothing there is fine.

    Raises:
        ConfigError: what is there is no smoke run.
        RunError: it is still going.
    """
    layout = RunLayout(config.directory)
    if not layout.config_json.exists():
        return
    record = read_json(layout.config_json)
    if not _is_smoke(record):
        raise ConfigError(
            f"{layout.root} holds a run that --smoke did not start, and would be replaced: move "
            "it, or choose another place (--set name=... or --set run_dir=...)"
        )
    held = lock(layout.ledger_db)
    try:
        _clear_shared(config, record)
        remove(layout.root)
    finally:
        os.close(held)


def _is_smoke(record: Any) -> bool:
    origins = record.get("origins") if isinstance(record, Mapping) else None
    return isinstance(origins, Mapping) and SMOKE in origins.values()


def _clear_shared(config: RunConfig, record: Mapping[str, Any]) -> None:
    """Remove the run's place at `runtime.shared`, if it bears the mark of this very run."""
    url, ours = config.shared_url, record.get("shared")
    if url is None or ours is None:
        return
    if is_marked(ObjectStore(url), ours):
        parent, _, name = url.rpartition("/")
        ObjectStore(parent).remove(name)


def export_source(run: Path) -> Path:
    """What `npd export` copies: a run's student, or an adapter by itself.

    Raises:
        ConfigError: `run` is neither.
        InputError: the run has no student yet.
        StoreError: its student is damaged.
    """
    if os.path.isfile(run / "adapter_config.json"):
        return run
    layout = RunLayout(run)
    record = read_record(layout)
    go_on = resume_command(record["config"], record["origins"])
    if not layout.student.is_dir():
        raise InputError(f"{run} has no student yet: finish the run first ({go_on})")
    try:
        verify(layout.student)
    except StoreError as error:
        raise StoreError(
            f"{layout.student} is damaged or not what the run wrote: have it written again from "
            f"the last checkpoint ({go_on})"
        ) from error
    return layout.student
