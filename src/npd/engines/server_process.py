"""A server that npd launches, on the loopback interface, with a random key and a free port.

Promises: none of its processes outlives npd (see `supervisor`). Its log file contains no secrets. A
server that exits, or is not ready in time, raises an error that quotes the last error line of its
log. Keys reach the server through its environment or a private file, never the command line, which
every user of the machine can read. Sends health checks only.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from npd.config import GenerateConfig, ScoreConfig
from npd.config.base import LaunchConfig
from npd.engines import auth_middleware, supervisor
from npd.errors import ConfigError, RunError, WorkerLostError
from npd.models import fingerprint
from npd.models.device import seeing, without_ours
from npd.models.metadata import model_settings
from npd.redaction import known_secrets, learn, learn_environment, remember, split_secret_flags

# Interval between readiness checks.
POLL_SECONDS = 0.25
# Time limit of a health check, which blocks the event loop.
_ANSWER_SECONDS = 1.0
# More than the supervisor's time limit, less than the runtime's for closing a worker (10 s).
_STOP_SECONDS = 8.0
_HEALTHY = re.compile(rb"HTTP/1\.[01] 200[ \r]")
_HEALTHY_BYTES = len(b"HTTP/1.1 200 ")
_READ_BACK = 65536
# Signals from a user or from a system out of memory; a crash raises others (SIGSEGV, SIGABRT).
_KILLS = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_ERROR_LINE = re.compile(
    r"error|exception|out of memory|no such|unrecognized|refused", re.IGNORECASE
)
# Error lines without a cause, and lines of a traceback.
_VAGUE = re.compile(
    r"^(Traceback|File |raise |During |[\^~ ]*$)|root cause above|EngineDeadError|except |^INFO:"
)
_NOISE = re.compile(r"^\S*\(\S+ pid=\d+\)\s*|^(ERROR|INFO|WARNING) [\d-]+ [\d:]+ \[[^]]*\]\s*")


class ServerProcess:
    """A launched server, from `start` (or `spawn`, then `is_ready`) to `stop`."""

    def __init__(self, engine: str, config: LaunchConfig, spec: ServerSpec, log: Path) -> None:
        self._engine, self._config, self._spec = engine, config, spec
        self.log = self._log = log
        # Hex, because a command line takes a key with a leading hyphen for an option.
        self.key = secrets.token_hex(32)
        # Identifies the server's processes if their parent, the supervisor, is killed.
        self._mark = f"NPD_SERVER={secrets.token_hex(8)}"
        self.url = ""
        self._popen: subprocess.Popen[bytes] | None = None
        self._pipe: int | None = None
        self._deadline = 0.0

    @property
    def is_running(self) -> bool:
        """Whether it has been started and has not exited."""
        return self._popen is not None and self._popen.poll() is None

    def start(self) -> None:
        """Start the server and wait until it is ready. Blocks; not for use in an event loop.

        Raises:
            ConfigError: the engine cannot be launched.
            RunError: as in `is_ready`.
        """
        with ExitStack() as undo:
            undo.callback(self.stop)
            self.spawn()
            while not self.is_ready():
                time.sleep(POLL_SECONDS)
            undo.pop_all()

    def spawn(self) -> None:
        """Start the server without waiting; poll `is_ready` afterwards.

        Raises:
            ConfigError: the engine cannot be launched.
        """
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        # Workers of one kind share the log's name, so the port is added.
        self.log = self._log.with_name(f"{self._log.stem}-{port}{self._log.suffix}")
        command = server_command(self._engine, self._config, self._spec, port=port)
        private = private_settings(self._config)
        environment = self._environment() | private.environment
        remember(self.key)
        learn_environment(environment)
        learn(self._config.model_dump(mode="json"))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        watched, self._pipe = os.pipe()
        try:
            with self.log.open("ab") as log:
                self._popen = subprocess.Popen(
                    [sys.executable, "-S", "-E", "-P", supervisor.__file__, str(watched)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(watched,),
                    env=environment,
                    start_new_session=True,
                )
        finally:
            os.close(watched)
        self._send_order(command, private.settings)
        self._deadline = time.monotonic() + self._config.start_timeout

    def _send_order(self, command: list[str], settings: dict[str, str]) -> None:
        """Send the supervisor its order; if it has exited already, `is_ready` reports that."""
        assert self._pipe is not None
        order = supervisor.Order(
            parent=os.getpid(),
            command=command,
            log=str(self.log.absolute()),
            secrets=known_secrets(),
            settings=settings,
        )
        line = memoryview(f"{json.dumps(order)}\n".encode())
        with suppress(BrokenPipeError):
            while line:
                line = line[os.write(self._pipe, line) :]

    def is_ready(self) -> bool:
        """Whether the server is healthy; takes at most a second.

        Raises:
            WorkerLostError: it was ended by a signal, so another start may succeed.
            RunError: it exited or was not ready in time; the message names its log.
        """
        # Health first, process second: another server may have taken the port and respond there.
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
        """Raise WorkerLostError if the server has exited; its requests must be sent again."""
        if not self.is_running:
            raise WorkerLostError(f"the {self._engine} server at {self.url} {self._ending()}")

    def stop(self, *, at_once: bool = False) -> None:
        """End the server and all processes it started, and wait until they are gone.

        `at_once` kills it; otherwise it has some seconds for a clean exit.
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
            if self._popen.returncode < 0:  # the supervisor was killed, and could not clean up
                supervisor.end_marked(self._mark)

    def _environment(self) -> dict[str, str]:
        inherited = without_ours(os.environ)
        inherited.pop("PYTHONPATH", None)
        ours = {
            "VLLM_API_KEY": self.key,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONPATH": str(Path(auth_middleware.__file__).parent),
            **dict([self._mark.split("=")]),
        }
        if not self._config.command:
            # The server must not import modules from the current directory. A user's own command
            # may be a script that imports its neighbours.
            ours["PYTHONSAFEPATH"] = "1"
        if self._config.gpus:
            ours |= seeing(self._config.gpus[0])
        return inherited | ours | self._config.env

    def _answers(self) -> bool:
        port = int(self.url.rpartition(":")[2])
        request = (
            f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
            f"Authorization: Bearer {self.key}\r\n\r\n"
        )
        deadline, status = time.monotonic() + _ANSWER_SECONDS, b""
        with (
            suppress(OSError),
            socket.create_connection(("127.0.0.1", port), _ANSWER_SECONDS) as channel,
        ):
            channel.sendall(request.encode())
            # The status line is enough.
            while len(status) < _HEALTHY_BYTES and (left := deadline - time.monotonic()) > 0:
                channel.settimeout(left)
                if not (part := channel.recv(_HEALTHY_BYTES - len(status))):
                    break
                status += part
        return _HEALTHY.fullmatch(status) is not None

    def _signal(self) -> int:
        """The signal that ended the server or its supervisor; 0 after an exit or a crash."""
        status = (None if self._popen is None else self._popen.poll()) or 0
        number = -status if status < 0 else status - 128
        return number if number in _KILLS else 0

    def _ending(self) -> str:
        """How the server ended, with the last error line of its log."""
        status = None if self._popen is None else self._popen.poll()
        how = "has ended"
        if status is not None:
            killed = f"was ended by signal {self._signal()}" if self._signal() else ""
            how = killed or f"exited with code {status}"
        cause = last_error(self.log)
        return f"{how}{f' ({cause})' if cause else ''}: see {self.log}"


