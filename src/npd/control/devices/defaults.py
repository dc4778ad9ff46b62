"""What `auto` comes to where devices and the forecast of memory decide.

Decided once, before a run starts; config.json records it, and a resumed run keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from npd.config import RunConfig
from npd.config.sections import SCORE_SIZES, SIZES_ON_CPU, ScoreSizes, chunk_for
from npd.control.devices.memory import (
    SERVER,
    Gpu,
    Part,
    at_once,
    gpus_here,
    has_room,
    needed,
    on_gpu,
    on_gpus,
    processes_by_gpu,
    scorer_parts,
    trainer_parts,
)
from npd.control.devices.placement import roles_with_models, visible_gpus
from npd.control.devices.server_memory import is_decided_here, need_of, servers_on, shares_beside
from npd.errors import ConfigError
from npd.models.metadata import GIB, ModelSize, size_of

# The share of the usual chunk that the loss takes where memory is short: a fourth.
_FEWER = 4


class _Choice(NamedTuple):
    """What `auto` comes to; a `chunk` of None is the loss's usual one."""

    recomputes: bool
    chunk: int | None
    sizes: ScoreSizes


_Places = Sequence[tuple[Gpu, dict[str, list[Part]]]]


def with_defaults(
    config: RunConfig, gpus: Sequence[Gpu] | None = None, *, alone: str = ""
) -> RunConfig:
    """The config with `auto` decided. Raises nothing.

    Models that all have the same one GPU share it in phases, if the window is all prompts or if
    they do not fit together. Of the sizes that fit the GPUs it takes what costs the least time:
    large rows of the scorer and chunks of the loss, activations that are kept. Without knowing it
    takes that too; on Ray each scorer decides by its own device. A server beside others takes what
    they leave (`launch.memory`). `gpus` as for `npd.doctor.memory.memory_checks`. `alone`,
    `trainer` or `scorer`: it is one process, on the first GPU, with nothing beside it.
    """
    is_filled = _filled(config, _Choice(False, None, SIZES_ON_CPU)) is config and config.loss.chunk
    is_asked = config.runtime.share == "auto" or any(map(is_decided_here, config.launches.values()))
    if is_filled and not is_asked:
        return config
    if config.runtime.kind == "ray" and not alone:
        together = _with_share(config, "together")
        return _filled(together, _Choice(False, None, SIZES_ON_CPU), is_on_ray=True)
    gpus, size = gpus_here(config) if gpus is None else gpus, size_of(config.student)
    if config.runtime.share == "auto":
        is_phased = not alone and _wants_phases(config, gpus, size)
        config = _with_share(config, "phases" if is_phased else "together")
    is_cpu = gpus is not None and not gpus
    if size is None or not gpus:
        sizes = SIZES_ON_CPU if is_cpu else _score_ladder(config)[0]
        return _filled(config, _Choice(False, None, sizes))
    config = _that_fits(config, size, gpus, alone)
    return config if alone else _with_shares(config, size, gpus)


def _with_share(config: RunConfig, share: str) -> RunConfig:
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"share": share})})


def _wants_phases(config: RunConfig, gpus: Sequence[Gpu] | None, size: ModelSize | None) -> bool:
    """Whether all models are on one GPU, and should take turns there."""
    names = visible_gpus(config.runtime.device) if gpus is None else [gpu.name for gpu in gpus]
    has_one = len(processes_by_gpu(config, names) if names else ()) == 1
    roles = roles_with_models(config)
    is_here = "generator" in roles or config.generate.source == "dataset"
    is_possible = (
        *(has_one, is_here, len(roles) > 1, config.train.ranks == config.score.ranks == 1),
        not any(launch.gpus for launch in config.launches.values()),
        *(config.schedule.overlap is not True, config.schedule.refresh.in_flight == "finish"),
    )
    if not all(is_possible):
        return False
    if config.schedule.window == "all" or size is None or gpus is None:
        return True
    least = _filled(config, _Choice(True, _fewer(size), _score_ladder(config)[-1]))
    return not all(has_room(least, gpu, here) for gpu, here in on_gpus(least, size, gpus))


def _that_fits(config: RunConfig, size: ModelSize, gpus: Sequence[Gpu], alone: str) -> RunConfig:
    """The first choice that the trainer's GPUs have room for; then the scorers' alone, if less."""

    def fits(choice: _Choice, role: str) -> bool:
        places = _places(_filled(config, choice), size, gpus, alone)
        return all(has_room(config, gpu, here, role) for gpu, here in places)

    ladder = _score_ladder(config)
    fewer = _fewer(size)
    choices = [
        _Choice(recomputes, chunk, sizes)
        for recomputes in (False, True)
        for chunk in (None, fewer)
        for sizes in (ladder if _is_shared(_places(config, size, gpus, alone)) else ladder[:1])
    ]
    choice = next((c for c in choices if fits(c, "trainer")), choices[-1])
    smaller = [choice._replace(sizes=sizes) for sizes in ladder if sizes <= choice.sizes]
    return _filled(config, next((c for c in smaller if fits(c, "scorer")), smaller[-1]))


