"""A forecast of memory: what the trainer and the models beside it take, and what there is.

A rough one: allocators, kernels and other architectures differ by tens of per cent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from npd.config import RunConfig, TrainConfig
from npd.doctor.checks import Check, fail, ok, warn
from npd.modeling import resolve_device
from npd.sections import chunk_for
from npd.servers.sizes import GIB, ModelSize, size_of

# Weights, gradients and AdamW's two moments, all float32.
_STATE_BYTES = 16
# Values of size `hidden` and `intermediate` a layer keeps for its backward pass, at the width of
# the compute type: residuals and norms stay float32, so count twice. Fitted to a 135M Llama, whose
# 30 layers take 1.0 MB a token in bfloat16.
_KEPT_HIDDEN, _KEPT_INTERMEDIATE = 19, 4
# On a CPU, glibc hands blocks below this back to its own heap. What activation checkpointing frees
# in each layer lies between the layer inputs it keeps, and what no later block fits into stays
# resident: 1.1 GiB of that 135M Llama with rows of 4,096 tokens, as 4 float32 values of size
# `hidden` a layer. (One backward pass: 3.6 GiB resident, 2.0 with MALLOC_MMAP_THRESHOLD_=2097152.)
_HEAP_BLOCK, _LEFT_IN_HEAP = 32 * 2**20, 4
_BYTES = {"bfloat16": 2, "float32": 4}


def memory_checks(config: RunConfig) -> Iterator[Check]:
    """The trainer's forecast beside what the device has."""
    size = size_of(config.student)
    if size is None:
        yield warn("memory", f"{config.student} is no directory here: its size is not known")
        return
    device = resolve_device(config.runtime.device)
    state, row = trainer_bytes(config, size)
    row += heap_bytes(config, size, device)
    state, row = over_ranks(config.train, device, size, state, row)
    beside = other_bytes(config, size)
    needed, (free, total) = state + row + beside, device_bytes(device)
    says = (
        f"trainer about {_gib(state)} GiB (weights, gradients, AdamW) + {_gib(row)} (a row of "
        f"{config.train.row_tokens:,} tokens), models beside it {_gib(beside)}; "
        f"{device} has {_gib(free)} free of {_gib(total)}"
    )
    smaller = "set train.activation_checkpointing: true, or lower train.row_tokens or loss.chunk"
    if config.runtime.kind == "ray":
        yield warn("memory", f"{says} on this machine, which may not be the trainer's")
    elif state > total:
        yield fail("memory", f"{says}: the student does not fit, take a smaller one")
    elif needed > free:
        yield warn("memory", f"{says}: {smaller}")
    else:
        yield ok("memory", says)
    if _is_apart(config) and _teacher_size(config) and config.runtime.kind != "ray":
        yield part_check(config, total)


def part_check(config: RunConfig, total: int) -> Check:
    """Whether a rank's part of the teachers fits a GPU of `total` bytes, all held at once."""
    score, writes = config.score, config.eval.source == "teacher"
    width = max(_BYTES[score.dtype], _BYTES[config.generate.dtype] if writes else 0)
    part = width * _teacher_size(config) // score.ranks
    says = f"teachers about {_gib(part)} GiB on each of {score.ranks} GPUs of {_gib(total)}"
    return ok("memory", says) if part < total else fail("memory", f"{says}: raise score.ranks")


def trainer_bytes(config: RunConfig, size: ModelSize) -> tuple[int, int]:
    """What the trainer holds always, and what a full row adds at its peak."""
    train, width = config.train, _BYTES[config.train.dtype]
    layer = _KEPT_HIDDEN * size.hidden + _KEPT_INTERMEDIATE * size.intermediate
    kept = width * size.layers * layer
    if train.activation_checkpointing:
        # Each layer's input, in float32, and all of the one that is recomputed.
        kept = 4 * size.layers * size.hidden + width * layer
    # A chunk's logits (later their gradient) in the compute type; and the LM head's gradient, which
    # is made with the loss and waits for the rest.
    is_cpu = resolve_device(config.runtime.device) == "cpu"
    chunk = config.loss.chunk or chunk_for(size.vocabulary, is_cpu=is_cpu)
    logits = width * min(chunk, train.row_tokens) * size.vocabulary
    head = 0 if train.lora is not None else 4 * size.vocabulary * size.hidden
    row = train.row_tokens * kept + logits + head
    if train.lora is not None:
        # Weights that stay as they are, and adapters beside four projections and three of the MLP.
        sides = 4 * 2 * size.hidden + 3 * (size.hidden + size.intermediate)
        trained = size.layers * train.lora.rank * sides
        return width * size.parameters + _STATE_BYTES * trained, row
    copy = 0 if train.dtype == "float32" else width * size.parameters
    return _STATE_BYTES * size.parameters, row + copy


def heap_bytes(config: RunConfig, size: ModelSize, device: str) -> int:
    """What a row's recomputed layers leave in the heap of a CPU process, beyond their tensors."""
    block = 4 * config.train.row_tokens * size.hidden
    if device != "cpu" or not config.train.activation_checkpointing or block >= _HEAP_BLOCK:
        return 0
    return size.layers * _LEFT_IN_HEAP * block


def over_ranks(
    train: TrainConfig, device: str, size: ModelSize, state: int, row: int
) -> tuple[int, int]:
    """The same where ranks share the student: on the first one's GPU, or all of them on the CPU.

    The first rank holds the whole student too, while it evaluates.
    """
    if train.ranks == 1:
        return state, row
    whole = _BYTES["float32" if train.lora is None else train.dtype] * size.parameters
    if device == "cpu":
        return state + whole, train.ranks * row
    return state // train.ranks + whole, row


def other_bytes(config: RunConfig, size: ModelSize) -> int:
    """Weights of the models that generators and scorers hold in process: of all teachers, each.

    Those of several ranks are not beside the trainer: on GPUs they have others to themselves.
    """
    generate, score, teacher_size = config.generate, config.score, _teacher_size(config)
    total = 0
    if generate.engine == "transformers" and generate.source != "dataset":
        writer = size.parameters if generate.source == "student" else teacher_size
        total += generate.workers * _BYTES[generate.dtype] * writer
    if config.needs_scores:
        each = teacher_size if score.engine == "transformers" and not _is_apart(config) else 0
        each += size.parameters if config.needs_ifd or config.needs_student_pass else 0
        total += score.workers * _BYTES[score.dtype] * each
    return total


def _is_apart(config: RunConfig) -> bool:
    return config.score.ranks > 1 and resolve_device(config.runtime.device) != "cpu"


def _teacher_size(config: RunConfig) -> int:
    """Parameters of all teachers whose directories are here."""
    sizes = map(size_of, config.teacher_models.values())
    return sum(size.parameters for size in sizes if size is not None)


def device_bytes(device: str) -> tuple[int, int]:
    """Free and total memory of a device (of the machine, for the CPU)."""
    if device.startswith("cuda"):
        import torch

        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    return _available() or page * os.sysconf("SC_AVPHYS_PAGES"), total


def _available() -> int:
    """What Linux would give to new programs, caches it can drop included; 0 elsewhere."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = dict(line.split(":", 1) for line in file)
    except OSError:
        return 0
    return int(found.get("MemAvailable", "0").split()[0]) * 1024


def _gib(count: int) -> str:
    return f"{count / GIB:,.1f}"
