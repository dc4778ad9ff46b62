"""The metrics of a step: sums over tokens on the device, numbers on the host, the step's report.

Token metrics (drift among them) are sums of weight times value, so sums of micro-batches add up.
Promises one transfer from the device per step. Does not compute losses.

Dimensions: N or C tokens, K teacher support size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from npd.errors import RunError
from npd.models.device import peak_bytes
from npd.train.loss_targets import Support, Targets
from npd.types import Step, StepReport

# Ids listed in an error message; a step may hold thousands.
_MAX_NAMED = 8
# Limit of |log rho|. It keeps rho^2 finite, and larger ratios carry no information.
_MAX_LOG_RATIO = 20.0

# ---- Of a token


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


# ---- Of a step


@dataclass(frozen=True, slots=True)
class Measured:
    """A step's numbers on the host: each row's share of the loss, sums over tokens, grad norm."""

    row_losses: tuple[float, ...]
    sums: dict[str, float]
    grad_norm: float

    @classmethod
    def of(cls, rows: Sequence[dict[str, Tensor]], grad_norm: Tensor) -> Measured:
        """Build it from each row's sums on the device (including `loss`) and the gradient norm."""
        # One transfer for all numbers; each transfer waits for the device.
        names = sorted({name for row in rows for name in row})
        zero = torch.zeros((), device=grad_norm.device)
        table = [torch.stack([row.get(name, zero).float() for row in rows]) for name in names]
        values = torch.cat([*table, grad_norm.float()[None]]).tolist()
        columns = {
            name: values[i * len(rows) : (i + 1) * len(rows)] for i, name in enumerate(names)
        }
        sums = {name: sum(column) for name, column in columns.items()}
        return cls(tuple(columns.get("loss", ())), sums, values[-1])

    @classmethod
    def together(cls, ranks: Sequence[Measured]) -> Measured:
        """Combine the numbers of all ranks, which have the same gradient norm."""
        names = sorted({name for part in ranks for name in part.sums})
        return cls(
            tuple(loss for part in ranks for loss in part.row_losses),
            {name: sum(part.sums.get(name, 0.0) for part in ranks) for name in names},
            ranks[0].grad_norm,
        )


def check_finite(step: Step, measured: Measured) -> None:
    """Raise RunError unless all numbers are finite; the error names the samples of faulty rows."""
    if np.isfinite([*measured.row_losses, measured.grad_norm]).all():
        return
    blamed = [not np.isfinite(loss) for loss in measured.row_losses]
    dealt = [row for rank in step.ranks for row in rank]
    rows = [row for row, bad in zip(dealt, blamed, strict=True) if bad] or dealt
    ids = [str(ref.sample_id) for row in rows for ref in row.samples]
    more = f" and {len(ids) - _MAX_NAMED} more" if len(ids) > _MAX_NAMED else ""
    raise RunError(
        f"step {step.index}: the loss is {sum(measured.row_losses)} and the gradient norm "
        f"{measured.grad_norm} in the rows of samples {', '.join(ids[:_MAX_NAMED])}{more}; the "
        "step was not taken and the weights are as before. Lower train.lr or raise train.warmup, "
        "set loss.target: tail, or train.dtype: float32"
    )


def report(
    step: Step, measured: Measured, response: int, version: int, row_tokens: int, seconds: float
) -> StepReport:
    """The report of a step with `response` response tokens over all ranks."""
    rows = [row for rank in step.ranks for row in rank]
    refs = [ref for row in rows for ref in row.samples]
    total = sum(ref.num_tokens for ref in refs)
    lags = [version - ref.version for ref in refs]
    sums, ratios = measured.sums, measured.sums.get("n_behavior", 0.0)

    def mean(name: str, count: float) -> float | None:
        return sums[name] / count if name in sums and count else None

    return StepReport(
        step=step.index,
        loss=sums["loss"],
        ce=sums["ce"] / response,
        kd=mean("kd", response),
        grad_norm=measured.grad_norm,
        lr=step.lr,
        num_samples=len(refs),
        response_tokens=response,
        total_tokens=total,
        num_rows=len(rows),
        fill=total / (len(rows) * row_tokens),
        seconds=seconds,
        teacher_mass=mean("teacher_mass", response),
        student_mass=mean("student_mass", response),
        agreement=mean("agreement", response),
        entropy=mean("entropy", response),
        drift=mean("drift", ratios),
        drift_k3=mean("drift_k3", ratios),
        ess=sums["rho"] ** 2 / (ratios * sums["rho_sq"]) if ratios else None,
        lag_mean=sum(lags) / len(lags),
        lag_max=max(lags),
        overlap=mean("overlap", response),
    )


def peak_memory_mib(device: str) -> float:
    """Peak memory in MiB: of a GPU since `reset_peak`, of the whole process elsewhere."""
    return peak_bytes(device) / 2**20
