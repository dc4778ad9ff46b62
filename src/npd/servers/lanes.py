"""Jobs over servers, some at a time on each, and what becomes of them where a server fails.

Consumes: jobs. Produces: a result for each, or the reason why there is none.
Waits for: the server that is free first. Unblocked by: its answer, its time limit, or its loss.

Every server has as many lanes as it may have jobs at once, those of a server that is lost are no
loss to the others. A refused job is final. An unanswered one is given to whichever server is free
next; its own is given nothing until it is well again, which is looked at with growing pauses, and
is given up when it stays silent longer than `patience`, or when its owner says so. Knows neither
what jobs are nor whose the servers are.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from npd.errors import RunError
from npd.servers.base import EngineServer
from npd.servers.http import KEY_STATUS, Refused, Unavailable

Job = TypeVar("Job")
Result = TypeVar("Result")

# A request that fails this often on servers that are well is at fault itself.
_MAX_TRIES = 3
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0


class NoServerLeft(RunError):
    """No server answers any more; `causes` says of each why."""

    def __init__(self, lost: Sequence[Unavailable]) -> None:
        self.causes = "; ".join(map(str, lost))
        is_slow = any(error.timed_out for error in lost)
        super().__init__(
            f"no server is left that answers: {self.causes}. Nothing recorded is lost: bring one "
            f"back{', or raise request_timeout for one that is slow,' if is_slow else ''} and use "
            "--resume"
        )


class Owner(Protocol):
    """Whose the servers are: the pool. It says when one is given up, and when all is over."""

    @property
    def servers(self) -> Sequence[EngineServer]:
        """Those to ask."""
        ...

    @property
    def given_up(self) -> Mapping[str, Unavailable]:
        """Those that are asked nothing more, and why."""
        ...

    def check(self, error: Unavailable) -> None:
        """Raise what ends all; may be shown the same error again."""
        ...

    def gives_up(self, server: EngineServer, error: Unavailable) -> bool:
        """Whether a server is to be asked nothing more."""
        ...

    async def until_up(self) -> None:
        """Wait while servers are being started anew."""
        ...


class _Member:
    """A server during one call of `ask`: how it fares."""

    def __init__(self, server: EngineServer, owner: Owner) -> None:
        self.server, self._owner = server, owner
        self.lost: Unavailable | None = None
        self.is_ailing = False
        self._mending = asyncio.Lock()
        self._mended_at = 0.0

    def fail(self, error: Unavailable) -> None:
        """Note that it gave no answer. Raises what ends all."""
        self._owner.check(error)
        self.is_ailing = True
        if self._owner.gives_up(self.server, error):
            self.lost = error

    async def mend(self, error: Unavailable, failed_at: float, patience: float) -> bool:
        """Wait until the server is well again; whether it is. One of its lanes waits for all."""
        async with self._mending:
            if self._mended_at <= failed_at:
                await self._await_health(error, patience)
            self.is_ailing = self.lost is not None
            return not self.is_ailing

    async def _await_health(self, error: Unavailable, patience: float) -> None:
        pause, deadline = _FIRST_PAUSE, time.monotonic() + patience
        while self.lost is None:
            await asyncio.sleep(pause)
            await self._owner.until_up()
            self._owner.check(error)  # our own may take a moment to be seen to have ended
            if await self.server.is_healthy():
                self._mended_at = time.monotonic()
                return
            if time.monotonic() >= deadline:
                self.lost = error
            pause = min(2 * pause, _LONGEST_PAUSE)


class Round(Generic[Job, Result]):
    """The jobs of one call and what has become of them; `do` may raise Refused or Unavailable."""

    def __init__(
        self,
        jobs: Sequence[Job],
        do: Callable[[EngineServer, Job], Awaitable[Result]],
        owner: Owner,
    ) -> None:
        self._jobs, self._do, self._owner = jobs, do, owner
        self._members = [_Member(server, owner) for server in owner.servers]
        self._waiting = deque(range(len(jobs)))
        self._tries = [0] * len(jobs)
        self._done: dict[int, Result | Refused | Unavailable] = {}
        self._moved = asyncio.Condition()

    async def run(self, at_once: int, patience: float) -> list[Result | Refused | Unavailable]:
        """The results, by lanes over the servers; NoServerLeft where they end before."""
        # A lane of each server in turn: the first jobs are dealt out evenly.
        lanes = [
            asyncio.create_task(self._lane(member, patience))
            for _ in range(min(at_once, len(self._jobs)))
            for member in self._members
        ]
        end: asyncio.Future[None] = asyncio.create_task(self._all_done())
        work: asyncio.Future[Any] = asyncio.gather(*lanes)
        try:
            # Not for all lanes: one may wait for a server that is no longer needed.
            await asyncio.wait([end, work], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            for task in (end, *lanes):
                task.cancel()
            await asyncio.gather(end, work, *lanes, return_exceptions=True)
        if not self._is_done:
            lost = {member.server.name: member.lost for member in self._members if member.lost}
            raise NoServerLeft(list({**self._owner.given_up, **lost}.values()))
        return [self._done[i] for i in range(len(self._jobs))]

    async def _lane(self, member: _Member, patience: float) -> None:
        while (job := await self._next(member)) is not None:
            started = time.monotonic()
            try:
                await self._settle(job, await self._do(member.server, self._jobs[job]))
            except Refused as error:
                if error.status in KEY_STATUS:
                    raise  # what is wrong is the key, and so with every job
                await self._settle(job, error)
            except Unavailable as error:
                member.fail(error)
                await self._fail(job, member, error, started, patience)

    async def _fail(
        self, job: int, member: _Member, error: Unavailable, started: float, patience: float
    ) -> None:
        """See to a job without an answer, and to the server that gave none."""
        self._tries[job] += 1
        is_last = self._tries[job] >= _MAX_TRIES
        if not is_last:
            await self._give_back(job)  # another server may do it meanwhile
        is_well = await member.mend(error, started, patience)
        if not is_well:
            self._tries[job] -= 1  # it was not the job's fault
        if is_last and is_well:
            await self._settle(job, error)
        elif is_last:
            await self._give_back(job)
        async with self._moved:
            self._moved.notify_all()

    @property
    def _is_done(self) -> bool:
        return len(self._done) == len(self._jobs)

    async def _all_done(self) -> None:
        async with self._moved:
            await self._moved.wait_for(lambda: self._is_done)

    async def _next(self, member: _Member) -> int | None:
        """A job for a server; None when it is lost or all are done."""
        async with self._moved:
            await self._moved.wait_for(
                lambda: (
                    self._is_done
                    or member.lost is not None
                    or (self._waiting and not member.is_ailing)
                )
            )
            is_over = self._is_done or member.lost is not None
            return None if is_over else self._waiting.popleft()

    async def _give_back(self, job: int) -> None:
        async with self._moved:
            self._waiting.append(job)
            self._moved.notify_all()

    async def _settle(self, job: int, result: Result | Refused | Unavailable) -> None:
        async with self._moved:
            self._done[job] = result
            if self._is_done:  # nothing else that is waited for
                self._moved.notify_all()
