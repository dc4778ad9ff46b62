"""GPUs of servers: whether they are there, suffice, and are not taken by npd's own ranks."""

from __future__ import annotations

from collections.abc import Iterator

from npd.config import LaunchConfig, RunConfig
from npd.control.devices.memory import gpu_ids
from npd.control.devices.placement import assign_gpus
from npd.control.devices.server_memory import given_share
from npd.models.device import hides_gpus, is_gpu, resolve_device, visible_names
from npd.types import Check


def gpu_checks(what: str, launch: LaunchConfig, config: RunConfig) -> Iterator[Check]:
    """Whether the GPUs named for a section's servers exist, suffice, and are free of npd itself.

    A server without GPUs of its own is on its worker's, and counted in the forecast of memory.
    """
    if not launch.gpus:
        return
    there = {part for pair in gpu_ids().items() for part in pair if part}
    for entry in launch.gpus:
        named = [part.strip() for part in entry.split(",") if part.strip()]
        missing = [gpu for gpu in named if not any(known.startswith(gpu) for known in there)]
        if missing:
            listed = ", ".join(sorted(k for k in there if k.isdigit())) or "none"
            yield Check.fail(
                what, f"no GPU {missing[0]} here (there are: {listed}): correct {what}.gpus"
            )
        elif len(named) < launch.tensor_parallel:
            yield Check.fail(
                what,
                f"a model over {launch.tensor_parallel} GPUs does not fit on {entry!r}: name "
                f"as many in {what}.gpus, or lower {what}.tensor_parallel",
            )
        else:
            yield Check.ok(what, f"GPU {entry} is there")
    yield from _shared_checks(what, launch, config)


# Processes that share their GPU with no other rank: the trainer's, and scorers' if they are ranks.
_HAS_ITS_OWN = {False: ("trainer",), True: ("trainer", "scorer")}


def _shared_checks(what: str, launch: LaunchConfig, config: RunConfig) -> Iterator[Check]:
    """A warning where a server is given the trainer's GPU, or that of a rank of a scorer, and its
    share is not decided."""
    if given_share(launch) is not None:
        return
    given = [part.strip() for entry in launch.gpus for part in entry.split(",") if part.strip()]
    own = own_gpus(config)
    for index, uuid in sorted(gpu_ids().items()):
        shared = [gpu for gpu in given if gpu == index or (uuid and gpu and uuid.startswith(gpu))]
        taken = [name for name, gpu in own.items() if gpu in (index, uuid)]
        if shared and taken:
            whose = "the trainer's" if taken[0].startswith("trainer") else "a scorer's"
            yield Check.warn(
                what,
                f"GPU {shared[0]} is {whose} too, and a server takes most of a GPU: name "
                f"others in {what}.gpus, move npd's own workers (train.gpus, score.gpus), or "
                f"set {what}.memory",
            )


def own_gpus(config: RunConfig) -> dict[str, str]:
    """The GPU, as the driver names it, of each process that shares it with no other rank.

    The variable that hides GPUs renumbers them for npd, not for the servers it starts.
    """
    device = config.runtime.device
    if not is_gpu(resolve_device(device)):
        return {}
    named = _visible(device)
    if config.runtime.names_one_gpu or config.runtime.kind == "inline":
        index = int(device.partition(":")[2] or 0)
        return {"trainer": named[index]} if index < len(named) else {}
    kinds = _HAS_ITS_OWN[config.score.ranks > 1]
    return {n: gpu for n, gpu in assign_gpus(config, named).items() if n.startswith(kinds)}


def _visible(device: str) -> list[str]:
    """The GPUs that npd sees, as the driver names them."""
    if not hides_gpus() and (listed := list(gpu_ids())):
        return listed
    return list(visible_names(device))
