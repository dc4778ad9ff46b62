"""A process between npd and a launched server. It ends the server when npd ends, for any reason.

`python supervisor.py FD [COMMAND...]` runs COMMAND in a new process group. It ends COMMAND and all
its descendants, in any group or session, as soon as one of these happens:

- the pipe FD closes because npd ended, even by kill -9,
- the parent process is gone,
- a signal arrives (SIGTERM; SIGQUIT skips the grace period),
- the server exits.

The exit code is the server's. When the supervisor has exited, all processes of the server are gone
and their memory, ports and temporary files are free, including shared memory that killed processes
leave behind: segments created since the start and mapped by the server's processes alone. No other
process is ever ended.

Without a COMMAND it reads an `Order` from FD as a line of JSON, because every user can read a
command line. Standard library only: it runs as a script, in the Python that runs npd.
"""

from __future__ import annotations

import ctypes
import getpass
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import IO, Any, NoReturn, TypedDict

# Time limits for the server's clean exit, and for the end of all its processes. npd waits slightly
# longer for the supervisor (`process`), and a runtime waits longer still for the worker.
_GRACE_SECONDS, _GONE_SECONDS = 5.0, 7.0
_POLL_SECONDS = 0.2
_REAP_SECONDS = 0.02
# Interval between looks at the server's memory maps; a look takes some milliseconds.
_LOOK_SECONDS = 2.0
_SHARED = "/dev/shm"
# Matches the inode, because a semaphore is mapped under a temporary name.
_SEGMENT = re.compile(rf" (\d+) +{_SHARED}/")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# Longer log lines are written in parts.
_LINE_BYTES = 65536
_HIDDEN = b"***"


class Order(TypedDict):
    """The command to run for the process `parent`.

    The output goes to the file `log`, without the `secrets`. `settings` are secret flags; they
    reach the server through a file that only its user can read.
    """

    parent: int
    command: list[str]
    log: str
    secrets: list[str]
    settings: dict[str, str]


class _Stop:
    """Whether to end the server, and its grace period in seconds."""

    def __init__(self) -> None:
        self.is_requested, self.grace = False, _GRACE_SECONDS
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, self._request)

    def _request(self, number: int, _: object) -> None:
        self.is_requested = True
        self.grace = 0.0 if number == signal.SIGQUIT else self.grace


def main(fd: int, command: list[str]) -> NoReturn:
    """Run `command`, or the command of the order, until it exits or `fd` closes; never returns."""
    stop = _Stop()
    _adopt_orphans()
    order = _read_order(fd, command)
    # For the server's sockets and temporary files, which a killed server leaves behind.
    directory = tempfile.mkdtemp(prefix="npd-server-")
    try:
        sys.exit(_supervise(fd, order, directory, stop))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _read_order(fd: int, command: list[str]) -> Order:
    """The order from `command` or `fd`; exits if npd ended before it sent the whole order."""
    if command:
        parent = os.getppid()
        return Order(parent=parent, command=command, log="", secrets=[], settings={})
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(fd, _LINE_BYTES)
        if not part:
            sys.exit(1)
        line += part
    order: Order = json.loads(line)
    return order


def _supervise(fd: int, order: Order, directory: str, stop: _Stop) -> int:
    """Run the server, end its remaining processes and free its memory; returns the exit code."""
    foreign, mapped, looked = set(_segments()), set[int](), time.monotonic()
    server = _start(order, directory)
    copier = _copy_output(server, order)
    while server.poll() is None and not stop.is_requested:
        is_closed = bool(select.select([fd], [], [], _POLL_SECONDS)[0])
        stop.is_requested |= is_closed or os.getppid() != order["parent"]
        if time.monotonic() > looked + _LOOK_SECONDS:
            mapped |= _mapped(_descendants())
            looked = time.monotonic()
    mapped |= _mapped(_descendants())
    status = _end(server, stop)
    if copier is not None:
        copier.join(1.0)
    for inode in mapped - foreign - _mapped():
        with suppress(OSError, KeyError):
            os.unlink(f"{_SHARED}/{_segments()[inode]}")
    return 128 - status if status < 0 else status


def _start(order: Order, directory: str) -> subprocess.Popen[bytes]:
    # Torch's compile cache stays in its usual directory, to be shared with later processes.
    cache = os.path.join(tempfile.gettempdir(), f"torchinductor_{_user()}")
    environment = {"TORCHINDUCTOR_CACHE_DIR": cache, **os.environ, "TMPDIR": directory}
    command = list(order["command"])
    if order["settings"]:
        path = os.path.join(directory, "settings.yaml")  # JSON is valid YAML
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(order["settings"], file)
        command += ["--config", path]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if order["log"] else None,
        stderr=subprocess.STDOUT if order["log"] else None,
        env={**environment, "VLLM_RPC_BASE_PATH": directory},
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )


