"""GPUs of npd's ranks and of servers it would start: are there enough, and is one wanted twice?"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

from npd.config import LaunchConfig, RunConfig
from npd.control.crew import num_scorers
from npd.doctor.checks import Check, fail, ok, warn

_SECONDS = 60.0


def gpu_checks(what: str, launch: LaunchConfig, config: RunConfig) -> Iterator[Check]:
    """Whether the GPUs named for a section's servers exist, suffice, and are free of npd itself."""
    from npd.modeling import resolve_device

    if not launch.gpus:
        if resolve_device(config.runtime.device).startswith("cuda"):
            yield warn(
                what,
                "its server takes most of the GPU that npd's own workers use: name another in "
                f"{what}.gpus, or bound it by --gpu-memory-utilization in {what}.args",
            )
        return
    there = {part for pair in gpu_ids().items() for part in pair if part}
    for entry in launch.gpus:
        named = [part.strip() for part in entry.split(",") if part.strip()]
        missing = [gpu for gpu in named if not any(known.startswith(gpu) for known in there)]
        if missing:
            listed = ", ".join(sorted(k for k in there if k.isdigit())) or "none"
            yield fail(what, f"no GPU {missing[0]} here (there are: {listed}): correct {what}.gpus")
        elif len(named) < launch.tensor_parallel:
            yield fail(
                what,
                f"a model over {launch.tensor_parallel} GPUs does not fit on {entry!r}: name "
                f"as many in {what}.gpus, or lower {what}.tensor_parallel",
            )
        else:
            yield ok(what, f"GPU {entry} is there")
    yield from _shared_checks(what, launch, config)


def rank_checks(config: RunConfig) -> Iterator[Check]:
    """Whether there is a GPU for each rank, where several share a model on this machine's GPUs."""
    ranks = {"train.ranks": config.train.ranks, "score.ranks": config.score.ranks}
    several = {name: count for name, count in ranks.items() if count > 1}
    wanted = _wanted(config)
    if not several or config.runtime.kind == "ray" or not wanted:
        return
    found = len(own_gpus(config))
    given = " and ".join(f"{name} {count}" for name, count in several.items())
    says = f"{given}: {len(wanted)} ranks take a GPU each, and npd sees {found}"
    if found < len(wanted):
        yield fail("gpus", f"{says}: lower {' or '.join(several)}, or set runtime.device: cpu")
    else:
        yield ok("gpus", says)


def _shared_checks(what: str, launch: LaunchConfig, config: RunConfig) -> Iterator[Check]:
    """A warning where a server is given a GPU that the trainer, or what is beside it, is on."""
    given = [part.strip() for entry in launch.gpus for part in entry.split(",") if part.strip()]
    own = own_gpus(config)
    for index, uuid in sorted(gpu_ids().items()):
        shared = [gpu for gpu in given if gpu == index or (uuid and gpu and uuid.startswith(gpu))]
        taken = [place for place, gpu in enumerate(own) if gpu in (index, uuid)]
        if shared and taken:
            whose = "the trainer's" if taken[0] < config.train.ranks else "a scorer's"
            yield warn(
                what,
                f"GPU {shared[0]} is {whose} too, and a server takes most of a GPU: name "
                f"others in {what}.gpus, move npd's own workers (runtime.device, "
                f"CUDA_VISIBLE_DEVICES), or bound it by --gpu-memory-utilization in {what}.args",
            )


def own_gpus(config: RunConfig) -> list[str]:
    """The GPUs of npd's own workers as the driver names them: none on the CPU, else one for each
    rank of the trainer, then (where they have several) of the scorers.

    `CUDA_VISIBLE_DEVICES` renumbers GPUs for npd, not for the servers it starts.
    """
    named = _visible()
    return [named[i] for i in _wanted(config) if i < len(named)]


def _wanted(config: RunConfig) -> range:
    """The places of npd's own GPUs among those that it sees; as `control.crew` gives them out."""
    from npd.modeling import resolve_device

    device = resolve_device(config.runtime.device)
    if not device.startswith("cuda"):
        return range(0)
    first = int(device.partition(":")[2] or 0)
    readers = num_scorers(config) * config.score.ranks if config.score.ranks > 1 else 0
    return range(first, first + config.train.ranks + readers)


def _visible() -> list[str]:
    """The GPUs that npd sees, as the driver names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip()]
    return list(gpu_ids()) or [str(i) for i in range(torch.cuda.device_count())]


def gpu_ids() -> dict[str, str]:
    """Unique ids of the GPUs that the driver lists, by index; empty where there is no driver."""
    ask = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if done.returncode != 0:
        return {}
    pairs = (line.partition(",") for line in done.stdout.splitlines() if line.strip())
    return {index.strip(): uuid.strip() for index, _, uuid in pairs}
