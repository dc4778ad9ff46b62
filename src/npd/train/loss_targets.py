"""The loss's inputs for each token, and its metrics: targets in, metric sums out.

Every metric is a sum over tokens of weight times value, so sums of micro-batches add up. The caller
divides by `tokens` (drift and ratios: by `n_behavior`). Does not compute losses.

Dimensions: N or C tokens, K teacher support size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npd.train.divergence import Support

# Limit of |log rho|. It keeps rho^2 finite, and larger ratios carry no information.
_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """The targets of each token.

    `labels_N` is int64. `weights_N` and `behavior_N` (log-prob in nats, NaN for none) have the
    accumulation dtype. With `support` None the loss is cross-entropy only.
    """

    labels_N: Tensor
    weights_N: Tensor
    support: Support | None
    behavior_N: Tensor | None

    def rows(self, part: slice) -> Targets:
        """The targets of a subset of the tokens."""
        return Targets(
            self.labels_N[part],
            self.weights_N[part],
            None if self.support is None else self.support.rows(part),
            None if self.behavior_N is None else self.behavior_N[part],
        )


@dataclass(frozen=True, slots=True, eq=False)
class TokenValues:
    """Values measured at each token, [N] each, detached: nats, or shares in [0, 1]."""

    ce_N: Tensor
    entropy_N: Tensor
    kd_N: Tensor | None = None
    student_mass_N: Tensor | None = None
    agreement_N: Tensor | None = None
    overlap_N: Tensor | None = None


def metric_sums(targets: Targets, found: TokenValues) -> dict[str, Tensor]:
    """Sums over tokens of weight times value, by metric name (`tokens`: the sum of weights)."""
    values: dict[str, Tensor] = {
        "tokens": torch.ones_like(found.ce_N),
        "ce": found.ce_N,
        "entropy": found.entropy_N,
    }
    if targets.support is not None:
        assert found.kd_N is not None
        assert found.student_mass_N is not None
        assert found.agreement_N is not None
        assert found.overlap_N is not None
        values["kd"] = found.kd_N
        values["teacher_mass"] = targets.support.mass_N
        values["student_mass"] = found.student_mass_N
        values["agreement"] = found.agreement_N
        values["overlap"] = found.overlap_N
    if targets.behavior_N is not None:
        values |= _drift(-found.ce_N, targets.behavior_N)
    weights = targets.weights_N
    return {name: (weights * value).sum() for name, value in values.items()}


def agreement(best_C: Tensor, inside_CK: Tensor, support: Support) -> Tensor:
    """1 where the teacher's likeliest id has the student's highest logit (ties agree), else 0."""
    top1 = support.logprobs_NK.argmax(dim=-1, keepdim=True)
    agrees = inside_CK.gather(-1, top1)[:, 0] >= best_C
    return (agrees & support.some_N1[:, 0]).to(inside_CK.dtype)


def overlap(top_C: Tensor, inside_CK: Tensor, support: Support) -> Tensor:
    """Share of a row's support ids with a logit at least as high as every logit outside it.

    That is a lower bound of the overlap of both top-k sets, and 1 exactly if the sets are equal.
    The overlap itself would need the student's top k: another pass over the vocabulary.
    """
    above = (inside_CK >= top_C[:, None]) & support.valid_NK
    count = support.valid_NK.sum(dim=-1).clamp(min=1)
    return above.sum(dim=-1).to(inside_CK.dtype) / count


def _drift(logprobs_N: Tensor, behavior_N: Tensor) -> dict[str, Tensor]:
    known = ~behavior_N.isnan()
    log_rho = torch.where(known, logprobs_N - behavior_N, 0.0).clamp(
        -_MAX_LOG_RATIO, _MAX_LOG_RATIO
    )
    rho = log_rho.exp()
    values = {
        "drift": rho * log_rho - rho + 1.0,
        "drift_k3": rho - 1.0 - log_rho,
        "rho": rho,
        "rho_sq": rho * rho,
        "n_behavior": torch.ones_like(rho),
    }
    return {name: torch.where(known, value, 0.0) for name, value in values.items()}
