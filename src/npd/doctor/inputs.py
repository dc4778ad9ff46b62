"""Models, vocabulary, data, and the place a run is kept: what `npd run` checks too, one by one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from npd.chat import Chat, check_same_vocabulary
from npd.config import RunConfig
from npd.control.preparation import (
    Prepared,
    check_compiler,
    check_model,
    check_ranks,
    check_weights,
    models_read_here,
    prepare,
)
from npd.control.teaching import role_of
from npd.doctor.checks import Check, attempt, fail, ok, warn
from npd.errors import NpdError
from npd.servers.models import model_settings
from npd.servers.sizes import GIB, size_of


def input_checks(config: RunConfig) -> Iterator[Check]:
    """Student, teachers, their vocabularies, and the data; what rests on a failure is left out."""
    teachers = {role_of(name): model for name, model in config.teacher_models.items()}
    models = {"student": config.student, **teachers}
    checks = [attempt(role, partial(_model, role, model, config)) for role, model in models.items()]
    if config.needs_teacher and not _failed(checks):
        for role, model in teachers.items():
            checks.append(attempt("vocabulary", partial(_vocabulary, role, model, config)))
    if config.score.ranks > 1 and not _failed(checks):
        checks.append(attempt("score.ranks", lambda: _ranks(config)))
    if config.train.compile:
        checks.append(attempt("compiler", lambda: _compiler(config)))
    yield from checks
    if not _failed(checks):
        yield from _data_checks(config)


def _failed(checks: list[Check]) -> bool:
    return any(check.status == "FAIL" for check in checks)


def _model(role: str, model: str, config: RunConfig) -> str:
    check_model(role, model, config)
    if model in models_read_here(config):
        check_weights(model)
    size, settings = size_of(model), model_settings(Path(model))
    parts = [model]
    if size is not None:
        parts.append(f"{size.parameters / 1e6:,.0f} M parameters")
    if settings.context:
        parts.append(
            f"context {settings.context:,}, samples have up to {config.max_sample_tokens:,}"
        )
    return ", ".join(parts)


def _vocabulary(role: str, teacher: str, config: RunConfig) -> str:
    trust = config.trust_remote_code
    check_same_vocabulary(teacher, config.student, trust_remote_code=trust)
    size = Chat.load(config.student, trust_remote_code=trust).vocab_size
    return f"{role} and student share {size:,} token ids"


def _ranks(config: RunConfig) -> str:
    check_ranks(config)
    return f"{config.score.ranks} ranks can hold each teacher together"


def _compiler(config: RunConfig) -> str:
    check_compiler(config)
    return "train.compile has the compiler it needs"


def _data_checks(config: RunConfig) -> Iterator[Check]:
    try:
        prepared = prepare(config)
    except NpdError as error:
        yield fail("data", str(error))
        return
    yield ok("data", _counts(prepared))
    for note in prepared.notes:
        yield warn("data", f"{note}: take it out of the config, or correct the data's `teacher`")


def _counts(prepared: Prepared) -> str:
    dropped = ", ".join(f"{count} dropped ({why})" for why, count in prepared.dropped.items())
    counts = f"{len(prepared.prompts):,} prompts, {len(prepared.heldout):,} held out"
    return f"{counts}{f', {dropped}' if dropped else ''}"


def run_directory_checks(config: RunConfig) -> Iterator[Check]:
    """Whether the run can be written where it is to be kept, and has room there."""
    root = config.directory.absolute()
    there = next(place for place in (root, *root.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield fail("run directory", f"{there} cannot be written to: set run_dir to another place")
        return
    if there == root and any(root.iterdir()):
        says = (
            f"{root} is not empty: npd run needs --resume (a run of this config), or another name"
        )
        yield warn("run directory", says)
    size = size_of(config.student)
    if size is None:
        yield ok("run directory", f"{root} can be written to")
        return
    # A checkpoint has weights and two moments in float32 (one more while written); snapshots bf16.
    needed = size.parameters * (12 * (config.checkpoint.keep + 1) + 2 * 3)
    free = shutil.disk_usage(there).free
    says = f"{root}: {free / GIB:,.1f} GiB free, checkpoints and snapshots take {needed / GIB:,.1f}"
    enough = ok("run directory", says)
    yield enough if needed < free else warn("run directory", f"{says}: free some, or set run_dir")
