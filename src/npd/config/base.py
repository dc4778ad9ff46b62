"""The base class of config sections, the types their values share, and the settings of servers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from npd.config.paths import expanded, why_no_path
from npd.text import shown

# A larger number is a typo: it would fill memory, or overflow a timer.
_LARGEST, _MOST_PROCESSES, _LONGEST_WAIT = 2**31 - 1, 1024, 1e6


def _plain(text: str) -> str:
    """Refuse text that is empty or holds control characters."""
    if not text.strip():
        raise ValueError("is empty: give it a value, or leave it out")
    if not text.isprintable():
        raise ValueError(f"({shown(text)}) contains control characters: remove them")
    return text


def _path(text: str) -> str:
    """A path or a model's name, with `~` expanded; refuses other text."""
    if not text.strip():
        raise ValueError("is empty: give a path or a name, or leave it out")
    if (why := why_no_path(text)) is not None:
        raise ValueError(f"({shown(text, 60)}) {why}: correct it")
    return expanded(text)


def _directory(value: object) -> object:
    return Path(_path(str(value))) if isinstance(value, str | Path) else value


Positive = Annotated[int, Field(ge=1, le=_LARGEST)]
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Processes = Annotated[int, Field(ge=1, le=_MOST_PROCESSES)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Seconds = Annotated[float, Field(gt=0.0, le=_LONGEST_WAIT)]
Minutes = Annotated[float, Field(gt=0.0, le=_LONGEST_WAIT / 60)]
Dtype = Literal["float32", "bfloat16"]
Text = Annotated[str, AfterValidator(_plain)]
Name = Annotated[str, AfterValidator(_path)]
Gpus = Annotated[tuple[Count, ...], Field(strict=False)]
Texts = Annotated[tuple[Text, ...], Field(strict=False)]
Directory = Annotated[Path, Field(strict=False), BeforeValidator(_directory)]


class Section(BaseModel):
    """Strict and frozen: an unknown key is an error, a value never changes, numbers are finite.

    Types are not converted: `true` is not a number, `"5"` is text. Tuples and paths are
    `Field(strict=False)`, because YAML and JSON have neither.
    """

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class LaunchConfig(Section):
    """A server that a worker starts, supervises and stops: loopback only, random key, free port.

    Its log is in the run directory. It is a separate process, so its dependencies cannot clash with
    npd's.
    """

    venv: Name | None = None
    """Virtual environment that holds the engine; None uses `command`, or the engine on the PATH."""
    command: Texts = ()
    """Start command in place of `venv`, e.g. `[vllm, serve, "{model}"]`; npd adds the flags for
    host, port and model."""
    gpus: Texts = ()
    """CUDA_VISIBLE_DEVICES of each worker's server, e.g. `["0,1", "2,3"]`; empty: its worker's."""
    tensor_parallel: Processes = 1
    """Number of GPUs that share a model."""
    memory: Annotated[float, Field(gt=0.0, le=1.0)] | Literal["auto"] = "auto"
    """Share of its GPUs' memory that a server takes (vLLM's --gpu-memory-utilization). `auto`: what
    other processes of the run on them leave, by forecast; without others, and on Ray, vLLM's."""
    args: Texts = ()
    """Extra flags for the server, as on its command line; they override npd's."""
    env: dict[str, str] = Field(default_factory=dict)
    """Extra environment variables for the server. Export keys instead: the server inherits npd's
    environment."""
    start_timeout: Seconds = 900.0
    """Seconds within which the server must be ready."""


class ServedConfig(Section):
    """Where a model runs: in process, on running servers (`urls`), or on servers npd starts
    (`launch`). The settings that `generate` and `score` share."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """`transformers` runs the model in process; `vllm` is a server (see `urls` and `launch`)."""
    urls: Texts = ()
    """Running servers, or a load balancer in front of them, e.g. `[http://10.0.0.5:8000]`."""
    launch: LaunchConfig | None = None
    """Start one server per worker, with these settings."""
    api_key_env: Text = "NPD_API_KEY"
    """Environment variable with the API key of the servers at `urls`; unset: no key."""
    request_timeout: Seconds = 600.0
    """Timeout of a request in seconds, including its wait in the server's queue."""
    patience: Annotated[float, Field(ge=0.0, le=1e6)] = 120.0
    """Seconds to retry a server at `urls` that does not answer, before giving up on it."""

    @property
    def is_served(self) -> bool:
        """Whether the engine is a server."""
        return self.engine != "transformers"
