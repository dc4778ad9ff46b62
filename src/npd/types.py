"""The records of npd: one frozen record per boundary between workers, with shapes and units.

This module computes nothing and does no I/O. Arrays are numpy (int32 ids, float32 log-probabilities
in nats). Records are never mutated. Records that a run creates by the million are named tuples,
which are five times as fast as frozen dataclasses to create, send and write.

Dimensions: L response tokens, k teacher support size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


DEFAULT_TEACHER = "default"
"""The name of the config's `teacher`, the teacher of prompts that name no other."""


def role_of(teacher: str) -> str:
    """The setting of a teacher's model: `teacher`, or `teachers.<name>`."""
    return "teacher" if teacher == DEFAULT_TEACHER else f"teachers.{teacher}"


IntArray: TypeAlias = "NDArray[np.int32]"
FloatArray: TypeAlias = "NDArray[np.float32]"


class FinishReason(StrEnum):
    """Why a response ended: at its end token, or at the length limit (truncated)."""

    STOP = "stop"
    LENGTH = "length"


class Outcome(StrEnum):
    """How a sample left. Each requested sample leaves at most once, and is live until then."""

    TRAINED_OUT = "trained_out"
    REJECTED = "rejected"
    STALE = "stale"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at before a run: `what`, how it stands, and what it `says`.

    Unless ok, `says` ends in the remedy. A run survives a warning. `error` is what `npd run` raises
    instead of a FAIL; None where only `npd doctor` looks.
    """

    status: Literal["ok", "warn", "FAIL"]
    what: str
    says: str
    error: Exception | None = None

    def __str__(self) -> str:
        """The line a person reads."""
        return f"{self.status:5} {self.what:20} {' '.join(self.says.split())}"

    @classmethod
    def ok(cls, what: str, says: str) -> Check:
        """A check that passed."""
        return cls("ok", what, says)

    @classmethod
    def warn(cls, what: str, says: str) -> Check:
        """A check that a run survives."""
        return cls("warn", what, says)

    @classmethod
    def fail(cls, what: str, why: str | Exception) -> Check:
        """A check that ends a run: the error that it ends in, or its text."""
        return cls("FAIL", what, str(why), why if isinstance(why, Exception) else None)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, e.g. `Message("user", "What is 2 + 2?")`.

    `extra` holds the record's other keys unchanged (`tool_calls`, `name`, `reasoning_content`,
    ...), for the chat template. `content` is None only if `extra` holds the turn's content.
    """

    role: str
    content: str | None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as read from the data, still text.

    Exactly one of `messages` (conversational, gets the chat template) and `text` (plain) is set.
    `completion` is a Message if it is more than text. `template_args` are further arguments of the
    chat template: `tools`, `documents`, and the content of `chat_template_kwargs`. `index` is the
    prompt's 0-based position in the source, and its identity within a run. `place` is the origin of
    its record (`train.jsonl:7`), for messages.
    """

    index: int
    messages: tuple[Message, ...] = ()
    text: str | None = None
    completion: str | Message | None = None
    answer: str | None = None
    teacher: str = DEFAULT_TEACHER
    template_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPrompt:
    """A prompt as token ids.

    `prompt_ids` [P] ends where the response begins, and includes the generation header.
    `header_ids` [H], H >= 1, is the context of the answer-alone pass: the prompt without the user's
    text. `completion_ids` is the reference response with its end token, if the data has one.
    """

    index: int
    prompt_ids: IntArray
    header_ids: IntArray
    completion_ids: IntArray | None = None
    answer: str | None = None
    teacher: str = DEFAULT_TEACHER

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles arrays as bytes, in half the time."""
        ids = (self.prompt_ids, self.header_ids, self.completion_ids)
        import numpy as np

        values = (i if i is None else np.asarray(i, np.int32).tobytes() for i in ids)
        return _prompt_of, (self.index, self.answer, self.teacher, *values)


