"""The divergence of student and teacher at a token, on the teacher's support.

A position has k + 1 buckets: the k ids of the teacher's support, and the tail outside it. Every
target and divergence is a function of both models' bucket log-probabilities, defined here once for
all implementations of the loss. Promises finite values and gradients for missing entries (teacher
log-prob -inf) and for a support of the whole vocabulary. Independent of hidden states, heads, token
weights and chunks.

Dimensions: N tokens, V vocabulary, K support size, B = K + 1 buckets (the last one is the outside).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from npd.config.checks import target_problems
from npd.errors import ConfigError

Target: TypeAlias = Literal["topk", "renorm", "tail", "sampled"]
Divergence: TypeAlias = Literal["forward", "reverse", "jsd"]

# Replaces -inf: exp(NOTHING) is 0, and 0 * NOTHING and NOTHING - NOTHING are 0 instead of NaN.
NOTHING = -1e30
# Below this, 1 - M_T is float32 noise, and reverse KL needs a finite log of it.
_TAIL_FLOOR = 1e-8


@dataclass(frozen=True, slots=True)
class LossSpec:
    """The loss: L = (1 - kd_weight) * CE + kd_weight * KD(target, divergence, temperature)."""

    kd_weight: float
    target: Target
    divergence: Divergence
    beta: float
    temperature: float

    @property
    def kind(self) -> Divergence:
        """The divergence; JSD with beta 0 or 1 becomes the KL that it equals."""
        if self.divergence != "jsd":
            return self.divergence
        return {0.0: "forward", 1.0: "reverse"}.get(self.beta, "jsd")  # type: ignore[return-value]

    def check(self) -> None:
        """Raise ConfigError for meaningless combinations; assert against programming errors."""
        assert 0.0 <= self.kd_weight <= 1.0, f"kd_weight {self.kd_weight} is not in [0, 1]"
        assert 0.0 <= self.beta <= 1.0, f"beta {self.beta} is not in [0, 1]"
        assert self.temperature > 0.0, f"temperature {self.temperature} is not positive"
        assert self.target in ("topk", "renorm", "tail", "sampled"), self.target
        assert self.divergence in ("forward", "reverse", "jsd"), self.divergence
        if found := [*target_problems(self.target, self.kind, self.temperature)]:
            raise ConfigError(*found)


@dataclass(frozen=True, slots=True, eq=False)
class Support:
    """The teacher's top-k or sampled ids and log-probs, safe to gather with.

    `ids_NK` int64 are all in [0, V); missing entries repeat an id of their row. `valid_NK` bool
    marks the others. `logprobs_NK` is log p_T in nats, NOTHING for missing entries. `share_NK`, for
    sampled targets only, is the id's share of the row's samples (repeated samples are merged into
    one entry).
    """

    ids_NK: Tensor
    valid_NK: Tensor
    logprobs_NK: Tensor
    share_NK: Tensor | None = None

    def rows(self, part: slice) -> Support:
        """The support of a subset of the tokens."""
        share = None if self.share_NK is None else self.share_NK[part]
        return Support(self.ids_NK[part], self.valid_NK[part], self.logprobs_NK[part], share)

    @property
    def some_N1(self) -> Tensor:
        """Whether the position has a teacher."""
        return self.valid_NK.any(dim=-1, keepdim=True)

    @property
    def mass_N(self) -> Tensor:
        """The teacher's probability inside the support, M_T."""
        return self.logprobs_NK.exp().sum(dim=-1)


def demand(is_met: Tensor, message: str) -> None:
    """Assert that all of `is_met` holds; on a GPU asynchronously, without waiting."""
    if is_met.device.type == "cpu":
        assert bool(is_met.all()), message
    else:
        torch._assert_async(is_met.all(), message)


def make_support(
    ids_NK: Tensor, logprobs_NK: Tensor, target: Target, vocab_size: int, dtype: torch.dtype
) -> Support:
    """A checked Support from the teacher's ids [N, K] and log-probabilities [N, K].

    Log-probability -inf (or NaN) marks a missing entry, whose id is ignored.
    """
    assert ids_NK.shape == logprobs_NK.shape, (ids_NK.shape, logprobs_NK.shape)
    assert ids_NK.shape[-1] > 0, "a teacher support needs at least one id"
    ids, logprobs = ids_NK.long(), logprobs_NK.to(dtype)
    valid = logprobs > -math.inf
    share = None
    if target == "sampled":
        ids, logprobs, valid, share = _merge_draws(ids, logprobs, valid)
    else:
        demand(_is_first(ids, valid), "an id occurs twice in a teacher's support")
    logprobs = torch.where(valid, logprobs, NOTHING)
    best = ids.gather(-1, logprobs.argmax(dim=-1, keepdim=True))
    ids = torch.where(valid, ids, torch.where(valid.any(dim=-1, keepdim=True), best, 0))
    demand((ids >= 0) & (ids < vocab_size), "a teacher id is outside the vocabulary")
    return Support(ids, valid, logprobs, share)


