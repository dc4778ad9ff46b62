"""The loss's inputs for each token: label, weight, the teacher's support, the snapshot's log-prob.

Promises values safe to gather with: ids of missing entries are ids of their row. Does not compute
losses.

Dimensions: N tokens, V vocabulary, K teacher support size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from npd.models.kernels import NOTHING

Target: TypeAlias = Literal["topk", "renorm", "tail", "sampled"]


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
