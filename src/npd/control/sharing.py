"""What must hold before workers exchange files: one place, this run's, seen by every machine.

Promises: a place that cannot be used, holds another run, or is not seen by some worker's machine is
one line before any model loads. Costs a run on one machine nothing.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from contextlib import suppress
from dataclasses import replace
from typing import Any

from npd.config import RunConfig
from npd.control.place import Elsewhere, Folder, Place
from npd.errors import ConfigError, RunError, WorkerLostError
from npd.runtime import Factory, Runtime, Worker
from npd.store.exchange import Exchange
from npd.store.files import read_json, remove
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.remote import Remote, check_usable
from npd.workers import Factory as WorkerFactory
from npd.workers.arrival import ARRIVALS, Arriving, Shared, not_seen
from npd.workers.scratch import scratch_root

MARK = "run.json"
# Workers of these live where the controller does.
_HERE = ("inline", "local")


def check_place(config: RunConfig, *, resume: bool) -> None:
    """Check that `runtime.shared` can be used from here, and for a new run that it is free.

    Raises:
        ConfigError: it cannot.
    """
    url = config.shared_url
    if url is None:
        return
    check_usable(url)
    if not resume and Remote(url).read(MARK) is not None:
        raise ConfigError(
            f"{url} holds a run already: go on with it (--resume, in its run_dir), or choose "
            "another place (--set name=... or --set runtime.shared=...)"
        )


def open_place(config: RunConfig, layout: RunLayout, ledger: Ledger) -> Place:
    """Where the run's files are exchanged, marked as its own.

    Raises:
        ConfigError: the run was started with another place, or this one is another run's.
    """
    url, ours = config.shared_url, run_id(layout)
    if (url is None) != (ours is None):
        was = "its directory" if ours is None else "a URL"
        raise ConfigError(
            f"{layout.root} was started with its shards in {was}: resume with runtime.shared as it "
            "was"
        )
    if url is None:
        return Folder()
    remote = Remote(url)
    mark = remote.read(MARK)
    if mark is None and next(iter(ledger.events()), None) is None:
        remote.write(MARK, json.dumps({"run": ours}).encode())
    elif mark is None or json.loads(mark).get("run") != ours:
        holds = "nothing" if mark is None else "another run"
        raise ConfigError(
            f"{url} holds {holds}, not the shards of {layout.root}: resume with runtime.shared and "
            "name as they were"
        )
    exchange = Exchange(remote, layout.root)
    for root in (layout.snapshots, layout.checkpoints):
        exchange.sweep(root)
    return Elsewhere(exchange)


def run_id(layout: RunLayout) -> str | None:
    """What marks the place of a run as its own; None of a run without one."""
    found = read_json(layout.config_json).get("shared")
    return None if found is None else str(found)


class Gathering:
    """A runtime whose workers may be elsewhere: each shows first that it sees the run's files."""

    def __init__(self, inner: Runtime, config: RunConfig, layout: RunLayout) -> None:
        self._inner, self._config, self._layout = inner, config, layout
        run = run_id(layout) or ""
        self._shared = Shared(config.shared_url, run, secrets.token_hex(4))
        self._place = self._shared.url or f"file://{layout.root.absolute()}"
        self._workers: list[Worker] = []

    def spawn(self, name: str, factory: Factory, *, threads: int, **others: Any) -> Worker:
        """Start a worker; see `Runtime.spawn`."""
        assert isinstance(factory, WorkerFactory), "the run's workers only"
        here = replace(factory, root=factory.root.absolute())  # a worker starts in its own folder
        arriving = Arriving(name, here, self._shared)
        worker = self._inner.spawn(name, arriving, threads=threads, **others)
        self._workers.append(worker)
        return worker

    async def close(self) -> None:
        """End every worker."""
        try:
            await self._inner.close()
        finally:
            self._clear()

    def _clear(self) -> None:
        """Remove the notes, and what workers of this machine left that could not close."""
        with suppress(RunError):
            Remote(self._place, pauses=()).remove(ARRIVALS)
        if self._shared.url is not None and self._config.runtime.kind in _HERE:
            remove(scratch_root(self._config.runtime.scratch, self._shared.run, "any").parent)

    async def prove(self) -> None:
        """Have each worker show that it sees what the controller does, and the controller it.

        Raises:
            ConfigError: one does not, or nobody can write there.
        """
        remote, shared = Remote(self._place), self._shared
        remote.remove(ARRIVALS)
        remote.write(shared.at("controller"), shared.word.encode())
        calls = (worker.call("arrive") for worker in self._workers)
        for worker, found in zip(
            self._workers, await asyncio.gather(*calls, return_exceptions=True), strict=True
        ):
            if isinstance(found, WorkerLostError):
                continue  # its next life begins with the same
            if isinstance(found, BaseException):
                raise found
            if remote.read(shared.at(worker.name)) is None:
                root, url = self._layout.root, shared.url
                raise ConfigError(not_seen(worker.name, str(found.value), root, url))


def gathered(runtime: Runtime, config: RunConfig, layout: RunLayout) -> Runtime:
    """`runtime`, whose workers show that they see the files, where that is not certain."""
    if config.shared_url is None and config.runtime.kind in _HERE:
        return runtime
    return Gathering(runtime, config, layout)
