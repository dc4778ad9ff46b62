"""The share of a GPU's memory that a server of npd's takes beside other processes of the run.

vLLM takes nine tenths of a GPU and refuses to start where less is free. A server that has its GPUs
to itself is left to that. Beside others it is given what they leave, by the forecast of
`npd.control.devices.memory`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from npd.config import LaunchConfig, RunConfig
from npd.config.sections import SIZES_ON_CPU
from npd.control.devices.placement import gpus_of_server, is_given_to_server
from npd.models.metadata import GIB, ModelSize, size_of
from npd.types import DEFAULT_TEACHER, Check

USUAL_SHARE = 0.9
"""vLLM's share of a GPU unless it is told another."""
_BYTES = {"bfloat16": 2, "float32": 4}
# The share of a GPU that is left free beside a server: what the forecast is off by.
_MARGIN = 0.04
# What an engine needs besides weights and keys and values: a context, activations, CUDA graphs.
_WORKSPACE = 2 * GIB
# Sequences of the full length, without which an engine hardly works.
_FEWEST = 4
# Responses rarely are as long as they may be.
_LENGTH_SHARE = 0.5


class Need(NamedTuple):
    """What a server needs on one GPU, in bytes: to work at all, and to be busy."""

    least: int
    wanted: int


def given_share(launch: LaunchConfig) -> float | None:
    """The share that the config names, by `launch.memory` or the engine's own flag."""
    text = " ".join(launch.args).replace("_", "-")
    found = re.search(r"--gpu-memory-utilization[= ]([\d.]+)", text)
    if found is not None:
        try:
            return float(found[1])
        except ValueError:
            return USUAL_SHARE
    return launch.memory if isinstance(launch.memory, float) else None


def is_decided_here(launch: LaunchConfig) -> bool:
    """Whether npd decides a server's share; flags in a file (`--config`) are not known."""
    has_file = any(word == "--config" or word.startswith("--config=") for word in launch.args)
    return given_share(launch) is None and not has_file


def need_of(config: RunConfig, where: str) -> Need:
    """What a server of the section `where` needs, its model left out if its size is not known."""
    launch = config.launches[where]
    width = _BYTES[config.generate.dtype if _writes(config, where) else config.score.dtype]
    size, gpus = size_of(_model(config, where) or ""), gpus_of_server(launch)
    if size is None:
        return Need(_WORKSPACE, _WORKSPACE)
    fixed = width * size.parameters // gpus + _WORKSPACE
    token, longest = _token_bytes(size, width) // gpus, config.max_sample_tokens
    if _writes(config, where):
        usual = int(config.generate.at_once * _LENGTH_SHARE * longest)
    else:
        longest = config.max_read_tokens
        usual = config.score.with_sizes(SIZES_ON_CPU).sizes.row_tokens
    fewest = _FEWEST * longest
    return Need(fixed + token * fewest, fixed + token * max(fewest, usual))


def role_of_server(config: RunConfig, where: str) -> str:
    """Which workers start the servers of the section `where`."""
    return "generator" if _writes(config, where) else "scorer"


def servers_on(config: RunConfig, where: str, gpu: str, names: Sequence[str]) -> int:
    """How many servers of the section `where` are on a GPU that has npd's processes `names`."""
    if config.launches[where].gpus:
        return int(is_given_to_server(config, gpu, where))
    role = role_of_server(config, where)
    return len({name.split("-")[1] for name in names if name.startswith(role)})


def parts_of_servers(
    config: RunConfig, gpu: str, total: int, names: Sequence[str], *, has_others: bool
) -> dict[str, tuple[str, int]]:
    """What the servers of each section take of a GPU with `total` bytes, in words and in bytes.

    One whose share is not decided takes what it wants beside others, and the usual share alone.
    """
    counts = {where: servers_on(config, where, gpu, names) for where in config.launches}
    is_shared = has_others or sum(counts.values()) > 1
    found = {}
    for where, count in counts.items():
        launch, times = config.launches[where], "" if count == 1 else f"{count} x "
        if is_shared and is_decided_here(launch):
            need = need_of(config, where)
            found[where] = f"{times}at least {need.least / GIB:,.1f}", count * need.wanted
        else:
            share = given_share(launch) or USUAL_SHARE
            found[where] = f"{times}{share:.0%} of it", int(count * share * total)
    return {where: part for where, part in found.items() if counts[where]}


def shares_beside(
    config: RunConfig,
    counts: Mapping[str, int],
    *,
    total: int,
    free: int,
    taken: int,
    elastic: int,
) -> dict[str, float | None]:
    """The share of a GPU for the servers of each section; None: others leave too little.

    Each server gets what it needs and an equal part of the rest. `taken` by others, of which
    `elastic` is halved in time of need: then a server gets what it needs at least.
    """
    needs = {where: need_of(config, where) for where in counts}
    least = sum(needs[where].least * count for where, count in counts.items())
    room = free - taken - int(_MARGIN * total)
    if room < least and total - taken - int(_MARGIN * total) + elastic < least:
        return dict.fromkeys(counts)
    rest = max(0, room - least) // max(1, sum(counts.values()))
    found: dict[str, float | None] = {}
    for where, need in needs.items():
        lowest = math.ceil(100 * need.least / total) / 100
        share = math.floor(100 * (need.least + rest) / total) / 100
        found[where] = max(lowest, min(USUAL_SHARE, share))
    return found


def blind_checks(config: RunConfig, on: Mapping[str, Sequence[str]]) -> Iterator[Check]:
    """Warnings of servers that take most of a GPU that others use, where no size is known.

    `on`: the names of npd's processes on each GPU.
    """
    for where, launch in config.launches.items():
        role = role_of_server(config, where)
        for gpu, names in on.items():
            # A generator beside its own server holds nothing; a scorer may hold the snapshot.
            others = [name for name in names if role == "scorer" or not name.startswith(role)]
            if others and servers_on(config, where, gpu, names) and is_decided_here(launch):
                yield Check.warn(
                    "memory",
                    f"GPU {gpu}: {where}'s server takes {USUAL_SHARE:.0%} of it beside "
                    f"{', '.join(others)}: set {where}.launch.memory, or another GPU in "
                    f"{where}.launch.gpus",
                )


def _writes(config: RunConfig, where: str) -> bool:
    """Whether generators start a section's servers."""
    is_teachers = where.startswith("teachers.")
    return where == "generate" or (is_teachers and not config.score.is_served)


def _model(config: RunConfig, where: str) -> str | None:
    name = where.removeprefix("teachers.") if "." in where else DEFAULT_TEACHER
    if where == "generate" and config.generate.source == "student":
        return config.student
    return config.teacher_models.get(name)


def _token_bytes(size: ModelSize, width: int) -> int:
    """Keys and values of one token."""
    return 2 * width * size.layers * size.kv_width
