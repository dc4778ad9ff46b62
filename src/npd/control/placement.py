"""Starts the workers of a run, each with its threads, GPUs and servers; ranks as one worker.

On this machine each process sees the GPUs that `assign_gpus` gives it, and no others. On Ray the
cluster assigns them. Threads of one process (`runtime.kind: inline`) share the first GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from npd.config import RunConfig, ServedConfig, TeacherConfig
from npd.control.run_directory import OpenRun
from npd.data.inputs import for_workers
from npd.errors import ConfigError
from npd.runtime import Resources, Runtime, Worker
from npd.runtime.rank_group import RankGroup
from npd.text import counted
from npd.workers import Factory

Role: TypeAlias = Literal["generator", "scorer", "trainer"]
_SEES_NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True, slots=True)
class WorkerSet:
    """The generators, the scorers (none if nothing is scored) and the trainer of a run."""

    generators: tuple[Worker, ...]
    scorers: tuple[Worker, ...]
    trainer: Worker


def num_scorers(config: RunConfig) -> int:
    """The number of scorers: `score.workers`, one if only held-out text is scored, or none."""
    if config.needs_scores:
        return config.score.workers
    return 1 if config.teacher_models and config.eval.source != "none" else 0


def threads_per_worker(config: RunConfig) -> int:
    """CPU threads per worker: all cores if stages take turns, else half of them.

    Half for the trainer, and half for generators and scorers, each of which may use all of it: on a
    CPU training takes longest, and a worker on busy cores waits at every barrier.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if config.runtime.threads is not None:
        return config.runtime.threads
    return max(1, (cores or 1) // (2 if config.is_overlapped else 1))


def share_of_servers(config: RunConfig, role: str, index: int) -> RunConfig:
    """The config for worker `index` of a role, with only its own servers and GPUs.

    Each worker gets every `workers`-th server of `urls`, so that no two workers manage the same
    server. `admin_urls` are not divided: with them there is only one worker.
    """
    if role not in ("generator", "scorer"):
        return config
    name = "generate" if role == "generator" else "score"
    section = config.generate if role == "generator" else config.score

    def own(servers: ServedConfig | TeacherConfig) -> dict[str, object]:
        launch = servers.launch
        if launch is not None:
            launch = launch.model_copy(update={"gpus": launch.gpus[index : index + 1]})
        return {"urls": servers.urls[index :: section.workers], "launch": launch}

    teachers = {n: t.model_copy(update=own(t)) for n, t in config.teachers.items()}
    update = {name: section.model_copy(update=own(section)), "teachers": teachers}
    return config.model_copy(update=update)


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(part.strip() for part in visible.split(",") if part.strip())
    import torch

    return tuple(map(str, range(torch.cuda.device_count())))


def check_gpus(config: RunConfig) -> str:
    """Check that the GPUs that a config names are there.

    Raises:
        ConfigError: one is not.
    """
    if config.runtime.kind != "local" or config.runtime.device not in ("auto", "cuda"):
        return "the GPUs named are of no use here"
    seen = visible_gpus()
    named = {
        "train": config.train.gpus, "score": config.score.gpus, "generate": config.generate.gpus
    }  # fmt: skip
    for name, indices in named.items():
        missing = [index for index in indices if index >= len(seen)]
        if missing:
            has = f"{counted(len(seen), 'GPU')}, numbered from 0" if seen else "none"
            raise ConfigError(
                f"{name}.gpus names GPU {missing[0]}, but npd sees {has}: correct it, or leave it "
                "out to have GPUs assigned"
            )
    return "the GPUs named are there"


def assign_gpus(config: RunConfig, gpus: Sequence[str]) -> dict[str, str]:
    """The CUDA_VISIBLE_DEVICES of each local process that needs a GPU, by its name.

    The trainer comes first and shares its GPUs last: scorers, then generators, take the others in
    turn, and the trainer's too only if there are no others. `train.gpus`, `score.gpus` and
    `generate.gpus` (indices into `gpus`) override this. Ranks never share a GPU; one for which
    there is none sees none. A server that npd starts is on its worker's GPUs, unless its
    `launch.gpus` names others.
    """
    if config.runtime.kind != "local" or not gpus or config.runtime.device.startswith("cuda:"):
        return {}
    own = {
        "trainer": config.train.gpus,
        "scorer": config.score.gpus,
        "generator": config.generate.gpus,
    }
    named = {index for indices in own.values() for index in indices}
    every = range(len(gpus))
    free = [index for index in every if index not in named] or [*every]
    trainers = _Turns(own["trainer"] or free)
    placed = {name: trainers.take(1, alone=True) for name in _trainer_names(config)}
    held = {index for indices in placed.values() for index in indices}
    others = [index for index in free if index not in held]
    others = others or [index for index in every if index not in held]
    shared = _Turns(others or every)
    for role, names, count in _others(config):
        is_alone = role == "scorer" and config.score.ranks > 1
        turns = shared if others or not is_alone else _Turns(())
        turns = _Turns(own[role]) if own[role] else turns
        placed |= {name: turns.take(count, alone=is_alone) for name in names}
    return {
        name: ",".join(gpus[index] for index in indices if index < len(gpus))
        for name, indices in placed.items()
    }


class _Turns:
    """Indices of GPUs, given out in turn: each once, then from the first again unless `alone`."""

    def __init__(self, indices: Sequence[int]) -> None:
        self._indices, self._given = list(indices), 0

    def take(self, count: int, *, alone: bool) -> list[int]:
        places = range(self._given, self._given + count)
        self._given += count
        if alone:
            return [self._indices[place] for place in places if place < len(self._indices)]
        size = len(self._indices)
        return sorted({self._indices[place % size] for place in places}) if size else []


def _trainer_names(config: RunConfig) -> list[str]:
    ranks = config.train.ranks
    return ["trainer"] if ranks == 1 else [f"trainer-{rank}" for rank in range(ranks)]


def _others(config: RunConfig) -> Iterator[tuple[Role, list[str], int]]:
    """Role, process names, and GPUs a process, of scorers and generators that need a GPU."""
    generate, score, ranks = config.generate, config.score, config.score.ranks
    launches = {where: launch for where, launch in config.launches.items() if not launch.gpus}
    widths = [n.tensor_parallel for where, n in launches.items() if where != "generate"]
    reads_here = not score.is_served or config.needs_ifd or config.needs_student_pass
    scorers = [f"scorer-{index}" for index in range(num_scorers(config))]
    if ranks > 1:
        yield "scorer", [f"{name}-{rank}" for name in scorers for rank in range(ranks)], 1
    elif reads_here or widths:
        yield "scorer", scorers, max([1, *widths])
    launch = launches.get("generate")
    if generate.source != "dataset" and (launch is not None or not generate.is_served):
        count = 1 if launch is None else launch.tensor_parallel
        yield "generator", [f"generator-{index}" for index in range(generate.workers)], count


def resources_for(config: RunConfig, role: Role) -> Resources:
    """The resources of one worker on a cluster: a GPU if it holds a model and a GPU exists."""
    if role in config.runtime.ray.gpus:
        return Resources(config.runtime.ray.gpus[role])
    is_on_servers = {
        "generator": bool(config.generate.urls) or config.generate.source == "dataset",
        "scorer": bool(config.score.urls) and not (config.needs_ifd or config.needs_student_pass),
        "trainer": False,
    }
    return Resources(0.0 if is_on_servers[role] or config.runtime.device == "cpu" else None)


def start_ranks(
    config: RunConfig,
    runtime: Runtime,
    name: str,
    factory: Callable[[], object],
    root: Path,
    *,
    ranks: int,
    needs: Resources,
) -> Worker:
    """A worker; with several `ranks` a group that shares its threads and has one GPU per rank."""
    threads, gpus = threads_per_worker(config), _environments(config)
    if ranks == 1:
        given = gpus.get(name)
        return runtime.spawn(name, factory, threads=threads, environment=given, needs=needs)
    is_on_cpu = config.runtime.device == "cpu"
    each = threads if config.runtime.threads is not None else max(1, threads // ranks)
    workers = [
        runtime.spawn(
            f"{name}-{rank}",
            factory,
            threads=each,
            environment=gpus.get(f"{name}-{rank}", _SEES_NO_GPU if is_on_cpu else None),
            needs=replace(needs, team=name, size=ranks),
        )
        for rank in range(ranks)
    ]
    return RankGroup(name, workers, None if config.runtime.kind == "ray" else root / "meeting")


def start_generators(run: OpenRun, runtime: Runtime) -> tuple[Worker, ...]:
    """The workers that generate. Every worker loads its models at its first call."""
    count = run.config.generate.workers
    return tuple(_start(run, runtime, f"generator-{i}", "generator", i) for i in range(count))


def start_scorers(run: OpenRun, runtime: Runtime) -> tuple[Worker, ...]:
    """The workers that score, each of `score.ranks` processes; none if nothing is scored."""
    count = num_scorers(run.config)
    return tuple(_start(run, runtime, f"scorer-{i}", "scorer", i) for i in range(count))


def start_trainer(run: OpenRun, runtime: Runtime) -> Worker:
    """The worker that trains, of `train.ranks` processes."""
    return _start(run, runtime, "trainer", "trainer")


def _start(run: OpenRun, runtime: Runtime, name: str, role: Role, index: int = 0) -> Worker:
    config, root = for_workers(run.config, run.inputs), run.layout.root
    ranks = {"trainer": config.train.ranks, "scorer": config.score.ranks}.get(role, 1)
    return start_ranks(
        config,
        runtime,
        name,
        Factory(role, share_of_servers(config, role, index), root, run.models),
        root,
        ranks=ranks,
        needs=resources_for(config, role),
    )


def _environments(config: RunConfig) -> dict[str, dict[str, str]]:
    """The environment variables that give each local process its GPUs."""
    if config.runtime.kind != "local" or config.runtime.device == "cpu":
        return {}
    placed = assign_gpus(config, visible_gpus())
    return {name: {"CUDA_VISIBLE_DEVICES": gpus} for name, gpus in placed.items()}
