"""Converts the metrics of a step from tensors on the device to numbers, and to the step's report.

Promises one transfer from the device per step. The loss decides which metrics exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from npd.errors import RunError
from npd.types import Step, StepReport

# Ids listed in an error message; a step may hold thousands.
_MAX_NAMED = 8


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
    """Peak memory in MiB: of the device on CUDA, of the whole process elsewhere."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