def _end(server: subprocess.Popen[bytes], stop: _Stop) -> int:
    """End the server and its descendants, first by SIGTERM; returns the server's exit status."""
    started = time.monotonic()
    if server.poll() is None and stop.grace:
        _signal_group(server.pid, signal.SIGTERM)
        while server.poll() is None and time.monotonic() < started + stop.grace:
            time.sleep(_POLL_SECONDS)
    # A child of the server may outlive it, e.g. an engine process that waits for its parent.
    _signal_group(server.pid, signal.SIGKILL)
    status = server.wait()
    deadline = started + _GONE_SECONDS
    while (remaining := _remaining(server.pid)) is not None and time.monotonic() < deadline:
        kill(remaining)
        time.sleep(_REAP_SECONDS)
    return status


def _remaining(group: int) -> dict[int, str] | None:
    """Reap ended processes; returns the live descendants, or None if no process remains."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    found = _descendants()
    return found if found or _is_group(group) else None


def end_marked(mark: str) -> None:
    """End all processes with `mark` in their environment, and their descendants (Linux)."""
    deadline = time.monotonic() + _GONE_SECONDS
    while (found := _marked(mark.encode())) and time.monotonic() < deadline:
        kill(found)
        time.sleep(_REAP_SECONDS)


def _marked(mark: bytes) -> dict[int, str]:
    def has_mark(pid: int) -> bool:
        with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
            return mark in file.read().split(b"\0")
        return False

    every = _processes()
    roots = [pid for pid in every if pid != os.getpid() and has_mark(pid)]
    return {pid: every[pid][1] for pid in _tree(every, roots)}


def _descendants() -> dict[int, str]:
    """The start time of each descendant of this process, by pid (Linux)."""
    every = _processes()
    own = os.getpid()
    return {pid: every[pid][1] for pid in _tree(every, [own]) - {own}}


def _tree(every: Mapping[int, tuple[int, str]], roots: Collection[int]) -> set[int]:
    """The existing `roots` and all their descendants."""
    found = set(roots) & set(every)
    while more := {pid for pid, (parent, _) in every.items() if parent in found} - found:
        found |= more
    return found


def _processes() -> dict[int, tuple[int, str]]:
    """The parent and start time of each running process, by pid (Linux; elsewhere empty)."""
    found: dict[int, tuple[int, str]] = {}
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        state, parent, started = _stat(int(name))
        if state not in "ZX":
            found[int(name)] = int(parent), started
    return found


def _stat(pid: int) -> tuple[str, str, str]:
    """The state, parent and start time of a process; a missing process has state X."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return fields[0], fields[1], fields[19]
    except (OSError, IndexError):
        return "X", "0", ""


def kill(processes: Mapping[int, str]) -> None:
    """Kill processes, given by pid and start time; a reused pid has another start time."""
    for pid, started in processes.items():
        with suppress(OSError):
            handle = _handle(pid)
            try:
                if _stat(pid)[2] != started:
                    continue
                if handle is None:
                    os.kill(pid, signal.SIGKILL)
                else:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                if handle is not None:
                    os.close(handle)


def _handle(pid: int) -> int | None:
    """A pidfd, which identifies the process even if its pid is reused; None on older kernels."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except (AttributeError, OSError):
        return None


def _copy_output(server: subprocess.Popen[bytes], order: Order) -> threading.Thread | None:
    """Copy the server's output to its log, without the secrets, until every writer has exited."""
    if server.stdout is None:
        return None
    hidden = [found for secret in order["secrets"] if (found := _bytes(secret))]
    source = server.stdout
    copier = threading.Thread(target=_copy, args=(source, order["log"], hidden), daemon=True)
    copier.start()
    return copier


def _bytes(text: str) -> bytes:
    """A text in the file system's encoding; empty if it cannot be encoded."""
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:
        return b""


def _copy(source: IO[bytes], path: str, hidden: list[bytes]) -> None:
    while line := source.readline(_LINE_BYTES):
        for secret in hidden:
            line = line.replace(secret, _HIDDEN)
        # With a full disk or a removed log the line is lost, but the server keeps running.
        with suppress(OSError), open(path, "ab", buffering=0) as log:
            log.write(line)


def _user() -> str:
    """The user's name as it appears in the name of torch's cache."""
    try:
        return re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, ModuleNotFoundError, OSError):
        return f"uid_{os.getuid()}"


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _is_group(group: int) -> bool:
    """Whether a process group has a member."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _segments() -> dict[int, str]:
    """The shared memory segments of this machine, names by inode (Linux; elsewhere empty)."""
    try:
        with os.scandir(_SHARED) as found:
            return {entry.inode(): entry.name for entry in found}
    except OSError:
        return {}


def _mapped(processes: Collection[int] | None = None) -> set[int]:
    """The segments mapped by `processes`, by default all that this user may inspect."""
    found: set[int] = set()
    for pid in _processes() if processes is None else processes:
        with (
            suppress(OSError),
            open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps,
        ):
            found.update(map(int, _SEGMENT.findall(maps.read())))
    return found


def _adopt_orphans() -> None:
    """On Linux, become the parent of orphaned descendants, to kill and reap them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _die_with_parent() -> None:
    """On Linux, die with the supervisor (a safe preexec_fn: it has one thread at this point)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    with suppress(OSError, AttributeError):
        call: Any = ctypes.CDLL(None).prctl
        call(option, value)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
