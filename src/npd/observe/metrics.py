"""The table of all metrics, and the file they are written to.

Promises: every number in `metrics.jsonl` has a unit and a meaning here; an unknown name is a bug
and fails an assertion. A name may have a suffix after `/` (`tokens_per_second/train`,
`peak_memory/trainer`). Computes no metric.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npd.observe.jsonl import JsonLines, read_json_lines


@dataclass(frozen=True, slots=True)
class Metric:
    """The unit and the meaning of a metric."""

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    # one optimiser step
    "loss": Metric("nats/token", "the training loss: (1 - kd_weight) CE + kd_weight KD"),
    "ce": Metric("nats/token", "cross-entropy of the student on the response's own tokens"),
    "kd": Metric("nats/token", "divergence from the teacher on its support (may be negative)"),
    "grad_norm": Metric("1", "global gradient norm before clipping"),
    "lr": Metric("1", "learning rate of the step"),
    "num_samples": Metric("samples", "samples in the step"),
    "response_tokens": Metric("tokens", "tokens in the loss"),
    "skipped_tokens": Metric("tokens", "response tokens left out by `loss.skip_after`"),
    "total_tokens": Metric("tokens", "prompt and response tokens of the step"),
    "num_rows": Metric("rows", "packed rows of the step, all ranks together"),
    "fill": Metric("share", "packed tokens divided by the capacity of the rows"),
    "seconds": Metric("s", "wall time of the step, or of the evaluation"),
    "teacher_mass": Metric("share", "teacher probability inside its support"),
    "student_mass": Metric("share", "student probability inside the teacher's support"),
    "agreement": Metric("share", "positions where student and teacher have the same top token"),
    "overlap": Metric("share", "support ids that the student ranks above every id outside it"),
    "entropy": Metric("nats", "mean entropy of the student's next-token distribution"),
    "drift": Metric("nats/token", "estimate of KL(theta || gen): student against its snapshot"),
    "drift_k3": Metric("nats/token", "k3 estimate of KL(gen || theta)"),
    "ess": Metric("share", "effective sample size of the importance ratios"),
    "lag_mean": Metric("versions", "mean age of the trained samples, in snapshots"),
    "lag_max": Metric("versions", "age of the oldest trained sample, in snapshots"),
    # one held-out evaluation
    "kl": Metric("nats/token", "tail-bucket KL(teacher || student) on fixed held-out responses"),
    "exact_match": Metric("share", "held-out prompts answered correctly by greedy decoding"),
    "num_prompts": Metric("prompts", "held-out prompts evaluated"),
    "num_answers": Metric("prompts", "evaluated held-out prompts with an answer to match"),
    "num_tokens": Metric("tokens", "held-out response tokens compared"),
    # the run as a whole
    "tokens_per_second": Metric("tokens/s", "a stage's tokens divided by its busy seconds"),
    "samples_per_hour": Metric("samples/h", "samples trained out per hour of wall time"),
    "peak_memory": Metric("MiB", "peak memory of a worker (on a GPU: within the segment)"),
    "window_live": Metric("samples", "live samples: requested and not yet finalized"),
    "version": Metric("versions", "newest published snapshot"),
    "asked": Metric("samples", "samples requested so far"),
    "trained_out": Metric("samples", "samples trained on `schedule.reuse` times"),
    "rejected": Metric("samples", "samples rejected by a filter"),
    "stale": Metric("samples", "samples dropped because their lag exceeded `schedule.max_lag`"),
    "failed": Metric("samples", "samples that failed after all retries"),
    "delta_median": Metric("1", "median Δ-IFD of a scored shard"),
    "kept_share": Metric(
        "share", "samples kept by all filters, of those judged since the last line"
    ),
}


def metric(name: str) -> Metric:
    """Look up `name` (the part before `/`); an unknown one is an AssertionError."""
    base = name.partition("/")[0]
    assert base in METRICS, f"metric {name!r} is not in npd.observe.metrics.METRICS"
    return METRICS[base]


class MetricsWriter:
    """Appends one line per call to `path`: step, kind, time (unix seconds) and the values."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def write(self, step: int, values: Mapping[str, float | None], kind: str = "train") -> None:
        """Write `values`; a non-finite number becomes null. RunError on a full disk."""
        for name in values:
            metric(name)
        clean = {name: _finite(value) for name, value in values.items()}
        self._lines.append({"step": step, "kind": kind, "time": time.time(), **clean})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of `path`, each with step, kind, time and its values; only of `kind` if given.

    An incomplete last line is dropped; a damaged line elsewhere is a StoreError.
    """
    lines = read_json_lines(path)
    return [line for line in lines if kind is None or line.get("kind") == kind]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
