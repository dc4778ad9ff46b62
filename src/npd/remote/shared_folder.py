"""Checks of a run's shared location: it is usable, belongs to the run, and is visible everywhere.

Promises: a location that cannot be used, belongs to another run, or is not visible to some machine
is reported in one line before any model loads. A run on one machine skips the checks.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from contextlib import suppress
from dataclasses import replace
from typing import Any

from npd.config import RunConfig
from npd.errors import ConfigError, RunError, WorkerLostError
from npd.remote.artifact_store import ArtifactStore, LocalStore, RemoteStore
from npd.remote.handshake import FOLDER, SharedFiles, WorkerBootstrap, not_shared
from npd.remote.objects import ObjectStore, check_usable
from npd.remote.sync import ArtifactSync
from npd.remote.worker_cache import cache_root
from npd.runtime import Factory, Runtime, Worker
from npd.store.files import read_json, remove
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.workers import Factory as WorkerFactory

MARK = "run.json"
# Their workers run on the controller's machine.
_HERE = ("inline", "local")


def check_shared(config: RunConfig, *, resume: bool) -> None:
    """Check that `runtime.shared` can be used from here and, for a new run, that it is free.

    Raises:
        ConfigError: the location cannot be used, or is not free.
    """
    url = config.shared_url
    if url is None:
        return
    check_usable(url)
    if not resume and ObjectStore(url).read(MARK) is not None:
        raise ConfigError(
            f"{url} holds a run already: resume it (--resume, in its run_dir), or choose another "
            "location (--set name=... or --set runtime.shared=...)"
        )


def open_artifacts(config: RunConfig, layout: RunLayout, ledger: Ledger) -> ArtifactStore:
    """Open the run's artifact store, and mark its location as this run's.

    Raises:
        ConfigError: the run was started with another location, or this one is another run's.
    """
    url, ours = config.shared_url, run_id(layout)
    if (url is None) != (ours is None):
        was = "its directory" if ours is None else "a URL"
        raise ConfigError(
            f"{layout.root} was started with its shards in {was}: resume with runtime.shared as it "
            "was"
        )
    if url is None:
        return LocalStore()
    remote = ObjectStore(url)
    mark = remote.read(MARK)
    if mark is None and next(iter(ledger.events()), None) is None:
        remote.write(MARK, json.dumps({"run": ours}).encode())
    elif mark is None or json.loads(mark).get("run") != ours:
        holds = "nothing" if mark is None else "another run"
        raise ConfigError(
            f"{url} holds {holds}, not the shards of {layout.root}: resume with runtime.shared and "
            "name as they were"
        )
    sync = ArtifactSync(remote, layout.root)
    for root in (layout.snapshots, layout.checkpoints):
        sync.remove_incomplete(root)
    return RemoteStore(sync)


def release_shared(config: RunConfig, layout: RunLayout, ours: str | None) -> None:
    """Remove the files of a run without results from its URL, the mark last.

    Nothing is removed if the location has another run's mark. A failed removal is not an error; the
    next start reports the remaining files.
    """
    if config.shared_url is None:
        return
    remote, names = (
        ObjectStore(config.shared_url, pauses=()),
        {path.name for path in layout.everything},
    )
    with suppress(RunError):
        if not is_marked(remote, ours):
            return
        left = [name for name in remote.names("") if name.removesuffix(".json") in names]
        for name in (*left, MARK):
            remote.remove(name)


def is_marked(remote: ObjectStore, run: str | None) -> bool:
    """Whether a location is marked as this run's."""
    mark = remote.read(MARK)
    with suppress(ValueError, AttributeError):
        return mark is not None and run is not None and json.loads(mark).get("run") == run
    return False


def run_id(layout: RunLayout) -> str | None:
    """The id that marks a run's location as its own; None for a run without one."""
    found = read_json(layout.config_json).get("shared")
    return None if found is None else str(found)


class HandshakeRuntime:
    """A runtime whose workers start with a handshake, because they may be on other machines."""

    def __init__(self, inner: Runtime, config: RunConfig, layout: RunLayout) -> None:
        self._inner, self._config, self._layout = inner, config, layout
        run = run_id(layout) or ""
        self._shared = SharedFiles(config.shared_url, run, secrets.token_hex(4))
        self._url = self._shared.url or f"file://{layout.root.absolute()}"
        self._workers: list[Worker] = []

    def spawn(self, name: str, factory: Factory, *, threads: int, **others: Any) -> Worker:
        """Start a worker; see `Runtime.spawn`."""
        assert isinstance(factory, WorkerFactory), "the run's workers only"
        here = replace(factory, root=factory.root.absolute())  # a worker's cwd may differ
        bootstrap = WorkerBootstrap(name, here, self._shared)
        worker = self._inner.spawn(name, bootstrap, threads=threads, **others)
        self._workers.append(worker)
        return worker

    async def close(self) -> None:
        """End every worker."""
        try:
            await self._inner.close()
        finally:
            self._clear()

    def _clear(self) -> None:
        """Remove the handshake objects, and the caches that workers on this machine left behind."""
        with suppress(RunError):
            ObjectStore(self._url, pauses=()).remove(FOLDER)
        if self._shared.url is not None and self._config.runtime.kind in _HERE:
            remove(cache_root(self._config.runtime.scratch, self._shared.run, "any").parent)

    async def handshake(self) -> None:
        """Perform the handshake with each worker.

        Raises:
            ConfigError: a worker does not see the controller's files, or the reverse.
        """
        remote, shared = ObjectStore(self._url), self._shared
        remote.remove(FOLDER)
        remote.write(shared.name_of("controller"), shared.session.encode())
        calls = (worker.call("handshake") for worker in self._workers)
        for worker, found in zip(
            self._workers, await asyncio.gather(*calls, return_exceptions=True), strict=True
        ):
            if isinstance(found, WorkerLostError):
                continue  # the worker repeats it after its restart
            if isinstance(found, BaseException):
                raise found
            if remote.read(shared.name_of(worker.name)) is None:
                root, url = self._layout.root, shared.url
                raise ConfigError(not_shared(worker.name, str(found.value), root, url))


async def check_handshake(runtime: Runtime) -> None:
    """Perform the handshake with each worker that may be on another machine.

    Raises:
        ConfigError: a worker does not see the run's files, or the reverse.
    """
    if isinstance(runtime, HandshakeRuntime):
        await runtime.handshake()


def with_handshake(runtime: Runtime, config: RunConfig, layout: RunLayout) -> Runtime:
    """`runtime`, with a handshake if its workers may be on other machines."""
    if config.shared_url is None and config.runtime.kind in _HERE:
        return runtime
    return HandshakeRuntime(runtime, config, layout)
