"""The protocols of a scorer, and of the models that compute log-probs for it.

A `Scorer` turns rollouts into scored records, in order. It keeps no sample and decides nothing. A
`LogprobModel` is one model, in process or behind HTTP: it returns log-probs for documents of token
ids. Imports no torch; the implementations do.

Dimensions: L tokens of a response.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from npd.types import DEFAULT_TEACHER, Failed, FloatArray, IntArray, Rollout, Scored

Key = TypeVar("Key", bound=Hashable)
Support: TypeAlias = Literal["topk", "sampled"]


@dataclass(frozen=True, slots=True, eq=False)
class LogprobRequest:
    """A response with its context, whose log-probs are requested.

    Each position also gets the model's top `k` ids, and one sampled id for each of `uniforms`
    [L, draws] in [0, 1). `teacher` names one of several teachers.
    """

    context: IntArray
    response: IntArray
    k: int = 0
    uniforms: NDArray[np.float64] | None = None
    teacher: str = DEFAULT_TEACHER

    @property
    def outputs(self) -> tuple[int, bool]:
        """`k` and whether ids are sampled; documents that agree share a pass of the LM head."""
        return self.k, self.uniforms is not None


@dataclass(frozen=True, slots=True, eq=False)
class Logprobs:
    """A model's log p(y_t) [L] of a document; `ids` [L, k + draws], first top-k, then sampled."""

    logprobs: FloatArray
    ids: IntArray
    id_logprobs: FloatArray

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the response, nats per token."""
        return float(-self.logprobs.mean(dtype=np.float64))


@dataclass(frozen=True, slots=True)
class LogprobFailure:
    """A document whose log-probs could not be computed; `reason` is one line."""

    reason: str


class LogprobModel(Protocol):
    """A model that returns log-probs of given text, independently for each document."""

    def read(
        self, documents: Mapping[Key, LogprobRequest]
    ) -> Mapping[Key, Logprobs | LogprobFailure]:
        """The log-probs of each document, or its failure, by key; errors name the key."""


class Scorer(Protocol):
    """Scores rollouts with a teacher and, if requested, with the snapshot that wrote them."""

    def load_student(self, snapshot: Path, version: int) -> None:
        """Use this snapshot for the student's log-probs from now on."""

    def score(self, rollouts: Sequence[Rollout]) -> Sequence[Scored | Failed]:
        """One record or failure for each rollout, in order.

        A record depends on its own rollout alone.
        """

    def close(self) -> None:
        """Free the models; no call is allowed afterwards."""
