"""Starts the workers of a run, each with its threads, GPUs and servers; ranks as one worker.

On this machine each process sees the GPUs that `assign_gpus` gives it, and no others. On Ray the
cluster assigns them. Threads of one process (`runtime.kind: inline`) share the first GPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from npd.config import LaunchConfig, RunConfig, ServedConfig, TeacherConfig
from npd.control.run_directory import OpenRun
from npd.data.inputs import for_workers
from npd.errors import ConfigError
from npd.models.device import CUDA, num_gpus, seeing, visible_names
from npd.runtime import Resources, Runtime, Worker
from npd.runtime.rank_group import RankGroup
from npd.text import counted
from npd.workers import Factory

Role: TypeAlias = Literal["generator", "scorer", "trainer"]


@dataclass(frozen=True, slots=True)
class WorkerSet:
    """The generators, the scorers (none if nothing is scored) and the trainer of a run."""

    generators: tuple[Worker, ...]
    scorers: tuple[Worker, ...]
    trainer: Worker


def with_models(workers: WorkerSet, config: RunConfig) -> WorkerSet:
    """The workers that have models on this machine's devices; the trainer is one of them."""
    holds = "generator" in roles_with_models(config)
    return replace(workers, generators=workers.generators if holds else ())


def roles_with_models(config: RunConfig) -> set[Role]:
    """The roles that hold models, or start servers that do, for the length of a run."""
    generate, score = config.generate, config.score
    roles: set[Role] = {"trainer"}
    writers: list[ServedConfig | TeacherConfig] = [generate]
    if generate.source == "teacher":
        writers += config.teachers.values()
    if generate.source != "dataset" and not any(writer.urls for writer in writers):
        roles.add("generator")
    reads_student = config.needs_ifd or config.needs_student_pass
    readers: list[ServedConfig | TeacherConfig] = [score, *config.teachers.values()]
    if config.needs_scores and (reads_student or not any(reader.urls for reader in readers)):
        roles.add("scorer")
    return roles


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


def visible_gpus(device: str = "auto") -> tuple[str, ...]:
    """Those of `visible_names` that are there: CUDA ignores all from the first wrong one on."""
    return visible_names(device)[: num_gpus(device)]


def check_gpus(config: RunConfig, gpus: Sequence[str] | None = None) -> str:
    """Check that the GPUs that a config names are there, and that there is one for each rank.

    `gpus` are those of another machine (None: those that this process sees).

    Raises:
        ConfigError: one is missing.
    """
    if not config.runtime.assigns_gpus:
        return "no GPUs are assigned here"
    seen = visible_gpus(config.runtime.device) if gpus is None else gpus
    has = f"{counted(len(seen), 'GPU')}, numbered from 0" if len(seen) else "none"
    for section, indices in config.named_gpus.items():
        missing = [index for index in indices if index >= len(seen)]
        if missing:
            raise ConfigError(
                f"{section}.gpus names GPU {missing[0]}, but npd sees {has}: correct it, or leave "
                "it out to have GPUs assigned"
            )
    placed = assign_gpus(config, seen)
    without = [name for name, given in placed.items() if not given]
    if without:
        section = "train" if without[0].startswith("trainer") else "score"
        own = f" (and {section}.gpus says which)" if section in config.named_gpus else ""
        raise ConfigError(
            f"{section}.ranks: each rank takes a GPU of its own, npd sees {len(seen)}{own}, and "
            f"{without[0]} gets none: lower {section}.ranks or {section}.workers, or set "
            "runtime.device: cpu"
        )
    used = sorted({gpu for given in placed.values() for gpu in given.split(",") if gpu})
    if config.has_phases and len(used) > 1:
        raise ConfigError(
            f"runtime.share: phases is for one device, but the processes are on GPUs "
            f"{', '.join(used)}: set runtime.share: together, or name one GPU in train.gpus, "
            "score.gpus and generate.gpus"
        )
    return f"each of {len(placed)} processes has its GPU, of {len(seen)}"


def assign_gpus(config: RunConfig, gpus: Sequence[str]) -> dict[str, str]:
    """The names of the GPUs of each local process that needs one, with commas, by its name.

    The trainer comes first and shares its GPUs last: scorers, then generators, take the others in
    turn, and the trainer's too only if there are no others. GPUs that `launch.gpus` gives to
    servers are left alone. `train.gpus`, `score.gpus` and `generate.gpus` (indices into `gpus`)
    override this. A rank never shares a GPU with another rank of its model; one for which there is
    none sees none. A server that npd starts is on its worker's GPUs, unless its `launch.gpus` names
    others; one over more GPUs than there are is left to itself.
    """
    if config.runtime.kind != "local" or not gpus or config.runtime.names_one_gpu:
        return {}
    own, every = config.named_gpus, [*range(len(gpus))]
    served = {index for index in every if is_given_to_server(config, gpus[index])}
    taken = served | {index for indices in own.values() for index in indices}
    ranks = config.train.ranks
    free = _first_enough(ranks, _without(taken, every), _without(served, every), every)
    trainers = _Turns(own.get("train") or free)
    placed = {name: trainers.take(1, alone=True) for name in trainer_names(config)}
    held = {index for indices in placed.values() for index in indices}
    others = _first_enough(1, _without(taken | held, every), _without(served | held, every))
    shared = _Turns(others or _without(served, every) or every)
    for section, names, count in _others(config):
        is_alone = section == "score" and config.score.ranks > 1
        turns = shared if others or not is_alone else _Turns([])
        turns = _Turns(own[section]) if section in own else turns
        if count > turns.size and not is_alone:
            turns = _Turns(every)
        if count <= turns.size or is_alone:
            placed |= {name: turns.take(count, alone=is_alone) for name in names}
    return {
        name: ",".join(gpus[index] for index in indices if index < len(gpus))
        for name, indices in placed.items()
    }


