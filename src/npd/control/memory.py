"""How much memory a run takes, by process and device, beside what the machine has.

The forecast is rough: allocators, kernels and other architectures differ by tens of per cent. On
GPUs it is one for each, of the processes that `npd.control.placement` puts there.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from npd.config import LaunchConfig, RunConfig, TrainConfig
from npd.config.sections import chunk_for
from npd.control.placement import (
    assign_gpus,
    is_given_to_server,
    num_scorers,
    trainer_names,
    visible_gpus,
)
from npd.errors import InputError
from npd.models.loading import resolve_device
from npd.models.metadata import GIB, ModelSize, size_of
from npd.types import Check

# Weights, gradients and AdamW's two moments, all float32; a checkpoint has no gradients.
_STATE_BYTES, _SAVED_BYTES = 16, 12
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
# What a process holds on a GPU besides its tensors: a context, kernels, the allocator's slack.
_CONTEXT_BYTES = GIB // 2
# vLLM's share of a GPU unless --gpu-memory-utilization says otherwise.
_SERVER_SHARE = 0.9
# The most an answer of the driver is waited for.
_DRIVER_SECONDS = 60.0
# Cards have somewhat less than their name says: an "80 GB" one 79.6 GiB.
_CARD_SHARE = 0.99


class Gpu(NamedTuple):
    """A GPU's index or id, and its memory in bytes; `free` is unknown for one not here."""

    name: str
    total: int
    free: int | None = None


class Part(NamedTuple):
    """A share of a process's memory. One that is `elastic` is halved where there is no room."""

    what: str
    bytes: int
    elastic: bool = False


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """The GPUs of `8x80GB`, or of `80GB`.

    Raises:
        InputError: it is nothing of the kind.
    """
    found = re.fullmatch(r"(?:(\d{1,4})\s*[x×*]\s*)?(\d{1,4})\s*(?:GB|GiB|G)?", text.strip(), re.I)
    count, size = (int(found[1] or 1), int(found[2])) if found is not None else (0, 0)
    if not count or not size:
        raise InputError(f"--gpus {text[:40]!r} is no machine: write it like 8x80GB")
    return tuple(Gpu(str(i), int(_CARD_SHARE * size * GIB)) for i in range(count))


def gpus_here(config: RunConfig, *, may_open: bool = False) -> tuple[Gpu, ...] | None:
    """The GPUs that npd's processes would use on this machine; none if they would use the CPU.

    None if their memory is not known. It is asked of the driver, because torch would leave a
    context on each GPU in this process for good; `may_open` allows that where the driver is silent.
    """
    if not resolve_device(config.runtime.device).startswith("cuda"):
        return ()
    rows = _ask_driver("index", "uuid", "memory.total", "memory.free")
    found: list[Gpu] = []
    for name in visible_gpus():
        row = next((row for row in rows if row[0] == name or _begins(row[1], name)), None)
        numbers = row[2:] if row is not None else ["", ""]
        if all(number.isdigit() for number in numbers):
            total, free = (int(number) * 2**20 for number in numbers)
        elif may_open:
            free, total = device_bytes(f"cuda:{len(found)}")
        else:
            return None
        found.append(Gpu(name, total, free))
    return tuple(found)


def _begins(uuid: str, name: str) -> bool:
    return name.startswith("GPU-") and uuid.startswith(name)


def gpu_ids() -> dict[str, str]:
    """Unique ids of the GPUs that the driver lists, by index; empty where there is no driver."""
    return {row[0]: row[1] for row in _ask_driver("index", "uuid")}


def _ask_driver(*fields: str) -> list[list[str]]:
    """These fields of each GPU, by nvidia-smi; none where there is none."""
    ask = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=_DRIVER_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if done.returncode == 0 and len(row) == len(fields)]


def with_defaults(
    config: RunConfig, gpus: Sequence[Gpu] | None = None, *, alone: bool = False
) -> RunConfig:
    """The config with `auto` decided by the forecast, where the device decides. Raises nothing.

    `train.activation_checkpointing` is on if a full row would take the trainer's GPU above what it
    has, and off where there is no GPU, or no knowing. `gpus` as for `memory_checks`. `alone`: the
    trainer is one process, on the first GPU, with nothing beside it.
    """
    if config.train.activation_checkpointing != "auto":
        return config
    off, size = _recomputing(config, False), size_of(config.student)
    if size is None or config.runtime.kind == "ray":
        return off
    gpus = gpus_here(config) if gpus is None else gpus
    if not gpus:
        return off
    if alone:
        lone = off.model_copy(update={"train": off.train.model_copy(update={"ranks": 1})})
        places = [(gpus[0], {"trainer": _trainer_parts(lone, size, is_first=True)})]
    else:
        places = [*_on_gpus(off, size, gpus)]
    for gpu, here in places:
        if any(name.startswith("trainer") for name in here) and not _has_room(gpu, here):
            return _recomputing(config, True)
    return off


