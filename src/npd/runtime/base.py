"""Where workers live: the small protocol that a thread, a process and a Ray actor keep.

Promises: calls of one worker run one at a time, in the order asked; a caller that is cancelled
leaves its call to finish and the worker usable; npd errors raised inside arrive as the same class
with the same message, any other exception as a RunError naming the worker's log; a lost worker says
so at each call until it is restarted. It does not retry, replace workers, or know what they do.
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
class Reply:
    """What a call returned, and when it ran: `time.time()` seconds, taken inside the worker."""

    value: Any
    started: float
    ended: float


@dataclass(frozen=True, slots=True)
class Needs:
    """What a worker takes of the machine it is put on, where there is a choice (Ray).

    `gpus`: how many it has to itself; None is one, if there are any. Members of a `team`, `size` in
    all, are placed together, near each other.
    """

    gpus: float | None = 0.0
    team: str | None = None
    size: int = 1


NOTHING = Needs()


class Worker(Protocol):
    """One object living in its own thread or process, spoken to by method name.

    Belongs to the event loop of its first call. `call` takes its time limit itself (ASYNC109):
    running out of it ends the worker, which a caller's own `asyncio.timeout` must not.
    """

    @property
    def name(self) -> str:
        """Unique within its runtime; names the log file too."""
        ...

    @property
    def pid(self) -> int | None:
        """Process id of a worker that has its own process and is alive, else None."""
        ...

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Reply:  # noqa: ASYNC109
        """Run `method(*args)` on the worker's object, which the first call builds.

        `timeout` (seconds, None: the runtime's `call_timeout`) counts from the call's turn.
        Raises WorkerLostError if the worker dies or overruns, RunError for an unforeseen
        exception, and the worker's own npd errors as they are.
        """
        ...

    async def restart(self) -> None:
        """Drop the object, and its process if it has one, and start afresh."""
        ...

    async def close(self) -> None:
        """End the worker: at once if it is idle or killable, else when its call has ended."""
        ...


class Runtime(Protocol):
    """A place to start workers in."""

    def spawn(
        self,
        name: str,
        factory: Factory,
        *,
        threads: int,
        environment: Environment = None,
        needs: Needs = NOTHING,
    ) -> Worker:
        """Start a worker. `factory` is picklable and runs inside it; `threads` are CPU threads.

        `environment` is set before anything is imported; a thread has none of its own.
        """
        ...

    async def close(self) -> None:
        """End every worker; no thread and no process of ours is left."""
        ...


class SerialWorker(ABC):
    """The half of a worker that is the same everywhere: taking turns and surviving cancellation.

    `call` consumes a turn, produced again when the running exchange ends, however it ends.
    """

    def __init__(self, name: str, call_timeout: float) -> None:
        self._name = name
        self._call_timeout = call_timeout
        self._turn = asyncio.Lock()
        self._running: asyncio.Task[Reply] | None = None
        self._life = 0
        self._gone: str | None = None

    @property
    def name(self) -> str:
        """Unique within its runtime."""
        return self._name

    @property
    def _closed(self) -> str:
        return f"worker {self.name} is closed"

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Reply:  # noqa: ASYNC109
        """Run a method when its turn comes; see `Worker.call`."""
        life = self._life
        await self._turn.acquire()
        limit = self._call_timeout if timeout is None else timeout
        self._running = asyncio.create_task(self._answer(life, method, args, limit))
        self._running.add_done_callback(self._end_turn)
        # A cancelled caller must not cut an exchange in two: the reply still has to be taken in.
        return await asyncio.shield(self._running)

    async def _answer(self, life: int, method: str, args: tuple[Any, ...], limit: float) -> Reply:
        if self._gone is not None:
            raise WorkerLostError(self._gone)
        if life != self._life:
            raise WorkerLostError(
                f"worker {self.name} was restarted before {method}() had its turn: ask again"
            )
        return await self._exchange(method, args, limit)

    def _end_turn(self, task: asyncio.Task[Reply]) -> None:
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
    async def _exchange(self, method: str, args: tuple[Any, ...], limit: float) -> Reply: ...
