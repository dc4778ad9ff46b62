"""Workers as processes of this machine: one fresh interpreter each.

Promises: CPU threads, and a GPU, are set in the environment before anything is imported; everything
a worker prints is appended to its log file; it is in a session of its own, so Ctrl-C reaches the
controller only; it ends when this process ends, however that happens. A worker that dies or
overruns its timeout is reported with its signal and its log, never replaced here.

A plain child program rather than `multiprocessing`: nothing re-imports the user's main script, no
resource tracker stays behind, and the log holds the first byte on. Factories must be importable.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from npd.errors import RunError
from npd.runtime.base import NOTHING, Environment, Factory, Needs, Reply, SerialWorker
from npd.runtime.child import HEADER
from npd.runtime.wire import opened

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from npd.runtime.child import main; main(int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])"
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Time to close files and free a device after being asked to end; then it is killed.
_GRACE_SECONDS = 10.0
# A process whose socket has closed is ending by itself; wait for its own exit status.
_LAST_BREATH_SECONDS = 2.0
_POLL_SECONDS = 0.01


class _Process:
    """One life of a worker: the child process and the socket to it."""

    def __init__(
        self, name: str, factory: Factory, log_file: Path, environment: Mapping[str, str]
    ) -> None:
        self._greeting = pickle.dumps(factory)
        self._socket, theirs = socket.socketpair()
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            with theirs, log_file.open("ab") as log:
                self.popen = _launch(theirs.fileno(), name, log_file, log, environment)
        except OSError as error:
            self._socket.close()
            theirs.close()
            raise RunError(
                f"cannot start worker {name} with its log in {log_file} ({error}): check that "
                "place and the machine's limits, then resume the run"
            ) from error
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> bytes:
        """One exchange. Raises EOFError or OSError when the process is gone."""
        reader, writer = await self._connect()
        _put_frame(writer, request)
        await writer.drain()
        size = HEADER.unpack(await reader.readexactly(HEADER.size))[0]
        return await reader.readexactly(size)

    async def stop(self) -> None:
        """Ask it to end, and end it if it does not within the grace period."""
        if self.popen.poll() is None:
            with suppress(OSError):
                _, writer = await self._connect()
                _put_frame(writer, b"")
                await writer.drain()
        await self.end(grace=_GRACE_SECONDS)

    async def end(self, *, grace: float = 0.0) -> int:
        """Wait up to `grace` seconds for it to end, kill it if it has not; its exit status."""
        deadline = asyncio.get_running_loop().time() + grace
        while self.popen.poll() is None:
            if asyncio.get_running_loop().time() >= deadline:
                self.popen.kill()
            await asyncio.sleep(_POLL_SECONDS)
        await self._disconnect()
        return self.popen.returncode

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(sock=self._socket)
            _put_frame(self._streams[1], self._greeting)
        return self._streams

    async def _disconnect(self) -> None:
        if self._streams is None:
            self._socket.close()
            return
        self._streams[1].close()
        with suppress(OSError):
            await self._streams[1].wait_closed()


class LocalWorker(SerialWorker):
    """One object in one process, started at once."""

    def __init__(
        self,
        name: str,
        factory: Factory,
        log_file: Path,
        environment: Mapping[str, str],
        call_timeout: float,
    ) -> None:
        super().__init__(name, call_timeout)
        self._factory = factory
        self._log_file = log_file
        self._environment = environment
        self._process = self._start()

    @property
    def pid(self) -> int | None:
        """Process id, None once it has ended."""
        popen = self._process.popen
        return popen.pid if popen.poll() is None else None

    async def restart(self) -> None:
        """Kill what is left of the process and start a fresh one; a running call is lost."""
        self._gone = f"worker {self.name} was restarted while it held a call: ask again"
        await self._process.end()
        await self._settle()
        self._process = self._start()
        self._life += 1
        self._gone = None

    async def close(self) -> None:
        """Let an idle process end by itself, kill one that holds a call."""
        self._gone = self._closed
        await (self._process.end() if self._turn.locked() else self._process.stop())
        await self._settle()

    async def _exchange(self, method: str, args: tuple[Any, ...], limit: float) -> Reply:
        try:
            async with asyncio.timeout(limit):
                answer = await self._process.ask(pickle.dumps((method, args)))
        except TimeoutError:
            raise await self._overran(method, limit) from None
        except (EOFError, OSError):
            raise await self._died(method) from None
        return opened(answer)

    def _start(self) -> _Process:
        return _Process(self.name, self._factory, self._log_file, self._environment)

    async def _overran(self, method: str, limit: float) -> Exception:
        pid = self._process.popen.pid
        await self._process.end()
        return self._lose(
            f"worker {self.name} (pid {pid}) gave no answer to {method}() within {limit:g} s and "
            f"was killed: raise runtime.call_timeout, or see {self._log_file}"
        )

    async def _died(self, method: str) -> Exception:
        status = await self._process.end(grace=_LAST_BREATH_SECONDS)
        return self._lose(
            self._gone
            or f"worker {self.name} (pid {self._process.popen.pid}) {_describe(status)} while it "
            f"held {method}(): see {self._log_file}"
        )


class LocalRuntime:
    """Starts process workers; their output goes to `log_dir/<name>.log`."""

    def __init__(self, log_dir: Path, *, call_timeout: float = 3600.0) -> None:
        self._log_dir = log_dir
        self._call_timeout = call_timeout
        self._workers: dict[str, LocalWorker] = {}

    def spawn(
        self,
        name: str,
        factory: Factory,
        *,
        threads: int,
        environment: Environment = None,
        needs: Needs = NOTHING,
    ) -> LocalWorker:
        """Start a worker; see `Runtime.spawn`."""
        assert name not in self._workers, f"worker {name} exists"
        log_file = self._log_dir / f"{name}.log"
        set_first = {**dict.fromkeys(THREAD_VARIABLES, str(threads)), **(environment or {})}
        worker = LocalWorker(name, factory, log_file, set_first, self._call_timeout)
        self._workers[name] = worker
        return worker

    async def close(self) -> None:
        """End every worker: idle ones by themselves, those that hold a call at once."""
        workers, self._workers = self._workers, {}
        await asyncio.gather(*(worker.close() for worker in workers.values()))


def _launch(
    fd: int, name: str, log_file: Path, log: Any, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    arguments = (json.dumps(sys.path), str(fd), str(os.getpid()), name, str(log_file))
    return subprocess.Popen(
        [sys.executable, "-u", "-X", "faulthandler", "-c", _PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=(fd,),
        env={**os.environ, **environment},
        start_new_session=True,
    )


def _put_frame(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(HEADER.pack(len(data)) + data)


def _describe(status: int) -> str:
    if status >= 0:
        return f"exited with code {status}"
    hint = ", often a machine out of memory," if -status == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-status).name}{hint}"
