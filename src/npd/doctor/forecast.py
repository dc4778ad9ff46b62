"""How long a run will be: steps, tokens, rough minutes, disk; and what that advises.

Minutes are a rule of thumb: floating-point operations over what such a device gets through. A CPU's
was measured once, with small models; a GPU's is counted and was never measured, which is said.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from npd.config import RunConfig
from npd.config.load import dump_config
from npd.data.inputs import RunInputs
from npd.errors import NpdError
from npd.models.device import is_gpu, resolve_device
from npd.models.metadata import GIB, model_settings, size_of
from npd.observe.findings import RunFacts, findings
from npd.observe.live import clock_text
from npd.text import counted
from npd.types import Check

# Operations a second of a CPU core and of a GPU, by stage. The core's: a 135M Llama on two cores
# (docs/performance.md). A GPU's: two fifths of an A100's bfloat16 peak; decoding waits for memory.
_CORE = {"generate": 4e10, "score": 1.5e11, "train": 1.2e11}
_GPU = {"generate": 5e12, "score": 1.2e14, "train": 1.2e14}
# Operations a parameter and token: a forward pass, and with it the backward one.
_FORWARD, _TRAIN = 2, 6
# Responses rarely are as long as they may be.
_LENGTH_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Length:
    """How much a run does: prompts, optimiser steps, samples requested, tokens written and trained
    on."""

    prompts: int
    steps: int
    samples: int
    written: int
    trained: int


def forecast_checks(
    config: RunConfig, prepared: RunInputs, *, has_gpu: bool | None = None
) -> Iterator[Check]:
    """What the run will be, in numbers, and what is to be said of them.

    `has_gpu` is about another machine (None: this one).
    """
    if has_gpu is None:
        has_gpu = is_gpu(resolve_device(config.runtime.device))
    length = length_of(config, prepared)
    tokens = f"some {_millions(length.written)} written, {_millions(length.trained)} trained on"
    says = f"{counted(length.steps, 'step')} of {config.train.batch_size} samples, {tokens}"
    seconds = seconds_of(config, length, has_gpu=has_gpu)
    if seconds is not None:
        cores = counted(os.cpu_count() or 1, "CPU core")
        where = "one GPU (by counting: never measured)" if has_gpu else cores
        says += f"; very roughly {clock_text(seconds)} on {where}, a factor of three either way"
    disk = disk_bytes(config)
    if disk is not None:
        says += f"; {disk / GIB:,.1f} GiB of disk"
    yield Check.ok("forecast", says)
    for finding in findings(planned_facts(config, length)):
        yield Check.warn("advice", str(finding))


def length_of(config: RunConfig, prepared: RunInputs) -> Length:
    """The size of a run in which no sample leaves early; responses as half as long as they may."""
    requests, batch = config.num_requests(len(prepared.prompts)), config.train.batch_size
    if requests is None:
        steps = config.schedule.steps or 0
        requests = -(-steps * batch // config.schedule.reuse)
    else:
        steps = -(-requests * config.schedule.reuse // batch)
    own = [len(p.completion_ids) for p in prepared.prompts if p.completion_ids is not None]
    response = _LENGTH_SHARE * config.generate.max_new_tokens
    if config.generate.source == "dataset" and own:
        response = sum(own) / len(own)
    prompt = sum(len(p.prompt_ids) for p in prepared.prompts) / max(1, len(prepared.prompts))
    written = 0 if config.generate.source == "dataset" else round(requests * response)
    trained = round(requests * config.schedule.reuse * (prompt + response))
    return Length(len(prepared.prompts), steps, requests, written, trained)


def seconds_of(config: RunConfig, length: Length, *, has_gpu: bool) -> float | None:
    """Rough seconds, stages one after another; None where the student's size is not known."""
    student = size_of(config.student)
    if student is None:
        return None
    sizes = [size.parameters for m in config.teacher_models.values() if (size := size_of(m))]
    teacher = max(sizes, default=0)
    writer = teacher if config.generate.source == "teacher" else student.parameters
    scored = length.trained / config.schedule.reuse if config.needs_scores else 0.0
    readers = teacher + (student.parameters if config.needs_ifd else 0)
    speeds = _GPU if has_gpu else _cpu_speeds()
    return (
        _FORWARD * writer * length.written / speeds["generate"]
        + _FORWARD * readers * scored / speeds["score"]
        + _TRAIN * student.parameters * length.trained / speeds["train"]
    )


def disk_bytes(config: RunConfig) -> int | None:
    """What checkpoints and snapshots take; None where the student's size is not known.

    A checkpoint has weights and two moments in float32 (one more while written); snapshots bf16.
    """
    size = size_of(config.student)
    return None if size is None else size.parameters * (12 * (config.checkpoint.keep + 1) + 2 * 3)


def disk_checks(config: RunConfig) -> Iterator[Check]:
    """Whether checkpoints and snapshots have room where the run is kept; nothing if unknown."""
    needed, root = disk_bytes(config), config.directory.absolute()
    if needed is None:
        return
    free = shutil.disk_usage(next(p for p in (root, *root.parents) if p.exists())).free
    says = f"{root}: {free / GIB:,.1f} GiB free, checkpoints and snapshots take {needed / GIB:,.1f}"
    if needed < free:
        yield Check.ok("disk", says)
    else:
        yield Check.warn("disk", f"{says}: free some, or set run_dir")


def planned_facts(config: RunConfig, length: Length) -> RunFacts:
    """What is known of a run before it starts."""
    size = size_of(config.student)
    # A cosine from lr to min_lr is their middle on average.
    middle = (config.train.lr + config.train.min_lr) / 2
    return RunFacts(
        config=dump_config(config.sized(length.prompts)),
        steps=length.steps,
        lr_sum=middle * length.steps,
        parameters=None if size is None else size.parameters,
        context=_context(config.student),
    )


def _context(student: str) -> int | None:
    try:
        return model_settings(Path(student)).context or None
    except NpdError:
        return None


def _cpu_speeds() -> dict[str, float]:
    cores = os.cpu_count() or 1
    return {stage: cores * speed for stage, speed in _CORE.items()}


def _millions(tokens: int) -> str:
    if tokens < 1_000_000:
        return f"{tokens:,} tokens"
    return f"{tokens / 1e6:,.1f} M tokens"
