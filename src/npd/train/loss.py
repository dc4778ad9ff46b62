"""The near-policy loss: cross-entropy and distillation on a teacher's sparse targets.

One public function (and a module, `NearPolicyLoss`) with three implementations that agree to float
noise: `reference` is plain autograd over full logits (for reading and testing), `chunked` never
allocates an [N, V] tensor, `triton` is `chunked` with fused kernels between its matmuls. Value and
gradient do not depend on the order of tokens, on micro-batches (given one `normalizer`) or on the
chunk size. A token of weight 0 with a finite hidden state has no effect. Results are finite even if
the teacher's support has missing entries (-inf). The host never waits for a GPU; an id outside the
vocabulary is a device-side assertion, after which this process cannot use the device. Does not run
models, pack, or average metrics.

Dimensions: N response tokens, d hidden size, V vocabulary, K teacher support size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available

from npd.config.sections import chunk_for
from npd.models.kernels.compile import builds_kernels, why_no_kernels
from npd.models.lm_head import Head
from npd.train.chunked import chunked_loss
from npd.train.fsdp import gathered_head
from npd.train.kd_divergence import Divergence, LossSpec
from npd.train.logits_passes import LogitsPasses, TorchPasses
from npd.train.loss_targets import Target, Targets, demand, make_support
from npd.train.reference import reference_loss

Impl: TypeAlias = Literal["auto", "chunked", "triton", "reference"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """`loss` is a scalar with gradient; `metrics` are detached sums over tokens, weight * value.

    Always: `tokens` (sum of weights), `ce`, `entropy` of the student (nats). With a teacher: `kd`
    (nats), `teacher_mass` and `student_mass` on the support, `agreement` (the teacher's likeliest
    id has the student's highest logit; a tie agrees), `overlap` (share of the support's ids whose
    logit is at least as high as all logits outside: a lower bound of the overlap of both top-k
    sets, 1 if they are equal). With `behavior_N`, over the tokens that have one and with
    rho = p_S(y) / p_behavior(y): `drift` (rho log rho - rho + 1, of KL(theta || gen)), `drift_k3`
    (rho - 1 - log rho, of KL(gen || theta)), `rho`, `rho_sq`, and their count `n_behavior`; the
    effective sample size as a share is rho^2 / (n_behavior rho_sq). log rho is limited to +-20.
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
    impl: Impl = "auto",
    chunk: int | None = None,
) -> LossOutput:
    """sum_t w_t [(1 - kd_weight) CE_t + kd_weight KD_t] / normalizer (default: sum w; nats).

    Source: Near-Policy Distillation, arXiv 2605.05940. CE = -log q(y). With p the teacher's true
    probabilities on its support S, q the student's full softmax, M_p and M_q their masses on S:

        topk     both raw on S: sum_S p log(p/q), as in the paper; its floor is M_p log M_p
        renorm   p / M_p; q full softmax (forward) or also divided by M_q (reverse, jsd)
        tail     both with one more bucket, 1 - M_p and 1 - M_q; never negative, 0 iff equal
        sampled  ids drawn from p, each 1/K: -(1/K) sum log q(c), unbiased up to H(p) (2503.16870)

    divergence (a pair a, b of the above): forward sum a log(a/b); reverse sum b log(b/a); jsd
    beta KL(a||m) + (1-beta) KL(b||m), m = beta a + (1-beta) b, beta 0 forward and 1 reverse (GKD,
    2306.13649). Raw `topk` has no useful reverse (its minimum is off the support): use `tail`.
    `temperature` softens both sides within S and keeps the masses. CE is never tempered.

    hidden_ND [N, d]; head: a `Head` or a weight [V, d]; labels_N [N] ids in [0, V); topk_*_NK
    [N, K] ids and untempered log p (-inf: no entry); weights_N [N], 0 masks; behavior_N [N] log p
    of the label under its sampling policy, NaN for none. Without a teacher or with kd_weight 0,
    L = CE. Matmuls run in hidden's dtype (autocast's if on; float16: float32), the rest in float32
    (float64 if hidden is); `chunk` tokens have logits at once. A weight sharded by FSDP2 is
    gathered (all ranks call), its gradient averaged over ranks. ConfigError: `sampled` with a
    divergence or temperature.
    """
    spec = LossSpec(kd_weight, target, divergence, beta, temperature)
    spec.check()
    hidden_ND = hidden_ND.to(_compute_dtype(hidden_ND))
    head = gathered_head(head if isinstance(head, Head) else Head(head), hidden_ND.dtype)
    has_teacher = topk_ids_NK is not None and kd_weight > 0.0
    spec = spec if has_teacher else LossSpec(0.0, target, divergence, beta, temperature)
    teacher = (topk_ids_NK, topk_logprobs_NK) if has_teacher else (None, None)
    targets = _targets(hidden_ND, head, labels_N, *teacher, target, weights_N, behavior_N)
    scale = _scale(normalizer, targets.weights_N)
    if impl == "reference":
        return LossOutput(*reference_loss(hidden_ND, head, targets, spec, scale))
    if chunk is None:
        chunk = chunk_for(len(head.weight), is_cpu=hidden_ND.device.type == "cpu")
    assert chunk > 0, f"chunk {chunk} is not positive"
    passes = _passes(impl, hidden_ND.device)
    return LossOutput(*chunked_loss(hidden_ND, head, targets, spec, scale, chunk, passes))


