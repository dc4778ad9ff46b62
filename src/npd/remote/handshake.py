"""The handshake, by which a worker proves that it sees the same files as the controller.

The controller writes an object to `runtime.shared`, or to the run directory. Before any model
loads, each worker reads it and writes an object of its own, which the controller reads. A restarted
worker repeats the handshake, because it may be on another machine.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npd.errors import ConfigError, NpdError, RunError
from npd.remote.objects import ObjectStore
from npd.remote.sync import ArtifactSync
from npd.remote.worker_cache import WorkerCache, cache_root
from npd.store.layout import RunLayout
from npd.workers import Factory

FOLDER = "arrivals"
# A mounted folder may show a new file with a delay.
_PATIENCE, _PAUSE = 3.0, 0.2


@dataclass(frozen=True, slots=True)
class SharedFiles:
    """The location of a run's shared files: `url` (None: the run directory), and the run's id."""

    url: str | None
    run: str
    session: str
    """The id of this start of the controller; each party writes `arrivals/<session>/<name>`."""

    def name_of(self, party: str) -> str:
        """The name of one party's object."""
        return f"{FOLDER}/{self.session}/{party}"


@dataclass(frozen=True, slots=True)
class WorkerBootstrap:
    """Builds worker `name` of `factory` in its process, behind the handshake."""

    name: str
    factory: Factory
    shared: SharedFiles

    def __call__(self) -> HandshakeWorker:
        """The worker, its models not loaded yet."""
        return HandshakeWorker(self.name, self.factory, self.shared)


class HandshakeWorker:
    """A proxy of the factory's worker that performs the handshake before the first call."""

    def __init__(self, name: str, factory: Factory, shared: SharedFiles) -> None:
        self._name, self._factory, self._shared = name, factory, shared
        self._cache: WorkerCache | None = None
        self._layout: RunLayout | None = None
        self._worker: object | None = None

    def handshake(self) -> str:
        """Prove that this machine sees the controller's files; returns the machine's name.

        Raises:
            ConfigError: it does not see them, or a package for the URL is missing.
            RunError: the store cannot be reached from here.
        """
        host, root, shared = socket.gethostname(), self._factory.root, self._shared
        try:
            remote = ObjectStore(shared.url or f"file://{root}")
            is_shared = _wait_for(lambda: remote.read(shared.name_of("controller")))
            if is_shared:
                remote.write(shared.name_of(self._name), host.encode())
        except (ConfigError, RunError) as error:
            raise type(error)(f"worker {self._name} on {host}: {error}") from error
        if not is_shared:
            raise ConfigError(not_shared(self._name, host, root, shared.url))
        self._layout = RunLayout(root) if shared.url is None else self._open_cache(remote)
        return host

    def close(self) -> None:
        """Close the worker and remove its cache directory."""
        close = getattr(self._worker, "close", None)
        try:
            if close is not None:
                close()
        finally:
            self._put_logs()
            if self._cache is not None:
                self._cache.close()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        """A method of the worker; files that it writes are uploaded before it returns."""
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*args: Any) -> Any:
            if self._worker is None:
                self._worker = self._build()
            try:
                value = getattr(self._worker, method)(*args)
            except NpdError:
                self._put_logs()
                raise
            if self._cache is not None:
                self._cache.end_call()
            return value

        return call

    def _build(self) -> object:
        if self._layout is None:
            self.handshake()
        assert self._layout is not None
        return self._factory.build(self._layout)

    def _open_cache(self, remote: ObjectStore) -> RunLayout:
        chosen = self._factory.config.runtime.scratch
        root = cache_root(chosen, self._shared.run, self._name)
        self._cache = WorkerCache(root, ArtifactSync(remote, root))
        return self._cache.open()

    def _put_logs(self) -> None:
        """Upload the logs of servers to the URL, for people to read."""
        if self._cache is None:
            return
        with suppress(RunError):
            self._cache.put_logs(self._name)


def not_shared(worker: str, host: str, root: Path, url: str | None) -> str:
    """The error of a worker that does not see the controller's files, or the reverse."""
    if url is None:
        return (
            f"worker {worker} on {host} does not share the run directory {root} with the "
            "controller: mount one folder there on every machine, or set runtime.shared to a URL"
        )
    return (
        f"worker {worker} on {host} does not find the controller's files at {url}: give a URL that "
        "is the same storage on all machines (same endpoint and account; memory:// never is)"
    )


def _wait_for(look: Callable[[], bytes | None]) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while look() is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
    return True