def last_error(log: Path) -> str:
    """The last error line of a log, without time stamps; "" if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _READ_BACK))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    bare = map(_bare, reversed(lines))
    return next(
        (line[:300] for line in bare if _ERROR_LINE.search(line) and not _VAGUE.search(line)), ""
    )


def _bare(line: str) -> str:
    """A log line without process name, time stamp and source location."""
    while (shorter := _NOISE.sub("", line).strip()) != line:
        line = shorter
    return line


def _free_port() -> int:
    """A port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# The command line of a server.

_MODULES = {"vllm": "vllm.entrypoints.openai.api_server"}
# vLLM's own default for the tokens of a scheduler step.
_CPU_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """What a server serves: a model directory in a dtype, with a `context` length in tokens.

    `max_logprobs` is the widest top-k of a request, `lora_rank` the highest LoRA rank (0: none).
    """

    model: str
    dtype: str
    context: int
    max_logprobs: int = 1
    lora_rank: int = 0
    trust_remote_code: bool = False


def generator_spec(
    config: GenerateConfig, model: Path, context: int, trust_remote_code: bool
) -> ServerSpec:
    """A server that generates samples of up to `context` tokens and scores the fingerprint texts.

    Raises:
        ConfigError: `model` is an adapter that does not name its base model.
    """
    settings = model_settings(model)
    room = max(context, fingerprint.MAX_TOKENS + 1)
    return ServerSpec(
        model=settings.base,
        dtype=config.dtype,
        context=min(room, settings.context or room),
        lora_rank=settings.lora_rank,
        trust_remote_code=trust_remote_code,
    )


def teacher_spec(
    config: ScoreConfig, teacher: Path, longest: int, widest: int, trust_remote_code: bool
) -> ServerSpec:
    """A server that scores texts of up to `longest` tokens, with a top-k of up to `widest`."""
    settings = model_settings(teacher)
    # A scoring request also samples one token.
    room = longest + 1
    return ServerSpec(
        model=str(teacher),
        dtype=config.dtype,
        context=min(room, settings.context or room),
        max_logprobs=max(config.top_k, widest),
        trust_remote_code=trust_remote_code,
    )


