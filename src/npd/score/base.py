"""What a scorer is.

A scorer reads rollouts and returns what the teacher says of them, one frozen record each, in order.
It keeps no sample and decides nothing. Import-light: torch comes with the implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from npd.types import Rollout, Scored

Support: TypeAlias = Literal["topk", "sampled"]


class Scorer(Protocol):
    """Scores rollouts by a teacher, and by the snapshot that wrote them where it is asked for."""

    def load_student(self, snapshot: Path, version: int) -> None:
        """Take the student's side of the scores from this snapshot from now on."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """One record a rollout, in the order given; a record depends on its own rollout alone."""

    def close(self) -> None:
        """Let go of the models; no call is allowed after it."""
