"""What the teacher says of each rollout, and what Δ-IFD needs of the snapshot that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from npd.config import RunConfig, ScoreConfig
from npd.score.base import Reader, Scorer, Support

if TYPE_CHECKING:
    from npd.score.served import ServedTeacher

__all__ = ["Reader", "Scorer", "Support", "build_scorer", "open_teacher"]


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
    served: Reader | None = None,
) -> Scorer:
    """A scorer, its teacher loaded, unless that is open already (`served`): it stays the caller's.

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
        load(teacher) if served is None else served,
        load,
        top_k=config.top_k,
        needs_ifd=needs_ifd,
        needs_student_pass=needs_student_pass,
        support=support,
        seed=seed,
    )


def open_teacher(
    config: RunConfig, vocab_size: int, log: Path, *, widest: int = 0
) -> ServedTeacher | None:
    """The teacher on the servers of `config.score`, to be closed by the caller; None in process.

    Our own server writes to `log`. `widest` is the widest support asked for besides `score.top_k`.

    Raises:
        ConfigError, ModelError, RunError: see `ServedTeacher`.
    """
    if config.score.engine == "transformers":
        return None
    from npd.score.served import ServedTeacher
    from npd.servers.pool import ServerPool

    assert config.teacher is not None, "checked by the config"
    return ServedTeacher(
        config.score,
        ServerPool(config.score.engine, config.score, log=log),
        teacher=config.teacher,
        vocab_size=vocab_size,
        context=config.max_read_tokens,
        tolerance=config.generate.probe_tolerance,
        widest=widest,
        trust_remote_code=config.trust_remote_code,
    )
