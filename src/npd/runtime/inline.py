"""Workers as threads of this process: for tests, notebooks and debugging.

One thread each, so workers may overlap. A thread cannot be stopped: a call that overruns its
timeout counts as lost and goes on unseen, `close` waits for it. Thread counts are torch's, which
are those of the whole process.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from npd.runtime.base import NOTHING, Environment, Factory, Needs, Reply, SerialWorker
from npd.runtime.host import Host


class InlineWorker(SerialWorker):
    """One object in one thread. Its log file holds the tracebacks only."""

    def __init__(
        self, name: str, factory: Factory, log_file: Path, threads: int, call_timeout: float
    ) -> None:
        super().__init__(name, call_timeout)
        self._factory = factory
        self._log_file = log_file
        self._threads = threads
        self._pool, self._host = self._start()
        self._retired: list[tuple[ThreadPoolExecutor, Future[None]]] = []

    @property
    def pid(self) -> int | None:
        """None: it has no process of its own."""
        return None

    async def restart(self) -> None:
        """Drop the object and build another at the next call, in another thread.

        A call that is still running is left behind; its caller gets its answer.
        """
        self._retire()
        self._pool, self._host = self._start()
        self._life += 1
        self._gone = None

    async def close(self) -> None:
        """Let the object close itself and end the thread, after the call that is running."""
        if self._gone != self._closed:
            self._gone = self._closed
            self._retire()
        for pool, last_job in self._retired:
            await asyncio.wrap_future(last_job)
            pool.shutdown()
        self._retired.clear()
        await self._settle()

    async def _exchange(self, method: str, args: tuple[Any, ...], limit: float) -> Reply:
        loop = asyncio.get_running_loop()
        answer = loop.run_in_executor(self._pool, _run, self._host, method, args)
        done, _ = await asyncio.wait([answer], timeout=limit)
        if done:
            return answer.result()
        answer.add_done_callback(lambda late: late.cancelled() or late.exception())
        raise self._lose(
            f"worker {self.name} gave no answer to {method}() within {limit:g} s; a thread cannot "
            "be stopped and goes on: raise runtime.call_timeout, or use runtime.kind: local"
        )

    def _start(self) -> tuple[ThreadPoolExecutor, Host]:
        pool = ThreadPoolExecutor(
            1, f"npd-{self.name}", initializer=_set_threads, initargs=(self._threads,)
        )
        return pool, Host(self.name, self._factory, self._log_file)

    def _retire(self) -> None:
        self._retired.append((self._pool, self._pool.submit(self._host.close)))
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
        needs: Needs = NOTHING,
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
        """End every worker, each after the call it is running."""
        workers, self._workers = self._workers, {}
        await asyncio.gather(*(worker.close() for worker in workers.values()))


def _run(host: Host, method: str, args: tuple[Any, ...]) -> Reply:
    with host.guard(method):
        return host.call(method, args)


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
