"""How a worker that may be on another machine starts: it shows that it sees the run's files.

The controller puts a word where files are exchanged: at `runtime.shared`, or else in the run
directory. A worker reads it and leaves one of its own, which the controller reads, before any model
loads; again in each later life of the worker, wherever that is.
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
from npd.store.exchange import Exchange
from npd.store.layout import RunLayout
from npd.store.remote import Remote
from npd.workers import Factory
from npd.workers.scratch import Scratch, scratch_root

ARRIVALS = "arrivals"
# A mounted folder may show a new file late.
_PATIENCE, _PAUSE = 3.0, 0.2


@dataclass(frozen=True, slots=True)
class Shared:
    """Where a run's files are exchanged: `url` (None: its directory), and the id of the run."""

    url: str | None
    run: str
    word: str
    """Names this session of the controller; all leave a note each in `arrivals/<word>/`."""

    def at(self, who: str) -> str:
        """The name of somebody's note."""
        return f"{ARRIVALS}/{self.word}/{who}"


@dataclass(frozen=True, slots=True)
class Arriving:
    """Builds worker `name` of `factory` in its process, once it has arrived."""

    name: str
    factory: Factory
    shared: Shared

    def __call__(self) -> Arrived:
        """The worker, its models not loaded yet."""
        return Arrived(self.name, self.factory, self.shared)


class Arrived:
    """A worker that looks for the run's files first, and is the factory's from then on."""

    def __init__(self, name: str, factory: Factory, shared: Shared) -> None:
        self._name, self._factory, self._shared = name, factory, shared
        self._scratch: Scratch | None = None
        self._layout: RunLayout | None = None
        self._worker: object | None = None

    def arrive(self) -> str:
        """Show that this machine sees what the controller sees; returns the machine's name.

        Raises:
            ConfigError: it does not, or has not what it takes.
            RunError: the place does not answer it.
        """
        host, root, shared = socket.gethostname(), self._factory.root, self._shared
        try:
            remote = Remote(shared.url or f"file://{root}")
            has_seen = _wait_for(lambda: remote.read(shared.at("controller")))
            if has_seen:
                remote.write(shared.at(self._name), host.encode())
        except (ConfigError, RunError) as error:
            raise type(error)(f"worker {self._name} on {host}: {error}") from error
        if not has_seen:
            raise ConfigError(not_seen(self._name, host, root, shared.url))
        self._layout = RunLayout(root) if shared.url is None else self._open_scratch(remote)
        return host

    def close(self) -> None:
        """Let the worker close itself; its scratch directory goes."""
        close = getattr(self._worker, "close", None)
        try:
            if close is not None:
                close()
        finally:
            self._put_logs()
            if self._scratch is not None:
                self._scratch.close()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        """A method of the worker; what it wrote is where all see it before it returns."""
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
            if self._scratch is not None:
                self._scratch.settle()
            return value

        return call

    def _build(self) -> object:
        if self._layout is None:
            self.arrive()
        assert self._layout is not None
        return self._factory.build(self._layout)

    def _open_scratch(self, remote: Remote) -> RunLayout:
        chosen = self._factory.config.runtime.scratch
        root = scratch_root(chosen, self._shared.run, self._name)
        self._scratch = Scratch(root, Exchange(remote, root))
        return self._scratch.open()

    def _put_logs(self) -> None:
        """Logs of servers, for people: at the URL, because this machine is not theirs."""
        if self._scratch is None:
            return
        with suppress(RunError):
            self._scratch.put_logs(self._name)


def not_seen(worker: str, host: str, root: Path, url: str | None) -> str:
    """The line for a worker that does not see what the controller wrote, or the reverse."""
    if url is None:
        return (
            f"worker {worker} on {host} does not share the run directory {root} with the "
            "controller: mount one folder there on every machine, or set runtime.shared to a URL"
        )
    return (
        f"worker {worker} on {host} does not find what the controller wrote at {url}: all machines "
        "must mean one place by it (same endpoint and account; memory:// is each process's own)"
    )


def _wait_for(look: Callable[[], bytes | None]) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while look() is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
    return True