class NearPolicyLoss(nn.Module):
    """`near_policy_loss` as a module with fixed options and no parameters.

    Options, arguments, shapes and units are those of the function.

    Raises:
        ConfigError: options that cannot be combined.
    """

    def __init__(
        self,
        *,
        kd_weight: float = 0.9,
        target: Target = "topk",
        divergence: Divergence = "forward",
        beta: float = 0.5,
        temperature: float = 1.0,
        impl: Impl = "auto",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        LossSpec(kd_weight, target, divergence, beta, temperature).check()
        self._options: dict[str, Any] = {
            "kd_weight": kd_weight,
            "target": target,
            "divergence": divergence,
            "beta": beta,
            "temperature": temperature,
            "impl": impl,
            "chunk": chunk,
        }

    def forward(
        self,
        hidden_ND: Tensor,
        head: Head | Tensor,
        labels_N: Tensor,
        topk_ids_NK: Tensor | None = None,
        topk_logprobs_NK: Tensor | None = None,
        *,
        weights_N: Tensor | None = None,
        behavior_N: Tensor | None = None,
        normalizer: float | None = None,
    ) -> LossOutput:
        """The loss of N tokens and its metric sums."""
        return near_policy_loss(
            hidden_ND,
            head,
            labels_N,
            topk_ids_NK,
            topk_logprobs_NK,
            weights_N=weights_N,
            behavior_N=behavior_N,
            normalizer=normalizer,
            **self._options,
        )

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return ", ".join(f"{name}={value!r}" for name, value in self._options.items())


def _passes(impl: str, device: torch.device) -> LogitsPasses:
    assert impl in ("auto", "chunked", "triton"), impl
    if impl == "chunked" or (impl == "auto" and not builds_kernels(device.type)):
        return TorchPasses()
    why = why_no_kernels(device)
    if not why:
        from npd.train.triton_passes import TritonPasses

        return TritonPasses()
    if impl == "triton":
        _fall_back(why)
    return TorchPasses()


@cache
def _fall_back(why: str) -> None:
    """Warn once about the fallback."""
    _log.warning("loss.impl triton: %s, so loss.impl chunked is used", why)


def _compute_dtype(hidden_ND: Tensor) -> torch.dtype:
    device = hidden_ND.device.type
    dtype = hidden_ND.dtype
    if dtype == torch.float32 and is_autocast_available(device):
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
    # Gradients are computed before a loss scale is known, and would underflow in float16.
    return torch.float32 if dtype == torch.float16 else dtype


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
    demand((labels_N >= 0) & (labels_N < vocab_size), "a label is outside the vocabulary")
    support = None
    if topk_ids_NK is not None:
        assert topk_logprobs_NK is not None, "teacher ids need their log-probabilities"
        assert len(topk_ids_NK) == num_tokens, (topk_ids_NK.shape, num_tokens)
        support = make_support(topk_ids_NK, topk_logprobs_NK, target, vocab_size, dtype)
    weights = hidden_ND.new_ones(num_tokens) if weights_N is None else weights_N.detach()
    behavior = None if behavior_N is None else behavior_N.detach().to(dtype)
    return Targets(labels_N.long(), weights.to(dtype), support, behavior)


def _scale(normalizer: float | None, weights_N: Tensor) -> Tensor:
    if normalizer is not None:
        assert normalizer > 0.0, f"normalizer {normalizer} is not positive"
        return weights_N.new_full((), 1.0 / normalizer)
    total = weights_N.sum()
    return torch.where(total != 0, 1.0 / total, 0.0)