def chosen(asked: RunConfig, config: RunConfig) -> tuple[str, ...]:
    """What to say of `auto` where it became something else than usual."""
    was, now = (c.train.activation_checkpointing for c in (asked, config))
    if was != "auto" or now is not True:
        return ()
    return (
        "activations are recomputed in the backward pass, because a full row would not fit the "
        "trainer's GPU (train.activation_checkpointing: auto)",
    )


def _recomputing(config: RunConfig, is_on: bool) -> RunConfig:
    train = config.train.model_copy(update={"activation_checkpointing": is_on})
    return config.model_copy(update={"train": train})


def memory_checks(config: RunConfig, gpus: Sequence[Gpu] | None = None) -> Iterator[Check]:
    """The forecast beside what the devices have: one check for each GPU, or one for the machine.

    `gpus` are those of another machine (None: of this one).
    """
    size = size_of(config.student)
    if size is None:
        yield Check.warn("memory", f"{config.student} is no directory here: its size is not known")
        return
    is_here = gpus is None
    if config.runtime.device == "cpu":
        gpus = ()
    gpus = gpus_here(config, may_open=True) if gpus is None else gpus
    config = with_defaults(config, gpus)
    if config.runtime.kind == "ray":
        yield _on_cluster(config, size)
    elif gpus is None:
        yield Check.warn("memory", "how much the GPUs have is not known: nothing is forecast")
    elif gpus:
        for gpu, here in _on_gpus(config, size, gpus):
            yield _gpu_check(gpu, here)
        if is_here:
            yield host_check(config, size)
    else:
        yield _cpu_memory(config, size)


def _cpu_memory(config: RunConfig, size: ModelSize) -> Check:
    state, row = trainer_bytes(config, size, is_cpu=True)
    row += heap_bytes(config, size, "cpu")
    state, row = over_ranks(config.train, "cpu", size, state, row)
    beside, copy = other_bytes(config, size), copy_bytes(config, size)
    needed, (free, total) = state + row + copy + beside, device_bytes("cpu")
    says = (
        f"trainer about {_gib(state)} GiB (weights, gradients, AdamW) + {_gib(row)} (a row of "
        f"{config.train.row_tokens:,} tokens) + {_gib(copy)} (a checkpoint's copy), models beside "
        f"it {_gib(beside)}; cpu has {_gib(free)} free of {_gib(total)}"
    )
    if state > total:
        return Check.fail("memory", f"{says}: the student does not fit, take a smaller one")
    if needed > free:
        return Check.warn("memory", f"{says}: {_SMALLER['row']}")
    return Check.ok("memory", says)


def host_check(config: RunConfig, size: ModelSize) -> Check:
    """The main memory of a machine whose GPUs train: for the copy of the state that is saved."""
    copy, (free, total) = copy_bytes(config, size), device_bytes("cpu")
    says = (
        f"main memory: {_gib(copy)} GiB (a checkpoint's copy, pinned) of {_gib(free)} GiB free of "
        f"{_gib(total)}"
    )
    if copy > free:
        return Check.warn("memory", f"{says}: take a machine with more, or train.lora")
    return Check.ok("memory", says)


def _on_cluster(config: RunConfig, size: ModelSize) -> Check:
    state, row = trainer_bytes(config, size, is_cpu=config.runtime.device == "cpu")
    return Check.warn(
        "memory",
        f"trainer about {_gib(state)} GiB (weights, gradients, AdamW) + {_gib(row)} (a row of "
        f"{config.train.row_tokens:,} tokens): which machine of the cluster it will be on is not "
        "known",
    )


def _on_gpus(
    config: RunConfig, size: ModelSize, gpus: Sequence[Gpu]
) -> Iterator[tuple[Gpu, dict[str, list[Part]]]]:
    """Each GPU that is used, and what the processes on it take."""
    on = processes_by_gpu(config, [gpu.name for gpu in gpus])
    parts = parts_by_process(config, size)
    for gpu in gpus:
        names = on.get(gpu.name, [])
        here = {name: parts[name] for name in names if parts[name]}
        here |= _servers_on(config, names, gpu)
        if here:
            yield gpu, here


def _needed(here: Mapping[str, Sequence[Part]]) -> int:
    own = [parts for name, parts in here.items() if not name.endswith(_SERVER)]
    return sum(p.bytes for parts in here.values() for p in parts) + _CONTEXT_BYTES * len(own)


def _has_room(gpu: Gpu, here: Mapping[str, Sequence[Part]]) -> bool:
    return _needed(here) <= (gpu.total if gpu.free is None else gpu.free)


