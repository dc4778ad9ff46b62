"""Cleans up after a Ray that npd started, however npd itself ended: a program of its own.

Consumes its standard input: one line with a mark and a folder, then nothing until the end of file,
which comes when the process that started it closes the pipe or is gone. Then it ends Ray's
processes and removes the folder; Ray's own agents would stay for minutes otherwise (2.60).

Ours are the processes that carry the mark in their environment (a secret made for this one Ray) and
whatever descends from them. Both are looked for as long as Ray lives: some write their title over
their environment, and lose their parent as Ray ends.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

# For Ray to end by itself, and for what was killed to be gone.
_GRACE_SECONDS, _LIMIT_SECONDS, _POLL_SECONDS = 1.0, 10.0, 0.05
_LOOK_SECONDS = 1.0


class Family:
    """The processes of one Ray, by process id and the time they were started at."""

    def __init__(self, mark: bytes) -> None:
        self._mark = mark
        self._known: dict[int, str] = {}

    def look(self) -> list[int]:
        """Take in what has come, forget what is gone; the process ids of those that are there."""
        there = _processes()
        known = {
            pid: began for pid, began in self._known.items() if there.get(pid, _NO)[1] == began
        }
        for pid, (_, began) in there.items():
            if pid != os.getpid() and pid not in known and _carries(pid, self._mark):
                known[pid] = began
        while more := {p for p, (parent, _) in there.items() if parent in known} - known.keys():
            known |= {pid: there[pid][1] for pid in more}
        self._known = known
        return list(known)


_NO = (0, "")


def main() -> None:
    """Wait for the end of the process that started this one, then clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    mark, _, folder = sys.stdin.readline().rstrip("\n").partition(" ")
    family = Family(mark.encode())
    while not select.select([sys.stdin], [], [], _LOOK_SECONDS)[0]:
        family.look()
    clean(family, Path(folder))


def clean(family: Family, folder: Path) -> None:
    """End all processes of the family and remove `folder`."""
    started = time.monotonic()
    while pids := family.look():
        waited = time.monotonic() - started
        if waited > _LIMIT_SECONDS:
            break
        if waited > _GRACE_SECONDS:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)


def _processes() -> dict[int, tuple[int, str]]:
    """Every process that is not a zombie: its parent and when it was started (clock ticks)."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent, *others = (entry / "stat").read_text().rpartition(")")[2].split()
            if state != "Z":
                found[int(entry.name)] = int(parent), others[17]
    return found


def _carries(pid: int, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False  # gone, or another user's


if __name__ == "__main__":
    main()
