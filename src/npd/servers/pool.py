"""The servers of one worker, those of its config or the one it started, and requests over them.

Promises: a server of ours that ends or hangs is a WorkerLostError, so that it is begun again from
nothing; servers that run are asked on until none is left. `lanes` says how jobs are spread.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from npd.errors import NpdError, WorkerLostError
from npd.served import ServedConfig
from npd.servers import EngineServer, Refused, Unavailable, build_server
from npd.servers.http import Client
from npd.servers.lanes import Job, NoServerLeft, Result, Round
from npd.servers.launch import ServerProcess, ServerSpec


class ServerPool:
    """Servers to ask, and the ones to manage (each behind a load balancer, if there is one)."""

    def __init__(
        self, engine: str, config: ServedConfig, *, log: Path, refresh_timeout: float = 600.0
    ) -> None:
        self._engine, self._config, self._log = engine, config, log
        self._refresh_timeout = refresh_timeout
        self._process: ServerProcess | None = None
        self._client: Client | None = None
        self.servers: list[EngineServer] = []
        self.admins: list[EngineServer] = []

    @property
    def is_open(self) -> bool:
        """Whether there are servers to ask."""
        return bool(self.servers)

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
            RunError: our server did not become ready.
        """
        if self._config.launch is not None:
            self._process = ServerProcess(self._engine, self._config.launch, spec, self._log)
            self._process.start()
            urls, admin_urls, key = [self._process.url], (), self._process.key
        else:
            urls, key = list(self._config.urls), os.environ.get(self._config.api_key_env, "")
        # A few more than requests at once, for the calls that manage.
        client = Client(key or None, connections=connections * len(urls) + 8)
        self._client = client

        def server(url: str) -> EngineServer:
            connection = client.connect(url, timeout=self._config.request_timeout)
            return build_server(self._engine, connection, refresh_timeout=self._refresh_timeout)

        self.servers = [server(url) for url in urls]
        self.admins = [server(url) for url in admin_urls] or self.servers

    async def close(self) -> None:
        """Let go of the connections; end our server."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        self.servers, self.admins = [], []
        if self._process is not None:
            self._process.stop()
            self._process = None

    async def release(self) -> None:
        """Have every server that answers take requests again."""
        released = [admin.release() for admin in self.admins]
        for error in await asyncio.gather(*released, return_exceptions=True):
            if isinstance(error, BaseException) and not isinstance(error, NpdError):
                raise error

    def check(self, error: Unavailable) -> None:
        """Raise WorkerLostError where our own server has ended, or hangs."""
        if self._process is None:
            return
        self._process.check()
        if error.timed_out:
            raise WorkerLostError(f"{error}: it hangs and is begun again, see {self._process.log}")

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
        round_ = Round(jobs, do, self.servers, self.check)
        try:
            return await round_.run(at_once, self._config.patience)
        except NoServerLeft as error:
            if self.is_ours:
                raise WorkerLostError(f"{error.causes}: it is begun again") from error
            raise
