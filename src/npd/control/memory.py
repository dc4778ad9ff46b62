"""How much memory a run takes, by process and device, beside what the machine has.

The forecast is rough: allocators, kernels and other architectures differ by tens of per cent. On
GPUs it is one for each, of the processes that `npd.control.placement` puts there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from npd.config import LaunchConfig, RunConfig, ServedConfig, TeacherConfig, TrainConfig
from npd.config.sections import SCORE_SIZES, SIZES_ON_CPU, SIZES_ON_GPU, ScoreSizes, chunk_for
from npd.control.placement import (
    assign_gpus,
    is_given_to_server,
    num_scorers,
    trainer_names,
    visible_gpus,
)
from npd.errors import InputError
from npd.models.device import CUDA, driver_gpus, free_and_total, is_gpu, kind_of, resolve_device
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
# Values of size `hidden` and `intermediate` that a token of a prefill has in its layer at once.
_READ_HIDDEN, _READ_INTERMEDIATE = 4, 3
# The share of the usual chunk that the loss takes where memory is short: a fourth.
_FEWER = 4
# What a process holds on a GPU besides its tensors: a context, kernels, the allocator's slack.
_CONTEXT_BYTES = GIB // 2
# vLLM's share of a GPU unless --gpu-memory-utilization says otherwise.
_SERVER_SHARE = 0.9
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


class _Choice(NamedTuple):
    """What `auto` comes to; a `chunk` of None is the loss's usual one."""

    recomputes: bool
    chunk: int | None
    sizes: ScoreSizes


_Places = Sequence[tuple[Gpu, dict[str, list[Part]]]]


def with_defaults(
    config: RunConfig, gpus: Sequence[Gpu] | None = None, *, alone: str = ""
) -> RunConfig:
    """The config with `auto` decided, where devices and the forecast decide. Raises nothing.

    `runtime.share` is `phases` if all models of the run are on one GPU. Of the sizes that fit the
    GPUs it takes what costs the least time: large rows of the scorer and chunks of the loss,
    activations that are kept. Without knowing it takes that too; on Ray each scorer decides by its
    own device. `gpus` as for `memory_checks`. `alone`, `trainer` or `scorer`: it is one process, on
    the first GPU, with nothing beside it.
    """
    is_decided = _filled(config, _Choice(False, None, SIZES_ON_CPU)) is config and config.loss.chunk
    if is_decided and config.runtime.share != "auto":
        return config
    if config.runtime.kind == "ray" and not alone:
        config = _with_share(config, ())
        return _filled(config, _Choice(False, None, SIZES_ON_CPU), is_on_ray=True)
    gpus = gpus_here(config) if gpus is None else gpus
    config = _with_share(config, () if alone else gpus or ())
    is_cpu, size = gpus is not None and not gpus, size_of(config.student)
    usual = _Choice(False, None, SIZES_ON_CPU if is_cpu else _score_ladder(config)[0])
    if size is None or not gpus:
        return _filled(config, usual)
    return _that_fits(config, size, gpus, alone)


