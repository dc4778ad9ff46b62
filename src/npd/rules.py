"""What cannot be in a config although each value by itself could: rules over several sections.

A rule is whether something is so, and what to do about it. Pure; `npd.config` raises.
"""

from __future__ import annotations

import re

from npd.sections import (
    GenerateConfig,
    LossConfig,
    RuntimeConfig,
    ScheduleConfig,
    ScoreConfig,
    TrainConfig,
)
from npd.served import LaunchConfig, ServedConfig

# What npd itself tells a server that it starts.
_OURS = ("--host", "--port", "--api-key", "--model", "--model-path", "--served-model-name", "--uds")
_OUR_VARIABLES = ("VLLM_API_KEY", "VLLM_SERVER_DEV_MODE")


def served_problems(
    generate: GenerateConfig,
    score: ScoreConfig,
    loss: LossConfig,
    schedule: ScheduleConfig,
    runtime: RuntimeConfig,
    *,
    has_teacher: bool = True,
) -> list[tuple[bool, str]]:
    """What cannot be about engines behind HTTP: (is it so, what to do).

    `has_teacher`: whether `teacher` is set, which the servers of `score` hold.
    """
    in_flight = schedule.refresh.in_flight
    both = set(generate.urls) & set(score.urls)
    return [
        *_section_problems(generate, score, has_teacher),
        *_time_problems("generate", generate, runtime),
        *_time_problems("score", score, runtime),
        (
            bool(generate.admin_urls) and (not generate.urls or generate.workers > 1),
            "generate.admin_urls are the servers behind the load balancer in generate.urls: set "
            "that, and generate.workers: 1",
        ),
        (
            not all(map(is_url, generate.admin_urls)),
            "generate.admin_urls must be like http://host:8000",
        ),
        (
            bool(both) and generate.source == "student",
            f"{min(both, default='')} is in generate.urls and in score.urls: it cannot hold the "
            "student and the teacher",
        ),
        (
            in_flight == "mix" and schedule.max_lag == 0,
            "schedule.refresh.in_flight mix with schedule.max_lag 0 throws every mixed sample "
            "away: set max_lag: 1, or in_flight: abort",
        ),
        (
            generate.source == "dataset" and generate.engine != "transformers",
            "generate.source dataset decodes nothing: leave generate.engine out",
        ),
        (
            in_flight != "finish" and generate.engine == "transformers",
            f"schedule.refresh.in_flight {in_flight} needs a server: set generate.engine: vllm, or "
            "in_flight: finish",
        ),
        (
            generate.engine == "sglang" and generate.temperature not in (0.0, 1.0),
            f"generate.temperature {generate.temperature:g} with generate.engine sglang, which "
            "tells the log-probs of tempered samples only: set it to 1 (the policy itself) or 0",
        ),
        (
            score.engine != "transformers" and loss.target == "sampled",
            "loss.target sampled draws from the teacher's whole distribution, which a server does "
            "not tell: set score.engine: transformers, or another target",
        ),
    ]


def rank_problems(train: TrainConfig, runtime: RuntimeConfig) -> list[tuple[bool, str]]:
    """What cannot be about a trainer of several processes: (is it so, what to do)."""
    several, ranks = train.ranks > 1, f"train.ranks {train.ranks}"
    return [
        (
            several and runtime.kind == "inline",
            f"{ranks} needs a process for each rank: set runtime.kind: local, or train.ranks: 1",
        ),
        (
            several and runtime.device.startswith("cuda:"),
            f"{ranks} takes a GPU for each rank, and runtime.device {runtime.device} is one: set "
            "cuda, and choose GPUs by CUDA_VISIBLE_DEVICES",
        ),
    ]


def runtime_problems(runtime: RuntimeConfig, train: TrainConfig) -> list[tuple[bool, str]]:
    """What cannot be about where workers live: (is it so, what to do)."""
    address = runtime.ray.address or ""
    return [
        (
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", runtime.device) is None,
            f"runtime.device ({runtime.device!r}) must be auto, cpu, cuda or cuda:N",
        ),
        (
            runtime.kind == "ray" and runtime.device.startswith("cuda:"),
            f"runtime.device {runtime.device} on Ray, which gives each worker a GPU of its own: "
            "set cuda, or auto",
        ),
        (
            address.startswith("ray://"),
            f"runtime.ray.address {address}: npd runs inside the cluster; submit it there (ray job "
            "submit -- npd run ..., with runtime.ray.address: auto)",
        ),
        (
            runtime.ray.gpus.get("trainer", 1.0) < 1.0 and train.ranks > 1,
            "runtime.ray.gpus gives ranks of the trainer a part of a GPU: each needs one (or, with "
            "runtime.device cpu, none: leave it out)",
        ),
    ]


