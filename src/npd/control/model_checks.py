"""Checks of a run's models before it starts: that they load, fit each other and their use."""

from __future__ import annotations

import os
from pathlib import Path

from npd.config import RunConfig
from npd.config.paths import why_no_path
from npd.errors import ModelError
from npd.generate.in_process import check_decoding
from npd.models import lora
from npd.models.device import resolve_device
from npd.models.files import check_files, check_generation_settings
from npd.models.kernels.compile import check_compilers
from npd.models.loading import (
    check_context,
    check_weights,
    outline,
    read_config,
)
from npd.models.quantisation import check_loadable, check_numbers, check_trainable
from npd.models.replica import check_packing, check_writing
from npd.models.tensors import about
from npd.score.tensor_parallel import check_divisible
from npd.text import shown_path
from npd.types import role_of


def check_model(role: str, model: str, config: RunConfig) -> None:
    """Check that a model is there and its context long enough, reading its config only.

    `role` is the name of the setting or option it comes from, for the message.

    Raises:
        ModelError: it cannot be used. A path is never taken for a hub's name.
    """
    if (why := why_no_path(model)) is not None:
        raise ModelError(f"{role} {shown_path(model)} {why}: give a model directory or name")
    if "://" in model:
        raise ModelError(
            f"{role} {shown_path(model)} is a URL: give a model directory, or a name like "
            "owner/name"
        )
    if _is_path(model) and not Path(model).is_dir():
        raise ModelError(
            f"no model directory at {model} (looked from {Path.cwd()}): correct `{role}`, or give "
            "the name of a model"
        )
    if role.startswith(("student", "teacher")) and lora.base_of(model) is not None:
        raise ModelError(
            f"the {role} {model} is a LoRA adapter: merge it into its base (npd export {model} "
            "DIR) and give that directory"
        )
    if Path(model).is_dir():
        check_files(role, Path(lora.base_of(model) or model))
    trust = config.trust_remote_code
    settings = read_config(model, trust_remote_code=trust, role=role)
    if (Path(model) / "config.json").is_file():
        check_generation_settings(role, Path(model))
    if role == "student":
        check_trainable(role, model, settings)
    check_numbers(role, model, settings)
    if role in _held_here(config):
        check_loadable(role, model, settings, resolve_device(config.runtime.device))
    with about(role, model):
        check_context(model, config.max_sample_tokens, trust_remote_code=trust)


def _is_path(model: str) -> bool:
    """Whether `model` can only mean a directory; a hub's names are `name` and `owner/name`."""
    owner, _, name = model.partition("/")
    return model.startswith(("/", ".")) or "/" in name or (bool(name) and Path(owner).is_dir())


def _held_here(config: RunConfig) -> set[str]:
    """The roles of teachers that transformers loads, on this machine: not served, not by Ray."""
    if config.runtime.kind == "ray":
        return set()
    writes_here = config.generate.source == "teacher" and not config.generate.is_served
    is_held = config.needs_teacher and (writes_here or not config.score.is_served)
    return {role_of(name) for name in config.teacher_models} if is_held else set()


def check_pair(config: RunConfig) -> str:
    """Check that the student does not learn from itself alone, on text that a model writes.

    Raises:
        ModelError: its only teacher is the student.
    """
    student, teacher = config.student, config.teacher
    same = student == teacher or (
        teacher is not None
        and os.path.isdir(student)
        and os.path.isdir(teacher)
        and os.path.samefile(student, teacher)
    )
    if same:
        raise ModelError(
            f"student and teacher are one model ({shown_path(student)}), which has nothing to "
            "learn from itself: set `teacher` to a better model of the same family"
        )
    return "student and teacher are two models"


def models_read_here(config: RunConfig) -> list[tuple[str, str]]:
    """Roles and models whose weights this machine reads; those of running servers are theirs."""
    teachers = config.teacher_models.items()
    here = [(role_of(name), model) for name, model in teachers if not _is_elsewhere(name, config)]
    return [("student", config.student), *here]


def _is_elsewhere(teacher: str, config: RunConfig) -> bool:
    writes_here = config.generate.source == "teacher" and not config.generate_of(teacher).urls
    return bool(config.score_of(teacher).urls) and not writes_here


def check_whole(role: str, model: str, config: RunConfig) -> None:
    """Check that a model's weights are there, and those of its architecture, by their headers.

    Raises:
        ModelError: some are missing, damaged, misnamed or of another shape.
    """
    with about(role, model):
        check_weights(model, trust_remote_code=config.trust_remote_code)


def check_use(role: str, model: str, config: RunConfig) -> None:
    """Check that a model's architecture can do what the run needs of it in process.

    It is tried on a small random model.

    Raises:
        ModelError: its packed rows, or its decoding, are not what its own code gives.
    """
    settings = read_config(model, trust_remote_code=config.trust_remote_code, role=role)
    if getattr(settings, "auto_map", None):
        return  # code that a directory brings is checked as the model is loaded
    with about(role, model):
        if role == "student" or _reads_here(config):
            check_packing(settings)
        if _writes_here(role, config):
            check_writing(settings, check_decoding)


def _reads_here(config: RunConfig) -> bool:
    """Whether a teacher reads samples or held-out text in process."""
    is_needed = config.needs_scores or config.evaluates_teacher
    return is_needed and not config.score.is_served


def _writes_here(role: str, config: RunConfig) -> bool:
    """Whether a model writes samples or held-out text in process."""
    writer = "student" if role == "student" else "teacher"
    writes = config.generate.source == writer and not config.generate.is_served
    answers = config.eval.num_samples > 0 and config.eval.source != "none"
    evaluates = config.eval.source == "teacher" and not config.score.is_served
    return writes or (answers if role == "student" else evaluates)


def lora_coverage(config: RunConfig) -> lora.Coverage | None:
    """What the adapters of `train.lora` act on; None without it, or where only loading can tell.

    Raises:
        ModelError: a name in `train.lora.targets` is no linear layer of the student.
    """
    if config.train.lora is None:
        return None
    try:
        model = outline(config.student, trust_remote_code=config.trust_remote_code)
    except ModelError:
        return None
    return lora.coverage(model, config.train.lora, config.student)


def check_compiler(config: RunConfig) -> str:
    """Check that what `compile` writes can be built here, if the workers are to be here.

    Raises:
        ConfigError: the compiler, or what it needs, is missing.
    """
    asked = {"train.compile": config.train.compile, "score.compile": config.score.compile is True}
    named = [setting for setting, is_on in asked.items() if is_on]
    for setting in named if config.runtime.kind != "ray" else ():
        check_compilers(resolve_device(config.runtime.device), setting)
    return f"{' and '.join(named)}: the compiler it needs is here"


def check_ranks(config: RunConfig) -> str:
    """Check that each teacher can be held by `score.ranks` together.

    Raises:
        ModelError: it cannot be shared out like that.
    """
    for model in config.teacher_models.values():
        trust = config.trust_remote_code
        check_divisible(model, config.score.ranks, trust_remote_code=trust)
    return f"{config.score.ranks} ranks can hold each teacher together"
