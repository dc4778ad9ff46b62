"""A process between npd and a server it started, so that the server ends with npd whatever happens.

`python nanny.py FD COMMAND...` runs COMMAND in a process group of its own and ends that group, the
server's own children included, when the pipe FD closes (npd ended, even by kill -9), when it is
asked to (SIGTERM), or when the server itself ends; its exit code is the server's. Standard library
only: it is run as a file, in whatever Python started npd.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import NoReturn

_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


def main(fd: int, command: list[str]) -> NoReturn:
    """Run `command` until it ends or `fd` closes; never returns."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent
    )
    while server.poll() is None and not stopped:
        stopped = bool(select.select([fd], [], [], _POLL_SECONDS)[0]) or stopped
    if server.poll() is None:
        _signal_group(server.pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        while server.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    # What the server started may outlive it: an engine process that waits for its parent, say.
    _signal_group(server.pid, signal.SIGKILL)
    status = server.wait()
    sys.exit(128 - status if status < 0 else status)


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _die_with_parent() -> None:
    """On Linux, be ended when the nanny is (safe here: it has one thread)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
