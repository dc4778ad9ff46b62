"""The config of engines behind HTTP: servers that are running, or that workers start.

Sections only, shared by those that may use such an engine; what they mean together is `npd.config`.
"""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator, Field

from npd.fields import Positive, Section

# Whole words of a name, so that TOKENIZERS_PARALLELISM is none.
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)(_|$)", re.IGNORECASE)


def looks_secret(name: str) -> bool:
    """Whether an environment variable of this name may hold what nobody should read."""
    return _SECRET.search(name) is not None


class LaunchConfig(Section):
    """A server that a worker starts, supervises and ends: loopback only, a random key, a free port.

    Its log is in the run directory. Nothing of it is imported: its pins never meet npd's.
    """

    venv: Annotated[str, AfterValidator(os.path.expanduser)] | None = None
    """Virtual environment that holds the engine; None takes `command`, or what is on the PATH."""
    command: tuple[str, ...] = ()
    """The command instead, e.g. `[vllm, serve, "{model}"]`; npd adds host, port and model flags."""
    gpus: tuple[str, ...] = ()
    """CUDA_VISIBLE_DEVICES of each worker's server, e.g. `["0,1", "2,3"]`; none: as inherited."""
    tensor_parallel: Positive = 1
    """GPUs a model is spread over."""
    args: tuple[str, ...] = ()
    """More flags for the server, as on its command line; the last word where a flag comes twice."""
    env: dict[str, str] = Field(default_factory=dict)
    """More environment variables for the server. No place for keys: it inherits npd's own."""
    start_timeout: Annotated[float, Field(gt=0.0)] = 900.0
    """Seconds in which it must be ready."""


class ServedConfig(Section):
    """An engine behind HTTP: servers that run (`urls`), or that workers start (`launch`)."""

    urls: tuple[str, ...] = ()
    """Running servers, or a load balancer before them, e.g. `[http://10.0.0.5:8000]`."""
    launch: LaunchConfig | None = None
    """Have each worker start a server of its own."""
    api_key_env: str = "NPD_API_KEY"
    """Environment variable that holds the key of the servers at `urls`; unset: no key."""
    request_timeout: Annotated[float, Field(gt=0.0)] = 600.0
    """Seconds in which a request must be answered: the longest response, behind a full queue."""
    patience: Annotated[float, Field(ge=0.0)] = 120.0
    """Seconds to go on asking a server at `urls` that does not answer, before it is given up."""
