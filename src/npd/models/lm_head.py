"""The LM head of a model: hidden states in, logits or top-k out, block by block.

Dimensions: N positions, C positions of a block, k ids, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from npd.errors import ModelError
from npd.models.kernels.compile import builds_kernels, why_no_kernels
from npd.models.kernels.products import has_wide_products, wide_product

# How logits are read: by a kernel or by torch's operations; `auto` as for the loss.
Impl: TypeAlias = Literal["auto", "triton", "torch"]
# The ids that a caller wants of a block of logits [C, V], given its slice of the positions and the
# maxima of groups of columns, where a kernel found them.
Choose: TypeAlias = Callable[[slice, Tensor, Tensor | None], Tensor]

# 32 MiB of float32 logits. The C library maps larger blocks anew at every allocation, and the page
# faults cost more than the matrix product (V = 49,152: 236 us/token against 430).
_CPU_LOGITS = 2**23
# Half-precision logits are converted to float32 in blocks of 8 MiB, whose memory is reused:
# log-sum-exp and top-10 together take 70 us/token, against 270 for a whole chunk.
_CPU_BLOCK = 2**21
# Block of the two-stage top-k. 64 gives 3.4 times torch.topk's speed at V = 49,152, k = 10.
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Head:
    """The LM head as tensors: logits = softcap(scale * (hidden @ weight.T + bias)).

    `weight` [V, d] is the model's own parameter (tied or not), not a copy. `layer` is set if the
    head is split over ranks: it gives every rank all logits, without gradients.
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
        """Float32 logits [C, V] of `hidden` [N, d], each with its slice; C is at most `at_most`."""
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
        """Slices over `length` positions, one per block of logits."""
        if self.weight.device.type == "cpu":
            at_most = max(1, min(at_most, _CPU_LOGITS // len(self.weight)))
        return (slice(start, start + at_most) for start in range(0, length, at_most))

    def _product(self, hidden: Tensor) -> Tensor:
        """Without gradients and where torch can, in float32: not rounded to the model's type."""
        hidden = hidden.to(self.weight.dtype)
        if self.layer is not None:
            return self.layer(hidden)
        if torch.is_grad_enabled() or not has_wide_products(hidden):
            return F.linear(hidden, self.weight, self.bias)
        flat = wide_product(hidden.flatten(0, -2), self.weight.t())
        out = flat.view(*hidden.shape[:-1], len(self.weight))
        return out if self.bias is None else out.add_(self.bias)

    def _finished(self, product: Tensor) -> Tensor:
        out = product.float()
        if self.scale != 1.0:
            out = out * self.scale
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)


def head_of(model: Any) -> Head:
    """The model's LM head; its weight stays the model's own parameter.

    A LoRA adapter (peft) on the head is added to the weight, with gradients for the adapter. That
    takes a [V, d] tensor, and another for its gradient, until the backward pass is over.

    Raises:
        ModelError: the adapter cannot be added to the weight.
    """
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = 1.0 / getattr(config, "logits_scaling", 1.0)
    scale *= getattr(config, "logit_scale", 1.0) * getattr(config, "lm_head_multiplier", 1.0)
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((getattr(config, name) for name in caps if hasattr(config, name)), None)
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
                "the adapter on the LM head is not plain LoRA (it has dropout, a bias, DoRA or the "
                "like) and cannot be added to the weight: use LoRA with lora_dropout 0 there, or "
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
    hidden_Nd: Tensor, head: Head, choose: Choose, chunk: int, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """The ids that `choose` selects from each block of logits [C, V], and their log-probabilities.

    Returns int64 and float32, both [N, number of chosen ids]. The softmax is over all V ids.
    """
    found = []
    for part, logits in head.blocks(hidden_Nd, chunk):
        log_sums, maxima = _sums_and_maxima(logits, impl)
        ids = choose(part, logits, maxima)
        found.append((ids, logits.gather(1, ids) - log_sums))
    return torch.cat([ids for ids, _ in found]), torch.cat([logprobs for _, logprobs in found])


def _sums_and_maxima(logits: Tensor, impl: Impl) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp [C, 1], and by a kernel, in the same read, the maxima of groups of columns."""
    is_wanted = impl == "triton" or (impl == "auto" and builds_kernels(logits.device.type))
    if not is_wanted or why_no_kernels(logits.device):
        return logits.logsumexp(dim=1, keepdim=True), None
    from npd.models.kernels.row_stats import row_stats

    stats = row_stats(logits.contiguous(), torch.float32, group=_BLOCK)
    return stats.log_sum_C[:, None], stats.maxima_CG


def top_k(logits: Tensor, k: int, maxima: Tensor | None = None) -> Tensor:
    """Ids [C, k] of the k highest of `logits` [C, V], highest first, in two stages of torch.topk.

    The k highest are in the k blocks with the highest maxima, or in the rest after the last block.
    `maxima` are those of the blocks, if known, and perhaps of more columns.
    """
    num_blocks = logits.shape[1] // _BLOCK
    if num_blocks <= k:
        return logits.topk(k, dim=1).indices
    body = logits[:, : num_blocks * _BLOCK].view(-1, num_blocks, _BLOCK)
    highest = body.amax(dim=2) if maxima is None else maxima[:, :num_blocks]
    best = highest.topk(k, dim=1).indices
    candidates = body.gather(1, best[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    rest = logits[:, num_blocks * _BLOCK :]
    columns = torch.cat([candidates, rest], dim=1).topk(k, dim=1).indices
    in_body = best.gather(1, (columns // _BLOCK).clamp_(max=k - 1)) * _BLOCK + columns % _BLOCK
    in_rest = columns + (num_blocks - k) * _BLOCK
    return torch.where(columns < k * _BLOCK, in_body, in_rest)