def _that_fits(config: RunConfig, size: ModelSize, gpus: Sequence[Gpu], alone: str) -> RunConfig:
    """The first choice that the trainer's GPUs have room for; then the scorers' alone, if less."""

    def has_room(choice: _Choice, role: str) -> bool:
        places = _places(_filled(config, choice), size, gpus, alone)
        of_role = [(gpu, on) for gpu, on in places if any(name.startswith(role) for name in on)]
        return all(_has_room(config, gpu, on) for gpu, on in of_role)

    ladder = _score_ladder(config)
    fewer = max(1, chunk_for(size.vocabulary, is_cpu=False) // _FEWER)
    choices = [
        _Choice(recomputes, chunk, sizes)
        for recomputes in (False, True)
        for chunk in (None, fewer)
        for sizes in (ladder if _is_shared(_places(config, size, gpus, alone)) else ladder[:1])
    ]
    choice = next((c for c in choices if has_room(c, "trainer")), choices[-1])
    smaller = [choice._replace(sizes=sizes) for sizes in ladder if sizes <= choice.sizes]
    return _filled(config, next((c for c in smaller if has_room(c, "scorer")), smaller[-1]))


def _is_shared(places: _Places) -> bool:
    """Whether a trainer and a scorer are on one GPU."""
    roles = [{name.partition("-")[0] for name in here} for _, here in places]
    return any({"trainer", "scorer"} <= on for on in roles)


def _places(config: RunConfig, size: ModelSize, gpus: Sequence[Gpu], alone: str) -> _Places:
    if not alone:
        return [*_on_gpus(config, size, gpus)]
    section = getattr(config, "train" if alone == "trainer" else "score")
    lone = section.model_copy(update={"ranks": 1})
    if alone == "trainer":
        config = config.model_copy(update={"train": lone})
        return [(gpus[0], {alone: _trainer_parts(config, size, is_first=True)})]
    config = config.model_copy(update={"score": lone})
    return [(gpus[0], {alone: _scorer_parts(config, size)})]


def _score_ladder(config: RunConfig) -> tuple[ScoreSizes, ...]:
    """The scorer's sizes, largest first, that `auto` may come to on a GPU.

    Where rows bound the data's completions, what is too long must not depend on the device.
    """
    bounds = config.generate.source == "dataset" and config.data.max_completion_tokens is None
    if config.score.is_served:
        return (SIZES_ON_CPU,)
    if bounds and config.score.row_tokens == "auto":
        return tuple(sizes._replace(row_tokens=SIZES_ON_CPU.row_tokens) for sizes in SCORE_SIZES)
    return SCORE_SIZES


def _filled(config: RunConfig, choice: _Choice, *, is_on_ray: bool = False) -> RunConfig:
    """The config with `choice` in place of what is `auto`; itself if nothing is."""
    train, score, loss = config.train, config.score, config.loss
    if train.activation_checkpointing == "auto":
        train = train.model_copy(update={"activation_checkpointing": choice.recomputes})
    if choice.chunk is not None and loss.chunk is None and loss.impl != "reference":
        loss = loss.model_copy(update={"chunk": choice.chunk})
    if not is_on_ray or score.is_served:
        score = score.with_sizes(choice.sizes)
    if train is config.train and score is config.score and loss is config.loss:
        return config
    return config.model_copy(update={"train": train, "score": score, "loss": loss})


def _with_share(config: RunConfig, gpus: Sequence[Gpu]) -> RunConfig:
    """The config with `runtime.share` decided: where every model is on one GPU, it is `phases`."""
    if config.runtime.share != "auto":
        return config
    names = processes_by_gpu(config, [gpu.name for gpu in gpus]) if gpus else {}
    roles = {_role_of(name) for here in names.values() for name in here}
    has_one = len(names) == 1 and len(roles) > 1 and config.train.ranks == config.score.ranks == 1
    servers: list[ServedConfig | TeacherConfig] = [config.generate, config.score]
    servers += config.teachers.values()
    is_elsewhere = config.runtime.kind == "ray" or any(
        server.urls or (server.launch is not None and server.launch.gpus) for server in servers
    )
    is_phased = has_one and not is_elsewhere and config.schedule.overlap is not True
    share = "phases" if is_phased else "together"
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"share": share})})


def chosen(asked: RunConfig, config: RunConfig) -> tuple[str, ...]:
    """What to say of `auto` where it became something else than usual."""
    found = []
    if asked.runtime.share == "auto" and config.has_phases:
        found.append(
            "generation, scoring and training take turns, because they have one GPU "
            "(runtime.share: auto)"
        )
    was, now = (c.train.activation_checkpointing for c in (asked, config))
    if was == "auto" and now is True:
        found.append(
            "activations are recomputed in the backward pass, because a full row would not fit the "
            "trainer's GPU (train.activation_checkpointing: auto)"
        )
    if asked.loss.chunk is None and config.loss.chunk is not None:
        found.append(
            f"the loss takes {config.loss.chunk:,} tokens at once, because more would not fit the "
            "trainer's GPU (loss.chunk: null)"
        )
    return tuple(found)


