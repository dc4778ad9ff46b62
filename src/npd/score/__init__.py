"""What the teacher says of each rollout, and what Δ-IFD needs of the snapshot that wrote it."""

from __future__ import annotations

from pathlib import Path

from npd.config import ScoreConfig
from npd.score.base import Scorer, Support

__all__ = ["Scorer", "Support", "build_scorer"]


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
