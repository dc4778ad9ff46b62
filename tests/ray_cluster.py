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
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_urlsafe(32),
}


@contextmanager
def ray_cluster() -> Iterator[tuple[str, list[int]]]:
    """Its address, and the processes that hold it: two nodes, of two and of three CPUs.

    Neither has a GPU, whatever the machine has. Every worker can import what tests can.
    """
    options = {"prefix": "ray-", "dir": "/tmp", "ignore_cleanup_errors": True}
    with tempfile.TemporaryDirectory(**options) as place:
        port, client_port = _free_port(), _free_port()
        head = {
            "head": None, "port": port, "temp-dir": place, "num-cpus": 2,
            "include-dashboard": "false", "ray-client-server-port": client_port,
        }  # fmt: skip
        processes = []
        try:
            processes.append(_start(head, Path(place) / "head.log"))
            joined = {
                "address": f"127.0.0.1:{port}", "num-cpus": 3,
                "include-log-monitor": "false",  # one a machine is enough
            }  # fmt: skip
            processes.append(_start(joined, Path(place) / "node.log"))
            yield f"127.0.0.1:{port}", [process.pid for process in processes]
        finally:
            _kill_all_of(place, {process.pid for process in processes})
            for process in processes:
                process.wait(600)


def _start(options: dict[str, object], log: Path) -> subprocess.Popen:
    options = {**options, "num-gpus": 0, "object-store-memory": 128 * 2**20, "block": None}
    flags = [f"--{name}" + ("" if v is None else f"={v}") for name, v in options.items()]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *flags],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": ":".join([str(TESTS), *sys.path])},
            start_new_session=True,
        )
    _wait_for(process, log)
    return process


def _wait_for(process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        if "Ray runtime started" in log.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def _kill_all_of(place: str, roots: set[int]) -> None:
    """The cluster's processes: those that name its folder, and whatever descends from `roots`.

    `ray stop` would end every other Ray of this machine too.
    """
    parents, ours = {}, set(roots)
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
