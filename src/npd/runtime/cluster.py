"""The Ray cluster a run lives on: one that runs already, or one of this machine alone, ours to end.

Promises: what is started here listens on the loopback interface only, asks for a key that exists
for this process only, reports nothing to anyone, keeps its files in one temporary folder, and is
gone with this process, however that ends (`npd.runtime.janitor`). A Ray that this process is joined
to already (a notebook, a Ray job's script) is used as it is, and left as it was.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from npd.config import RayConfig
from npd.errors import ConfigError, RunError

# Requests and replies are small, shards are files; Ray's own default is 30 % of the memory.
_OBJECT_STORE_BYTES = 256 * 2**20
_PREFIX = "npd-ray-"
# Unix sockets have short names (107 bytes), and Ray's own part of one is long.
_LONGEST_PLACE = 20
_ANSWER_SECONDS = 10.0
_MARK = "NPD_RAY"
# Ray reads these as it is imported, so they stay for as long as this process does.
_GUARDED = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_urlsafe(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    # Keeps Ray to the loopback interface, on every system.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
_QUIET = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}


class Cluster:
    """This process joined to a Ray cluster. Raises ConfigError without Ray or a cluster."""

    def __init__(self, config: RayConfig) -> None:
        self._janitor: subprocess.Popen[str] | None = None
        self.name = config.address or "of this machine"
        is_early = "ray" not in sys.modules
        if config.address is None and is_early:
            os.environ.update(_GUARDED)
        self._ray = _import_ray()
        self._is_joined = not self._ray.is_initialized()
        if not self._is_joined:
            self.name = "that this process is joined to"
        elif config.address is not None:
            self._join(config.address)
        elif is_early or _GUARDED.items() <= os.environ.items():
            self._start()
        else:
            raise ConfigError(
                "Ray was imported before npd could keep a Ray of its own to this machine: call "
                "ray.init() first, give runtime.ray.address, or leave the import to npd"
            )
        _be_quiet()

    @property
    def is_ours(self) -> bool:
        """Whether it was started here, for this run."""
        return self._janitor is not None

    def resources(self) -> Mapping[str, float]:
        """What all its machines have together, e.g. CPU and GPU."""
        found: Mapping[str, float] = self._ray.cluster_resources()
        return found

    def free(self) -> Mapping[str, float]:
        """What of it nobody has taken."""
        found: Mapping[str, float] = self._ray.available_resources()
        return found

    def leave(self) -> None:
        """Leave it, or end it if it was started here; twice is fine."""
        if self._is_joined:
            self._ray.shutdown()
        self._is_joined = False
        if self._janitor is not None:
            self._janitor.communicate()
            self._janitor = None

    def _start(self) -> None:
        place = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_short_place())
        mark = secrets.token_urlsafe(32)
        self._janitor = _hire(mark, place)
        os.environ[_MARK] = mark
        # What a worker asks for decides its place among machines; on one there is no choice, so
        # the number of its cores must not keep any worker waiting.
        try:
            self._ray.init(
                address="local",
                num_cpus=1024,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=place,
                **_QUIET,
            )
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            self.leave()
            raise RunError(
                f"Ray could not be started on this machine: {_line(error)}; set runtime.kind: "
                "local to do without it"
            ) from error
        finally:
            del os.environ[_MARK]

    def _join(self, address: str) -> None:
        try:
            _check_answers(address)
            options = {} if address.startswith("ray://") else _QUIET
            self._ray.init(address=address, **options)
        except (ConnectionError, OSError, RuntimeError, ValueError, ImportError) as error:
            raise ConfigError(
                f"no Ray cluster at runtime.ray.address {address!r}: {_line(error)}; start one "
                "(ray start --head), correct the address, or leave it out for one on this machine"
            ) from error


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "runtime.kind ray needs Ray: pip install 'npd[ray]', or set runtime.kind: local"
        ) from error
    return ray


def _be_quiet() -> None:
    """Keep Ray from printing to the terminal whatever befalls a worker: npd says it, once.

    Ray has no setting for it (2.60). Where its insides look different, it prints.
    """
    from importlib import import_module

    with suppress(ImportError, AttributeError):
        worker: Any = import_module("ray._private.worker")
        worker.print_to_stdstream = lambda *_, **__: None


def _short_place() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual) <= _LONGEST_PLACE else "/tmp"


def _hire(mark: str, place: str) -> subprocess.Popen[str]:
    """A janitor that goes to work when this process is gone, or closes its pipe."""
    janitor = subprocess.Popen(
        [sys.executable, "-I", str(Path(__file__).with_name("janitor.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert janitor.stdin is not None
    janitor.stdin.write(f"{mark} {place}\n")
    janitor.stdin.flush()
    return janitor


def _check_answers(address: str) -> None:
    """Ray itself asks a dead address for a minute, and tells it all to the terminal."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return
    with socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS):
        pass


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
