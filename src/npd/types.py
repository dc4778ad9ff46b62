"""The nouns of npd: one frozen record per boundary between workers, with shapes and units.

Nothing here computes or does I/O. Arrays are numpy (int32 ids, float32 log-probabilities in nats);
records are never changed on their way. Those that a run makes by the million are named tuples: five
times as fast as frozen dataclasses to make, to send and to write. Dimension legend: L response
tokens, k teacher support size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from npd.names import DEFAULT_TEACHER

IntArray: TypeAlias = NDArray[np.int32]
FloatArray: TypeAlias = NDArray[np.float32]


class FinishReason(StrEnum):
    """Why a response ended: its own end token, or the length limit (then it is truncated)."""

    STOP = "stop"
    LENGTH = "length"


class Outcome(StrEnum):
    """How a sample left. Each sample asked for leaves at most once; until then it is live."""

    TRAINED_OUT = "trained_out"
    REJECTED = "rejected"
    STALE = "stale"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, e.g. `Message("user", "What is 2 + 2?")`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as read from the data, still text.

    Exactly one of `messages` (conversational, gets the chat template) and `text` (plain) is set.
    `index` is its 0-based position among the prompts of the source and its identity within a run,
    `place` where its record was read, for messages.
    """

    index: int
    messages: tuple[Message, ...] = ()
    text: str | None = None
    completion: str | None = None
    answer: str | None = None
    teacher: str = DEFAULT_TEACHER
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPrompt:
    """A prompt as token ids.

    `prompt_ids` [P] ends where the response begins (generation header included). `header_ids` [H],
    H >= 1, is the context of the answer-alone pass: the same with the user's text left out.
    `completion_ids` is the reference response with its end token, if the data has one.
    """

    index: int
    prompt_ids: IntArray
    header_ids: IntArray
    completion_ids: IntArray | None = None
    answer: str | None = None
    teacher: str = DEFAULT_TEACHER

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as bytes: arrays and slots as they are take twice as long."""
        ids = (self.prompt_ids, self.header_ids, self.completion_ids)
        values = (i if i is None else np.asarray(i, np.int32).tobytes() for i in ids)
        return _prompt_of, (self.index, self.answer, self.teacher, *values)


class Ask(NamedTuple):
    """A request for one sample. `sample_id` is unique in a run; `seed` decides its randomness."""

    sample_id: int
    seed: int
    prompt: EncodedPrompt


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One response and the context it was written in.

    `response_ids` [L], L >= 1, includes the end token when `finish` is STOP. `logprobs` [L] are the
    writing snapshot's own log p(y_t) in nats, untempered; None where the text is not the student's.
    `versions` [L] are the snapshots that drew each token where a refresh fell in the middle, and
    `version` is then the oldest of them; None where one snapshot wrote it all. `teacher` is the
    name of the prompt's teacher.
    """

    sample_id: int
    prompt_index: int
    version: int
    prompt_ids: IntArray
    header_ids: IntArray
    response_ids: IntArray
    logprobs: FloatArray | None
    finish: FinishReason
    seed: int
    versions: IntArray | None = None
    teacher: str = DEFAULT_TEACHER

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and response together: the room the sample takes in a packed row."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True)
class Failed:
    """A sample that could not be written although others could, and why, in one line."""

    sample_id: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A rollout with what the teacher says of it.

    `topk_ids` [L, k], `topk_logprobs` [L, k]: the teacher's support at each response position, true
    log-probabilities (not renormalised), highest first; for sampled targets the k ids drawn, with
    repetition. `teacher_logprobs` [L]: log p_T(y_t). The four `nll_*` are means over the response
    in nats per token, with the prompt (conditional) and without (alone); student ones are the
    snapshot's and None where no filter asks for them. `overlap` is the mean share of the teacher's
    top-k that is in the snapshot's own top-k, None where it was not computed.
    """

    rollout: Rollout
    topk_ids: IntArray
    topk_logprobs: FloatArray
    teacher_logprobs: FloatArray
    nll_teacher: float
    nll_teacher_alone: float | None = None
    nll_student: float | None = None
    nll_student_alone: float | None = None
    overlap: float | None = None


class SampleStats(NamedTuple):
    """The scalars of a sample, all that the controller and the filters ever see of it.

    The fields before `nll_teacher` are known once it is generated, the rest once it is scored.
    `repeat` is the share of the response's 4-grams that occurred before in it (0 for L < 5).
    `teacher_mass` is the mean over positions of the probability inside the teacher's support.
    """

    sample_id: int
    prompt_index: int
    version: int
    prompt_tokens: int
    response_tokens: int
    finish: FinishReason
    repeat: float
    nll_teacher: float | None = None
    nll_teacher_alone: float | None = None
    nll_student: float | None = None
    nll_student_alone: float | None = None
    overlap: float | None = None
    teacher_mass: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and response together."""
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True, slots=True)
class Verdict:
    """A filter's word on one sample: kept, or rejected with a short machine-readable reason."""

    keep: bool
    reason: str = ""


class SampleRef(NamedTuple):
    """Where a sample lies (`shard`), which snapshot wrote it, and how many tokens it packs to."""

    sample_id: int
    shard: int
    version: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row: documents laid end to end, at most `row_tokens` tokens in all."""

    samples: tuple[SampleRef, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as plain numbers, as prompts are as bytes."""
        return _row_of, (tuple(map(tuple, self.samples)),)


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: `ranks[r]` are the rows of trainer rank r; `lr` is already decided."""

    index: int
    lr: float
    ranks: tuple[tuple[Row, ...], ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """A fixed list of optimiser steps. `version` is the newest snapshot when it was decided."""

    index: int
    version: int
    steps: tuple[Step, ...]

    @property
    def refs(self) -> Iterator[SampleRef]:
        """The samples trained on, step by step, each as often as it is used."""
        rows = (row for step in self.steps for rank in step.ranks for row in rank)
        return (ref for row in rows for ref in row.samples)


def _prompt_of(index: int, answer: str | None, teacher: str, *ids: bytes | None) -> EncodedPrompt:
    # From bytearrays, so that the arrays can be written to.
    arrays: list[Any] = [i if i is None else np.frombuffer(bytearray(i), np.int32) for i in ids]
    return EncodedPrompt(index, arrays[0], arrays[1], arrays[2], answer, teacher)


def _row_of(samples: tuple[tuple[int, int, int, int], ...]) -> Row:
    return Row(tuple(map(SampleRef._make, samples)))
