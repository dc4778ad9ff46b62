"""The near-policy loss in its simplest form: full logits and autograd, for reading and testing.

Shares only the arithmetic on k + 1 buckets (`npd.train.kd_divergence`) and the metrics
(`npd.train.step_metrics`) with the chunked loss. Holds several [N, V] tensors at once.
Does not check its arguments; `npd.train.loss` does.

Dimensions: N tokens, d hidden size, V vocabulary, K support size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from npd.models.kernels import NOTHING
from npd.models.lm_head import Head
from npd.models.loading import autocast
from npd.train.kd_divergence import LossSpec, kd_of_buckets
from npd.train.loss_targets import Targets
from npd.train.step_metrics import TokenValues, agreement, metric_sums, overlap


def reference_loss(
    hidden_ND: Tensor, head: Head, targets: Targets, spec: LossSpec, scale: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """`scale` times the weighted sum of token losses, gradient attached, and the metric sums."""
    with autocast(hidden_ND.device, is_on=False):
        logits_NV = _full_logits(hidden_ND, head)
    logprobs_NV = F.log_softmax(logits_NV, dim=-1)
    ce = -logprobs_NV.gather(-1, targets.labels_N[:, None])[:, 0]
    entropy = torch.special.entr(logprobs_NV.detach().exp()).sum(dim=-1)
    found = TokenValues(ce.detach(), entropy)
    if targets.support is None:
        return scale * (targets.weights_N * ce).sum(), metric_sums(targets, found)
    support = targets.support
    inside = torch.where(support.valid_NK, logprobs_NV.gather(-1, support.ids_NK), NOTHING)
    is_inside = torch.zeros_like(logprobs_NV, dtype=torch.bool).scatter_(
        -1, support.ids_NK, support.some_N1.expand_as(support.ids_NK)
    )
    tail = logprobs_NV.masked_fill(is_inside, NOTHING).logsumexp(dim=-1, keepdim=True)
    kd = kd_of_buckets(torch.cat([inside, tail], dim=-1), support, spec)
    with torch.no_grad():
        agrees = agreement(logprobs_NV.amax(dim=-1), inside, support)
        shared = overlap(logprobs_NV.masked_fill(is_inside, NOTHING).amax(-1), inside, support)
        found = TokenValues(ce, entropy, kd, inside.exp().sum(dim=-1), agrees, shared)
        sums = metric_sums(targets, found)
    token = spec.kd_weight * kd
    if spec.kd_weight < 1.0:
        token = token + (1.0 - spec.kd_weight) * ce
    return scale * (targets.weights_N * token).sum(), sums


def _full_logits(hidden_ND: Tensor, head: Head) -> Tensor:
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    logits = (hidden_ND @ head.weight.to(hidden_ND.dtype).t()).to(dtype)
    if head.bias is not None:
        logits = logits + head.bias.to(dtype)
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
