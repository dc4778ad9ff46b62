"""The processes of a run that may be killed, by kind, found among the run's own only.

A kind is a row of `KINDS`: what one of its command line's arguments looks like. Another runtime's
or another engine's processes get a row of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

CONTROLLER = "controller"
# Of a command line's arguments, one that shows the kind; the first kind that fits counts.
KINDS = {
    "server": re.compile(r"vllm\.entrypoints\S+|VLLM::\S+"),
    "generator": re.compile(r"generator-\d+"),
    "scorer": re.compile(r"scorer-\d+"),
    "trainer rank": re.compile(r"trainer(-\d+)?"),
}


class Victim(NamedTuple):
    """A process that may be killed."""

    kind: str
    pid: int


def find_victims(
    controller: int, processes: Mapping[int, Sequence[str]], wanted: Sequence[str]
) -> list[Victim]:
    """Those of `processes` (pid to arguments; all of them the run's) that are of `wanted` kinds."""
    found = [Victim(CONTROLLER, controller)] if controller in processes else []
    found += [
        Victim(kind, pid)
        for pid, arguments in sorted(processes.items())
        if pid != controller and (kind := _kind(arguments)) is not None
    ]
    return [victim for victim in found if victim.kind in wanted]


def _kind(arguments: Sequence[str]) -> str | None:
    if any(argument.endswith("supervisor.py") for argument in arguments):
        return None  # its command line repeats the server's
    for kind, pattern in KINDS.items():
        if any(pattern.fullmatch(argument) for argument in arguments):
            return kind
    return None