def _gpu_check(gpu: Gpu, here: Mapping[str, Sequence[Part]]) -> Check:
    needed = _needed(here)
    listed = "; ".join(
        f"{name} {' + '.join(f'{_gib(part.bytes)} ({part.what})' for part in parts)}"
        for name, parts in here.items()
    )
    has = f"{_gib(gpu.total)} GiB"
    if gpu.free is not None:
        has = f"{_gib(gpu.free)} GiB free of {_gib(gpu.total)}"
    says = f"GPU {gpu.name}: {listed}; {_gib(needed)} GiB of {has}"
    if _has_room(gpu, here):
        return Check.ok("memory", says)
    elastic = [part for parts in here.values() for part in parts if part.elastic]
    if needed - sum(part.bytes for part in elastic) > gpu.total:
        return Check.fail("memory", f"{says}: {_remedy(here)}")
    if not elastic:
        return Check.warn("memory", f"{says}: {_remedy(here)}")
    largest = max(elastic, key=lambda part: part.bytes)
    return Check.warn("memory", f"{says}: {_SMALLER[largest.what.split()[0]]}")


def _remedy(here: Mapping[str, Sequence[Part]]) -> str:
    if any(name.endswith(_SERVER) for name in here):
        return (
            "bound the server's share (--gpu-memory-utilization in launch.args), or name a GPU for "
            "it alone (launch.gpus)"
        )
    if len(here) > 1:
        return "give its processes GPUs of their own (score.gpus, generate.gpus), or smaller models"
    return "take a smaller model, or raise train.ranks (score.ranks) to share it over GPUs"


_SERVER = "'s server"
# What makes an elastic part smaller, by its first word.
_SMALLER = {
    "row": "set train.activation_checkpointing: true, or lower train.row_tokens or loss.chunk",
    "KV": "lower generate.batch_size, or give generators a GPU of their own (generate.gpus)",
    "logits": "lower score.head_chunk, or give scorers a GPU of their own (score.gpus)",
}


def processes_by_gpu(config: RunConfig, gpus: Sequence[str]) -> dict[str, list[str]]:
    """The names of npd's processes on each of `gpus`, as placement assigns them."""
    device = config.runtime.device
    if config.runtime.kind == "inline" or device.startswith("cuda:"):
        index = int(device.partition(":")[2] or 0)
        return {gpu: process_names(config) for gpu in gpus[index : index + 1]}
    found: dict[str, list[str]] = {}
    for name, given in assign_gpus(config, gpus).items():
        for gpu in filter(None, given.split(",")):
            found.setdefault(gpu, []).append(name)
    return found


def process_names(config: RunConfig) -> list[str]:
    """The names of a run's worker processes, as logs and checks have them."""
    score, names = config.score.ranks, trainer_names(config)
    for index in range(num_scorers(config)):
        name = f"scorer-{index}"
        names += [name] if score == 1 else [f"{name}-{rank}" for rank in range(score)]
    return names + [f"generator-{index}" for index in range(config.generate.workers)]


def parts_by_process(config: RunConfig, size: ModelSize) -> dict[str, list[Part]]:
    """What each of npd's processes holds on its GPU, by its name; servers are not among them."""
    found: dict[str, list[Part]] = {}
    for name in process_names(config):
        role = name.partition("-")[0]
        if role == "trainer":
            found[name] = _trainer_parts(config, size, is_first=name in ("trainer", "trainer-0"))
        elif role == "scorer":
            found[name] = _scorer_parts(config, size)
        else:
            found[name] = _generator_parts(config, size)
    return found


