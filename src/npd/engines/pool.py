"""The servers of one worker, and the scheduling of requests over them.

A worker uses the running servers at `urls`, or launches one server of its own. Promises: if the
launched server exits or hangs, all its processes are ended and then a WorkerLostError is raised, so
that the server can be restarted. A server at `urls` that exceeds a request's time limit gets no
more requests; the others continue until none is left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from npd.config.base import ServedConfig
from npd.engines import Connection, EngineServer, Refused, Unavailable, build_server
from npd.engines.client import KEY_STATUS, Client, key_of
from npd.engines.server_process import POLL_SECONDS, ServerProcess, ServerSpec
from npd.errors import NpdError, RunError, WorkerLostError
from npd.redaction import without_login

# Connections beyond the concurrent requests, for health checks and weight calls.
_SPARE_CONNECTIONS = 8

_log = logging.getLogger(__name__)


class ServerPool:
    """The servers of one worker.

    `servers` receive requests. `admins` receive weights: they are the servers behind a load
    balancer, or `servers` themselves. `given_up` are the servers at `urls` that exceeded a
    request's time limit, by name; they receive neither requests nor weights any more.
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
        self._places: dict[tuple[str, int], Places] = {}
        self._num_calls = 0
        self.servers: list[EngineServer] = []
        self.admins: list[EngineServer] = []
        self.given_up: dict[str, Unavailable] = {}

    @property
    def is_open(self) -> bool:
        """Whether `open` has connected to the servers."""
        return self._client is not None

    @property
    def is_ours(self) -> bool:
        """Whether npd launches the server itself."""
        return self._config.launch is not None

    async def open(
        self, spec: ServerSpec, *, connections: int, admin_urls: Sequence[str] = ()
    ) -> None:
        """Launch our server, or connect to the servers at `urls`.

        Raises:
            ConfigError: the engine cannot be launched.
            WorkerLostError, RunError: our server was killed, or did not become ready.
        """
        if self.is_ours:
            self.servers = self.admins = [self._build(await self._start(spec, connections))]
            return
        urls, key = self._config.urls, key_of(self._config.api_key_env)
        client = Client(key, connections=connections * len(urls) + _SPARE_CONNECTIONS)
        self._client = client

        def servers(urls: Sequence[str]) -> list[EngineServer]:
            left = [url for url in urls if without_login(url)[0] not in self.given_up]
            return [self._build(self._connect(client, url)) for url in left]

        self.servers = servers(urls)
        self.admins = servers(admin_urls) if admin_urls else self.servers

    async def reopen(self, spec: ServerSpec, *, connections: int) -> None:
        """Stop our server and launch a new one; the objects in `servers` stay the same.

        Requests to the old server fail and are retried on the new one.

        Raises:
            ConfigError, RunError: as in `open`; after that only `close` may be called.
        """
        assert self.is_ours, "servers at urls are not restarted by npd"
        process, client = self._process, self._client
        self._process = self._client = None
        self._is_up.clear()
        try:
            if process is not None:
                process.stop()
            connection = await self._start(spec, connections)
            for server in self.servers:
                server.reconnect(connection)
        finally:
            self._is_up.set()
            if client is not None:
                await client.aclose()

    async def close(self) -> None:
        """Close the connections and stop our server."""
        process, client = self._process, self._client
        self._process = self._client = None
        self.servers, self.admins = [], []
        try:
            if client is not None:
                await client.aclose()
        finally:
            if process is not None:
                process.stop()

    async def resume(self) -> None:
        """Resume every server that responds."""
        resumed = [admin.resume() for admin in self.admins]
        for error in await asyncio.gather(*resumed, return_exceptions=True):
            if isinstance(error, BaseException) and not isinstance(error, NpdError):
                raise error

    def check(self, error: Unavailable) -> None:
        """Raise WorkerLostError if our own server has exited or hangs; a hanging one is killed."""
        if self._process is None:
            return
        self._process.check()
        if error.timed_out:
            self._process.stop(at_once=True)
            raise WorkerLostError(f"{error}: it hangs and is restarted, see {self._process.log}")

    def gives_up(self, server: EngineServer, error: Unavailable) -> bool:
        """Whether `server` gets no more requests after `error`; records it in `given_up`."""
        if self.is_ours or not error.timed_out:
            return False
        if server.name not in self.given_up:
            self.given_up[server.name] = error
            _log.warning("%s: it gets no more requests, other servers take over its work", error)
            self.servers = [other for other in self.servers if other.name != server.name]
            self.admins = [other for other in self.admins if other.name != server.name]
        return True

    async def wait_until_up(self) -> None:
        """Wait until a restart of our server is over."""
        await self._is_up.wait()

    async def run_jobs(
        self,
        jobs: Sequence[Job],
        do: Callable[[EngineServer, Job], Awaitable[Result]],
        *,
        at_once: int,
    ) -> list[Result | Refused | Unavailable]:
        """Run `do` for each job on the next free server; the results in the order of the jobs.

        A server has at most `at_once` jobs at a time, also of several calls together, of which
        earlier ones go first. The result of a job is an error if a server
        refuses the job, or if the job keeps failing on healthy servers.

        Raises:
            WorkerLostError: our own server exited or hangs.
            RunError: no server responds any more.
        """
        if not jobs:
            return []
        self._num_calls += 1
        order = self._num_calls

        def place(server: EngineServer) -> AbstractAsyncContextManager[None]:
            places = self._places.setdefault((server.name, at_once), Places(at_once))
            return places.taken(order)

        try:
            scheduler = RequestScheduler(jobs, do, self, place)
            return await scheduler.run(at_once, self._config.patience)
        except NoServerLeft as error:
            if not self.is_ours:
                raise
            if self._process is not None:
                self._process.stop(at_once=True)
            raise WorkerLostError(f"{error.causes}: it is restarted") from error

    async def _start(self, spec: ServerSpec, connections: int) -> Connection:
        """Launch our server and wait until it is ready; returns the connection to it."""
        assert self._config.launch is not None
        process = ServerProcess(self._engine, self._config.launch, spec, self._log)
        with ExitStack() as undo:
            undo.callback(process.stop)  # also on cancellation
            process.spawn()
            while not process.is_ready():  # noqa: ASYNC110 - a process offers no event to await
                await asyncio.sleep(POLL_SECONDS)
            undo.pop_all()
        self._process = process
        self._client = Client(process.key, connections=connections + _SPARE_CONNECTIONS)
        return self._connect(self._client, process.url)

    def _connect(self, client: Client, url: str) -> Connection:
        return client.connect(url, timeout=self._config.request_timeout)

    def _build(self, connection: Connection) -> EngineServer:
        return build_server(self._engine, connection, refresh_timeout=self._refresh_timeout)


