"""The command that starts an engine: its program, and the flags for what it is to serve.

Promises: loopback only, a key in front, the sampling defaults of nobody; the user's own flags come
last, and so have the last word. Starts nothing.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from npd import probe
from npd.config import GenerateConfig, LaunchConfig, ScoreConfig
from npd.errors import ConfigError
from npd.servers.models import model_settings

_MODULES = {"vllm": "vllm.entrypoints.openai.api_server", "sglang": "sglang.launch_server"}
# vLLM's own default for the tokens of a step.
_CPU_BATCH_TOKENS = 2048


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


def generator_spec(
    config: GenerateConfig, model: Path, context: int, trust_remote_code: bool
) -> ServerSpec:
    """What a server holds to write samples of up to `context` tokens, and to read the probe.

    Raises:
        ConfigError: `model` is an adapter that does not say what it adapts.
    """
    settings = model_settings(model)
    room = max(context, probe.MAX_TOKENS + 1)
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
    """What a server holds to read texts of up to `longest` tokens, with supports up to `widest`."""
    settings = model_settings(teacher)
    # It draws one token more than it reads, up to what the model can hold.
    room = longest + 1
    return ServerSpec(
        model=str(teacher),
        dtype=config.dtype,
        context=min(room, settings.context or room),
        max_logprobs=max(config.top_k, widest),
        trust_remote_code=trust_remote_code,
    )


def server_command(
    engine: str, config: LaunchConfig, spec: ServerSpec, *, port: int, key: str
) -> list[str]:
    """The command of a server of `spec` at `port`, which asks for `key`.

    vLLM takes its key from the environment; that of SGLang is on its command line, which every user
    of the machine can read.

    Raises:
        ConfigError: there is no such engine to start.
    """
    is_vllm = engine == "vllm"
    flags = _vllm_flags(spec, config, port) if is_vllm else _sglang_flags(spec, config, port, key)
    command = [*program_of(engine, config), *flags, *config.args]
    return [part.replace("{model}", spec.model) for part in command]


def program_of(engine: str, config: LaunchConfig) -> list[str]:
    """What starts the engine: the command given, that of the virtual environment, or the PATH's.

    Raises:
        ConfigError: there is none.
    """
    if config.command:
        return list(config.command)
    if config.venv is not None:
        python = Path(config.venv) / "bin" / "python"
        if not python.exists():
            raise ConfigError(
                f"launch.venv {config.venv} is no virtual environment (no bin/python): make one "
                f"with python -m venv {config.venv} and install {engine} there"
            )
        return [str(python), "-m", _MODULES[engine]]
    found = shutil.which("vllm") if engine == "vllm" else None
    if found is None:
        raise ConfigError(
            f"no {engine} to start: set launch.venv (a virtual environment that has it) or "
            "launch.command"
        )
    return [found, "serve", "{model}"]


def _vllm_flags(spec: ServerSpec, config: LaunchConfig, port: int) -> list[str]:
    has_model = any("{model}" in part for part in program_of("vllm", config))
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


def _sglang_flags(spec: ServerSpec, config: LaunchConfig, port: int, key: str) -> list[str]:
    flags: list[str | int] = ["--model-path", spec.model, "--host", "127.0.0.1", "--port", port]
    flags += ["--api-key", key, "--dtype", spec.dtype, "--context-length", spec.context]
    flags += ["--tp-size", config.tensor_parallel, "--sampling-defaults", "openai"]
    if spec.lora_rank:
        flags += ["--enable-lora", "--max-loras-per-batch", 2, "--max-lora-rank", spec.lora_rank]
        flags += ["--lora-target-modules", "all"]
    return list(map(str, flags + (["--trust-remote-code"] if spec.trust_remote_code else [])))
