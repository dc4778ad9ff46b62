"""What a scorer is, and how one is built from the config.

A scorer reads rollouts and returns what the teacher says of them, one frozen record each, in order.
It keeps no sample and decides nothing. Import-light: torch comes with the implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from npd.config import ScoreConfig
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


def build_scorer(
    config: ScoreConfig,
    *,
    teacher: Path | str,
    vocab_size: int,
    needs_ifd: bool,
    needs_student_pass: bool,
    support: Support,
    device: str,
    trust_remote_code: bool,
    seed: int,
) -> Scorer:
    """The scorer that `config.engine` names, its teacher loaded.

    `vocab_size` is the number of token ids that teacher and student share (`len(tokenizer)`).

    Raises:
        ModelError: the teacher cannot be loaded.
    """
    from npd.score.transformers import TransformersScorer

    return TransformersScorer(
        config,
        teacher=teacher,
        vocab_size=vocab_size,
        needs_ifd=needs_ifd,
        needs_student_pass=needs_student_pass,
        support=support,
        device=device,
        trust_remote_code=trust_remote_code,
        seed=seed,
    )
