"""What a generator is: asks in, rollouts out, one policy version at a time.

Promises of every implementation (one contract suite runs over all): rollouts come back in the
order of the asks, each response has at least one token, and a sample's randomness is decided by
its seed alone (where the engine is a server: as far as that keeps to it). `build_generator`
imports only the implementation a config asks for. Does not score, store or filter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from npd.config import GenerateConfig
from npd.types import Ask, Failed, Rollout

if TYPE_CHECKING:
    from npd.generate.served import Surroundings


class Generator(Protocol):
    """Writes one response per ask with the snapshot it holds."""

    @property
    def version(self) -> int | None:
        """The version of the snapshot it holds; None before the first."""

    def load(self, snapshot: Path, version: int) -> None:
        """Take over the weights of `snapshot`; every later rollout carries `version`."""

    def generate(self, asks: Sequence[Ask]) -> Sequence[Rollout | Failed]:
        """One rollout, or the reason why there is none, per ask, in the order of the asks."""

    def close(self) -> None:
        """Let go of the model; the generator cannot be used afterwards."""


def build_generator(
    config: GenerateConfig,
    *,
    stop_ids: Iterable[int],
    pad_id: int,
    vocab_size: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    surroundings: Surroundings | None = None,
) -> Generator:
    """The generator `config.source` and `config.engine` name, not yet loaded.

    `stop_ids` end a response, `pad_id` fills the left of shorter prompts (masked), and ids from
    `vocab_size` on (padding of the embedding) are never sampled. `device` is `auto`, `cpu`, `cuda`.
    `surroundings` are what a generator by servers must know of the run; others do without.
    """
    if config.source == "dataset":
        from npd.generate.dataset import DatasetGenerator

        return DatasetGenerator(config.max_new_tokens)
    if config.engine != "transformers":
        from npd.generate.served import ServedGenerator

        assert surroundings is not None, "a server's generator has a log and a context"
        return ServedGenerator(
            config,
            surroundings,
            stop_ids=stop_ids,
            vocab_size=vocab_size,
            trust_remote_code=trust_remote_code,
        )
    from npd.generate.transformers import TransformersGenerator

    return TransformersGenerator(
        config,
        stop_ids=stop_ids,
        pad_id=pad_id,
        vocab_size=vocab_size,
        device=device,
        trust_remote_code=trust_remote_code,
    )
