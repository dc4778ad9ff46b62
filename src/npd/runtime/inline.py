"""Workers as threads of this process: for tests, notebooks and debugging.

Each worker has a thread, so workers may overlap. A thread cannot be stopped: a call that overruns
its timeout counts as lost but keeps running, and `close` waits for it. `threads` sets torch's
thread count, which applies to the whole process.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from npd.runtime.base import NOTHING, CallResult, Environment, Factory, Resources, SerialWorker
from npd.runtime.rpc import ObjectServer


class InlineWorker(SerialWorker):
    """One object in one thread. Its log file contains tracebacks only."""

    def __init__(
        self, name: str, factory: Factory, log_file: Path, threads: int, call_timeout: float
    ) -> None:
        super().__init__(name, call_timeout)
        self._factory = factory
        self._log_file = log_file
        self._threads = threads
        self._pool, self._server = self._start()
        self._retired: list[tuple[ThreadPoolExecutor, Future[None]]] = []

    @property
    def pid(self) -> int | None:
        """None, because it has no separate process."""
        return None

    async def restart(self) -> None:
        """Discard the object; the next call builds a new one in a new thread.

        Does not wait for a running call, whose caller still gets the result.
        """
        self._retire()
        self._pool, self._server = self._start()
        self._restarts += 1
        self._gone = None

    async def close(self) -> None:
        """Close the object and end the thread, after the running call."""
        if self._gone != self._closed:
            self._gone = self._closed
            self._retire()
        for pool, last_job in self._retired:
            await asyncio.wrap_future(last_job)
            pool.shutdown()
        self._retired.clear()
        await self._settle()

    async def _exchange(self, method: str, args: tuple[Any, ...], limit: float) -> CallResult:
        loop = asyncio.get_running_loop()
        call = loop.run_in_executor(self._pool, _run, self._server, method, args)
        done, _ = await asyncio.wait([call], timeout=limit)
        if done:
            return call.result()
        call.add_done_callback(lambda late: late.cancelled() or late.exception())
        raise self._lose(
            f"worker {self.name} gave no answer to {method}() within {limit:g} s, and its thread "
            "cannot be stopped: raise runtime.call_timeout, or use runtime.kind: local"
        )

    def _start(self) -> tuple[ThreadPoolExecutor, ObjectServer]:
        pool = ThreadPoolExecutor(
            1, f"npd-{self.name}", initializer=_set_threads, initargs=(self._threads,)
        )
        return pool, ObjectServer(self.name, self._factory, self._log_file)

    def _retire(self) -> None:
        self._retired.append((self._pool, self._pool.submit(self._server.close)))
        self._pool.shutdown(wait=False)


class InlineRuntime:
    """Starts thread workers; tracebacks go to `log_dir/<name>.log`."""

    def __init__(self, log_dir: Path, *, call_timeout: float = 3600.0) -> None:
        self._log_dir = log_dir
        self._call_timeout = call_timeout
        self._workers: dict[str, InlineWorker] = {}

    def spawn(
        self,
        name: str,
        factory: Factory,
        *,
        threads: int,
        environment: Environment = None,
        needs: Resources = NOTHING,
    ) -> InlineWorker:
        """Start a worker; see `Runtime.spawn`."""
        assert not environment, "threads share the environment of their process"
        assert name not in self._workers, f"worker {name} exists"
        self._log_dir.mkdir(parents=True, exist_ok=True)
        log_file = self._log_dir / f"{name}.log"
        worker = InlineWorker(name, factory, log_file, threads, self._call_timeout)
        self._workers[name] = worker
        return worker

    async def close(self) -> None:
        """End every worker after its running call."""
        workers, self._workers = self._workers, {}
        await asyncio.gather(*(worker.close() for worker in workers.values()))


def _run(server: ObjectServer, method: str, args: tuple[Any, ...]) -> CallResult:
    with server.reporting_errors(method):
        return server.call(method, args)


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
