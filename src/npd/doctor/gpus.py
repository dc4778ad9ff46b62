"""GPUs of servers that npd would start: are they there, and does npd train on them itself?"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

from npd.config import LaunchConfig, RunConfig
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


def _shared_checks(what: str, launch: LaunchConfig, config: RunConfig) -> Iterator[Check]:
    """A warning where a server is given a GPU that the trainer, or what is beside it, is on."""
    given = [part.strip() for entry in launch.gpus for part in entry.split(",") if part.strip()]
    for index, uuid in sorted(gpu_ids().items()):
        shared = [gpu for gpu in given if gpu == index or (uuid and gpu and uuid.startswith(gpu))]
        if shared and not {index, uuid}.isdisjoint(trainer_gpus(config)):
            yield warn(
                what,
                f"GPU {shared[0]} is the trainer's too, and a server takes most of a GPU: name "
                f"others in {what}.gpus, move npd's own workers (runtime.device, "
                f"CUDA_VISIBLE_DEVICES), or bound it by --gpu-memory-utilization in {what}.args",
            )


def trainer_gpus(config: RunConfig) -> list[str]:
    """The GPUs of npd's own workers as the driver names them: one for each rank, none on the CPU.

    `CUDA_VISIBLE_DEVICES` renumbers GPUs for npd, not for the servers it starts.
    """
    from npd.modeling import resolve_device

    device = resolve_device(config.runtime.device)
    if not device.startswith("cuda"):
        return []
    first = int(device.partition(":")[2] or 0)
    wanted = range(first, first + config.train.ranks)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = None if visible is None else [part.strip() for part in visible.split(",")]
    return [
        str(i) if named is None else named[i] for i in wanted if named is None or i < len(named)
    ]


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
