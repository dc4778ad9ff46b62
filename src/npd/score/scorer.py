"""The scorer: log-probs of each rollout under the teacher and under the snapshot that wrote it.

Promises: a record depends on its own rollout alone (to float noise), wherever its teacher runs.
Does not sample, filter, or write files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from npd.score.base import LogprobFailure, LogprobModel, LogprobRequest, Logprobs, Support
from npd.types import Failed, IntArray, Rollout, Scored


class _Key(NamedTuple):
    """A rollout's id; `is_alone` marks the pass over its response without the prompt."""

    sample_id: int
    is_alone: bool

    def __str__(self) -> str:
        return f"sample {self.sample_id}{', its response alone' if self.is_alone else ''}"


class _Read:
    """A model's log-probs by document, and the first failure of each incomplete sample."""

    def __init__(self, found: Mapping[_Key, Logprobs | LogprobFailure]) -> None:
        self.readings: dict[_Key, Logprobs] = {}
        self.reasons: dict[int, str] = {}
        for key, item in found.items():
            if isinstance(item, LogprobFailure):
                self.reasons.setdefault(key.sample_id, item.reason)
            else:
                self.readings[key] = item


class TeacherStudentScorer:
    """A Scorer over two models: the teacher, and the snapshot given to `load_student`.

    With `support="sampled"` the `top_k` ids of a position are sampled from p_T (within the shared
    ids), by a generator seeded with (seed, sample id). `close` frees the models, but leaves servers
    to the caller that opened them.
    """

    def __init__(
        self,
        teacher: LogprobModel,
        load: Callable[[Path], LogprobModel],
        *,
        top_k: int,
        needs_ifd: bool,
        needs_student_pass: bool,
        support: Support = "topk",
        seed: int = 0,
    ) -> None:
        self._teacher: LogprobModel | None = teacher
        self._load = load
        self._top_k = top_k
        self._needs_ifd = needs_ifd
        self._needs_student_pass = needs_student_pass
        self._support = support
        self._seed = seed
        self._student: LogprobModel | None = None
        self._snapshot: tuple[Path, int] | None = None

    def load_student(self, snapshot: Path, version: int) -> None:
        """Use this snapshot for the student's log-probs from now on."""
        if self._snapshot != (snapshot, version):
            self._student = None  # free the old weights before loading the new ones
            self._student = self._load(snapshot)
            self._snapshot = (snapshot, version)

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored | Failed]:
        """One record or failure for each rollout, in order.

        Raises:
            ModelError: a rollout holds a token id outside a model's vocabulary.
            RunError: a model's log-probabilities are not finite, or no server responds.
            WorkerLostError: a server that npd launched exited or hangs.
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
        """Free both models."""
        self._teacher = self._student = self._snapshot = None

    def _is_measured(self, rollout: Rollout) -> bool:
        return self._needs_student_pass or (self._needs_ifd and rollout.logprobs is None)

    def _teacher_documents(self, rollouts: Sequence[Rollout]) -> dict[_Key, LogprobRequest]:
        documents: dict[_Key, LogprobRequest] = {}
        for rollout in rollouts:
            draws = self._uniforms(rollout) if self._support == "sampled" else None
            k = self._top_k if draws is None or self._is_measured(rollout) else 0
            prompt, header, response = rollout.prompt_ids, rollout.header_ids, rollout.response_ids
            documents[_whole(rollout)] = LogprobRequest(prompt, response, k, draws, rollout.teacher)
            if self._needs_ifd:
                documents[_alone(rollout)] = LogprobRequest(
                    header, response, teacher=rollout.teacher
                )
        return documents

    def _student_documents(self, rollouts: Sequence[Rollout]) -> dict[_Key, LogprobRequest]:
        documents: dict[_Key, LogprobRequest] = {}
        for rollout in rollouts:
            if self._is_measured(rollout):
                prompt, response = rollout.prompt_ids, rollout.response_ids
                documents[_whole(rollout)] = LogprobRequest(prompt, response, self._top_k)
            if self._needs_ifd:
                documents[_alone(rollout)] = LogprobRequest(
                    rollout.header_ids, rollout.response_ids
                )
        return documents

    def _uniforms(self, rollout: Rollout) -> NDArray[np.float64]:
        rng = np.random.default_rng([self._seed, rollout.sample_id])
        return rng.random((len(rollout.response_ids), self._top_k))

    def _record(
        self,
        rollout: Rollout,
        by_teacher: Mapping[_Key, Logprobs],
        by_student: Mapping[_Key, Logprobs],
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
