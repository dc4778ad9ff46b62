"""A process between npd and a server it started, so that the server ends with npd whatever happens.

`python nanny.py FD COMMAND...` runs COMMAND in a process group of its own and ends that group, the
server's own children included, when the pipe FD closes (npd ended, even by kill -9), when it is
asked to (SIGTERM; SIGQUIT: at once, without the grace to end by itself), or when the server itself
ends; its exit code is the server's. When it has ended, so has all of the group, and what the group
held (memory, ports, temporary files) is free; shared memory too, which the system keeps of
processes that are killed: segments made since the start that the group had mapped and nobody else
has. Standard library only: it is run as a file, in whatever Python started npd.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import NoReturn

# What the server has to end by itself, and what its whole group has to be gone. npd waits for the
# nanny a little longer (`launch`), and whoever ends npd's worker longer still.
_GRACE_SECONDS, _GONE_SECONDS = 5.0, 7.0
_POLL_SECONDS = 0.2
_REAP_SECONDS = 0.02
# Reading the maps of a server's processes takes some milliseconds.
_LOOK_SECONDS = 2.0
_SHARED = "/dev/shm"
# By its number: a semaphore is mapped under another name than it has in the end.
_SEGMENT = re.compile(rf" (\d+) +{_SHARED}/")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(fd: int, command: list[str]) -> NoReturn:
    """Run `command` until it ends or `fd` closes; never returns."""
    stopped, grace = False, _GRACE_SECONDS

    def stop(number: int, _: object) -> None:
        nonlocal stopped, grace
        stopped = True
        grace = 0.0 if number == signal.SIGQUIT else grace

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, stop)
    _adopt_orphans()
    foreign, mapped, looked = set(_segments()), set[int](), time.monotonic()
    # Its sockets and temporary files: killed, it leaves them. Not torch's cache, which is for all.
    cache = os.path.join(tempfile.gettempdir(), f"torchinductor_{_user()}")
    place = tempfile.mkdtemp(prefix="npd-server-")
    environment = {"TORCHINDUCTOR_CACHE_DIR": cache, **os.environ, "TMPDIR": place}
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env={**environment, "VLLM_RPC_BASE_PATH": place},
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    while server.poll() is None and not stopped:
        stopped = bool(select.select([fd], [], [], _POLL_SECONDS)[0]) or stopped
        if time.monotonic() > looked + _LOOK_SECONDS:
            mapped |= _mapped(server.pid)
            looked = time.monotonic()
    mapped |= _mapped(server.pid)
    asked = time.monotonic()
    if server.poll() is None and grace:
        _signal_group(server.pid, signal.SIGTERM)
        while server.poll() is None and time.monotonic() < asked + grace:
            time.sleep(_POLL_SECONDS)
    # What the server started may outlive it: an engine process that waits for its parent, say.
    _signal_group(server.pid, signal.SIGKILL)
    status = server.wait()
    while _is_group(server.pid) and time.monotonic() < asked + _GONE_SECONDS:
        time.sleep(_REAP_SECONDS)
    shutil.rmtree(place, ignore_errors=True)
    for inode in mapped - foreign - _mapped():
        with suppress(OSError, KeyError):
            os.unlink(f"{_SHARED}/{_segments()[inode]}")
    sys.exit(128 - status if status < 0 else status)


def _user() -> str:
    """As torch names its cache."""
    try:
        return re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, ModuleNotFoundError, OSError):
        return f"uid_{os.getuid()}"


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _is_group(group: int) -> bool:
    """Whether anything of a group is left, once those of it that ended are reaped."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _segments() -> dict[int, str]:
    """The shared memory on this machine, names by inode (Linux; elsewhere none)."""
    try:
        with os.scandir(_SHARED) as found:
            return {entry.inode(): entry.name for entry in found}
    except OSError:
        return {}


def _mapped(group: int | None = None) -> set[int]:
    """The segments that a group's processes have mapped, or any that we may look at."""
    found: set[int] = set()
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with suppress(OSError):
            if group is None or os.getpgid(int(name)) == group:
                with open(f"/proc/{name}/maps", encoding="utf-8", errors="replace") as maps:
                    found.update(map(int, _SEGMENT.findall(maps.read())))
    return found


def _adopt_orphans() -> None:
    """On Linux, be the parent of what the server leaves behind, to see its end."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _die_with_parent() -> None:
    """On Linux, be ended when the nanny is (safe here: it has one thread)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
