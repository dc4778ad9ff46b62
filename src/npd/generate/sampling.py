"""Sampling from logits (greedy, temperature, top-p), and the tokens that end a response.

By inverse CDF of one uniform per token.

Pure functions of their arguments, without random state. Independent of models and prompts.

Dimensions: B rows, V model vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters and end conditions of responses.

    `temperature` 0 is greedy. Ids from `vocab_size` on (padding of the embedding) are never chosen;
    None allows all. `pad_id` fills masked positions only. With no `stop_ids` only the length limit
    ends a response.
    """

    max_new_tokens: int
    stop_ids: frozenset[int]
    pad_id: int
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 32
    vocab_size: int | None = None

    def is_end(self, token: int) -> bool:
        """Whether a response ends with this token."""
        return token in self.stop_ids


def choose(logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The next token of each row [B] and its log-prob [B] in nats.

    The log-prob is from the untempered softmax over all V ids, so it equals the log-prob of a plain
    forward pass at any temperature and top-p. It is NaN if the row's logits are not finite.
    """
    allowed = logits_BV[:, : sampling.vocab_size]
    if sampling.temperature == 0.0:
        ids = allowed.argmax(-1)
    else:
        probs = torch.softmax(_tempered(allowed, sampling.temperature), -1)
        if sampling.top_p < 1.0:
            probs = nucleus(probs, sampling.top_p)
        ids = inverse_cdf(probs, uniforms_B)
    chosen = logits_BV.gather(-1, ids[:, None])[:, 0]
    return ids, chosen - logits_BV.logsumexp(-1)


def _tempered(logits_BV: Tensor, temperature: float) -> Tensor:
    if temperature == 1.0:
        return logits_BV
    # The shift keeps tiny temperatures from overflowing.
    return (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature


def nucleus(probs_BV: Tensor, top_p: float) -> Tensor:
    """`probs`, zeroed outside the smallest set of top ids with mass `top_p`; not renormalised."""
    ranked, order = probs_BV.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    keep = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, before < top_p)
    return probs_BV * keep


def inverse_cdf(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The ids [B] at which the cumulative `weights` first exceed `uniforms` times their sum.

    The sum may be any positive number. Ids of weight 0 are never chosen. `uniforms` [B] are float64
    in [0, 1). Sums over blocks of ids and then within one block, which takes a fifth of the time of
    one cumulative sum over a large vocabulary.
    """
    num_rows, vocab_size = weights_BV.shape
    blocks = F.pad(weights_BV, (0, -vocab_size % _BLOCK)).view(num_rows, -1, _BLOCK)
    sums = blocks.sum(-1)
    block, rest = _locate(sums, uniforms_B * sums.sum(-1, dtype=torch.float64))
    within, _ = _locate(blocks[torch.arange(num_rows, device=block.device), block], rest)
    return (block * _BLOCK + within).clamp(max=vocab_size - 1)


def _locate(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, the index at which the cumulative weights first exceed `target`, and `target` less
    the sum before that index."""
    # float64, because a float32 sum over many ids loses the tail.
    cumulated = weights.cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1]
    # Rounding may make the target equal the total, which no cumulative sum exceeds.
    target = torch.minimum(target.clamp(min=0.0), torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulated, target[:, None], right=True)
    index = index.clamp(max=weights.shape[-1] - 1)
    before = cumulated.gather(-1, index) - weights.gather(-1, index)
    return index[:, 0], target - before[:, 0]
