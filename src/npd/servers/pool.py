"""The servers of one worker, those of its config or the one it started, and requests over them.

Promises: a server of ours that ends or hangs is a WorkerLostError, raised when nothing is left of
it, so that it is begun again from nothing; servers that run are asked on until none is left, but
one that let a request's time pass is asked nothing more. `lanes` says how jobs are spread.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from npd.errors import NpdError, WorkerLostError
from npd.served import ServedConfig
from npd.servers import Connection, EngineServer, Refused, Unavailable, build_server
from npd.servers.http import Client
from npd.servers.lanes import Job, NoServerLeft, Result, Round
from npd.servers.launch import POLL_SECONDS, ServerProcess, ServerSpec

# A few more connections than requests at once, for the calls that manage.
_SPARE_CONNECTIONS = 8

_log = logging.getLogger(__name__)


class ServerPool:
    """Servers to ask, and the ones to manage (each behind a load balancer, if there is one).

    `given_up` are those at `urls` that let a request's time pass, by name: neither asked nor
    managed any more.
    """

    def __init__(
        self, engine: str, config: ServedConfig, *, log: Path, refresh_timeout: float = 600.0
    ) -> None:
        self._engine, self._config, self._log = engine, config, log
        self._refresh_timeout = refresh_timeout
        self._process: ServerProcess | None = None
        self._client: Client | None = None
        self._is_up = asyncio.Event()
        self._is_up.set()
        self.servers: list[EngineServer] = []
        self.admins: list[EngineServer] = []
        self.given_up: dict[str, Unavailable] = {}

    @property
    def is_open(self) -> bool:
        """Whether it is in touch with its servers."""
        return self._client is not None

    @property
    def is_ours(self) -> bool:
        """Whether the server is one we start and end."""
        return self._config.launch is not None

    async def open(
        self, spec: ServerSpec, *, connections: int, admin_urls: Sequence[str] = ()
    ) -> None:
        """Start our server, or get in touch with those that run.

        Raises:
            ConfigError: there is nothing to start.
            WorkerLostError, RunError: our server was killed, or did not become ready.
        """
        if self.is_ours:
            self.servers = self.admins = [self._build(await self._start(spec, connections))]
            return
        urls, key = self._config.urls, os.environ.get(self._config.api_key_env, "")
        client = Client(key or None, connections=connections * len(urls) + _SPARE_CONNECTIONS)
        self._client = client

        def servers(urls: Sequence[str]) -> list[EngineServer]:
            left = [url for url in urls if url not in self.given_up]
            return [self._build(self._connect(client, url)) for url in left]

        self.servers = servers(urls)
        self.admins = servers(admin_urls) if admin_urls else self.servers

    async def reopen(self, spec: ServerSpec, *, connections: int) -> None:
        """End our server and start another; who holds the server's object goes on with it.

        Jobs that the old one is asked fail and are given to the new one.

        Raises:
            ConfigError, RunError: as `open`; then the pool is closed but for `close`.
        """
        assert self.is_ours, "servers at urls are not ours to start anew"
        process, client = self._process, self._client
        self._process = self._client = None
        self._is_up.clear()
        try:
            if process is not None:
                process.stop()
            connection = await self._start(spec, connections)
            for server in self.servers:
                server.move(connection)
        finally:
            self._is_up.set()
            if client is not None:
                await client.aclose()

    async def close(self) -> None:
        """Let go of the connections; end our server."""
        process, client = self._process, self._client
        self._process = self._client = None
        self.servers, self.admins = [], []
        try:
            if client is not None:
                await client.aclose()
        finally:
            if process is not None:
                process.stop()

    async def release(self) -> None:
        """Have every server that answers take requests again."""
        released = [admin.release() for admin in self.admins]
        for error in await asyncio.gather(*released, return_exceptions=True):
            if isinstance(error, BaseException) and not isinstance(error, NpdError):
                raise error

    def check(self, error: Unavailable) -> None:
        """Raise WorkerLostError where our own server has ended, or hangs; then it has ended."""
        if self._process is None:
            return
        self._process.check()
        if error.timed_out:
            self._process.stop(at_once=True)
            raise WorkerLostError(f"{error}: it hangs and is begun again, see {self._process.log}")

    def gives_up(self, server: EngineServer, error: Unavailable) -> bool:
        """Whether `server` is to be asked nothing more after `error`; it is remembered."""
        if self.is_ours or not error.timed_out:
            return False
        if server.name not in self.given_up:
            self.given_up[server.name] = error
            _log.warning("%s: it is asked nothing more, its work goes to the others", error)
            self.servers = [other for other in self.servers if other.name != server.name]
            self.admins = [other for other in self.admins if other.name != server.name]
        return True

    async def until_up(self) -> None:
        """Wait while our server is being started anew."""
        await self._is_up.wait()

    async def ask(
        self,
        jobs: Sequence[Job],
        do: Callable[[EngineServer, Job], Awaitable[Result]],
        *,
        at_once: int,
    ) -> list[Result | Refused | Unavailable]:
        """`do` each job on whichever server is free, `at_once` jobs a server; results in order.

        A job that a server refuses, or that keeps failing on servers that are well, has its error
        as its result.

        Raises:
            WorkerLostError: our own server ended or hangs.
            RunError: no server answers any more.
        """
        if not jobs:
            return []
        try:
            return await Round(jobs, do, self).run(at_once, self._config.patience)
        except NoServerLeft as error:
            if not self.is_ours:
                raise
            if self._process is not None:
                self._process.stop(at_once=True)
            raise WorkerLostError(f"{error.causes}: it is begun again") from error

    async def _start(self, spec: ServerSpec, connections: int) -> Connection:
        """Start a server of ours; the connection to it, once it is ready."""
        assert self._config.launch is not None
        process = ServerProcess(self._engine, self._config.launch, spec, self._log)
        with ExitStack() as undo:
            undo.callback(process.stop)  # also where this is cancelled
            process.begin()
            while not process.is_ready():  # noqa: ASYNC110 - a process gives no notice
                await asyncio.sleep(POLL_SECONDS)
            undo.pop_all()
        self._process = process
        self._client = Client(process.key, connections=connections + _SPARE_CONNECTIONS)
        return self._connect(self._client, process.url)

    def _connect(self, client: Client, url: str) -> Connection:
        return client.connect(url, timeout=self._config.request_timeout)

    def _build(self, connection: Connection) -> EngineServer:
        return build_server(self._engine, connection, refresh_timeout=self._refresh_timeout)
