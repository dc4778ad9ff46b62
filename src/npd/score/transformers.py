"""The in-process scorer: teacher and snapshot read many samples at once, in packed rows.

Promises: a record depends on its own rollout alone (to float noise). Does not sample, filter, or
write files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from npd.config import ScoreConfig
from npd.modeling import load_model, resolve_device
from npd.score.base import Support
from npd.score.prefill import Document, Reader, Reading
from npd.types import IntArray, Rollout, Scored

# A rollout's index in the call, and whether its response is read alone (without the prompt).
_Key: TypeAlias = tuple[int, bool]


class TransformersScorer:
    """A Scorer over two Hugging Face models; see `npd.score.base.build_scorer` for the arguments.

    With `support="sampled"` the k ids of a position are drawn from p_T (within the shared ids), by
    a generator seeded with (seed, sample id).
    """

    def __init__(
        self,
        config: ScoreConfig,
        *,
        teacher: Path | str,
        vocab_size: int,
        needs_ifd: bool,
        needs_student_pass: bool,
        support: Support = "topk",
        device: str = "auto",
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._needs_ifd = needs_ifd
        self._needs_student_pass = needs_student_pass
        self._support = support
        self._device = resolve_device(device)
        self._trust_remote_code = trust_remote_code
        self._seed = seed
        self._teacher: Reader | None = self._load(teacher)
        self._student: Reader | None = None
        self._snapshot: tuple[Path, int] | None = None

    def load_student(self, snapshot: Path, version: int) -> None:
        """Take the student's side of the scores from this snapshot from now on."""
        if self._snapshot != (snapshot, version):
            self._student = None  # the old weights go before the new ones come
            self._student = self._load(snapshot)
            self._snapshot = (snapshot, version)

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """One record a rollout, in order.

        Raises:
            ModelError: a rollout holds a token id that a model does not know.
            RunError: a model's log-probabilities are not finite.
        """
        assert self._teacher is not None, "score after close"
        teacher = self._teacher.read(self._teacher_documents(rollouts))
        documents = self._student_documents(rollouts)
        assert self._student or not documents, "score before load_student"
        student = self._student.read(documents) if self._student else {}
        return [
            self._record(rollout, teacher[i, False], teacher.get((i, True)), student, i)
            for i, rollout in enumerate(rollouts)
        ]

    def close(self) -> None:
        """Let go of both models."""
        self._teacher = self._student = self._snapshot = None

    def _load(self, path: Path | str) -> Reader:
        model = load_model(
            path,
            dtype=self._config.dtype,
            device=self._device,
            trust_remote_code=self._trust_remote_code,
        )
        return Reader(model, str(path), self._vocab_size, self._config)

    def _is_measured(self, rollout: Rollout) -> bool:
        return self._needs_student_pass or (self._needs_ifd and rollout.logprobs is None)

    def _teacher_documents(self, rollouts: Sequence[Rollout]) -> dict[_Key, Document]:
        documents: dict[_Key, Document] = {}
        for i, rollout in enumerate(rollouts):
            draws = self._uniforms(rollout) if self._support == "sampled" else None
            k = self._config.top_k if draws is None or self._is_measured(rollout) else 0
            documents[i, False] = Document(rollout.prompt_ids, rollout.response_ids, k, draws)
            if self._needs_ifd:
                documents[i, True] = Document(rollout.header_ids, rollout.response_ids)
        return documents

    def _student_documents(self, rollouts: Sequence[Rollout]) -> dict[_Key, Document]:
        documents: dict[_Key, Document] = {}
        for i, rollout in enumerate(rollouts):
            if self._is_measured(rollout):
                prompt, response = rollout.prompt_ids, rollout.response_ids
                documents[i, False] = Document(prompt, response, self._config.top_k)
            if self._needs_ifd:
                documents[i, True] = Document(rollout.header_ids, rollout.response_ids)
        return documents

    def _uniforms(self, rollout: Rollout) -> NDArray[np.float64]:
        rng = np.random.default_rng([self._seed, rollout.sample_id])
        return rng.random((len(rollout.response_ids), self._config.top_k))

    def _record(
        self,
        rollout: Rollout,
        teacher: Reading,
        teacher_alone: Reading | None,
        student: Mapping[_Key, Reading],
        index: int,
    ) -> Scored:
        conditional, alone = student.get((index, False)), student.get((index, True))
        k, recorded = self._config.top_k, rollout.logprobs
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


def _overlap(teacher_ids: IntArray, student_ids: IntArray) -> float:
    """Mean share of the teacher's top [L, k ...] found in the student's top [L, k]."""
    top = teacher_ids[:, : student_ids.shape[1]]
    return float((top[:, :, None] == student_ids[:, None, :]).any(axis=2).mean())
