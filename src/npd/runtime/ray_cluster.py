"""The connection to a running Ray cluster, from the start of a run to its end.

Promises: starts no cluster and ends none. If this process is connected to a cluster already (a
notebook, a Ray job's script), that connection is used and stays open.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from npd.config import RayConfig
from npd.errors import ConfigError

_CONNECT_SECONDS = 10.0
_QUIET = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
_REMEDY = "start one (ray start --head) and set runtime.ray.address: auto"
_LOCAL = "or set runtime.kind: local, which needs none"


class Cluster:
    """This process's connection to a cluster. Raises ConfigError without Ray or a cluster."""

    def __init__(self, config: RayConfig) -> None:
        self.name, address = cluster_address(config), config.address or _from_environment()
        self._ray = _import_ray()
        self._is_joined = not self._ray.is_initialized()
        if self._is_joined:
            assert address is not None
            self._join(address)
        _be_quiet()

    def resources(self) -> Mapping[str, float]:
        """The total resources of all machines, e.g. CPU and GPU."""
        found: Mapping[str, float] = self._ray.cluster_resources()
        return found

    def free(self) -> Mapping[str, float]:
        """The free resources of all machines."""
        found: Mapping[str, float] = self._ray.available_resources()
        return found

    def leave(self) -> None:
        """Disconnect, if this object connected; may be called twice."""
        if self._is_joined:
            self._ray.shutdown()
        self._is_joined = False

    def _join(self, address: str) -> None:
        try:
            _check_port(address)
            self._ray.init(address=address, **_QUIET)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"no Ray cluster at {self.name}: {_line(error)}; correct the address, start a "
                f"cluster (ray start --head), {_LOCAL}"
            ) from error


def cluster_address(config: RayConfig) -> str:
    """A description of the cluster for messages: the setting and its address. Does not connect.

    Raises:
        ConfigError: neither `runtime.ray.address` nor RAY_ADDRESS names a cluster.
    """
    if _is_initialized():
        return "the address that this process has joined"
    if config.address is not None:
        return f"runtime.ray.address {config.address!r}"
    address = _from_environment()
    if address is None:
        raise ConfigError(
            "runtime.kind ray joins a running Ray cluster, and neither runtime.ray.address nor "
            f"RAY_ADDRESS names one: {_REMEDY}, {_LOCAL}"
        )
    if address == "local" or address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS {address!r} is not the address of a cluster that this machine is part "
            f"of: give auto or HOST:PORT, {_LOCAL}"
        )
    return f"RAY_ADDRESS {address!r}"


def _from_environment() -> str | None:
    return os.environ.get("RAY_ADDRESS") or None


def _is_initialized() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "runtime.kind ray needs Ray: pip install 'npd[ray]', or set runtime.kind: local"
        ) from error
    return ray


def _be_quiet() -> None:
    """Keep Ray from printing every worker's failure to the terminal; npd reports it once.

    Ray 2.60 has no setting for it, so this uses its internals; if they change, Ray prints again.
    """
    from importlib import import_module

    with suppress(ImportError, AttributeError):
        worker: Any = import_module("ray._private.worker")
        worker.print_to_stdstream = lambda *_, **__: None


def _check_port(address: str) -> None:
    """Fail at once if no process listens, because Ray retries for a minute and logs each try."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return
    with socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS):
        pass


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
