"""How much memory a run takes, by process and device, beside what the machine has.

The forecast is rough: allocators, kernels and other architectures differ by tens of per cent. On
GPUs it is one for each, of the processes that `placement` puts there and of the servers that they
start. In phases (`runtime.share`) one role at a time has its models there. What follows from it is
decided in `defaults`, and shown in `npd.doctor.memory`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from npd.config import RunConfig, TrainConfig
from npd.config.sections import SIZES_ON_GPU, chunk_for
from npd.control.devices.placement import assign_gpus, num_scorers, trainer_names, visible_gpus
from npd.control.devices.server_memory import parts_of_servers, role_of_server
from npd.errors import InputError
from npd.models.device import CUDA, driver_gpus, free_and_total, is_gpu, kind_of, resolve_device
from npd.models.metadata import GIB, ModelSize, size_of

# Weights, gradients and AdamW's two moments, all float32; or the moments in a byte each. A
# checkpoint has no gradients, and its moments are float32.
_STATE_BYTES = {"adamw": 16, "adamw8bit": 10}
_SAVED_BYTES = 12
# Values of size `hidden` and `intermediate` a layer keeps for its backward pass, at the width of
# the compute type: residuals and norms stay float32, so count twice. Fitted to a 135M Llama, whose
# 30 layers take 1.0 MB a token in bfloat16.
_KEPT_HIDDEN, _KEPT_INTERMEDIATE = 19, 4
# The same where FSDP casts the weights instead of autocast: residuals and norms are bfloat16, and a
# layer keeps about 5 values of size `hidden` less (25.2 KB a token instead of 30.8).
_KEPT_HIDDEN_CAST = 14
# On a CPU, glibc hands blocks below this back to its own heap. What activation checkpointing frees
# in each layer lies between the layer inputs it keeps, and what no later block fits into stays
# resident: 1.1 GiB of that 135M Llama with rows of 4,096 tokens, as 4 float32 values of size
# `hidden` a layer. (One backward pass: 3.6 GiB resident, 2.0 with MALLOC_MMAP_THRESHOLD_=2097152.)
_HEAP_BLOCK, _LEFT_IN_HEAP = 32 * 2**20, 4
_BYTES = {"bfloat16": 2, "float32": 4}
# Values of size `hidden` and `intermediate` that a token of a prefill has in its layer at once.
_READ_HIDDEN, _READ_INTERMEDIATE = 4, 3
# What a process holds on a GPU besides its tensors: a context, kernels, the allocator's slack.
_CONTEXT_BYTES = GIB // 2
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
    device = resolve_device(config.runtime.device)
    if not is_gpu(device):
        return ()
    rows = driver_gpus() if kind_of(device) == CUDA else []
    found: list[Gpu] = []
    for name in visible_gpus(device):
        row = next((row for row in rows if row.number == name or _begins(row.uuid, name)), None)
        if row is not None and row.total is not None and row.free is not None:
            found.append(Gpu(name, row.total, row.free))
            continue
        asked = free_and_total(f"{kind_of(device)}:{len(found)}") if may_open else None
        if asked is None:
            return None
        free, total = asked
        found.append(Gpu(name, total, free))
    return tuple(found)


def _begins(uuid: str, name: str) -> bool:
    return name.startswith("GPU-") and uuid.startswith(name)


def gpu_ids() -> dict[str, str]:
    """Unique ids of the GPUs that the driver lists, by index; empty where there is no driver."""
    return {gpu.number: gpu.uuid for gpu in driver_gpus()}


def on_gpus(
    config: RunConfig, size: ModelSize, gpus: Sequence[Gpu]
) -> Iterator[tuple[Gpu, dict[str, list[Part]]]]:
    """Each GPU that is used, and what the processes and servers on it take."""
    on = processes_by_gpu(config, [gpu.name for gpu in gpus])
    for gpu in gpus:
        if here := on_gpu(config, size, gpu, on.get(gpu.name, [])):
            yield gpu, here


def on_gpu(
    config: RunConfig, size: ModelSize, gpu: Gpu, names: Sequence[str]
) -> dict[str, list[Part]]:
    """What npd's processes `names` and their servers take of a GPU; those that take nothing go."""
    parts = parts_by_process(config, size)
    here = {name: parts[name] for name in names if parts[name]}
    has_others = bool(here) and not config.has_phases
    served = parts_of_servers(config, gpu.name, gpu.total, names, has_others=has_others)
    return here | {f"{where}{SERVER}": [Part(*part)] for where, part in served.items()}


