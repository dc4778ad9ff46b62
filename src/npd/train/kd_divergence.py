"""The divergence of student and teacher at a token, on the teacher's support.

A position has k + 1 buckets: the k ids of the teacher's support, and the tail outside it. Target
`tail` has a term for the tail, `topk` leaves it out, `renorm` divides it away. Every target and
divergence is a function of both models' bucket log-probabilities, defined here once for all
implementations of the loss. Promises finite values and gradients for missing entries (teacher
log-prob -inf) and for a support of the whole vocabulary. Independent of hidden states, heads, token
weights and chunks.

Dimensions: N tokens, V vocabulary, K support size, B = K + 1 buckets (the last one is the tail).
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
from npd.models.kernels import NOTHING
from npd.train.loss_targets import Support, Target

Divergence: TypeAlias = Literal["forward", "reverse", "jsd"]

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
        tail = student_NB[:, -1:]
        student = torch.cat([student, tail], dim=-1)
        teacher = torch.cat([teacher, _log_tail(support.logprobs_NK)], dim=-1)
        valid = torch.cat([valid, tail > NOTHING / 2], dim=-1)
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


def _log_tail(logprobs_NK: Tensor) -> Tensor:
    mass = logprobs_NK.logsumexp(dim=-1, keepdim=True)
    return (-torch.expm1(mass)).clamp(min=_TAIL_FLOOR).log()
