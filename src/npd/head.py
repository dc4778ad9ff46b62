"""The LM head of a model by itself: hidden states in, logits out, wherever its weight lies.

Dimensions: d hidden size, V vocabulary.
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
        hidden = hidden.to(self.weight.dtype)
        apply = self.layer
        out = F.linear(hidden, self.weight, self.bias) if apply is None else apply(hidden)
        out = out.float()
        if self.scale != 1.0:
            out = out * self.scale
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)

    def slices(self, length: int, at_most: int) -> Iterator[slice]:
        """Slices over `length` positions, of as many as should have logits at once."""
        if self.weight.device.type == "cpu":
            at_most = max(1, min(at_most, _CPU_LOGITS // len(self.weight)))
        return (slice(start, start + at_most) for start in range(0, length, at_most))


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
