"""The protocol of an inference server: token ids in, token ids and log-probs out, weight updates.

One contract suite runs over every implementation. Requests carry token ids, never text. All methods
are coroutines of one event loop.

Dimensions: P tokens of a sequence, k ids per position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from npd.engines.client import Connection
from npd.types import FloatArray, IntArray

Ending: TypeAlias = Literal["stop", "length", "abort"]
ENDINGS: dict[object, Ending] = {"stop": "stop", "length": "length", "abort": "abort"}


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Sampling parameters and end conditions of responses; `banned_ids` are never sampled.

    `temperature` 1 with `top_p` 1 samples the policy itself; the server's defaults do not apply.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    banned_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """A response: ids [L] including the end token, their log-probs [L], and why it ended.

    A pause ends a response with `abort`; it keeps the tokens sampled so far (L may be 0). Log-probs
    are over the full vocabulary at temperature 1.
    """

    ids: IntArray
    logprobs: FloatArray
    ending: Ending


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """The log-probs of a sequence of P tokens, each token given the tokens before it.

    `logprobs` [P - 1] belong to tokens 1, ..., P - 1 of the sequence. `ids` and `id_logprobs`
    [P - 1, k] are the model's top k at the same positions, highest first.
    """

    logprobs: FloatArray
    ids: IntArray
    id_logprobs: FloatArray


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server reports about itself; a field is None if the server does not report it."""

    engine: str
    version: str | None
    models: tuple[str, ...]
    max_context: int | None
    can_refresh: bool
    is_paused: bool | None = None


class EngineServer(Protocol):
    """One server. Calls raise Refused (a retry cannot succeed) or Unavailable (a retry may)."""

    @property
    def name(self) -> str:
        """Its URL."""
        ...

    def reconnect(self, connection: Connection) -> None:
        """Use `connection` from now on, because the server was restarted."""
        ...

    async def facts(self) -> ServerFacts:
        """The engine, its version, its models and its limits."""
        ...

    async def is_healthy(self) -> bool:
        """Whether it responds and its engine is alive."""
        ...

    async def complete(
        self,
        prompt: Sequence[int],
        sampling: SamplingSettings,
        *,
        seed: int | None,
        model: str | None,
    ) -> Completion:
        """Generate a response with the adapter named `model`, or with the base model if None.

        Without a `seed` the server draws from random numbers of its own.
        """
        ...

    async def read(self, ids: Sequence[int], k: int, *, model: str | None = None) -> PromptLogprobs:
        """Log-probs of a given sequence, with the top `k` ids of each position (0: none)."""
        ...

    async def pause(self, *, drain: bool) -> None:
        """Start no new requests; finish running ones (`drain`) or abort them."""
        ...

    async def resume(self) -> None:
        """Accept requests again after `pause`."""
        ...

    async def load_weights(self, directory: Path) -> None:
        """Load the weights of a model directory in place, and reset the prefix cache."""
        ...

    async def load_adapter(self, directory: Path, name: str) -> None:
        """Load the adapter in `directory` and serve it as `name`, beside the base model."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter; not an error if it is not loaded."""
        ...

    async def tag(self) -> str | None:
        """The weight version last set by `set_tag`; None if the server has no tags."""
        ...

    async def set_tag(self, tag: str) -> None:
        """Have the server report `tag` as its weight version; a no-op if it has no tags."""
        ...