SERVER = "'s server"
"""What ends the name of a server: `generate's server`."""


def at_once(
    config: RunConfig, here: Mapping[str, Sequence[Part]]
) -> list[Mapping[str, list[Part]]]:
    """What is on a GPU at the same time: everything, or in phases one role's after another's."""
    if not config.has_phases:
        return [{name: [*parts] for name, parts in here.items()}]
    roles: dict[str, dict[str, list[Part]]] = {}
    for name, parts in here.items():
        roles.setdefault(role_of(config, name), {})[name] = [*parts]
    return [*roles.values()]


def role_of(config: RunConfig, name: str) -> str:
    """The role of a process or of a server."""
    if name.endswith(SERVER):
        return role_of_server(config, name.removesuffix(SERVER))
    return name.partition("-")[0]


def needed(now: Mapping[str, Sequence[Part]], here: Mapping[str, Sequence[Part]]) -> int:
    """The bytes of `now`, at the same time on a GPU, and of the contexts of all its processes."""
    own = [name for name in here if not name.endswith(SERVER)]
    return _CONTEXT_BYTES * len(own) + sum(p.bytes for parts in now.values() for p in parts)


def has_room(
    config: RunConfig, gpu: Gpu, here: Mapping[str, Sequence[Part]], role: str | None = None
) -> bool:
    """Whether a GPU has room for what it is to hold; with a `role`, when that role has its turn."""
    room = gpu.total if gpu.free is None else gpu.free
    turns = [
        now
        for now in at_once(config, here)
        if role is None or any(role_of(config, name) == role for name in now)
    ]
    return all(needed(now, here) <= room for now in turns)


def processes_by_gpu(config: RunConfig, gpus: Sequence[str]) -> dict[str, list[str]]:
    """The names of npd's processes on each of `gpus`, as placement assigns them."""
    device = config.runtime.device
    if config.runtime.kind == "inline" or config.runtime.names_one_gpu:
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
            found[name] = trainer_parts(config, size, is_first=name in ("trainer", "trainer-0"))
        elif role == "scorer":
            found[name] = scorer_parts(config, size)
        else:
            found[name] = _generator_parts(config, size)
    return found


def trainer_parts(config: RunConfig, size: ModelSize, *, is_first: bool) -> list[Part]:
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


