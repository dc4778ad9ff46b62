"""A server that npd starts, supervises and ends: loopback only, a random key, a free port.

Promises: nothing of it outlives its owner (see `nanny`); what it prints is in its log file; a
server that ends, or does not become ready, is an error with the last line that says why. Does not
ask it anything but whether it is there.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from npd.errors import RunError, WorkerLostError
from npd.served import LaunchConfig
from npd.servers import guard, nanny
from npd.servers.commands import ServerSpec, program_of, server_command

__all__ = ["POLL_SECONDS", "ServerProcess", "ServerSpec", "last_complaint", "program_of"]

# How often to ask whether a server is ready.
POLL_SECONDS = 0.25
# What an answer to that may take: whoever polls in an event loop does nothing else meanwhile.
_ANSWER_SECONDS = 1.0
# More than the nanny needs at most, less than the runtime gives a worker to close (10 s).
_STOP_SECONDS = 8.0
_READ_BACK = 65536
# Sent by somebody, or by a system that is short of memory; a crash (SIGSEGV, SIGABRT) is not.
_KILLS = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_BLAME = re.compile(r"error|exception|out of memory|no such|unrecognized|refused", re.IGNORECASE)
# What only says that something else went wrong, and lines of a traceback.
_VAGUE = re.compile(
    r"^(Traceback|File |raise |During |[\^~ ]*$)|root cause above|EngineDeadError|except |^INFO:"
)
_NOISE = re.compile(r"^\S*\(\S+ pid=\d+\)\s*|^(ERROR|INFO|WARNING) [\d-]+ [\d:]+ \[[^]]*\]\s*")


class ServerProcess:
    """A server of ours, from `start` (or `begin`, until `is_ready`) to `stop`."""

    def __init__(self, engine: str, config: LaunchConfig, spec: ServerSpec, log: Path) -> None:
        self._engine, self._config, self._spec = engine, config, spec
        self.log = self._log = log
        # Hex: a key that begins with a hyphen, on a command line, is taken for an option.
        self.key = secrets.token_hex(32)
        self.url = ""
        self._popen: subprocess.Popen[bytes] | None = None
        self._pipe: int | None = None
        self._deadline = 0.0

    @property
    def is_running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._popen is not None and self._popen.poll() is None

    def start(self) -> None:
        """Start it and wait until it answers; blocks, so not in an event loop.

        Raises:
            ConfigError: there is no such engine to start.
            RunError: as `is_ready`.
        """
        with ExitStack() as undo:
            undo.callback(self.stop)
            self.begin()
            while not self.is_ready():
                time.sleep(POLL_SECONDS)
            undo.pop_all()

    def begin(self) -> None:
        """Start it; `is_ready` tells when it answers.

        Raises:
            ConfigError: there is no such engine to start.
        """
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        # One file a server: workers of one kind are told the same name.
        self.log = self._log.with_name(f"{self._log.stem}-{port}{self._log.suffix}")
        command = server_command(self._engine, self._config, self._spec, port=port, key=self.key)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        watched, self._pipe = os.pipe()
        try:
            with self.log.open("ab") as log:
                self._popen = subprocess.Popen(
                    [sys.executable, "-S", "-E", nanny.__file__, str(watched), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(watched,),
                    env=self._environment(),
                    start_new_session=True,
                )
        finally:
            os.close(watched)
        self._deadline = time.monotonic() + self._config.start_timeout

    def is_ready(self) -> bool:
        """Whether it answers by now; within a second.

        Raises:
            WorkerLostError: somebody ended it by a signal: another start may go well.
            RunError: it ended, or was not ready in time; its log says why, the message what.
        """
        # In this order: had ours lost the port to another server, that one would answer.
        answers = self._answers()
        if not self.is_running:
            ending, is_killed = self._ending(), bool(self._signal())
            self.stop()
            kind = WorkerLostError if is_killed else RunError
            raise kind(f"the {self._engine} server for {self._spec.model} {ending}")
        if not answers and time.monotonic() > self._deadline:
            self.stop()
            raise RunError(
                f"the {self._engine} server was not ready within {self._config.start_timeout:g} s: "
                f"see {self.log}, or raise launch.start_timeout"
            )
        return answers

    def check(self) -> None:
        """Raise WorkerLostError if it has ended: what was asked of it is to be asked again."""
        if not self.is_running:
            raise WorkerLostError(f"the {self._engine} server at {self.url} {self._ending()}")

    def stop(self, *, at_once: bool = False) -> None:
        """End it and everything it started; returns when it has ended.

        `at_once`: it is killed; otherwise it may take some seconds to end by itself.
        """
        if self._popen is not None and at_once:
            self._popen.send_signal(signal.SIGQUIT)
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None
        if self._popen is not None:
            try:
                self._popen.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        ours = {
            # In the environment, not on the command line, where every user of the machine reads it.
            "VLLM_API_KEY": self.key,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if self._engine == "vllm":
            ours["PYTHONPATH"] = str(Path(guard.__file__).parent)
        if self._config.gpus:
            ours["CUDA_VISIBLE_DEVICES"] = self._config.gpus[0]
        return inherited | ours | self._config.env

    def _answers(self) -> bool:
        request = urllib.request.Request(
            f"{self.url}/health", headers={"Authorization": f"Bearer {self.key}"}
        )
        # No proxy of the environment for a server of this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_ANSWER_SECONDS) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _signal(self) -> int:
        """The number of the signal that ended it, as the nanny's exit code says, or that ended the
        nanny; 0 where it ended by itself or crashed."""
        status = (None if self._popen is None else self._popen.poll()) or 0
        number = -status if status < 0 else status - 128
        return number if number in _KILLS else 0

    def _ending(self) -> str:
        """How it ended and what its log says of that."""
        status = None if self._popen is None else self._popen.poll()
        how = "has ended"
        if status is not None:
            killed = f"was ended by signal {self._signal()}" if self._signal() else ""
            how = killed or f"exited with code {status}"
        cause = last_complaint(self.log)
        return f"{how}{f' ({cause})' if cause else ''}: see {self.log}"


def last_complaint(log: Path) -> str:
    """The last line of a log that reads like an error, without time stamps; "" if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _READ_BACK))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    bare = map(_bare, reversed(lines))
    return next(
        (line[:300] for line in bare if _BLAME.search(line) and not _VAGUE.search(line)), ""
    )


def _bare(line: str) -> str:
    """A line of a log without process, time and place."""
    while (shorter := _NOISE.sub("", line).strip()) != line:
        line = shorter
    return line


def _free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
