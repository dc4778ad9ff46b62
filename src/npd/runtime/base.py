"""The protocol of a runtime, whose workers are threads, processes or Ray actors.

Promises: calls of one worker run one at a time, in the order of the requests. If a caller is
cancelled, its call still finishes and the worker stays usable. npd's errors in a worker reach the
caller with the same class and message; any other exception becomes a RunError that names the
worker's log. A lost worker raises WorkerLostError at every call until it is restarted. Does not
retry calls or replace workers, and is independent of their work.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from npd.errors import WorkerLostError

Factory: TypeAlias = Callable[[], object]
Environment: TypeAlias = Mapping[str, str] | None


@dataclass(frozen=True, slots=True)
class CallResult:
    """The result of a call, and its start and end as `time.time()` seconds in the worker."""

    value: Any
    started: float
    ended: float


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of a worker, for a runtime that chooses its machine (Ray).

    `gpus` is the number of GPUs for the worker alone; None is one, if there are any. The `size`
    members of a `team` are scheduled together, on as few machines as possible.
    """

    gpus: float | None = 0.0
    team: str | None = None
    size: int = 1


NOTHING = Resources()


class Worker(Protocol):
    """One object in its own thread or process, called by method name.

    Belongs to the event loop of its first call. `call` takes the timeout as an argument (ASYNC109),
    because an overrun ends the worker; a caller's own `asyncio.timeout` does not.
    """

    @property
    def name(self) -> str:
        """Unique within its runtime; also the name of the log file."""
        ...

    @property
    def pid(self) -> int | None:
        """The process id of a live worker with its own process, else None."""
        ...

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> CallResult:  # noqa: ASYNC109
        """Run `method(*args)` on the worker's object, which the first call builds.

        `timeout` (seconds; None: the runtime's `call_timeout`) starts with the call's turn. Raises
        WorkerLostError if the worker dies or overruns, npd's errors unchanged, and RunError for any
        other exception.
        """
        ...

    async def restart(self) -> None:
        """Discard the object, and its process if it has one, and start a new one."""
        ...

    async def close(self) -> None:
        """End the worker: at once if it is idle or can be killed, else after its call."""
        ...


class Runtime(Protocol):
    """Starts and ends workers."""

    def spawn(
        self,
        name: str,
        factory: Factory,
        *,
        threads: int,
        environment: Environment = None,
        needs: Resources = NOTHING,
    ) -> Worker:
        """Start a worker. `factory` is picklable and runs inside it; `threads` are CPU threads.

        `environment` is set before the worker imports anything; thread workers do not support it.
        """
        ...

    async def close(self) -> None:
        """End every worker, so that no thread and no process remains."""
        ...


class SerialWorker(ABC):
    """The base of all workers: calls take turns, and a cancelled caller interrupts no call.

    Consumes: calls. Produces: results. Waits for: the turn of a call. Unblocked by: the end of the
    running call.
    """

    def __init__(self, name: str, call_timeout: float) -> None:
        self._name = name
        self._call_timeout = call_timeout
        self._turn = asyncio.Lock()
        self._running: asyncio.Task[CallResult] | None = None
        self._restarts = 0
        self._gone: str | None = None

    @property
    def name(self) -> str:
        """Unique within its runtime."""
        return self._name

    @property
    def _closed(self) -> str:
        return f"worker {self.name} is closed"

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> CallResult:  # noqa: ASYNC109
        """Run a method in its turn; see `Worker.call`."""
        restarts = self._restarts
        await self._turn.acquire()
        limit = self._call_timeout if timeout is None else timeout
        self._running = asyncio.create_task(self._answer(restarts, method, args, limit))
        self._running.add_done_callback(self._end_turn)
        # A cancelled caller must not interrupt the exchange, because the reply must still be read.
        return await asyncio.shield(self._running)

    async def _answer(
        self, restarts: int, method: str, args: tuple[Any, ...], limit: float
    ) -> CallResult:
        if self._gone is not None:
            raise WorkerLostError(self._gone)
        if restarts != self._restarts:
            raise WorkerLostError(
                f"worker {self.name} was restarted before {method}() ran: call it again"
            )
        return await self._exchange(method, args, limit)

    def _end_turn(self, task: asyncio.Task[CallResult]) -> None:
        self._turn.release()
        if not task.cancelled():
            task.exception()

    def _lose(self, message: str) -> WorkerLostError:
        self._gone = message
        return WorkerLostError(message)

    async def _settle(self) -> None:
        if self._running is not None:
            await asyncio.wait([self._running])

    @abstractmethod
    async def _exchange(self, method: str, args: tuple[Any, ...], limit: float) -> CallResult: ...
