"""A Ray cluster of this machine for tests, started as an operator would; it ends with them."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TESTS = Path(__file__).parent
ENVIRONMENT = {
    # Keeps Ray to the loopback interface; there is no other machine.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_urlsafe(32),
}


@contextmanager
def ray_cluster(**resources: float) -> Iterator[tuple[str, int]]:
    """Its address, and the process that holds it. Every worker can import what tests can."""
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
    ) as place:
        port = _free_port()
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        options = {
            "port": port,
            "num-cpus": 64,
            "include-dashboard": "false",
            "temp-dir": place,
            "object-store-memory": 256 * 2**20,
            "ray-client-server-port": _free_port(),
            **resources,
        }
        command += [f"--{name}={value}" for name, value in options.items()]
        log = Path(place) / "start.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ
                | ENVIRONMENT
                | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
                start_new_session=True,
            )
        try:
            _wait_for(port, process, log)
            yield f"127.0.0.1:{port}", process.pid
        finally:
            _kill_all_of(place, process.pid)
            process.wait(20)


def _wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        if "Ray runtime started" in log.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def _kill_all_of(place: str, root: int) -> None:
    """The cluster's processes: those that name its folder, and whatever descends from `root`.

    `ray stop` would end every other Ray of this machine too.
    """
    parents, ours = {}, {root}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            pid = int(entry.name)
            parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if place.encode() in (entry / "cmdline").read_bytes():
                ours.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    for pid in ours:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