@dataclass(frozen=True, slots=True)
class PrivateSettings:
    """The server's secrets: environment variables, and flags for a private `--config` file."""

    environment: dict[str, str]
    settings: dict[str, str]


def server_command(engine: str, config: LaunchConfig, spec: ServerSpec, *, port: int) -> list[str]:
    """The command that starts a server of `spec` at `port`, without the `private_settings`.

    The server listens on the loopback interface only, requires a key, and ignores the sampling
    defaults of the model's author. The user's own flags come last and override the others.

    Raises:
        ConfigError: the engine cannot be launched.
    """
    args = config.args if _has_file(config) else split_secret_flags(config.args)[0]
    command = [*program_of(engine, config), *_vllm_flags(spec, config, port), *args]
    return [part.replace("{model}", spec.model) for part in command]


def private_settings(config: LaunchConfig) -> PrivateSettings:
    """The secrets in `launch.args`, to be kept off the command line.

    The Hugging Face token goes to the environment, other secret flags to a file (`--config`). If
    the user passes a `--config` file, all of `launch.args` stay on the command line.
    """
    if _has_file(config):
        return PrivateSettings({}, {})
    settings = split_secret_flags(config.args)[1]
    token = settings.pop("hf-token", None)
    environment = {} if token is None else {"HF_TOKEN": token}
    return PrivateSettings(environment, settings)


def _has_file(config: LaunchConfig) -> bool:
    words = (*config.command, *config.args)
    return any(word == "--config" or word.startswith("--config=") for word in words)


def check_program(where: str, engine: str, config: LaunchConfig) -> str:
    """The path of the program that the section `where` launches.

    Raises:
        ConfigError: there is no such program, or it is not executable.
    """
    program = program_of(engine, config)[0]
    found = shutil.which(program, path=config.env.get("PATH"))
    if found is None:
        raise ConfigError(
            f"{where}.launch: {program} is not an executable program: correct "
            f"{where}.launch.{'venv' if config.venv else 'command'}"
        )
    return found


def program_of(engine: str, config: LaunchConfig) -> list[str]:
    """The program that starts the engine: `launch.command`, or the engine in `launch.venv`, or the
    one on the PATH.

    Raises:
        ConfigError: there is none.
    """
    if config.command:
        return list(config.command)
    if config.venv is not None:
        python = Path(config.venv) / "bin" / "python"
        if not python.exists():
            raise ConfigError(
                f"launch.venv {config.venv} is not a virtual environment (no bin/python): create "
                f"one with python -m venv {config.venv} and install {engine} there"
            )
        return [str(python), "-m", _MODULES[engine]]
    found = shutil.which("vllm") if engine == "vllm" else None
    if found is None:
        raise ConfigError(
            f"no {engine} to start: set launch.venv (a virtual environment with {engine}) or "
            "launch.command"
        )
    return [found, "serve", "{model}"]


def _vllm_flags(spec: ServerSpec, config: LaunchConfig, port: int) -> list[str]:
    has_model = any("{model}" in part for part in program_of("vllm", config))
    flags: list[str | int] = [] if has_model else ["--model", spec.model]
    flags += ["--host", "127.0.0.1", "--port", port, "--served-model-name", "npd"]
    flags += ["--dtype", spec.dtype, "--max-model-len", spec.context]
    flags += ["--max-logprobs", spec.max_logprobs]
    flags += ["--middleware", "npd_auth.RequireKey"]
    # Without the sampling defaults of the model's generation_config.json.
    flags += ["--generation-config", "vllm"]
    if not _has_accelerator():
        # On CPU, vLLM 0.32 crashes if the prompt of a seeded request is prefilled in two chunks.
        flags += ["--no-enable-chunked-prefill"]
        flags += ["--max-num-batched-tokens", max(_CPU_BATCH_TOKENS, spec.context)]
    if config.tensor_parallel > 1:
        flags += ["--tensor-parallel-size", config.tensor_parallel]
    if isinstance(config.memory, float):
        flags += ["--gpu-memory-utilization", f"{config.memory:g}"]
    if spec.lora_rank:
        flags += ["--enable-lora", "--max-loras", 2, "--max-lora-rank", _lora_rank(spec.lora_rank)]
    if spec.trust_remote_code:
        flags += ["--trust-remote-code"]
    return list(map(str, flags))


def _has_accelerator() -> bool:
    """Whether this machine has a GPU that vLLM would use (NVIDIA, AMD)."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def _lora_rank(rank: int) -> int:
    """The smallest rank of at least `rank` that vLLM supports."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)
