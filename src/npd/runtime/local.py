"""Workers as processes on this machine, each with a new Python interpreter.

Promises: a worker's environment (CPU threads, a GPU) is set before it imports anything. Its output
is appended to its log file. It runs in a separate session, so Ctrl-C reaches the controller only.
It ends when this process ends, for any reason. A worker that dies or overruns its timeout is
reported with its signal and its log, and not replaced here.

A plain child program has advantages over `multiprocessing`: the user's main script is not imported
again, no resource tracker remains, and the log contains all output. Factories must be importable.
Modules are not imported from the current directory, where a `json.py` is data and not code.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from npd.errors import RunError
from npd.runtime.base import NOTHING, CallResult, Environment, Factory, Resources, SerialWorker
from npd.runtime.rpc import no_link, unpack_reply
from npd.runtime.worker_main import HEADER

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from npd.runtime.worker_main import main; "
    "main(int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])"
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Grace period for closing files and freeing a device, after which a worker is killed.
_GRACE_SECONDS = 10.0
# Time limit for the exit status of a process whose socket has closed, because it is exiting.
_EXIT_SECONDS = 2.0
_POLL_SECONDS = 0.01
# A worker that is stopped (SIGSTOP) this long during a call is continued.
_STOPPED_SECONDS = 20.0
_log = logging.getLogger(__name__)


def search_path(factory: Factory) -> list[str]:
    """A worker's `sys.path`: that of this process, without the current directory.

    The folders of npd and of the factory's package are appended if they are missing.
    """
    explicit = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(p)]
    here = {"", os.curdir, os.getcwd(), os.path.realpath(os.curdir)} - {*explicit}
    found = [entry for entry in sys.path if entry not in here]
    home = getattr(factory, "__module__", "npd")
    return found + [root for root in map(_root_of, ("npd", home)) if root not in found]


def _root_of(module: str) -> str:
    """The folder of a module's outermost package."""
    outermost = sys.modules[module.partition(".")[0]]
    file = Path(getattr(outermost, "__file__", None) or __file__).absolute()
    return str(file.parents[1] if file.name == "__init__.py" else file.parent)


class _Process:
    """One incarnation of a worker: the child process and the socket to it."""

    def __init__(
        self, name: str, factory: Factory, log_file: Path, environment: Mapping[str, str]
    ) -> None:
        self._greeting = pickle.dumps(factory)
        path = search_path(factory)
        self._socket, theirs = socket.socketpair()
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            with theirs, open(log_file, "ab", opener=no_link) as log:
                self.popen = _launch(theirs.fileno(), name, log_file, log, environment, path)
        except OSError as error:
            self._socket.close()
            theirs.close()
            raise RunError(
                f"cannot start worker {name} with its log in {log_file} ({error}): check that "
                "directory and the machine's limits, then resume the run"
            ) from error
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def exchange(self, request: bytes) -> bytes:
        """Send a request, return the reply. Raises EOFError or OSError if the process has ended."""
        reader, writer = await self._connect()
        _put_frame(writer, request)
        await writer.drain()
        size = HEADER.unpack(await reader.readexactly(HEADER.size))[0]
        return await reader.readexactly(size)

    async def stop(self) -> None:
        """Request the process to exit; kill it after the grace period."""
        if self.popen.poll() is None:
            self._continue()
            with suppress(OSError):
                _, writer = await self._connect()
                _put_frame(writer, b"")
                await writer.drain()
        await self.end(grace=_GRACE_SECONDS)

    async def end(self, *, grace: float = 0.0) -> int:
        """Wait up to `grace` seconds for the process to exit, then kill it; returns its status."""
        deadline = asyncio.get_running_loop().time() + grace
        while self.popen.poll() is None:
            if asyncio.get_running_loop().time() >= deadline:
                self.popen.kill()
            await asyncio.sleep(_POLL_SECONDS)
        await self._disconnect()
        return self.popen.returncode

    async def watch(self, patience: float) -> None:
        """Continue the process if it is stopped (SIGSTOP) for over `patience` seconds.

        A stopped process sends no replies, and does not end with this process.
        """
        looks = 0
        while True:
            await asyncio.sleep(patience / 2)
            looks = looks + 1 if _is_stopped(self.popen.pid) else 0
            if looks == 2:
                _log.warning("worker pid %d was stopped (SIGSTOP): continued", self.popen.pid)
                self._continue()
                looks = 0

    def _continue(self) -> None:
        """Send SIGCONT, which has no effect on a running process."""
        with suppress(ProcessLookupError):
            self.popen.send_signal(signal.SIGCONT)

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
        patience: float = _STOPPED_SECONDS,
    ) -> None:
        super().__init__(name, call_timeout)
        self._factory = factory
        self._log_file = log_file
        self._environment = environment
        self._patience = patience
        self._is_closed = False
        self._process = self._start()

    @property
    def pid(self) -> int | None:
        """The process id; None after the process has ended."""
        popen = self._process.popen
        return popen.pid if popen.poll() is None else None

    async def restart(self) -> None:
        """Kill the process and start a new one; a running call is lost.

        Raises WorkerLostError for a closed worker.
        """
        self._check_open()
        self._gone = f"worker {self.name} was restarted during a call: call it again"
        await self._process.end()
        await self._settle()
        self._check_open()
        self._process = self._start()
        self._restarts += 1
        self._gone = None

    async def close(self) -> None:
        """End the process: an idle one by request, one with a running call by a kill."""
        self._is_closed, self._gone = True, self._closed
        await (self._process.end() if self._turn.locked() else self._process.stop())
        await self._settle()

    async def _exchange(self, method: str, args: tuple[Any, ...], limit: float) -> CallResult:
        watch = asyncio.create_task(self._process.watch(self._patience))
        try:
            async with asyncio.timeout(limit):
                reply = await self._process.exchange(pickle.dumps((method, args)))
        except TimeoutError:
            raise await self._overran(method, limit) from None
        except (EOFError, OSError):
            raise await self._died(method) from None
        finally:
            watch.cancel()
        return unpack_reply(reply)

    def _check_open(self) -> None:
        """Refuse to restart a closed worker, which may count as lost because it was closed."""
        if self._is_closed:
            raise self._lose(self._closed)

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
        status = await self._process.end(grace=_EXIT_SECONDS)
        return self._lose(
            self._gone
            or f"worker {self.name} (pid {self._process.popen.pid}) {_describe(status)} during "
            f"{method}(): see {self._log_file}"
        )