def teacher_rank_problems(
    score: ScoreConfig, generate: GenerateConfig, runtime: RuntimeConfig
) -> list[tuple[bool, str]]:
    """What cannot be about a teacher of several processes: (is it so, what to do)."""
    several, ranks = score.ranks > 1, f"score.ranks {score.ranks}"
    return [
        (
            several and score.engine != "transformers",
            f"{ranks} is for a teacher in process, and score.engine {score.engine} is a server: "
            "set score.launch.tensor_parallel instead, and score.ranks: 1",
        ),
        (
            several and runtime.kind == "inline",
            f"{ranks} needs a process for each rank: set runtime.kind: local, or score.ranks: 1",
        ),
        (
            several and runtime.device.startswith("cuda:"),
            f"{ranks} takes a GPU for each rank, and runtime.device {runtime.device} is one: set "
            "cuda, and choose GPUs by CUDA_VISIBLE_DEVICES",
        ),
        (
            several and runtime.ray.gpus.get("scorer", 1.0) < 1.0 and runtime.device != "cpu",
            f"{ranks} with runtime.ray.gpus giving scorers a part of a GPU: each rank needs one",
        ),
        (
            several and generate.source == "teacher" and generate.engine == "transformers",
            f"{ranks} with generate.source teacher, which writes in one process: set "
            "generate.engine: vllm, with generate.launch.tensor_parallel",
        ),
    ]


def _section_problems(
    generate: GenerateConfig, score: ScoreConfig, has_teacher: bool
) -> list[tuple[bool, str]]:
    writes = generate.source != "teacher" or has_teacher
    return [
        *_server_problems("generate", generate, generate.engine, generate.workers, is_held=writes),
        *_server_problems("score", score, score.engine, score.workers, is_held=has_teacher),
    ]


def _server_problems(
    where: str, section: ServedConfig, engine: str, workers: int, *, is_held: bool
) -> list[tuple[bool, str]]:
    """The same about the servers of section `where`; `is_held`: there is a model they are for."""
    launch, urls = section.launch, section.urls
    is_served = engine != "transformers"
    gpus = launch.gpus if launch is not None else ()
    return [
        (
            is_held and is_served and bool(urls) == (launch is not None),
            f"{where}.engine {engine} needs a server: set exactly one of {where}.urls (running "
            f"ones) and {where}.launch (started by npd)",
        ),
        (
            not is_served and (bool(urls) or launch is not None),
            f"{where}.urls and {where}.launch are for servers, but {where}.engine is transformers: "
            f"set {where}.engine: vllm, or leave them out",
        ),
        (
            not is_held and (bool(urls) or launch is not None),
            f"{where}.urls and {where}.launch serve `teacher`, which is not set: give the servers "
            "of each of `teachers` there",
        ),
        (
            bool(urls) and workers > len(urls),
            f"{where}.workers ({workers}) is more than {where}.urls has servers ({len(urls)}): "
            "each worker has servers of its own",
        ),
        (
            not all(map(is_url, urls)),
            f"{where}.urls must be like http://host:8000",
        ),
        (
            len(set(urls)) < len(urls),
            f"{where}.urls names a server twice: list each once",
        ),
        (
            bool(gpus) and len(gpus) < workers,
            f"{where}.launch.gpus has too few entries ({len(gpus)}), as {where}.workers is "
            f"{workers}: one entry a worker",
        ),
        (
            launch is not None and launch.venv is not None and bool(launch.command),
            f"{where}.launch takes one of venv and command",
        ),
        *launch_problems(where, launch or LaunchConfig()),
    ]


def launch_problems(where: str, launch: LaunchConfig) -> list[tuple[bool, str]]:
    """What cannot be about how section `where` starts a server: (is it so, what to do)."""
    flags = {word.partition("=")[0] for word in launch.args} & set(_OURS)
    names = set(launch.env) & set(_OUR_VARIABLES)
    return [
        (
            bool(flags),
            f"{where}.launch.args sets {', '.join(sorted(flags))}, which npd sets itself "
            "(loopback, a free port, a key, the snapshot): leave it out",
        ),
        (
            bool(names),
            f"{where}.launch.env sets {', '.join(sorted(names))}, which npd sets itself: leave it "
            "out",
        ),
    ]


def _time_problems(
    where: str, section: ServedConfig, runtime: RuntimeConfig
) -> list[tuple[bool, str]]:
    """A worker must not count as lost while it still waits for its server."""
    limits = {f"{where}.request_timeout": section.request_timeout}
    if section.launch is not None:
        limits[f"{where}.launch.start_timeout"] = section.launch.start_timeout
    is_served = bool(section.urls) or section.launch is not None
    return [
        (
            is_served and limit >= runtime.call_timeout,
            f"runtime.call_timeout ({runtime.call_timeout:g} s) must be more than {name} "
            f"({limit:g} s)",
        )
        for name, limit in limits.items()
    ]


def is_url(text: str) -> bool:
    """Whether `text` is like http://host:8000."""
    return re.fullmatch(r"https?://[^/\s]+(/[^\s]*)?", text) is not None
