"""Models, vocabulary, data, and the place a run is kept: what `npd run` checks too, one by one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from npd import lora
from npd.chat import Chat, check_same_vocabulary
from npd.config import RunConfig
from npd.control.preparation import (
    Prepared,
    check_compiler,
    check_model,
    check_ranks,
    check_weights,
    data_section,
    models_read_here,
    read_data,
)
from npd.control.sharing import check_place
from npd.control.teaching import role_of
from npd.data import load_prompts
from npd.doctor.checks import Check, attempt, fail, ok, warn
from npd.errors import NpdError
from npd.servers.models import model_settings
from npd.servers.sizes import GIB, size_of
from npd.wording import counted


def input_checks(config: RunConfig) -> Iterator[Check]:
    """Student, teachers, their vocabularies, adapters, and the data: each that can be looked at.

    What is wrong with one hides nothing that can be said of another: only the vocabularies need
    both models, and without a student the data is read but not tokenised.
    """
    student = attempt("student", lambda: _model("student", config.student, config))
    yield student
    has_student, teachers_sound = student.status != "FAIL", True
    for name, model in config.teacher_models.items():
        role = role_of(name)
        teacher = attempt(role, partial(_model, role, model, config))
        yield teacher
        is_sound = teacher.status != "FAIL"
        teachers_sound &= is_sound
        if config.needs_teacher and has_student and is_sound:
            yield attempt("vocabulary", partial(_vocabulary, role, model, config))
    if config.score.ranks > 1 and teachers_sound:
        yield attempt("score.ranks", lambda: _ranks(config))
    if config.train.compile:
        yield attempt("compiler", lambda: _compiler(config))
    if config.train.lora is not None:
        yield attempt("lora", lambda: _lora(config, has_student))
    yield from _data_checks(config, has_student)


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


def _data_checks(config: RunConfig, has_student: bool) -> Iterator[Check]:
    if not has_student:
        yield attempt("data", lambda: _records(config))
        return
    trust = config.trust_remote_code
    try:
        chat = Chat.load(config.student, system=config.data.system, trust_remote_code=trust)
        prepared = read_data(config, chat)
    except NpdError as error:
        yield fail("data", str(error))
        return
    yield ok("data", _counts(prepared))
    for note in prepared.notes:
        yield warn("data", f"{note}: take it out of the config, or correct the data's `teacher`")


def _counts(prepared: Prepared) -> str:
    dropped = ", ".join(f"{count} dropped ({why})" for why, count in prepared.dropped.items())
    counts = f"{counted(len(prepared.prompts), 'prompt')}, {len(prepared.heldout):,} held out"
    return f"{counts}{f', {dropped}' if dropped else ''}"


def _records(config: RunConfig) -> str:
    """The data as far as it goes without a tokenizer."""
    found = load_prompts(data_section(config))
    counts = f"{counted(len(found.train), 'prompt')}, {len(found.heldout):,} held out"
    return f"{counts}; how long they are shows once the student can be read"


def _lora(config: RunConfig, has_student: bool) -> str:
    assert config.train.lora is not None
    lora.require("train.lora")
    if not has_student:
        return "peft is installed; the targets show once the student can be read"
    lora.check_targets(config.train.lora, config.student)
    return "peft is installed, and the student has the layers that train.lora.targets names"


def _shared(config: RunConfig) -> str:
    check_place(config, resume=True)
    return f"{config.shared_url} takes and gives back a small object, from this machine"


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
    if config.shared_url is not None:
        yield attempt("shared files", lambda: _shared(config))
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