def scorer_parts(config: RunConfig, size: ModelSize) -> list[Part]:
    score, parts = config.score, []
    width = _BYTES[score.dtype]
    if not score.is_served:
        parts.append(Part("teacher", width * _teacher_size(config) // score.ranks))
    if config.needs_scores and (config.needs_ifd or config.needs_student_pass):
        parts.append(Part("snapshot", width * size.parameters))
    if parts:
        # Undecided on Ray: as large as on any GPU.
        row, chunk = score.with_sizes(SIZES_ON_GPU).sizes
        widest = max([size, *_teacher_sizes(config)], key=lambda size: size.hidden)
        token = _READ_HIDDEN * widest.hidden + _READ_INTERMEDIATE * widest.intermediate
        parts.append(Part(f"prefill of {row:,} tokens", width * row * token, elastic=True))
        # A block's logits and their softmax, in float32.
        logits = 2 * _BYTES["float32"] * min(chunk, row) * size.vocabulary
        parts.append(Part("logits", logits, elastic=True))
    return parts


def _generator_parts(config: RunConfig, size: ModelSize) -> list[Part]:
    generate = config.generate
    if generate.is_served or generate.source == "dataset":
        return []
    width = _BYTES[generate.dtype]
    writer = size
    if generate.source == "teacher":
        writer = max(_teacher_sizes(config), key=lambda found: found.parameters, default=size)
    tokens = config.data.max_prompt_tokens + generate.max_new_tokens
    cache = 2 * width * writer.layers * writer.kv_width * generate.at_once * tokens
    return [
        Part("weights", width * writer.parameters),
        Part(f"KV cache of {generate.at_once} x {tokens:,} tokens", cache, elastic=True),
    ]


def trainer_bytes(config: RunConfig, size: ModelSize, *, is_cpu: bool) -> tuple[int, int]:
    """What the trainer holds always, and what a full row adds at its peak."""
    train, width = config.train, _BYTES[config.train.dtype]
    # One rank computes under autocast, unless `train.shard` says otherwise on a GPU.
    is_sharded = train.ranks > 1 or (train.shard != "auto" and not is_cpu)
    is_cast = train.dtype == "bfloat16" and is_sharded
    layer = (_KEPT_HIDDEN_CAST if is_cast else _KEPT_HIDDEN) * size.hidden
    layer += _KEPT_INTERMEDIATE * size.intermediate
    kept = width * size.layers * layer
    if train.activation_checkpointing is True:
        # Each layer's input, in float32 under autocast, and all of the one that is recomputed.
        kept = (width if is_cast else 4) * size.layers * size.hidden + width * layer
    # A chunk's logits (later their gradient) in the compute type; and the LM head's gradient, which
    # is made with the loss and waits for the rest.
    chunk = config.loss.chunk or chunk_for(size.vocabulary, is_cpu=is_cpu)
    logits = width * min(chunk, train.row_tokens) * size.vocabulary
    head = 0 if train.lora is not None else 4 * size.vocabulary * size.hidden
    # The backward pass scales a copy of that gradient when the logits are gone, except on a CPU
    # without ranks.
    copied = 0 if is_cpu and train.ranks == 1 else head
    row = train.row_tokens * kept + max(logits, copied) + head
    state = _STATE_BYTES[train.optimizer]
    if train.lora is not None:  # weights that stay as they are, and adapters beside them
        row += _gathered(train, size, is_cast)
        return width * size.parameters + state * _num_trained(config, size), row
    copy = 0 if train.dtype == "float32" else width * size.parameters
    if is_cast or train.ranks > 1:
        copy = _gathered(train, size, is_cast)
    return state * size.parameters, row + copy


def _gathered(train: TrainConfig, size: ModelSize, is_cast: bool) -> int:
    """The weights that a rank has gathered at once, in the compute type."""
    width = _BYTES[train.dtype]
    if train.ranks == 1 and not is_cast:
        return 0
    if train.ranks > 1 and train.shard == "optimizer":
        return width * size.parameters
    # Embeddings and LM head, counted once, and two layers: one computes, the next one is gathered.
    tables = size.vocabulary * size.hidden
    return width * (tables + 2 * max(0, size.parameters - tables) // max(1, size.layers))


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
    return sum(size.parameters for size in _teacher_sizes(config))


def _teacher_sizes(config: RunConfig) -> list[ModelSize]:
    sizes = map(size_of, config.teacher_models.values())
    return [size for size in sizes if size is not None]


def away_bytes(config: RunConfig, size: ModelSize) -> int:
    """What a trainer keeps in main memory while others have its device: weights and moments."""
    if config.train.lora is None:
        return _SAVED_BYTES * size.parameters
    return _BYTES[config.train.dtype] * size.parameters + _SAVED_BYTES * _num_trained(config, size)


def device_bytes(device: str) -> tuple[int, int]:
    """Free and total memory of a device (of the machine, for the CPU and where it is shared)."""
    if is_gpu(device) and (asked := free_and_total(device)) is not None:
        return asked
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
