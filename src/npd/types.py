"""The nouns of npd: one frozen record per boundary between workers, with shapes and units.

Nothing here computes or does I/O. Arrays are numpy (int32 ids, float32 log-probabilities in nats);
records are never changed on their way. Dimension legend: L response tokens, k teacher support size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

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


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
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


@dataclass(frozen=True, slots=True)
class SampleStats:
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


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where a sample lies (`shard`), which snapshot wrote it, and how many tokens it packs to."""

    sample_id: int
    shard: int
    version: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row: documents laid end to end, at most `row_tokens` tokens in all."""

    samples: tuple[SampleRef, ...]


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


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimiser step measured; means are over its response tokens, all ranks together.

    `drift` estimates KL(theta || gen) and `drift_k3` KL(gen || theta) in nats per token on samples
    of the newest snapshot, None when the step held none or no behaviour log-probs exist. `ess` is
    the effective sample size of the importance ratios as a share of tokens, in (0, 1].
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


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """A trained segment: one report a step, and the peak memory of the trainer in MiB."""

    segment: int
    steps: tuple[StepReport, ...]
    peak_memory_mib: float = 0.0


@dataclass(frozen=True, slots=True)
class EvalReport:
    """Held-out quality at a step.

    `kl` is the tail-bucket KL(teacher || student) in nats per token on fixed held-out responses,
    `agreement` the share of their positions where both argmaxes agree, `exact_match` the share of
    prompts with an `answer` whose greedy response contains it as its final answer. `teacher_kls`
    are (teacher's name, `kl` on its prompts) where there are several.
    """

    step: int
    kl: float | None
    agreement: float | None
    exact_match: float | None
    num_prompts: int
    num_tokens: int
    seconds: float
    samples: tuple[tuple[str, str], ...] = ()
    teacher_kls: tuple[tuple[str, float], ...] = ()
