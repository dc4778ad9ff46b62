"""The scorer: a teacher and the snapshot that wrote, each read through a reader of its own.

Promises: a record depends on its own rollout alone (to float noise), wherever its teacher runs.
Does not sample, filter, or write files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from npd.score.base import Document, Reader, Reading, Support, Unread
from npd.types import Failed, IntArray, Rollout, Scored


class _Key(NamedTuple):
    """A rollout, by its id; `is_alone`: its response read without the prompt."""

    sample_id: int
    is_alone: bool

    def __str__(self) -> str:
        return f"sample {self.sample_id}{', its response alone' if self.is_alone else ''}"


class _Read:
    """What a reader said: its readings, and why a sample lacks one (the first reason)."""

    def __init__(self, found: Mapping[_Key, Reading | Unread]) -> None:
        self.readings: dict[_Key, Reading] = {}
        self.reasons: dict[int, str] = {}
        for key, item in found.items():
            if isinstance(item, Unread):
                self.reasons.setdefault(key.sample_id, item.reason)
            else:
                self.readings[key] = item


class PairScorer:
    """A Scorer over two readers: the teacher's, and the one `load_student` makes of a snapshot.

    With `support="sampled"` the `top_k` ids of a position are drawn from p_T (within the shared
    ids), by a generator seeded with (seed, sample id). `close` lets go of the readers; what they
    hold open, such as a server, is closed by whoever opened it.
    """

    def __init__(
        self,
        teacher: Reader,
        load: Callable[[Path], Reader],
        *,
        top_k: int,
        needs_ifd: bool,
        needs_student_pass: bool,
        support: Support = "topk",
        seed: int = 0,
    ) -> None:
        self._teacher: Reader | None = teacher
        self._load = load
        self._top_k = top_k
        self._needs_ifd = needs_ifd
        self._needs_student_pass = needs_student_pass
        self._support = support
        self._seed = seed
        self._student: Reader | None = None
        self._snapshot: tuple[Path, int] | None = None

    def load_student(self, snapshot: Path, version: int) -> None:
        """Take the student's side of the scores from this snapshot from now on."""
        if self._snapshot != (snapshot, version):
            self._student = None  # the old weights go before the new ones come
            self._student = self._load(snapshot)
            self._snapshot = (snapshot, version)

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored | Failed]:
        """One record a rollout, or why a server has none for it, in order.

        Raises:
            ModelError: a rollout holds a token id that a model does not know.
            RunError: a model's log-probabilities are not finite, or no server answers.
            WorkerLostError: our own server ended or hangs.
        """
        assert self._teacher is not None, "score after close"
        teacher = _Read(self._teacher.read(self._teacher_documents(rollouts)))
        read = [rollout for rollout in rollouts if rollout.sample_id not in teacher.reasons]
        documents = self._student_documents(read)
        assert self._student or not documents, "score before load_student"
        student = _Read(self._student.read(documents) if self._student else {})
        reasons = teacher.reasons | student.reasons
        return [
            Failed(rollout.sample_id, reasons[rollout.sample_id])
            if rollout.sample_id in reasons
            else self._record(rollout, teacher.readings, student.readings)
            for rollout in rollouts
        ]

    def close(self) -> None:
        """Let go of both models."""
        self._teacher = self._student = self._snapshot = None

    def _is_measured(self, rollout: Rollout) -> bool:
        return self._needs_student_pass or (self._needs_ifd and rollout.logprobs is None)

    def _teacher_documents(self, rollouts: Sequence[Rollout]) -> dict[_Key, Document]:
        documents: dict[_Key, Document] = {}
        for rollout in rollouts:
            draws = self._uniforms(rollout) if self._support == "sampled" else None
            k = self._top_k if draws is None or self._is_measured(rollout) else 0
            prompt, header, response = rollout.prompt_ids, rollout.header_ids, rollout.response_ids
            documents[_whole(rollout)] = Document(prompt, response, k, draws, rollout.teacher)
            if self._needs_ifd:
                documents[_alone(rollout)] = Document(header, response, teacher=rollout.teacher)
        return documents

    def _student_documents(self, rollouts: Sequence[Rollout]) -> dict[_Key, Document]:
        documents: dict[_Key, Document] = {}
        for rollout in rollouts:
            if self._is_measured(rollout):
                prompt, response = rollout.prompt_ids, rollout.response_ids
                documents[_whole(rollout)] = Document(prompt, response, self._top_k)
            if self._needs_ifd:
                documents[_alone(rollout)] = Document(rollout.header_ids, rollout.response_ids)
        return documents

    def _uniforms(self, rollout: Rollout) -> NDArray[np.float64]:
        rng = np.random.default_rng([self._seed, rollout.sample_id])
        return rng.random((len(rollout.response_ids), self._top_k))

    def _record(
        self,
        rollout: Rollout,
        by_teacher: Mapping[_Key, Reading],
        by_student: Mapping[_Key, Reading],
    ) -> Scored:
        whole, response = _whole(rollout), _alone(rollout)
        teacher, teacher_alone = by_teacher[whole], by_teacher.get(response)
        conditional, alone = by_student.get(whole), by_student.get(response)
        k, recorded = self._top_k, rollout.logprobs
        nll_recorded = None if recorded is None else float(-recorded.mean(dtype=np.float64))
        return Scored(
            rollout=rollout,
            topk_ids=teacher.ids[:, -k:],
            topk_logprobs=teacher.id_logprobs[:, -k:],
            teacher_logprobs=teacher.logprobs,
            nll_teacher=teacher.nll,
            nll_teacher_alone=None if teacher_alone is None else teacher_alone.nll,
            nll_student=nll_recorded if conditional is None else conditional.nll,
            nll_student_alone=None if alone is None else alone.nll,
            overlap=None if conditional is None else _overlap(teacher.ids, conditional.ids),
        )


def _whole(rollout: Rollout) -> _Key:
    return _Key(rollout.sample_id, is_alone=False)


def _alone(rollout: Rollout) -> _Key:
    return _Key(rollout.sample_id, is_alone=True)


def _overlap(teacher_ids: IntArray, student_ids: IntArray) -> float:
    """Mean share of the teacher's top [L, k ...] found in the student's top [L, k]."""
    top = teacher_ids[:, : student_ids.shape[1]]
    return float((top[:, :, None] == student_ids[:, None, :]).any(axis=2).mean())