def _fewer(size: ModelSize) -> int:
    """The loss's chunk where memory is short."""
    return max(1, chunk_for(size.vocabulary, is_cpu=False) // _FEWER)


def _is_shared(places: _Places) -> bool:
    """Whether a trainer and a scorer are on one GPU."""
    roles = [{name.partition("-")[0] for name in here} for _, here in places]
    return any({"trainer", "scorer"} <= on for on in roles)


def _places(config: RunConfig, size: ModelSize, gpus: Sequence[Gpu], alone: str) -> _Places:
    if not alone:
        return [*on_gpus(config, size, gpus)]
    section = getattr(config, "train" if alone == "trainer" else "score")
    lone = section.model_copy(update={"ranks": 1})
    if alone == "trainer":
        config = config.model_copy(update={"train": lone})
        return [(gpus[0], {alone: trainer_parts(config, size, is_first=True)})]
    config = config.model_copy(update={"score": lone})
    return [(gpus[0], {alone: scorer_parts(config, size)})]


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


def _with_shares(config: RunConfig, size: ModelSize, gpus: Sequence[Gpu]) -> RunConfig:
    """The config, each server that shares its GPUs having what others leave on the fullest."""
    found: dict[str, list[float | None]] = {}
    on = processes_by_gpu(config, [gpu.name for gpu in gpus])
    for gpu in gpus:
        for where, share in _shares_on(config, size, gpu, on.get(gpu.name, [])).items():
            found.setdefault(where, []).append(share)
    least = {w: min(s) for w, each in found.items() if (s := [*filter(None, each)]) == each}
    return config.with_launches({where: {"memory": share} for where, share in least.items()})


def _shares_on(
    config: RunConfig, size: ModelSize, gpu: Gpu, names: Sequence[str]
) -> dict[str, float | None]:
    """The share of a GPU for each section whose servers npd bounds there; None: nothing is left."""
    here = on_gpu(config, size, gpu, names)
    own = {where for where, launch in config.launches.items() if is_decided_here(launch)}
    free = gpu.total if gpu.free is None else gpu.free
    found: dict[str, float | None] = {}
    for now in at_once(config, here):
        counts = {w: servers_on(config, w, gpu.name, names) for w in own if f"{w}{SERVER}" in now}
        others = {n: parts for n, parts in now.items() if n.removesuffix(SERVER) not in own}
        is_alone = not others and sum(counts.values()) == 1 and not config.has_phases
        if not counts or is_alone:
            continue
        elastic = sum(part.bytes for parts in others.values() for part in parts if part.elastic)
        taken = needed(others, here)
        found |= shares_beside(
            config, counts, total=gpu.total, free=free, taken=taken, elastic=elastic
        )
    return found


def check_servers(config: RunConfig) -> None:
    """Check that servers which share their GPUs have room there, as far as the forecast goes.

    Raises:
        ConfigError: nothing is left for one.
    """
    size = size_of(config.student)
    if size is None or config.runtime.kind == "ray" or not config.launches:
        return
    gpus = gpus_here(config) or ()
    on = processes_by_gpu(config, [gpu.name for gpu in gpus])
    for gpu in gpus:
        for where, share in _shares_on(config, size, gpu, on.get(gpu.name, [])).items():
            if share is None:
                least = need_of(config, where).least / GIB
                beside = ", ".join(_beside(config, where, on.get(gpu.name, [])))
                raise ConfigError(
                    f"GPU {gpu.name} ({gpu.total / GIB:,.1f} GiB) has no room for {where}'s "
                    f"server, which needs {least:,.1f} GiB, beside {beside}: name another in "
                    f"{where}.launch.gpus, set {where}.launch.memory, or take smaller models"
                )


def _beside(config: RunConfig, where: str, names: Sequence[str]) -> list[str]:
    """What else is on a server's GPU: npd's processes there, and servers."""
    servers = [f"{other}{SERVER}" for other in config.launches if other != where]
    return [*names, *(servers if not names else [])]


def chosen(asked: RunConfig, config: RunConfig) -> tuple[str, ...]:
    """What to say of `auto` where it became something else than usual."""
    found = []
    if asked.runtime.share == "auto" and config.has_phases:
        found.append(
            "generators, scorers and trainer have their models on the GPU in turn "
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
    for where, launch in config.launches.items():
        if launch.memory != asked.launches[where].memory:
            found.append(
                f"{where}'s server takes {launch.memory:.0%} of its GPU's memory, which it shares "
                f"with other processes ({where}.launch.memory: auto)"
            )
    return tuple(found)