class SampleRequest(NamedTuple):
    """A request for one sample. `sample_id` is unique in a run; `seed` fixes its randomness."""

    sample_id: int
    seed: int
    prompt: EncodedPrompt


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One response and its context.

    `response_ids` [L], L >= 1, includes the end token if `finish` is STOP. `logprobs` [L] are the
    generating snapshot's own log p(y_t) in nats, untempered; None if the text is not the student's.
    `versions` [L] is the snapshot that sampled each token if a refresh happened in between; then
    `version` is the oldest. It is None if one snapshot sampled all tokens. `teacher` is the name of
    the prompt's teacher.
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
        """Tokens of prompt and response together: the sample's size in a packed row."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True)
class Failed:
    """A single sample that a stage failed on; `reason` is one line."""

    sample_id: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A rollout with its scores.

    `topk_ids` [L, k], `topk_logprobs` [L, k]: the teacher's support at each response position, with
    true log-probabilities (not renormalised), highest first; for sampled targets, k sampled ids,
    with repetition. `teacher_logprobs` [L]: log p_T(y_t). The four `nll_*` are means over the
    response in nats per token, with the prompt (conditional) or without it (alone). `nll_student*`
    are the snapshot's, None if no filter needs them. `overlap` is the mean share of the teacher's
    top-k in the snapshot's own top-k, None if it was not computed.
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
    """The scalars of a sample, for the controller and the filters.

    The fields before `nll_teacher` are known after generation, the others after scoring.
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
    """A filter's decision on one sample: kept, or rejected with a machine-readable reason."""

    keep: bool
    reason: str = ""


class SampleRef(NamedTuple):
    """A sample's shard, the snapshot that generated it, and its number of tokens in a row."""

    sample_id: int
    shard: int
    version: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row: concatenated documents, at most `row_tokens` tokens in total."""

    samples: tuple[SampleRef, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles plain numbers, for speed."""
        return _row_of, (tuple(map(tuple, self.samples)),)


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: `ranks[r]` are the rows of trainer rank r, `lr` its learning rate."""

    index: int
    lr: float
    ranks: tuple[tuple[Row, ...], ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """A fixed list of optimiser steps. `version` is the newest snapshot at the time of planning."""

    index: int
    version: int
    steps: tuple[Step, ...]

    @property
    def refs(self) -> Iterator[SampleRef]:
        """The samples trained on, step by step, repeated for each use."""
        rows = (row for step in self.steps for rank in step.ranks for row in rank)
        return (ref for row in rows for ref in row.samples)


def _prompt_of(index: int, answer: str | None, teacher: str, *ids: bytes | None) -> EncodedPrompt:
    # From bytearrays, because the arrays must be writable.
    import numpy as np

    arrays: list[Any] = [i if i is None else np.frombuffer(bytearray(i), np.int32) for i in ids]
    return EncodedPrompt(index, arrays[0], arrays[1], arrays[2], answer, teacher)


def _row_of(samples: tuple[tuple[int, int, int, int], ...]) -> Row:
    return Row(tuple(map(SampleRef._make, samples)))


@dataclass(frozen=True, slots=True)
class StepReport:
    """The metrics of one optimiser step; means are over its response tokens on all ranks, without
    the `skipped_tokens` of `loss.skip_after`.

    `drift` estimates KL(theta || gen) and `drift_k3` KL(gen || theta) in nats per token on samples
    of the newest snapshot; None if the step has none, or no behaviour log-probs. `ess` is
    the effective sample size of the importance ratios as a share of tokens, in (0, 1]. `overlap`
    is the share of support ids that the student ranks above every id outside the support.
    """

    step: int
    loss: float
    ce: float
    kd: float | None
    grad_norm: float
    lr: float
    num_samples: int
    response_tokens: int
    total_tokens: int
    num_rows: int
    fill: float
    seconds: float
    teacher_mass: float | None = None
    student_mass: float | None = None
    agreement: float | None = None
    entropy: float | None = None
    drift: float | None = None
    drift_k3: float | None = None
    ess: float | None = None
    lag_mean: float = 0.0
    lag_max: int = 0
    overlap: float | None = None
    skipped_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """A trained segment: one report for each step, and the trainer's peak memory in MiB
    (on a GPU within the segment, elsewhere of the process so far)."""

    segment: int
    steps: tuple[StepReport, ...]
    peak_memory_mib: float = 0.0


@dataclass(frozen=True, slots=True)
class EvalReport:
    """Held-out quality at a step.

    `kl`: tail-bucket KL(teacher || student) in nats per token on fixed held-out responses.
    `kl_sums`: its sum over each response. `agreement`: the share of positions where both argmaxes
    agree. `exact_match`: the share of the `num_answers` prompts with an `answer` whose greedy
    response ends in the answer. `teacher_kls`: (teacher's name, `kl` on its prompts) if there are
    several teachers.
    """

    step: int
    kl: float | None
    agreement: float | None
    exact_match: float | None
    num_prompts: int
    num_tokens: int
    seconds: float
    samples: tuple[tuple[str, str], ...] = ()
    kl_sums: tuple[float, ...] = ()
    num_answers: int = 0
    teacher_kls: tuple[tuple[str, float], ...] = ()
