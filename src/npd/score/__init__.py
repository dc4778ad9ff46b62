"""What the teacher says of each rollout, and what Δ-IFD needs of the snapshot that wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from npd.config import RunConfig, ScoreConfig
from npd.names import DEFAULT_TEACHER
from npd.score.base import Reader, Scorer, Support

if TYPE_CHECKING:
    from npd.score.served import ServedTeacher
    from npd.score.teachers import Teachers

__all__ = ["Reader", "Scorer", "Support", "build_scorer", "open_teacher", "open_teachers"]


def build_scorer(
    config: ScoreConfig,
    *,
    teacher: Path | str | Reader,
    vocab_size: int,
    needs_ifd: bool,
    needs_student_pass: bool,
    support: Support,
    device: str,
    trust_remote_code: bool,
    seed: int,
) -> Scorer:
    """A scorer, its teacher loaded, unless it is open already: a reader stays the caller's.

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
        load(teacher) if isinstance(teacher, Path | str) else teacher,
        load,
        top_k=config.top_k,
        needs_ifd=needs_ifd,
        needs_student_pass=needs_student_pass,
        support=support,
        seed=seed,
    )


def open_teacher(
    config: RunConfig,
    vocab_size: int,
    log: Path,
    *,
    teacher: str = DEFAULT_TEACHER,
    widest: int = 0,
) -> ServedTeacher | None:
    """A teacher of a run on servers of its own, to be closed by the caller; None in process.

    Our own server writes to `log`. `widest` is the widest support asked for besides `score.top_k`.

    Raises:
        ConfigError, ModelError, RunError: see `ServedTeacher`.
    """
    if config.score.engine == "transformers":
        return None
    from npd.score.served import ServedTeacher
    from npd.servers.pool import ServerPool

    score = config.score_of(teacher)
    return ServedTeacher(
        score,
        ServerPool(score.engine, score, log=log),
        teacher=config.teacher_models[teacher],
        vocab_size=vocab_size,
        context=config.max_read_tokens,
        tolerance=config.generate.probe_tolerance,
        widest=widest,
        trust_remote_code=config.trust_remote_code,
    )


def open_teachers(
    config: RunConfig,
    vocab_size: int,
    *,
    device: str,
    log: Callable[[str], Path],
    widest: int = 0,
    tell: Callable[[str], None] = lambda note: None,
    hold: Callable[[str], Reader] | None = None,
) -> Teachers:
    """The teachers of a run, each opened at its first use; to be closed by the caller.

    `log` gives the log file of a server that we start for a teacher of that name; `tell` takes what
    shows of a running one that it holds the teacher. `widest` and errors as in `open_teacher`.
    With `hold` a teacher in process is not loaded here: `hold` gives it, by name.
    """
    from npd.score.prefill import load_reader
    from npd.score.teachers import Teachers

    def load(name: str) -> Reader:
        trust, model = config.trust_remote_code, config.teacher_models[name]
        return load_reader(config.score, model, vocab_size, device=device, trust_remote_code=trust)

    def serve(name: str) -> ServedTeacher | None:
        served = open_teacher(config, vocab_size, log(name), teacher=name, widest=widest)
        for note in () if served is None else served.notes:
            tell(note)
        return served

    return Teachers(load if hold is None else hold, serve)
