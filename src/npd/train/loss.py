"""The near-policy loss: cross-entropy and distillation on a teacher's sparse targets.

One public function, two implementations that agree to float noise: `reference` is plain autograd
over full logits (for reading and testing), `chunked` never holds an [N, V] tensor. Promises that
the value and its gradient do not depend on the order of tokens, on how they are split into
micro-batches (given one `normalizer`) or on the chunk size; that a token of weight 0 changes
nothing; and finite results where the teacher's support has holes (-inf).
Does not run models, pack, or average metrics.

Dimensions: N response tokens, d hidden size, V vocabulary, K teacher support size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from npd.head import Head
from npd.train.chunked import chunked_loss
from npd.train.divergence import NOTHING, Divergence, Rule, Target, kd_of_buckets, make_support
from npd.train.tokens import Targets, TokenValues, agreement, metric_sums


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """`loss` is a scalar with gradient; `metrics` are detached sums over tokens, weight * value.

    Always: `tokens` (sum of weights), `ce`, `entropy` of the student (nats). With a teacher: `kd`
    (nats), `teacher_mass` and `student_mass` on the support, `agreement` (the teacher's likeliest
    id has the student's highest logit; a tie agrees). With `behavior_N`, over the tokens that have
    one and with rho = p_S(y) / p_behavior(y): `drift` (rho log rho - rho + 1, of KL(theta || gen)),
    `drift_k3` (rho - 1 - log rho, of KL(gen || theta)), `rho`, `rho_sq`, and their count
    `n_behavior`. log rho is limited to +-20.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]


def near_policy_loss(
    hidden_ND: Tensor,
    head: Head | Tensor,
    labels_N: Tensor,
    topk_ids_NK: Tensor | None = None,
    topk_logprobs_NK: Tensor | None = None,
    *,
    kd_weight: float = 0.9,
    target: Target = "topk",
    divergence: Divergence = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    weights_N: Tensor | None = None,
    behavior_N: Tensor | None = None,
    normalizer: float | None = None,
    impl: Literal["chunked", "reference"] = "chunked",
    chunk: int = 1024,
) -> LossOutput:
    """sum_t w_t [(1 - kd_weight) CE_t + kd_weight KD_t] / normalizer (default: sum w; nats).

    Source: Near-Policy Distillation, arXiv 2605.05940. CE = -log q(y). With p the teacher's true
    probabilities on its support S, q the student's full softmax, M_p and M_q their masses on S:

        topk     both raw on S: sum_S p log(p/q), the printed form; its floor is M_p log M_p
        renorm   p / M_p; q full softmax (forward) or also divided by M_q (reverse, jsd)
        tail     both with one bucket more, 1 - M_p and 1 - M_q; never negative, 0 iff equal
        sampled  ids drawn from p, each 1/K: -(1/K) sum log q(c), unbiased up to H(p) (2503.16870)

    divergence (a pair a, b of the above): forward sum a log(a/b); reverse sum b log(b/a); jsd
    beta KL(a||m) + (1-beta) KL(b||m), m = beta a + (1-beta) b, ends 0 forward and 1 reverse (GKD,
    2306.13649). Raw `topk` has no meaningful reverse (it is lowest off the support): use `tail`.
    `temperature` softens both sides within S and keeps the masses. CE is never tempered.

    hidden_ND [N, d]; head: a `Head` or a weight [V, d]; labels_N [N] ids in [0, V); topk_*_NK
    [N, K] ids and untempered log p (-inf: no entry); weights_N [N], 0 masks; behavior_N [N] log p
    of the label by its writer, NaN for none. Without a teacher or with kd_weight 0, L = CE. Matmuls
    run in hidden's type (autocast's if on), the rest in float32 (float64 if hidden is); `chunk`
    tokens have logits at once.

    Raises ConfigError for `sampled` with another divergence or temperature.
    """
    rule = Rule(kd_weight, target, divergence, beta, temperature)
    rule.check()
    head = head if isinstance(head, Head) else Head(head)
    hidden_ND = hidden_ND.to(_compute_dtype(hidden_ND))
    has_teacher = topk_ids_NK is not None and kd_weight > 0.0
    rule = rule if has_teacher else Rule(0.0, target, divergence, beta, temperature)
    teacher = (topk_ids_NK, topk_logprobs_NK) if has_teacher else (None, None)
    targets = _targets(hidden_ND, head, labels_N, *teacher, target, weights_N, behavior_N)
    scale = _scale(normalizer, targets.weights_N)
    assert chunk > 0, f"chunk {chunk} is not positive"
    assert impl in ("chunked", "reference"), impl
    if impl == "chunked":
        loss, sums = chunked_loss(hidden_ND, head, targets, rule, scale, chunk)
    else:
        loss, sums = _reference_loss(hidden_ND, head, targets, rule, scale)
    return LossOutput(loss, sums)


