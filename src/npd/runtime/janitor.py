"""Cleans up after a Ray that npd started, however npd itself ended: a program of its own.

Consumes its standard input: one line with a mark and a folder, then nothing until the end of file,
which comes when the process that started it closes the pipe or is gone. Then it ends every process
that carries the mark in its environment (a secret made for this one Ray, so it is ours for sure)
and removes the folder. Ray's own agents would stay for minutes otherwise (2.60).
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

# For Ray to end by itself, and for what was killed to be gone.
_GRACE_SECONDS, _LIMIT_SECONDS, _POLL_SECONDS = 1.0, 10.0, 0.05


def main() -> None:
    """Wait for the end of the process that started this one, then clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    mark, _, folder = sys.stdin.readline().rstrip("\n").partition(" ")
    sys.stdin.read()
    clean(mark.encode(), Path(folder))


def clean(mark: bytes, folder: Path) -> None:
    """End all processes that carry `mark` in their environment and remove `folder`."""
    started = time.monotonic()
    while marked := _marked(mark):
        waited = time.monotonic() - started
        if waited > _LIMIT_SECONDS:
            break
        if waited > _GRACE_SECONDS:
            for pid in marked:
                _kill(pid)
        time.sleep(_POLL_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)


def _marked(mark: bytes) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        try:
            if pid != os.getpid() and mark in (entry / "environ").read_bytes():
                found.append(pid)
        except OSError:
            continue  # gone, or another user's
    return found


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
