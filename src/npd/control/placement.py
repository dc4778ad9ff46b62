"""Starts the workers of a run, each with its threads, GPUs and servers; ranks as one worker.

Sets the GPU of each rank where a worker has several. A worker of one process takes the first GPU
that it sees.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from npd.config import RunConfig, ServedConfig, TeacherConfig
from npd.control.run_directory import OpenRun
from npd.data.inputs import for_workers
from npd.runtime import Resources, Runtime, Worker
from npd.runtime.rank_group import RankGroup
from npd.workers import Factory

Role: TypeAlias = Literal["generator", "scorer", "trainer"]


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


def gpu_of_rank(config: RunConfig, rank: int) -> dict[str, str]:
    """The environment variables that give a rank one GPU: the `rank`-th that this process sees.

    With `runtime.device: cpu` the rank sees no GPU. On Ray it is empty, because Ray assigns GPUs.
    """
    if config.runtime.kind == "ray":
        return {}
    if config.runtime.device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(rank)] * (rank + 1) if visible is None else visible.split(",")
    return {"CUDA_VISIBLE_DEVICES": gpus[rank] if rank < len(gpus) else ""}


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
    first_gpu: int = 0,
) -> Worker:
    """A worker; with several `ranks` a group that shares its threads and has one GPU per rank."""
    threads = threads_per_worker(config)
    if ranks == 1:
        return runtime.spawn(name, factory, threads=threads, needs=needs)
    each = threads if config.runtime.threads is not None else max(1, threads // ranks)
    workers = [
        runtime.spawn(
            f"{name}-{rank}",
            factory,
            threads=each,
            environment=gpu_of_rank(config, first_gpu + rank),
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
        # The trainer has the first GPUs; a teacher with several ranks has the next ones.
        first_gpu=config.train.ranks + index * ranks if role == "scorer" else 0,
    )
