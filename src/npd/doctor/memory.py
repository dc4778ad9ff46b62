"""The forecast of memory as checks: one for each GPU, or one for the machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from npd.config import RunConfig
from npd.control.devices.defaults import with_defaults
from npd.control.devices.memory import (
    SERVER,
    Gpu,
    Part,
    at_once,
    away_bytes,
    copy_bytes,
    device_bytes,
    gpus_here,
    has_room,
    heap_bytes,
    needed,
    on_gpus,
    other_bytes,
    over_ranks,
    processes_by_gpu,
    trainer_bytes,
)
from npd.control.devices.server_memory import blind_checks
from npd.models.metadata import GIB, ModelSize, size_of
from npd.types import Check


def memory_checks(config: RunConfig, gpus: Sequence[Gpu] | None = None) -> Iterator[Check]:
    """The forecast beside what the devices have: one check for each GPU, or one for the machine.

    `gpus` are those of another machine (None: of this one).
    """
    size = size_of(config.student)
    if size is None:
        yield Check.warn("memory", f"{config.student} is no directory here: its size is not known")
        if config.runtime.kind != "ray" and config.runtime.device != "cpu":
            gpus = gpus_here(config) if gpus is None else gpus
            on = processes_by_gpu(config, [gpu.name for gpu in gpus or ()])
            yield from blind_checks(config, on)
        return
    if config.runtime.device == "cpu":
        gpus = ()
    is_here = gpus is None
    gpus = gpus_here(config, may_open=True) if gpus is None else gpus
    config = with_defaults(config, gpus)
    if config.runtime.kind == "ray":
        yield _on_cluster(config, size)
    elif gpus is None:
        yield Check.warn("memory", "how much the GPUs have is not known: nothing is forecast")
    elif gpus:
        for gpu, here in on_gpus(config, size, gpus):
            yield _gpu_check(config, gpu, here)
        if is_here:
            yield host_check(config, size)
    else:
        yield _cpu_memory(config, size)


def _cpu_memory(config: RunConfig, size: ModelSize) -> Check:
    state, row = trainer_bytes(config, size, is_cpu=True)
    row += heap_bytes(config, size, "cpu")
    state, row = over_ranks(config.train, "cpu", size, state, row)
    beside, copy = other_bytes(config, size), copy_bytes(config, size)
    total_needed, (free, total) = state + row + copy + beside, device_bytes("cpu")
    says = (
        f"trainer about {_gib(state)} GiB (weights, gradients, AdamW) + {_gib(row)} (a row of "
        f"{config.train.row_tokens:,} tokens) + {_gib(copy)} (a checkpoint's copy), models beside "
        f"it {_gib(beside)}; cpu has {_gib(free)} free of {_gib(total)}"
    )
    if state > total:
        return Check.fail("memory", f"{says}: the student does not fit, take a smaller one")
    if total_needed > free:
        return Check.warn("memory", f"{says}: {_SMALLER['row'][0]}")
    return Check.ok("memory", says)


def _on_cluster(config: RunConfig, size: ModelSize) -> Check:
    state, row = trainer_bytes(config, size, is_cpu=config.runtime.device == "cpu")
    return Check.warn(
        "memory",
        f"trainer about {_gib(state)} GiB (weights, gradients, AdamW) + {_gib(row)} (a row of "
        f"{config.train.row_tokens:,} tokens): which machine of the cluster it will be on is not "
        "known",
    )


def _gpu_check(config: RunConfig, gpu: Gpu, here: Mapping[str, Sequence[Part]]) -> Check:
    listed = "; ".join(
        f"{name} {' + '.join(f'{_gib(part.bytes)} ({part.what})' for part in parts)}"
        for name, parts in here.items()
    )
    has = f"{_gib(gpu.total)} GiB"
    if gpu.free is not None:
        has = f"{_gib(gpu.free)} GiB free of {_gib(gpu.total)}"
    turns = sorted(at_once(config, here), key=lambda now: needed(now, here), reverse=True)
    at_a_time = " at a time" if len(turns) > 1 else ""
    says = f"GPU {gpu.name}: {listed}; {_gib(needed(turns[0], here))} GiB{at_a_time} of {has}"
    if has_room(config, gpu, here):
        return Check.ok("memory", says)
    for now in turns:
        elastic = sum(p.bytes for parts in now.values() for p in parts if p.elastic)
        if needed(now, here) - elastic > gpu.total:
            return Check.fail("memory", f"{says}: {_remedy(now)}")
    elastic_parts = [part for parts in turns[0].values() for part in parts if part.elastic]
    if not elastic_parts:
        return Check.warn("memory", f"{says}: {_remedy(turns[0])}")
    largest = max(elastic_parts, key=lambda part: part.bytes)
    return Check.warn("memory", f"{says}: {_smaller(largest, is_alone=len(turns) > 1)}")


def _remedy(now: Mapping[str, Sequence[Part]]) -> str:
    """What helps where parts that cannot be made smaller are too large."""
    if any(name.endswith(SERVER) for name in now):
        return "bound the server's share (launch.memory), or name a GPU for it alone (launch.gpus)"
    if len(now) > 1:
        return "give its processes GPUs of their own (score.gpus, generate.gpus), or smaller models"
    if any(name.startswith("trainer") for name in now):
        return (
            "take a smaller student, train adapters (train.lora), or raise train.ranks to share it "
            "over GPUs"
        )
    return "take a smaller model, or raise score.ranks to share a teacher over GPUs"


# What makes an elastic part smaller, by its first word: by itself, and beside others.
_SMALLER = {
    "row": (
        "set train.activation_checkpointing: true, or lower train.row_tokens or loss.chunk",
        "",
    ),
    "KV": ("lower generate.batch_size", "give generators a GPU of their own (generate.gpus)"),
    "logits": ("lower score.head_chunk", "give scorers a GPU of their own (score.gpus)"),
    "prefill": ("lower score.row_tokens", "give scorers a GPU of their own (score.gpus)"),
}


def _smaller(part: Part, *, is_alone: bool) -> str:
    alone, beside = _SMALLER[part.what.split()[0]]
    return alone if is_alone or not beside else f"{alone}, or {beside}"


def host_check(config: RunConfig, size: ModelSize) -> Check:
    """What a trainer on a GPU keeps in main memory."""
    copy, away = copy_bytes(config, size), 0
    says = f"main memory: {_gib(copy)} GiB (a checkpoint's copy)"
    if config.has_phases:
        away = away_bytes(config, size)
        says += f" + {_gib(away)} (the student and its moments, while others have the GPU)"
    free, total = device_bytes("cpu")
    says += f" of {_gib(free)} GiB free of {_gib(total)}"
    if copy + away <= free:
        return Check.ok("memory", says)
    return Check.warn("memory", f"{says}: take a machine with more, or train.lora")


def _gib(count: int) -> str:
    return f"{count / GIB:,.1f}"
