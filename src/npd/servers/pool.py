"""The servers of one worker, those of its config or the one it started, and requests over them.

Consumes: jobs. Produces: a result for each, or the reason why there is none.
Waits for: the server that is free first. Unblocked by: its answer, its time limit, or its loss.

A refused request is final. An unanswered one is asked again, elsewhere if another server is free,
with growing pauses; a server that stays silent longer than `patience` is given up, and when none is
left that is an error (running servers) or the loss of the worker (its own server: then it is begun
again from nothing).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from npd.errors import RunError, WorkerLostError
from npd.served import ServedConfig
from npd.servers import EngineServer, Refused, Unavailable, build_server
from npd.servers.http import Client
from npd.servers.launch import ServerProcess, ServerSpec

Job = TypeVar("Job")
Result = TypeVar("Result")

# A request that fails this often on servers that are well is at fault itself.
_MAX_TRIES = 3
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0


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
        round_ = _Round(jobs, do, [_Member(server) for server in self.servers], self)
        while round_.is_unfinished:
            await round_.run(at_once, self._config.patience)
        return round_.results()


class _Member:
    """A server during one call of `ask`: how it fares."""

    def __init__(self, server: EngineServer) -> None:
        self.server = server
        self.lost: Unavailable | None = None
        self._mending = asyncio.Lock()
        self._mended_at = 0.0

    async def mend(
        self, error: Unavailable, failed_at: float, patience: float, check: Callable[[], None]
    ) -> bool:
        """Wait until the server is well again; whether it is. One of its lanes waits for all.

        `check` raises where there is nothing to wait for: an ended process shows a little late.
        """
        async with self._mending:
            if self._mended_at > failed_at:
                return True
            pause, deadline = _FIRST_PAUSE, time.monotonic() + patience
            while self.lost is None:
                await asyncio.sleep(pause)
                check()
                if await self.server.is_healthy():
                    self._mended_at = time.monotonic()
                    return True
                if time.monotonic() >= deadline:
                    self.lost = error
                pause = min(2 * pause, _LONGEST_PAUSE)
            return False


class _Round(Generic[Job, Result]):
    """The jobs of one call and what has become of them."""

    def __init__(
        self,
        jobs: Sequence[Job],
        do: Callable[[EngineServer, Job], Awaitable[Result]],
        members: list[_Member],
        pool: ServerPool,
    ) -> None:
        self._jobs, self._do, self._members, self._pool = jobs, do, members, pool
        self._waiting = deque(range(len(jobs)))
        self._tries = [0] * len(jobs)
        self._done: dict[int, Result | Refused | Unavailable] = {}

    @property
    def is_unfinished(self) -> bool:
        return len(self._done) < len(self._jobs)

    def results(self) -> list[Result | Refused | Unavailable]:
        return [self._done[i] for i in range(len(self._jobs))]

    async def run(self, at_once: int, patience: float) -> None:
        """Lanes over the servers that are left, until none has anything to do."""
        alive = [member for member in self._members if member.lost is None]
        if not alive:
            causes = "; ".join(str(member.lost) for member in self._members)
            if self._pool.is_ours:
                raise WorkerLostError(f"{causes}: it is begun again")
            raise RunError(
                f"no server is left that answers: {causes}. Nothing recorded is lost: bring one "
                "back and use --resume"
            )
        count = min(at_once, -(-len(self._waiting) // len(alive)))
        lanes = [
            asyncio.create_task(self._lane(member, patience))
            for member in alive
            for _ in range(count)
        ]
        try:
            await asyncio.gather(*lanes)
        finally:
            for lane in lanes:
                lane.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)

    async def _lane(self, member: _Member, patience: float) -> None:
        while self._waiting and member.lost is None:
            job = self._waiting.popleft()
            started = time.monotonic()
            try:
                self._done[job] = await self._do(member.server, self._jobs[job])
            except Refused as error:
                self._done[job] = error
            except Unavailable as error:
                self._pool.check(error)
                self._tries[job] += 1
                check = partial(self._pool.check, error)
                is_well = await member.mend(error, started, patience, check)
                if is_well and self._tries[job] >= _MAX_TRIES:
                    self._done[job] = error
                else:
                    self._waiting.append(job)
