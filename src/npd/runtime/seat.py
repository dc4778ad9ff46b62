"""The inside of a Ray actor: one worker's object, its log, and a name for each of its lives.

Ray starts an actor that died again by itself, with a fresh object in it. So each life has a name of
its own, and a request is answered in the life it is meant for only: a trainer that came back empty
must not go on as if it were the old one.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

from npd.runtime.host import Host
from npd.runtime.wire import Shipped, answer, configure_logging
from npd.world import ADDRESS


@dataclass(frozen=True, slots=True)
class Life:
    """One life of an actor: its name, where it is, and its process there."""

    name: str
    node: str
    pid: int

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.node}"


class Seat:
    """What Ray runs as an actor. Calls come one at a time."""

    def __init__(self, name: str, factory: bytes, log_file: str, folder: str) -> None:
        # Ctrl-C is the controller's to act on; Ray's own machinery ends us by other means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if Path(folder).is_dir():
            os.chdir(folder)  # where the run was started: relative paths mean the same
        _print_to(Path(log_file))
        configure_logging()
        os.environ[ADDRESS] = _address()
        self._life = Life(uuid.uuid4().hex, socket.gethostname(), os.getpid())
        self._host = Host(name, Shipped(factory), Path(log_file))

    def life(self) -> Life:
        """Which life this is."""
        return self._life

    def answer(self, life: str, request: bytes) -> bytes:
        """A pickled Reply or Failure; nothing if the request was meant for an earlier life."""
        return answer(self._host, request) if life == self._life.name else b""

    def close(self) -> None:
        """Let the object close itself."""
        self._host.close()


def _address() -> str:
    """How other machines of the cluster reach this one."""
    import ray

    address: str = ray.util.get_node_ip_address()
    return address


def _print_to(log_file: Path) -> None:
    """Append what is printed to the run's log, if this machine sees its folder; else Ray logs it.

    Below Python, so that libraries and a crash's last words are in it too.
    """
    if not log_file.parent.is_dir():
        return
    with log_file.open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
