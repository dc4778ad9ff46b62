"""The workers of a run, started on a runtime with a share of the machine's threads each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from npd.config import RunConfig
from npd.runtime import Runtime, Worker
from npd.workers import Factory


@dataclass(frozen=True, slots=True)
class Crew:
    """Generators, scorers (none when nothing is scored) and the trainer."""

    generators: tuple[Worker, ...]
    scorers: tuple[Worker, ...]
    trainer: Worker


def num_scorers(config: RunConfig) -> int:
    """Scorers a run needs: those configured, one for held-out text alone, or none."""
    if config.needs_scores:
        return config.score.workers
    return 1 if config.teacher is not None and config.eval.source != "none" else 0


def threads_per_worker(config: RunConfig) -> int:
    """CPU threads a worker may use: all when stages take turns, else an even share.

    Generators and scorers share one half of the cores and the trainer has the other: training is
    the longer part on a CPU, and a worker spread over busy cores waits at every barrier.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if config.runtime.threads is not None:
        return config.runtime.threads
    return max(1, (cores or 1) // (2 if config.is_overlapped else 1))


def spawn_crew(
    config: RunConfig,
    runtime: Runtime,
    root: Path,
    factory: Callable[[str, RunConfig, Path], Callable[[], object]] = Factory,
) -> Crew:
    """Start every worker of the run; models load at their first call."""
    threads = threads_per_worker(config)

    def spawn(name: str, role: str) -> Worker:
        return runtime.spawn(name, factory(role, config, root), threads=threads)

    return Crew(
        generators=tuple(
            spawn(f"generator-{i}", "generator") for i in range(config.generate.workers)
        ),
        scorers=tuple(spawn(f"scorer-{i}", "scorer") for i in range(num_scorers(config))),
        trainer=spawn("trainer", "trainer"),
    )
