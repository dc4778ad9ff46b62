"""The workers of a run, started on a runtime with a share of the machine's threads each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from npd.config import RunConfig, ServedConfig, TeacherConfig
from npd.control.group import RankGroup
from npd.runtime import Needs, Runtime, Worker
from npd.workers import Factory

Role: TypeAlias = Literal["generator", "scorer", "trainer"]


@dataclass(frozen=True, slots=True)
class Crew:
    """Generators, scorers (none when nothing is scored) and the trainer, of one rank or several."""

    generators: tuple[Worker, ...]
    scorers: tuple[Worker, ...]
    trainer: Worker


def num_scorers(config: RunConfig) -> int:
    """Scorers a run needs: those configured, one for held-out text alone, or none."""
    if config.needs_scores:
        return config.score.workers
    return 1 if config.teacher_models and config.eval.source != "none" else 0


def threads_per_worker(config: RunConfig) -> int:
    """CPU threads a worker may use: all when stages take turns, else an even share.

    Generators and scorers share one half of the cores and the trainer has the other: training is
    the longer part on a CPU, and a worker spread over busy cores waits at every barrier.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if config.runtime.threads is not None:
        return config.runtime.threads
    return max(1, (cores or 1) // (2 if config.is_overlapped else 1))


def share_of_servers(config: RunConfig, role: str, index: int) -> RunConfig:
    """The config as worker `index` of a role sees it: with the servers and GPUs that are its own.

    Every `workers`-th server of `urls` is one worker's, so that no two manage the same; a load
    balancer's servers (`admin_urls`) go with the one worker it then has.
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
    """The environment that leaves a rank one GPU: the `rank`-th that this process sees.

    On a CPU it sees none, whatever there is. Nothing on Ray, which deals GPUs out itself.
    """
    if config.runtime.kind == "ray":
        return {}
    if config.runtime.device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(rank)] * (rank + 1) if visible is None else visible.split(",")
    return {"CUDA_VISIBLE_DEVICES": gpus[rank] if rank < len(gpus) else ""}


def needs_of(config: RunConfig, role: Role) -> Needs:
    """What one worker of a role asks of a cluster: a GPU, if it holds a model and there are any."""
    if role in config.runtime.ray.gpus:
        return Needs(config.runtime.ray.gpus[role])
    is_on_servers = {
        "generator": bool(config.generate.urls) or config.generate.source == "dataset",
        "scorer": bool(config.score.urls) and not (config.needs_ifd or config.needs_student_pass),
        "trainer": False,
    }
    return Needs(0.0 if is_on_servers[role] or config.runtime.device == "cpu" else None)


def spawn_ranks(
    config: RunConfig,
    runtime: Runtime,
    name: str,
    factory: Callable[[], object],
    root: Path,
    *,
    ranks: int,
    needs: Needs,
    first_gpu: int = 0,
) -> Worker:
    """A worker, or a group of as many as `ranks` that share its threads and take a GPU each."""
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


def spawn_crew(
    config: RunConfig,
    runtime: Runtime,
    root: Path,
    factory: Callable[[str, RunConfig, Path], Callable[[], object]] = Factory,
) -> Crew:
    """Start every worker of the run; models load at their first call."""

    def spawn(name: str, role: Role, index: int = 0) -> Worker:
        made = factory(role, share_of_servers(config, role, index), root)
        ranks = {"trainer": config.train.ranks, "scorer": config.score.ranks}.get(role, 1)
        return spawn_ranks(
            config,
            runtime,
            name,
            made,
            root,
            ranks=ranks,
            needs=needs_of(config, role),
            # The trainer has the first GPUs; a teacher that needs several has others to itself.
            first_gpu=config.train.ranks + index * ranks if role == "scorer" else 0,
        )

    return Crew(
        generators=tuple(
            spawn(f"generator-{i}", "generator", i) for i in range(config.generate.workers)
        ),
        scorers=tuple(spawn(f"scorer-{i}", "scorer", i) for i in range(num_scorers(config))),
        trainer=spawn("trainer", "trainer"),
    )
