"""The LM head of a model by itself: hidden states in, logits out, wherever its weight lies.

Whoever has a teacher's hidden states and its head has its word: `topk_of_hidden` makes of them what
a scorer stores. So what travels could be either; today it is the top-k.

Dimensions: N positions, C of a block, k of the support; d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from npd.errors import ModelError

# 32 MiB of float32 logits: the C library maps larger blocks afresh at every allocation, and the
# page faults then cost more than the matrix product (V = 49,152: 236 us/token against 430).
_CPU_LOGITS = 2**23
# Half-precision logits become float32 so many at once, 8 MiB, and what is then made of them reuses
# the same memory: log-sum-exp and top-10 together 70 us/token against 270 for a whole chunk.
_CPU_BLOCK = 2**21
# Block of the two-stage top-k: 64 is 3.4 times torch.topk's speed at V = 49,152, k = 10.
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Head:
    """The LM head as plain numbers: logits = softcap(scale * (hidden @ weight.T + bias)).

    `weight` [V, d] is the model's own parameter (tied or not), not a copy. `layer` is set where
    ranks hold a part of it each: it gives every rank all logits, without gradients.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    layer: Callable[[Tensor], Tensor] | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., V] of `hidden` [..., d]."""
        return self._finished(self._product(hidden))

    def blocks(self, hidden: Tensor, at_most: int) -> Iterator[tuple[slice, Tensor]]:
        """Float32 logits [C, V] of `hidden` [N, d] with the slice they are of, block by block; no
        more than `at_most` positions have logits at once."""
        for part in self.slices(len(hidden), at_most):
            product = self._product(hidden[part])
            step = len(product)
            if product.device.type == "cpu":
                step = max(1, min(step, _CPU_BLOCK // len(self.weight)))
            for start in range(0, len(product), step):
                block = self._finished(product[start : start + step])
                first = part.start + start
                yield slice(first, first + len(block)), block

    def slices(self, length: int, at_most: int) -> Iterator[slice]:
        """Slices over `length` positions, of as many as should have logits at once."""
        if self.weight.device.type == "cpu":
            at_most = max(1, min(at_most, _CPU_LOGITS // len(self.weight)))
        return (slice(start, start + at_most) for start in range(0, length, at_most))

    def _product(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.weight.dtype)
        apply = self.layer
        return F.linear(hidden, self.weight, self.bias) if apply is None else apply(hidden)

    def _finished(self, product: Tensor) -> Tensor:
        out = product.float()
        if self.scale != 1.0:
            out = out * self.scale
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)


def head_of(model: Any) -> Head:
    """The model's LM head; its weight stays the model's own parameter.

    A LoRA adapter (peft) on the head is added to the weight, with gradients for the adapter: that
    is a [V, d] tensor, and its gradient another one, until the backward pass is over.

    Raises:
        ModelError: the adapter is of a kind that is not a sum of weights.
    """
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = 1.0 / getattr(config, "logits_scaling", 1.0) * getattr(config, "logit_scale", 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    weight, bias = _adapted_weight(layer), getattr(layer, "bias", None)
    is_spread = hasattr(weight, "full_tensor")
    return Head(weight, bias, scale, softcap, layer if is_spread else None)


def _adapted_weight(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    if not hasattr(layer, "get_delta_weight") or layer.merged or layer.disable_adapters:
        return weight
    for name in layer.active_adapters:
        if not _is_plain_lora(layer, name):
            raise ModelError(
                "the adapter on the LM head is no plain LoRA (dropout, a bias, DoRA and the like), "
                "which alone can be added to the weight: use LoRA with lora_dropout 0 there, or "
                "leave the head out of target_modules"
            )
        if name in layer.lora_A:
            weight = weight + layer.get_delta_weight(name)
    return weight


def _is_plain_lora(layer: Any, name: str) -> bool:
    if not hasattr(layer, "lora_A"):
        return False
    drops = layer.training and name in layer.lora_A and layer.lora_dropout[name].__dict__.get("p")
    return not (drops or name in layer.lora_variant or layer.lora_bias.get(name))


def read_hidden(
    hidden_Nd: Tensor, head: Head, choose: Callable[[slice, Tensor], Tensor], chunk: int
) -> tuple[Tensor, Tensor]:
    """Ids that `choose` takes of each block of logits [C, V], and their log-probabilities.

    Returns int64 and float32, both [N, as many as are chosen]. The softmax is over all of V.
    """
    found = []
    for part, logits in head.blocks(hidden_Nd, chunk):
        ids = choose(part, logits)
        found.append((ids, logits.gather(1, ids) - logits.logsumexp(dim=1, keepdim=True)))
    return torch.cat([ids for ids, _ in found]), torch.cat([logprobs for _, logprobs in found])


def topk_of_hidden(
    hidden_Nd: Tensor, head: Head, k: int, *, vocab_size: int | None = None, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """The `k` likeliest ids [N, k] and their log-probabilities, highest first, of hidden states.

    Ids at and beyond `vocab_size` are padding: never chosen, but part of the softmax.
    """
    return read_hidden(hidden_Nd, head, lambda _, logits: top_k(logits[:, :vocab_size], k), chunk)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Ids [C, k] of the k highest of `logits` [C, V], highest first: torch.topk, in two stages.

    The k highest lie in the k blocks with the highest maxima (or in the rest after the last block).
    """
    num_blocks = logits.shape[1] // _BLOCK
    if num_blocks <= k:
        return logits.topk(k, dim=1).indices
    body = logits[:, : num_blocks * _BLOCK].view(-1, num_blocks, _BLOCK)
    best = body.amax(dim=2).topk(k, dim=1).indices
    candidates = body.gather(1, best[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    rest = logits[:, num_blocks * _BLOCK :]
    places = torch.cat([candidates, rest], dim=1).topk(k, dim=1).indices
    in_body = best.gather(1, (places // _BLOCK).clamp_(max=k - 1)) * _BLOCK + places % _BLOCK
    in_rest = places + (num_blocks - k) * _BLOCK
    return torch.where(places < k * _BLOCK, in_body, in_rest)
