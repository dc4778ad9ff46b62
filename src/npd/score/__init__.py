"""What the teacher says of each rollout, and what Δ-IFD needs of the snapshot that wrote it."""

from __future__ import annotations

from pathlib import Path

from npd.config import ScoreConfig
from npd.score.base import Reader, Scorer, Support

__all__ = ["Reader", "Scorer", "Support", "build_scorer"]


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
    """A scorer, its teacher loaded.

    `vocab_size` is the number of token ids that teacher and student share (`len(tokenizer)`).

    Raises:
        ModelError: the teacher cannot be loaded.
    """
    from npd.score.pair import PairScorer
    from npd.score.prefill import load_reader

    def load(model: Path | str) -> Reader:
        return load_reader(
            config, model, vocab_size, device=device, trust_remote_code=trust_remote_code
        )

    return PairScorer(
        load(teacher),
        load,
        top_k=config.top_k,
        needs_ifd=needs_ifd,
        needs_student_pass=needs_student_pass,
        support=support,
        seed=seed,
    )