def _trainer_parts(config: RunConfig, size: ModelSize, *, is_first: bool) -> list[Part]:
    train = config.train
    state, row = trainer_bytes(config, size, is_cpu=False)
    recomputed = ", activations recomputed" if train.activation_checkpointing is True else ""
    parts = [
        Part("weights, gradients, AdamW", state // train.ranks),
        Part(f"row of {train.row_tokens:,} tokens{recomputed}", row, elastic=True),
    ]
    if train.ranks > 1 and is_first and config.eval.source != "none":
        width = _BYTES["float32" if train.lora is None else train.dtype]
        parts.append(Part("the whole student, to evaluate", width * size.parameters))
    return parts


def _scorer_parts(config: RunConfig, size: ModelSize) -> list[Part]:
    score, parts = config.score, []
    width = _BYTES[score.dtype]
    if not score.is_served:
        parts.append(Part("teacher", width * _teacher_size(config) // score.ranks))
    if config.needs_scores and (config.needs_ifd or config.needs_student_pass):
        parts.append(Part("snapshot", width * size.parameters))
    if parts:
        # A block's logits and their softmax, in float32.
        chunk = min(score.head_chunk, score.row_tokens)
        parts.append(Part("logits", 2 * _BYTES["float32"] * chunk * size.vocabulary, elastic=True))
    return parts


def _generator_parts(config: RunConfig, size: ModelSize) -> list[Part]:
    generate = config.generate
    if generate.is_served or generate.source == "dataset":
        return []
    width = _BYTES[generate.dtype]
    writer = size
    if generate.source == "teacher":
        sizes = [found for m in config.teacher_models.values() if (found := size_of(m)) is not None]
        writer = max(sizes, key=lambda found: found.parameters, default=size)
    tokens = config.data.max_prompt_tokens + generate.max_new_tokens
    cache = 2 * width * writer.layers * writer.kv_width * generate.batch_size * tokens
    return [
        Part("weights", width * writer.parameters),
        Part(f"KV cache of {generate.batch_size} x {tokens:,} tokens", cache, elastic=True),
    ]


def _servers_on(config: RunConfig, names: Sequence[str], gpu: Gpu) -> dict[str, list[Part]]:
    """The share of a GPU that servers started by its processes take."""
    roles = {"generate": "generator", "score": "scorer"}
    found = {}
    for where, launch in config.launches.items():
        role = roles.get(where, "scorer")
        is_here = any(name.startswith(role) for name in names)
        if is_given_to_server(config, gpu.name, where) if launch.gpus else is_here:
            share = _share_of(launch)
            found[f"{where}{_SERVER}"] = [Part(f"{share:.0%} of it", int(share * gpu.total))]
    return found


def _share_of(launch: LaunchConfig) -> float:
    """The share of a GPU that a server takes, by its own flag."""
    text = " ".join(launch.args).replace("_", "-")
    found = re.search(r"--gpu-memory-utilization[= ]([\d.]+)", text)
    try:
        return float(found[1]) if found is not None else _SERVER_SHARE
    except ValueError:
        return _SERVER_SHARE


def trainer_bytes(config: RunConfig, size: ModelSize, *, is_cpu: bool) -> tuple[int, int]:
    """What the trainer holds always, and what a full row adds at its peak."""
    train, width = config.train, _BYTES[config.train.dtype]
    layer = _KEPT_HIDDEN * size.hidden + _KEPT_INTERMEDIATE * size.intermediate
    kept = width * size.layers * layer
    if train.activation_checkpointing is True:
        # Each layer's input, in float32, and all of the one that is recomputed.
        kept = 4 * size.layers * size.hidden + width * layer
    # A chunk's logits (later their gradient) in the compute type; and the LM head's gradient, which
    # is made with the loss and waits for the rest.
    chunk = config.loss.chunk or chunk_for(size.vocabulary, is_cpu=is_cpu)
    logits = width * min(chunk, train.row_tokens) * size.vocabulary
    head = 0 if train.lora is not None else 4 * size.vocabulary * size.hidden
    row = train.row_tokens * kept + logits + head
    if train.lora is not None:  # weights that stay as they are, and adapters beside them
        return width * size.parameters + _STATE_BYTES * _num_trained(config, size), row
    copy = 0 if train.dtype == "float32" else width * size.parameters
    return _STATE_BYTES * size.parameters, row + copy


def copy_bytes(config: RunConfig, size: ModelSize) -> int:
    """The copy of weights and moments that is being written, in the first rank's main memory.

    It is kept for the next checkpoint.
    """
    return _SAVED_BYTES * _num_trained(config, size)


def _num_trained(config: RunConfig, size: ModelSize) -> int:
    if config.train.lora is None:
        return size.parameters
    # Adapters beside four projections and three of the MLP.
    sides = 4 * 2 * size.hidden + 3 * (size.hidden + size.intermediate)
    return size.layers * config.train.lora.rank * sides


def heap_bytes(config: RunConfig, size: ModelSize, device: str) -> int:
    """What a row's recomputed layers leave in the heap of a CPU process, beyond their tensors."""
    block = 4 * config.train.row_tokens * size.hidden
    if device != "cpu" or config.train.activation_checkpointing is not True or block >= _HEAP_BLOCK:
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
    """Weights of the models that generators and scorers hold in process: of all teachers, each."""
    generate, score, teacher_size = config.generate, config.score, _teacher_size(config)
    total = 0
    if not generate.is_served and generate.source != "dataset":
        writer = size.parameters if generate.source == "student" else teacher_size
        total += generate.workers * _BYTES[generate.dtype] * writer
    if config.needs_scores:
        each = 0 if score.is_served else teacher_size
        each += size.parameters if config.needs_ifd or config.needs_student_pass else 0
        total += score.workers * _BYTES[score.dtype] * each
    return total


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