def _reference_loss(
    hidden_ND: Tensor, head: Head, targets: Targets, rule: Rule, scale: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.autocast(hidden_ND.device.type, enabled=False):
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
    outside = logprobs_NV.masked_fill(is_inside, NOTHING).logsumexp(dim=-1, keepdim=True)
    kd = kd_of_buckets(torch.cat([inside, outside], dim=-1), support, rule)
    with torch.no_grad():
        agrees = agreement(logprobs_NV.amax(dim=-1), inside, support)
        found = TokenValues(ce, entropy, kd, inside.exp().sum(dim=-1), agrees)
        sums = metric_sums(targets, found)
    token = rule.kd_weight * kd
    if rule.kd_weight < 1.0:
        token = token + (1.0 - rule.kd_weight) * ce
    return scale * (targets.weights_N * token).sum(), sums


def _full_logits(hidden_ND: Tensor, head: Head) -> Tensor:
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    logits = (hidden_ND @ head.weight.to(hidden_ND.dtype).t()).to(dtype)
    if head.bias is not None:
        logits = logits + head.bias.to(dtype)
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _compute_dtype(hidden_ND: Tensor) -> torch.dtype:
    device = hidden_ND.device.type
    if hidden_ND.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_ND.dtype


def _targets(
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    topk_ids_NK: Tensor | None,
    topk_logprobs_NK: Tensor | None,
    target: Target,
    weights_N: Tensor | None,
    behavior_N: Tensor | None,
) -> Targets:
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    vocab_size, num_tokens = head.weight.shape[0], hidden_ND.shape[0]
    assert hidden_ND.shape[1:] == head.weight.shape[1:], (hidden_ND.shape, head.weight.shape)
    for tensor in (labels_N, weights_N, behavior_N):
        assert tensor is None or tensor.shape == (num_tokens,), tensor.shape
    assert bool(((labels_N >= 0) & (labels_N < vocab_size)).all()), (
        "a label is outside the vocabulary"
    )
    support = None
    if topk_ids_NK is not None:
        assert topk_logprobs_NK is not None, "teacher ids come with their log-probabilities"
        assert len(topk_ids_NK) == num_tokens, (topk_ids_NK.shape, num_tokens)
        support = make_support(topk_ids_NK, topk_logprobs_NK, target, vocab_size, dtype)
    weights = hidden_ND.new_ones(num_tokens) if weights_N is None else weights_N.detach()
    behavior = None if behavior_N is None else behavior_N.detach().to(dtype)
    return Targets(labels_N.long(), weights.to(dtype), support, behavior)


def _scale(normalizer: float | None, weights_N: Tensor) -> Tensor:
    if normalizer is not None:
        assert normalizer > 0.0, f"normalizer {normalizer} is not positive"
        return weights_N.new_tensor(1.0 / normalizer)
    total = weights_N.sum()
    return torch.where(total != 0, 1.0 / total, 0.0)
