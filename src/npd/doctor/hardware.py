"""Memory and GPUs: what a run takes, and what this machine has.

The forecast of memory is rough: allocators, kernels and other architectures differ by tens of per
cent. Of GPUs it is asked whether there are enough, and whether one is given out twice.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

from npd.config import LaunchConfig, RunConfig, TrainConfig
from npd.config.sections import chunk_for
from npd.control.placement import num_scorers
from npd.models.loading import resolve_device
from npd.models.metadata import GIB, ModelSize, size_of
from npd.types import Check

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
        yield Check.warn("memory", f"{config.student} is no directory here: its size is not known")
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
        yield Check.warn("memory", f"{says} on this machine, which may not be the trainer's")
    elif state > total:
        yield Check.fail("memory", f"{says}: the student does not fit, take a smaller one")
    elif needed > free:
        yield Check.warn("memory", f"{says}: {smaller}")
    else:
        yield Check.ok("memory", says)
    if _is_apart(config) and _teacher_size(config) and config.runtime.kind != "ray":
        yield part_check(config, total)


def part_check(config: RunConfig, total: int) -> Check:
    """Whether a rank's part of the teachers fits a GPU of `total` bytes, all held at once."""
    score, writes = config.score, config.eval.source == "teacher"
    width = max(_BYTES[score.dtype], _BYTES[config.generate.dtype] if writes else 0)
    part = width * _teacher_size(config) // score.ranks
    says = f"teachers about {_gib(part)} GiB on each of {score.ranks} GPUs of {_gib(total)}"
    if part < total:
        return Check.ok("memory", says)
    return Check.fail("memory", f"{says}: raise score.ranks")


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
    if not generate.is_served and generate.source != "dataset":
        writer = size.parameters if generate.source == "student" else teacher_size
        total += generate.workers * _BYTES[generate.dtype] * writer
    if config.needs_scores:
        each = teacher_size if not score.is_served and not _is_apart(config) else 0
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


# ---- GPUs of npd's ranks and of servers it would start


_SECONDS = 60.0


def gpu_checks(what: str, launch: LaunchConfig, config: RunConfig) -> Iterator[Check]:
    """Whether the GPUs named for a section's servers exist, suffice, and are free of npd itself."""
    from npd.models.loading import resolve_device

    if not launch.gpus:
        if resolve_device(config.runtime.device).startswith("cuda"):
            yield Check.warn(
                what,
                "its server takes most of the GPU that npd's own workers use: name another in "
                f"{what}.gpus, or bound it by --gpu-memory-utilization in {what}.args",
            )
        return
    there = {part for pair in gpu_ids().items() for part in pair if part}
    for entry in launch.gpus:
        named = [part.strip() for part in entry.split(",") if part.strip()]
        missing = [gpu for gpu in named if not any(known.startswith(gpu) for known in there)]
        if missing:
            listed = ", ".join(sorted(k for k in there if k.isdigit())) or "none"
            yield Check.fail(
                what, f"no GPU {missing[0]} here (there are: {listed}): correct {what}.gpus"
            )
        elif len(named) < launch.tensor_parallel:
            yield Check.fail(
                what,
                f"a model over {launch.tensor_parallel} GPUs does not fit on {entry!r}: name "
                f"as many in {what}.gpus, or lower {what}.tensor_parallel",
            )
        else:
            yield Check.ok(what, f"GPU {entry} is there")
    yield from _shared_checks(what, launch, config)


def rank_checks(config: RunConfig) -> Iterator[Check]:
    """Whether there is a GPU for each rank, where several share a model on this machine's GPUs."""
    ranks = {"train.ranks": config.train.ranks, "score.ranks": config.score.ranks}
    several = {name: count for name, count in ranks.items() if count > 1}
    wanted = _wanted(config)
    if not several or config.runtime.kind == "ray" or not wanted:
        return
    found = len(own_gpus(config))
    given = " and ".join(f"{name} {count}" for name, count in several.items())
    says = f"{given}: {len(wanted)} ranks take a GPU each, and npd sees {found}"
    if found < len(wanted):
        yield Check.fail(
            "gpus", f"{says}: lower {' or '.join(several)}, or set runtime.device: cpu"
        )
    else:
        yield Check.ok("gpus", says)


def _shared_checks(what: str, launch: LaunchConfig, config: RunConfig) -> Iterator[Check]:
    """A warning where a server is given a GPU that the trainer, or what is beside it, is on."""
    given = [part.strip() for entry in launch.gpus for part in entry.split(",") if part.strip()]
    own = own_gpus(config)
    for index, uuid in sorted(gpu_ids().items()):
        shared = [gpu for gpu in given if gpu == index or (uuid and gpu and uuid.startswith(gpu))]
        taken = [place for place, gpu in enumerate(own) if gpu in (index, uuid)]
        if shared and taken:
            whose = "the trainer's" if taken[0] < config.train.ranks else "a scorer's"
            yield Check.warn(
                what,
                f"GPU {shared[0]} is {whose} too, and a server takes most of a GPU: name "
                f"others in {what}.gpus, move npd's own workers (runtime.device, "
                f"CUDA_VISIBLE_DEVICES), or bound it by --gpu-memory-utilization in {what}.args",
            )


def own_gpus(config: RunConfig) -> list[str]:
    """The GPUs of npd's own workers as the driver names them: none on the CPU, else one for each
    rank of the trainer, then (where they have several) of the scorers.

    `CUDA_VISIBLE_DEVICES` renumbers GPUs for npd, not for the servers it starts.
    """
    named = _visible()
    return [named[i] for i in _wanted(config) if i < len(named)]


def _wanted(config: RunConfig) -> range:
    """Indices of npd's own GPUs among the visible ones, as `control.placement` assigns them."""
    from npd.models.loading import resolve_device

    device = resolve_device(config.runtime.device)
    if not device.startswith("cuda"):
        return range(0)
    first = int(device.partition(":")[2] or 0)
    readers = num_scorers(config) * config.score.ranks if config.score.ranks > 1 else 0
    return range(first, first + config.train.ranks + readers)


def _visible() -> list[str]:
    """The GPUs that npd sees, as the driver names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip()]
    return list(gpu_ids()) or [str(i) for i in range(torch.cuda.device_count())]


def gpu_ids() -> dict[str, str]:
    """Unique ids of the GPUs that the driver lists, by index; empty where there is no driver."""
    ask = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if done.returncode != 0:
        return {}
    pairs = (line.partition(",") for line in done.stdout.splitlines() if line.strip())
    return {index.strip(): uuid.strip() for index, _, uuid in pairs}