def kd_of_buckets(student_NB: Tensor, support: Support, spec: LossSpec) -> Tensor:
    """KD [N] in nats from the student's bucket log-probabilities [N, K + 1].

    0 at positions without a teacher. A temperature reshapes both distributions inside the support
    and keeps the support's mass, because the teacher's tail is unknown. At k = V that is the usual
    tempered divergence (without the factor temperature^2).
    """
    valid, inside = support.valid_NK, student_NB[:, :-1]
    if support.share_NK is not None:
        return -(support.share_NK * torch.where(valid, inside, 0.0)).sum(dim=-1)
    teacher = _temper(support.logprobs_NK, spec.temperature)
    student = _temper(inside, spec.temperature)
    if spec.target == "tail":
        outside = student_NB[:, -1:]
        student = torch.cat([student, outside], dim=-1)
        teacher = torch.cat([teacher, _log_outside(support.logprobs_NK)], dim=-1)
        valid = torch.cat([valid, outside > NOTHING / 2], dim=-1)
    elif spec.target == "renorm":
        teacher = F.log_softmax(teacher, dim=-1)
        # Forward KL can compare the renormalised teacher with the student's full softmax. But that
        # teacher is 0 outside the support, where reverse KL is infinite and JSD cannot vanish.
        student = student if spec.kind == "forward" else F.log_softmax(student, dim=-1)
    return _divergence(teacher, student, valid, spec)


def _divergence(teacher_NB: Tensor, student_NB: Tensor, live_NB: Tensor, spec: LossSpec) -> Tensor:
    a, b = torch.where(live_NB, teacher_NB, 0.0), torch.where(live_NB, student_NB, 0.0)
    p, q = a.exp() * live_NB, b.exp() * live_NB
    if spec.kind == "forward":
        return (p * (a - b)).sum(dim=-1)
    if spec.kind == "reverse":
        return (q * (b - a)).sum(dim=-1)
    mixture = torch.logaddexp(a + math.log(spec.beta), b + math.log1p(-spec.beta))
    return (spec.beta * p * (a - mixture) + (1.0 - spec.beta) * q * (b - mixture)).sum(dim=-1)


def _temper(logprobs_NK: Tensor, temperature: float) -> Tensor:
    if temperature == 1.0:
        return logprobs_NK
    mass = logprobs_NK.logsumexp(dim=-1, keepdim=True)
    return mass + F.log_softmax(logprobs_NK / temperature, dim=-1)


def _log_outside(logprobs_NK: Tensor) -> Tensor:
    mass = logprobs_NK.logsumexp(dim=-1, keepdim=True)
    return (-torch.expm1(mass)).clamp(min=_TAIL_FLOOR).log()


def _merge_draws(
    ids_NK: Tensor, logprobs_NK: Tensor, valid_NK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids, order = torch.where(valid_NK, ids_NK, -1).sort(dim=-1)
    is_first = _starts(ids)
    group = is_first.cumsum(dim=-1) - 1
    drawn = (ids >= 0).to(logprobs_NK.dtype)
    count = torch.zeros_like(drawn).scatter_add_(-1, group, drawn).gather(-1, group)
    valid = is_first & (ids >= 0)
    share = torch.where(valid, count / drawn.sum(dim=-1, keepdim=True).clamp(min=1.0), 0.0)
    return ids, logprobs_NK.gather(-1, order), valid, share


def _is_first(ids_NK: Tensor, valid_NK: Tensor) -> Tensor:
    """Whether each id is the first of its value, in sorted order."""
    unlike = -1 - torch.arange(ids_NK.shape[-1], device=ids_NK.device)
    return _starts(torch.where(valid_NK, ids_NK, unlike).sort(dim=-1).values)


def _starts(sorted_NK: Tensor) -> Tensor:
    starts = torch.ones_like(sorted_NK, dtype=torch.bool)
    starts[:, 1:] = sorted_NK[:, 1:] != sorted_NK[:, :-1]
    return starts
