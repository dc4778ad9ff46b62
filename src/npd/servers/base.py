"""What an engine server is: token ids in, token ids and log-probs out, and weights that change.

One contract suite runs over every implementation. Positions and tokens are the caller's: no server
here ever sees text. All methods are coroutines of one event loop.

Dimensions: P tokens of a sequence, k ids of a position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from npd.servers.http import Connection
from npd.types import FloatArray, IntArray

Ending: TypeAlias = Literal["stop", "length", "abort"]
ENDINGS: dict[object, Ending] = {"stop": "stop", "length": "length", "abort": "abort"}


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How responses are drawn, and when they end; `banned_ids` are never drawn.

    `temperature` 1 with `top_p` 1 samples the policy itself, whatever the server's own defaults.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    banned_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """What a server wrote: ids [L] with the end token, their log-probs [L], and why it ended.

    `abort` is a response cut off by a refresh; it holds what was written until then (L may be 0).
    Log-probs are those of the model's whole distribution at temperature 1.
    """

    ids: IntArray
    logprobs: FloatArray
    ending: Ending


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """A model's word on a sequence [P]: entry t is about token t given those before it.

    `logprobs` [P - 1] are of the sequence's own tokens 1, ..., P - 1; `ids`, `id_logprobs`
    [P - 1, k] the model's top k there, highest first.
    """

    logprobs: FloatArray
    ids: IntArray
    id_logprobs: FloatArray


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself; None where it does not tell."""

    engine: str
    version: str | None
    models: tuple[str, ...]
    max_context: int | None
    can_refresh: bool
    is_paused: bool | None = None


class EngineServer(Protocol):
    """One server. Raises Refused for what it will never do, Unavailable for what it cannot now."""

    @property
    def name(self) -> str:
        """Its URL."""
        ...

    def move(self, connection: Connection) -> None:
        """Be the server at the end of `connection`: it was started anew."""
        ...

    async def facts(self) -> ServerFacts:
        """What it is."""
        ...

    async def is_healthy(self) -> bool:
        """Whether it answers at all."""
        ...

    async def complete(
        self, prompt: Sequence[int], sampling: SamplingSettings, *, seed: int, model: str | None
    ) -> Completion:
        """Write a response; `model` names an adapter, None is what the server serves."""
        ...

    async def read(self, ids: Sequence[int], k: int, *, model: str | None = None) -> PromptLogprobs:
        """Log-probs of a given sequence, with the top `k` of each position (0: none)."""
        ...

    async def hold(self, *, drain: bool) -> None:
        """Take up no new request; let running ones end (`drain`) or cut them off."""
        ...

    async def release(self) -> None:
        """Take requests again."""
        ...

    async def load_weights(self, directory: Path) -> None:
        """Take the weights of a model directory in place, and forget cached prefixes."""
        ...

    async def load_adapter(self, directory: Path, name: str) -> None:
        """Serve the adapter of a directory under `name`, beside what is served already."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """No longer serve an adapter; one that is not there is fine."""
        ...

    async def tag(self) -> str | None:
        """The tag that was last set; None where the server cannot tell."""
        ...

    async def set_tag(self, tag: str) -> None:
        """Make `tag` what the server reports, where it can."""
        ...

    async def checksums(self) -> Mapping[str, str]:
        """SHA-256 of the tensors it holds, by name; empty where it cannot tell."""
        ...
