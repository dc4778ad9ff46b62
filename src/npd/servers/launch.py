"""A server that npd starts, supervises and ends: loopback only, a random key, a free port.

Promises: nothing of it outlives its owner (see `nanny`); what it prints is in its log file; a
server that ends, or does not become ready, is an error with the last line that says why. Does not
ask it anything but whether it is there.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from npd.errors import ConfigError, RunError, WorkerLostError
from npd.served import LaunchConfig
from npd.servers import guard, nanny

_POLL_SECONDS = 0.25
_STOP_SECONDS = 15.0
# vLLM's own default for the tokens of a step.
_CPU_BATCH_TOKENS = 2048
_READ_BACK = 65536
_BLAME = re.compile(r"error|exception|out of memory|no such|unrecognized|refused", re.IGNORECASE)
# What only says that something else went wrong, and lines of a traceback.
_VAGUE = re.compile(
    r"^(Traceback|File |raise |During |[\^~ ]*$)|root cause above|EngineDeadError|except |^INFO:"
)
_NOISE = re.compile(r"^\S*\(\S+ pid=\d+\)\s*|^(ERROR|INFO|WARNING) [\d-]+ [\d:]+ \[[^]]*\]\s*")


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """What a server is to serve: a model directory, at a type, for sequences up to `context`.

    `max_logprobs` is the widest top-k it will be asked for; `lora_rank` the widest adapter (0:
    none).
    """

    model: str
    dtype: str
    context: int
    max_logprobs: int = 1
    lora_rank: int = 0
    trust_remote_code: bool = False


class ServerProcess:
    """A server of ours, from `start` to `stop`."""

    def __init__(self, engine: str, config: LaunchConfig, spec: ServerSpec, log: Path) -> None:
        self._engine, self._config, self._spec = engine, config, spec
        self.log = self._log = log
        self.key = secrets.token_urlsafe(32)
        self.url = ""
        self._popen: subprocess.Popen[bytes] | None = None
        self._pipe: int | None = None

    @property
    def is_running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._popen is not None and self._popen.poll() is None

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            ConfigError: there is no such engine to start.
            RunError: it ended, or was not ready in time; its log says why, the message what.
        """
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        # One file a server: workers of one kind are told the same name.
        self.log = self._log.with_name(f"{self._log.stem}-{port}{self._log.suffix}")
        command = self.command(port)
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
        self._await_ready()

    def command(self, port: int) -> list[str]:
        """What starts it on `port`; raises ConfigError where there is nothing to start."""
        words = [*_program(self._engine, self._config), *self._flags(port), *self._config.args]
        return [word.replace("{model}", self._spec.model) for word in words]

    def check(self) -> None:
        """Raise WorkerLostError if it has ended: what was asked of it is to be asked again."""
        if not self.is_running:
            raise WorkerLostError(f"the {self._engine} server at {self.url} {self._ending()}")

    def stop(self) -> None:
        """End it and everything it started; returns when it has ended."""
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None
        if self._popen is not None:
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(_STOP_SECONDS)
            self._popen.kill()
            self._popen.wait()

    def _flags(self, port: int) -> list[str]:
        if self._engine == "sglang":
            return _sglang_flags(self._spec, self._config.tensor_parallel, port, self.key)
        return _vllm_flags(self._spec, self._config, port)

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

    def _await_ready(self) -> None:
        deadline = time.monotonic() + self._config.start_timeout
        while True:
            # In this order: had ours lost the port to another server, that one would answer.
            answers = self._answers()
            if not self.is_running:
                ending = self._ending()
                self.stop()
                raise RunError(f"the {self._engine} server for {self._spec.model} {ending}")
            if answers:
                return
            if time.monotonic() > deadline:
                self.stop()
                raise RunError(
                    f"the {self._engine} server was not ready within "
                    f"{self._config.start_timeout:g} s: see {self.log}, or raise "
                    "launch.start_timeout"
                )
            time.sleep(_POLL_SECONDS)

    def _answers(self) -> bool:
        request = urllib.request.Request(
            f"{self.url}/health", headers={"Authorization": f"Bearer {self.key}"}
        )
        # No proxy of the environment for a server of this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=2.0) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _ending(self) -> str:
        """How it ended and what its log says of that."""
        status = None if self._popen is None else self._popen.poll()
        how = "has ended"
        if status is not None:
            killed = f"was ended by signal {status - 128}" if status > 128 else ""
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


def _program(engine: str, config: LaunchConfig) -> list[str]:
    """What starts the engine: the command given, that of the virtual environment, or the PATH's."""
    if config.command:
        return list(config.command)
    module = {
        "vllm": "vllm.entrypoints.openai.api_server",
        "sglang": "sglang.launch_server",
    }[engine]
    if config.venv is not None:
        python = Path(config.venv) / "bin" / "python"
        if not python.exists():
            raise ConfigError(
                f"launch.venv {config.venv} is no virtual environment (no bin/python): make one "
                f"with python -m venv {config.venv} and install {engine} there"
            )
        return [str(python), "-m", module]
    found = shutil.which("vllm") if engine == "vllm" else None
    if found is None:
        raise ConfigError(
            f"no {engine} to start: set launch.venv (a virtual environment that has it) or "
            "launch.command"
        )
    return [found, "serve", "{model}"]


def _vllm_flags(spec: ServerSpec, config: LaunchConfig, port: int) -> list[str]:
    has_model = any("{model}" in part for part in _program("vllm", config))
    flags: list[str | int] = [] if has_model else ["--model", spec.model]
    flags += ["--host", "127.0.0.1", "--port", port, "--served-model-name", "npd"]
    flags += ["--dtype", spec.dtype, "--max-model-len", spec.context]
    flags += ["--max-logprobs", spec.max_logprobs]
    flags += ["--middleware", "npd_guard.RequireKey"]
    # Sampling defaults of the model's author are not the policy.
    flags += ["--generation-config", "vllm"]
    if not _has_accelerator():
        # On CPU vLLM 0.32 dies when a prompt of a seeded request is prefilled in two parts.
        flags += ["--no-enable-chunked-prefill"]
        flags += ["--max-num-batched-tokens", max(_CPU_BATCH_TOKENS, spec.context)]
    if config.tensor_parallel > 1:
        flags += ["--tensor-parallel-size", config.tensor_parallel]
    if spec.lora_rank:
        flags += ["--enable-lora", "--max-loras", 2, "--max-lora-rank", _lora_rank(spec.lora_rank)]
    if spec.trust_remote_code:
        flags += ["--trust-remote-code"]
    return list(map(str, flags))


def _has_accelerator() -> bool:
    """Whether this machine has a GPU that vLLM would use (NVIDIA, AMD)."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def _lora_rank(rank: int) -> int:
    """The smallest rank vLLM knows that holds `rank`."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)


def _sglang_flags(spec: ServerSpec, tensor_parallel: int, port: int, key: str) -> list[str]:
    flags: list[str | int] = ["--model-path", spec.model, "--host", "127.0.0.1", "--port", port]
    flags += ["--api-key", key, "--dtype", spec.dtype, "--context-length", spec.context]
    flags += ["--tp-size", tensor_parallel, "--sampling-defaults", "openai"]
    return list(map(str, flags + (["--trust-remote-code"] if spec.trust_remote_code else [])))


def _free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program_of(engine: str, config: LaunchConfig) -> Sequence[str]:
    """The command that would start the engine; ConfigError when there is none."""
    return _program(engine, config)