def memory_checks(config: RunConfig, gpus: Sequence[Gpu] | None = None) -> Iterator[Check]:
    """The forecast beside what the devices have: one check for each GPU, or one for the machine.

    `gpus` are those of another machine (None: of this one).
    """
    size = size_of(config.student)
    if size is None:
        yield Check.warn("memory", f"{config.student} is no directory here: its size is not known")
        return
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
            yield _gpu_check(config, gpu, here)
    else:
        yield _cpu_memory(config, size)


def _cpu_memory(config: RunConfig, size: ModelSize) -> Check:
    state, row = trainer_bytes(config, size, is_cpu=True)
    row += heap_bytes(config, size, "cpu")
    state, row = over_ranks(config.train, "cpu", size, state, row)
    beside = other_bytes(config, size)
    needed, (free, total) = state + row + beside, device_bytes("cpu")
    says = (
        f"trainer about {_gib(state)} GiB (weights, gradients, AdamW) + {_gib(row)} (a row of "
        f"{config.train.row_tokens:,} tokens), models beside it {_gib(beside)}; "
        f"cpu has {_gib(free)} free of {_gib(total)}"
    )
    if state > total:
        return Check.fail("memory", f"{says}: the student does not fit, take a smaller one")
    if needed > free:
        return Check.warn("memory", f"{says}: {_SMALLER['row']}")
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


def _needed(config: RunConfig, here: Mapping[str, Sequence[Part]]) -> int:
    """What processes on a GPU take at once: all of them, or in phases one role's."""
    own = [name for name in here if not name.endswith(_SERVER)]
    return _CONTEXT_BYTES * len(own) + sum(part.bytes for part in _at_once(config, here))


def _at_once(config: RunConfig, here: Mapping[str, Sequence[Part]]) -> list[Part]:
    """The parts that a GPU holds at the same time: in phases those of the largest role."""
    roles: dict[str, list[Part]] = {}
    for name, parts in here.items():
        roles.setdefault(_role_of(name) if config.has_phases else "", []).extend(parts)
    return max(roles.values(), key=lambda parts: sum(part.bytes for part in parts))


def _role_of(name: str) -> str:
    """The role of a process or server on a GPU."""
    role = name.removesuffix(_SERVER)
    return {"generate": "generator"}.get(role, role.partition("-")[0])


def _has_room(config: RunConfig, gpu: Gpu, here: Mapping[str, Sequence[Part]]) -> bool:
    return _needed(config, here) <= (gpu.total if gpu.free is None else gpu.free)


def _gpu_check(config: RunConfig, gpu: Gpu, here: Mapping[str, Sequence[Part]]) -> Check:
    needed = _needed(config, here)
    listed = "; ".join(
        f"{name} {' + '.join(f'{_gib(part.bytes)} ({part.what})' for part in parts)}"
        for name, parts in here.items()
    )
    has = f"{_gib(gpu.total)} GiB"
    if gpu.free is not None:
        has = f"{_gib(gpu.free)} GiB free of {_gib(gpu.total)}"
    at_a_time = " at a time" if config.has_phases and len(here) > 1 else ""
    says = f"GPU {gpu.name}: {listed}; {_gib(needed)} GiB{at_a_time} of {has}"
    if _has_room(config, gpu, here):
        return Check.ok("memory", says)
    elastic = [part for part in _at_once(config, here) if part.elastic]
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
    "prefill": "lower score.row_tokens, or give scorers a GPU of their own (score.gpus)",
    "logits": "lower score.head_chunk, or give scorers a GPU of their own (score.gpus)",
}


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
    # The backward pass scales a copy of that gradient when the logits are gone, except on a CPU
    # without ranks.
    copied = 0 if is_cpu and train.ranks == 1 else head
    row = train.row_tokens * kept + max(logits, copied) + head
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


def _gib(count: int) -> str:
    return f"{count / GIB:,.1f}"
