"""Scoring of rollouts: the teacher's log-probs and top-k, and the student's log-probs for Δ-IFD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from npd.config import RunConfig, ScoreConfig
from npd.score.base import LogprobModel, Scorer, Support
from npd.types import DEFAULT_TEACHER, role_of

if TYPE_CHECKING:
    from npd.score.served import ServedTeacher
    from npd.score.teachers import Teachers

__all__ = ["LogprobModel", "Scorer", "Support", "build_scorer", "open_teacher", "open_teachers"]


def build_scorer(
    config: ScoreConfig,
    *,
    teacher: Path | str | LogprobModel,
    vocab_size: int,
    needs_ifd: bool,
    needs_student_pass: bool,
    support: Support,
    device: str,
    trust_remote_code: bool,
    seed: int,
) -> Scorer:
    """A scorer; `teacher` is a path to load, or an open model, which the caller closes.

    `vocab_size` is the number of token ids that teacher and student share (`len(tokenizer)`).

    Raises:
        ModelError: the teacher cannot be loaded.
    """
    from npd.score.in_process import load_prefill_model
    from npd.score.scorer import TeacherStudentScorer

    def load(model: Path | str, role: str = "student") -> LogprobModel:
        return load_prefill_model(
            config, model, vocab_size, role=role, device=device, trust_remote_code=trust_remote_code
        )

    return TeacherStudentScorer(
        load(teacher, "teacher") if isinstance(teacher, Path | str) else teacher,
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
    """A teacher on its servers, to be closed by the caller; None if it runs in process.

    A server that npd starts writes to `log`. `widest` is the largest support that will be
    requested besides `score.top_k`.

    Raises:
        ConfigError, ModelError, RunError: see `ServedTeacher`.
    """
    if not config.score.is_served:
        return None
    from npd.engines.pool import ServerPool
    from npd.score.served import ServedTeacher

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
    notify: Callable[[str], None] = lambda note: None,
    get_teacher: Callable[[str], LogprobModel] | None = None,
) -> Teachers:
    """The teachers of a run, each opened at its first use; to be closed by the caller.

    `log` gives the log file of a server that npd starts for a teacher; `notify` receives the
    verification of a running one. With `get_teacher`, which returns a teacher by name, teachers in
    process are not loaded. `widest` and errors as in `open_teacher`.
    """
    from npd.score.in_process import load_prefill_model
    from npd.score.teachers import Teachers

    def load(name: str) -> LogprobModel:
        return load_prefill_model(
            config.score,
            config.teacher_models[name],
            vocab_size,
            role=role_of(name),
            device=device,
            trust_remote_code=config.trust_remote_code,
        )

    def serve(name: str) -> ServedTeacher | None:
        served = open_teacher(config, vocab_size, log(name), teacher=name, widest=widest)
        for note in () if served is None else served.notes:
            notify(note)
        return served

    return Teachers(load if get_teacher is None else get_teacher, serve)