class LocalRuntime:
    """Starts process workers; their output goes to `log_dir/<name>.log`."""

    def __init__(
        self, log_dir: Path, *, call_timeout: float = 3600.0, patience: float = _STOPPED_SECONDS
    ) -> None:
        self._log_dir = log_dir
        self._call_timeout, self._patience = call_timeout, patience
        self._workers: dict[str, LocalWorker] = {}

    def spawn(
        self,
        name: str,
        factory: Factory,
        *,
        threads: int,
        environment: Environment = None,
        needs: Resources = NOTHING,
    ) -> LocalWorker:
        """Start a worker; see `Runtime.spawn`."""
        assert name not in self._workers, f"worker {name} exists"
        log_file = self._log_dir / f"{name}.log"
        set_first = {**dict.fromkeys(THREAD_VARIABLES, str(threads)), **(environment or {})}
        worker = LocalWorker(name, factory, log_file, set_first, self._call_timeout, self._patience)
        self._workers[name] = worker
        return worker

    async def close(self) -> None:
        """End every worker; one with a running call is killed."""
        workers, self._workers = self._workers, {}
        await asyncio.gather(*(worker.close() for worker in workers.values()))


def _launch(
    fd: int,
    name: str,
    log_file: Path,
    log: Any,
    environment: Mapping[str, str],
    path: Sequence[str],
) -> subprocess.Popen[bytes]:
    arguments = (json.dumps(path), str(fd), str(os.getpid()), name, str(log_file))
    return subprocess.Popen(
        [sys.executable, "-P", "-u", "-X", "faulthandler", "-c", _PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=(fd,),
        env={**_inherited(), **environment},
        start_new_session=True,
    )


def _inherited() -> dict[str, str]:
    """This process's environment, without empty parts of PYTHONPATH (the current directory)."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    named = os.pathsep.join(entry for entry in entries if entry not in ("", os.curdir))
    others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return others | ({"PYTHONPATH": named} if named else {})


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal (Linux); a debugger's stop does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False


def _put_frame(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(HEADER.pack(len(data)) + data)


def _describe(status: int) -> str:
    if status >= 0:
        return f"exited with code {status}"
    hint = " (often because the machine is out of memory)" if -status == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-status).name}{hint}"