def is_given_to_server(config: RunConfig, gpu: str, where: str | None = None) -> bool:
    """Whether a `launch.gpus` (of the section `where`) names this GPU, by index or begin of id."""
    given = [
        part.strip()
        for section, launch in config.launches.items()
        if where in (None, section)
        for entry in launch.gpus
        for part in entry.split(",")
        if part.strip()
    ]
    return any(gpu == part or (not part.isdigit() and gpu.startswith(part)) for part in given)


def _without(taken: Collection[int], every: Sequence[int]) -> list[int]:
    return [index for index in every if index not in taken]


def _first_enough(count: int, *choices: list[int]) -> list[int]:
    """The first of `choices` with as many GPUs, or else the last."""
    return next((choice for choice in choices if len(choice) >= count), choices[-1])


class _Turns:
    """Indices of GPUs, given out in turn: each once, then from the first again unless `alone`."""

    def __init__(self, indices: Sequence[int]) -> None:
        self._indices, self._given = [*dict.fromkeys(indices)], 0

    @property
    def size(self) -> int:
        return len(self._indices)

    def take(self, count: int, *, alone: bool) -> list[int]:
        places = range(self._given, self._given + count)
        self._given += count
        if alone:
            return [self._indices[place] for place in places if place < self.size]
        return sorted(self._indices[place % self.size] for place in places)


def trainer_names(config: RunConfig) -> list[str]:
    """The names of the trainer's processes: one, or one for each rank."""
    ranks = config.train.ranks
    return ["trainer"] if ranks == 1 else [f"trainer-{rank}" for rank in range(ranks)]


def _others(config: RunConfig) -> Iterator[tuple[str, list[str], int]]:
    """Section, process names, and GPUs a process, of scorers and generators that need a GPU."""
    generate, score, ranks = config.generate, config.score, config.score.ranks
    launches = {where: launch for where, launch in config.launches.items() if not launch.gpus}
    widths = [gpus_of_server(n) for where, n in launches.items() if where != "generate"]
    reads_here = not score.is_served or config.needs_ifd or config.needs_student_pass
    scorers = [f"scorer-{index}" for index in range(num_scorers(config))]
    if ranks > 1:
        yield "score", [f"{name}-{rank}" for name in scorers for rank in range(ranks)], 1
    elif reads_here or widths:
        yield "score", scorers, max([1, *widths])
    launch = launches.get("generate")
    if generate.source != "dataset" and (launch is not None or not generate.is_served):
        count = 1 if launch is None else gpus_of_server(launch)
        yield "generate", [f"generator-{index}" for index in range(generate.workers)], count


def gpus_of_server(launch: LaunchConfig) -> int:
    """How many GPUs a server takes: ranks of a model, times stages and copies of its own flags."""
    count, text = launch.tensor_parallel, " ".join(launch.args).replace("_", "-")
    for flag in ("pipeline-parallel-size", "data-parallel-size"):
        found = re.search(rf"--{flag}[= ](\d+)", text)
        count *= int(found[1]) if found is not None else 1
    return count


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
            environment=gpus.get(f"{name}-{rank}", seeing("") if is_on_cpu else None),
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
        Factory(role, _on_gpu(share_of_servers(config, role, index)), root, run.models),
        root,
        ranks=ranks,
        needs=resources_for(config, role),
    )


def _on_gpu(config: RunConfig) -> RunConfig:
    """The config for a worker: where this process found GPUs, `auto` is no CPU in the worker."""
    if config.runtime.kind != "local" or config.runtime.device != "auto" or not visible_gpus():
        return config
    runtime = config.runtime.model_copy(update={"device": CUDA})
    return config.model_copy(update={"runtime": runtime})


def _environments(config: RunConfig) -> dict[str, dict[str, str]]:
    """The environment variables that give each local process its GPUs."""
    if config.runtime.kind != "local" or config.runtime.device == "cpu":
        return {}
    device = config.runtime.device
    placed = assign_gpus(config, visible_gpus(device))
    return {name: seeing(gpus, device) for name, gpus in placed.items()}