class Places:
    """At most `count` requests of a server at a time; those of the lowest order go first.

    Waits for: a place. Unblocked by: the end of any request that has one.
    """

    def __init__(self, count: int) -> None:
        self._num_free = count
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._num_asked = 0

    @asynccontextmanager
    async def taken(self, order: int) -> AsyncIterator[None]:
        """Hold a place, once there is one."""
        if self._num_free:
            self._num_free -= 1
        else:
            await self._wait(order)
        try:
            yield
        finally:
            # A moment later: until then the slot of an earlier call has asked for its next job.
            asyncio.get_running_loop().call_soon(self._pass_on)

    async def _wait(self, order: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._num_asked += 1
        heappush(self._waiting, (order, self._num_asked, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given a place at the same moment
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            turn = heappop(self._waiting)[2]
            if not turn.done():
                turn.set_result(None)
                return
        self._num_free += 1


# Scheduling of jobs over servers.

Job = TypeVar("Job")
Result = TypeVar("Result")

# After this many failures on healthy servers the fault is the job's.
_MAX_TRIES = 3
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0


class NoServerLeft(RunError):
    """No server responds any more; `causes` holds the error of each server."""

    def __init__(self, lost: Sequence[Unavailable]) -> None:
        self.causes = "; ".join(map(str, lost))
        is_slow = any(error.timed_out for error in lost)
        super().__init__(
            f"no server is left that responds: {self.causes}. No recorded work is lost: restart a "
            f"server{', or raise request_timeout if it is only slow,' if is_slow else ''} and use "
            "--resume"
        )


class ServerOwner(Protocol):
    """The scheduler's view of the pool, which decides when to give up a server."""

    @property
    def servers(self) -> Sequence[EngineServer]:
        """The servers that receive requests."""
        ...

    @property
    def given_up(self) -> Mapping[str, Unavailable]:
        """The servers that receive no more requests, with the reason."""
        ...

    def check(self, error: Unavailable) -> None:
        """Raise an error if the whole call must end; may be called twice with the same error."""
        ...

    def gives_up(self, server: EngineServer, error: Unavailable) -> bool:
        """Whether a server receives no more requests after `error`."""
        ...

    async def wait_until_up(self) -> None:
        """Wait until restarts of servers are over."""
        ...


class _ServerState:
    """The health of a server during one call of `run_jobs`."""

    def __init__(self, server: EngineServer, owner: ServerOwner) -> None:
        self.server, self._owner = server, owner
        self.lost: Unavailable | None = None
        self.is_unhealthy = False
        self._recovering = asyncio.Lock()
        self._recovered_at = 0.0

    def fail(self, error: Unavailable) -> None:
        """Record a request without a response. Raises an error if the whole call must end."""
        self._owner.check(error)
        self.is_unhealthy = True
        if self._owner.gives_up(self.server, error):
            self.lost = error

    async def recover(self, error: Unavailable, failed_at: float, patience: float) -> bool:
        """Wait up to `patience` seconds for the server's health; whether it is healthy.

        One slot checks the health on behalf of all slots of the server.
        """
        async with self._recovering:
            if self._recovered_at <= failed_at:
                await self._await_health(error, patience)
            self.is_unhealthy = self.lost is not None
            return not self.is_unhealthy

    async def _await_health(self, error: Unavailable, patience: float) -> None:
        pause, deadline = _FIRST_PAUSE, time.monotonic() + patience
        while self.lost is None:
            # Never sleeps past the deadline.
            await asyncio.sleep(min(pause, max(_FIRST_PAUSE, deadline - time.monotonic())))
            await self._owner.wait_until_up()
            self._owner.check(error)  # the exit of our own process may be visible only later
            if await self.server.is_healthy():
                self._recovered_at = time.monotonic()
                return
            if time.monotonic() >= deadline:
                self.lost = error
            pause = min(2 * pause, _LONGEST_PAUSE)


class RequestScheduler(Generic[Job, Result]):
    """Runs the jobs of one call over several servers, with retries.

    Consumes: jobs. Produces: a result for each, or the error that prevented it.
    Waits for: the first free server. Unblocked by: its response, its time limit, or its loss.

    Every server has one slot per concurrent job, which takes a `place` at the server for each job,
    as other calls may use the server too. `do` may raise Refused or Unavailable. A refused
    job is final. A job without a response is retried on the next free server. The server that did
    not respond gets no job until it is healthy, which is checked with growing pauses. It is lost
    if it stays silent longer than `patience`, or if the pool gives it up.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        do: Callable[[EngineServer, Job], Awaitable[Result]],
        owner: ServerOwner,
        place: Callable[[EngineServer], AbstractAsyncContextManager[None]],
    ) -> None:
        self._jobs, self._do, self._owner, self._place = jobs, do, owner, place
        self._states = [_ServerState(server, owner) for server in owner.servers]
        self._waiting = deque(range(len(jobs)))
        self._tries = [0] * len(jobs)
        self._done: dict[int, Result | Refused | Unavailable] = {}
        self._changed = asyncio.Condition()

    async def run(self, at_once: int, patience: float) -> list[Result | Refused | Unavailable]:
        """The results in order. Raises NoServerLeft if every server is lost first."""
        # Slots alternate between servers, which spreads the first jobs evenly.
        slots = [
            asyncio.create_task(self._slot(state, patience))
            for _ in range(min(at_once, len(self._jobs)))
            for state in self._states
        ]
        end: asyncio.Future[None] = asyncio.create_task(self._all_done())
        work: asyncio.Future[Any] = asyncio.gather(*slots)
        try:
            # Do not wait for all slots: one may wait for a server that is no longer needed.
            await asyncio.wait([end, work], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            for task in (end, *slots):
                task.cancel()
            await asyncio.gather(end, work, *slots, return_exceptions=True)
        if not self._is_done:
            lost = {state.server.name: state.lost for state in self._states if state.lost}
            raise NoServerLeft(list({**self._owner.given_up, **lost}.values()))
        return [self._done[i] for i in range(len(self._jobs))]

    async def _slot(self, state: _ServerState, patience: float) -> None:
        while (job := await self._next(state)) is not None:
            started = time.monotonic()
            try:
                async with self._place(state.server):
                    started = time.monotonic()
                    if (given_up := self._owner.given_up.get(state.server.name)) is not None:
                        raise given_up  # by another call, while this one waited
                    result = await self._do(state.server, self._jobs[job])
                await self._settle(job, result)
            except Refused as error:
                if error.status in KEY_STATUS:
                    raise  # an invalid key fails every job
                await self._settle(job, error)
            except Unavailable as error:
                state.fail(error)
                await self._fail(job, state, error, started, patience)

    async def _fail(
        self, job: int, state: _ServerState, error: Unavailable, started: float, patience: float
    ) -> None:
        """Retry or settle a job that got no response, and wait for the server to recover."""
        self._tries[job] += 1
        is_last = self._tries[job] >= _MAX_TRIES
        if not is_last:
            await self._put_back(job)  # another server may take it now
        is_healthy_again = await state.recover(error, started, patience)
        if not is_healthy_again:
            self._tries[job] -= 1  # the server was at fault, not the job
        if is_last and is_healthy_again:
            await self._settle(job, error)
        elif is_last:
            await self._put_back(job)
        async with self._changed:
            self._changed.notify_all()

    @property
    def _is_done(self) -> bool:
        return len(self._done) == len(self._jobs)

    async def _all_done(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_done)

    async def _next(self, state: _ServerState) -> int | None:
        """The next job for a server; None if the server is lost or all jobs are done."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: (
                    self._is_done
                    or state.lost is not None
                    or (self._waiting and not state.is_unhealthy)
                )
            )
            is_over = self._is_done or state.lost is not None
            return None if is_over else self._waiting.popleft()

    async def _put_back(self, job: int) -> None:
        async with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()

    async def _settle(self, job: int, result: Result | Refused | Unavailable) -> None:
        async with self._changed:
            self._done[job] = result
            if self._is_done:  # no waiter depends on a single result
                self._changed.notify_all()
