"""What a scorer is, and what reads for it.

A scorer reads rollouts and returns what the teacher says of them, one frozen record each, in order.
It keeps no sample and decides nothing. A reader is one model, wherever it runs: given documents it
returns that model's word on them. Import-light: torch comes with the implementations.

Dimensions: L tokens of a response.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from npd.names import DEFAULT_TEACHER
from npd.types import Failed, FloatArray, IntArray, Rollout, Scored

Key = TypeVar("Key", bound=Hashable)
Support: TypeAlias = Literal["topk", "sampled"]


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A response after some context. `k` ids of the model's top are asked for at each of its
    positions, and one drawn id for each of `uniforms` [L, draws] in [0, 1). `teacher` names who is
    to read it, where there are several."""

    context: IntArray
    response: IntArray
    k: int = 0
    uniforms: NDArray[np.float64] | None = None
    teacher: str = DEFAULT_TEACHER

    @property
    def wants(self) -> tuple[int, bool]:
        """Documents that want the same of each position go through the head together."""
        return self.k, self.uniforms is not None


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A model's word on a document: log p(y_t) [L]; `ids` [L, k + draws], top first, then drawn."""

    logprobs: FloatArray
    ids: IntArray
    id_logprobs: FloatArray

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the response, nats per token."""
        return float(-self.logprobs.mean(dtype=np.float64))


@dataclass(frozen=True, slots=True)
class Unread:
    """A document that could not be read although others could, and why, in one line."""

    reason: str


class Reader(Protocol):
    """One model, asked about given text. Readings do not depend on what is read beside them."""

    def read(self, documents: Mapping[Key, Document]) -> Mapping[Key, Reading | Unread]:
        """A reading of each document, or the reason why there is none, under its key; a key's text
        names it in an error."""


class Scorer(Protocol):
    """Scores rollouts by a teacher, and by the snapshot that wrote them where it is asked for."""

    def load_student(self, snapshot: Path, version: int) -> None:
        """Take the student's side of the scores from this snapshot from now on."""

    def score(self, rollouts: Sequence[Rollout]) -> Sequence[Scored | Failed]:
        """One record a rollout, or the reason why there is none, in the order given; a record
        depends on its own rollout alone."""

    def close(self) -> None:
        """Let go of the models; no call is allowed after it."""
