"""The one table of what a run measures, and the file it is written to.

Promises: every number in `metrics.jsonl` has a unit and a meaning here; an unknown name is our own
bug and fails. A name may carry a part after `/` (`tokens_per_second/train`, `peak_memory/trainer`).
Does not compute any metric.
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
    """What a number is measured in, and what it says."""

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    # one optimiser step
    "loss": Metric("nats/token", "what the optimiser minimises: (1 - kd_weight) CE + kd_weight KD"),
    "ce": Metric("nats/token", "cross-entropy of the student on the response's own tokens"),
    "kd": Metric("nats/token", "divergence from the teacher on its support (may be negative)"),
    "grad_norm": Metric("1", "global gradient norm before clipping"),
    "lr": Metric("1", "learning rate of the step"),
    "num_samples": Metric("samples", "documents in the step"),
    "response_tokens": Metric("tokens", "tokens that carry loss"),
    "skipped_tokens": Metric("tokens", "response tokens left out by `loss.skip_after`"),
    "total_tokens": Metric("tokens", "prompt and response tokens of the step"),
    "num_rows": Metric("rows", "packed rows of the step, all ranks together"),
    "fill": Metric("share", "packed tokens over the capacity of the rows"),
    "seconds": Metric("s", "wall time of the step, or of the evaluation"),
    "teacher_mass": Metric("share", "teacher probability inside its support"),
    "student_mass": Metric("share", "student probability inside the teacher's support"),
    "agreement": Metric("share", "positions where student and teacher have the same top token"),
    "overlap": Metric("share", "support ids the student puts before every id outside the support"),
    "entropy": Metric("nats", "mean entropy of the student's next-token distribution"),
    "drift": Metric("nats/token", "estimate of KL(theta || gen): student against its snapshot"),
    "drift_k3": Metric("nats/token", "k3 estimate of KL(gen || theta)"),
    "ess": Metric("share", "effective sample size of the importance ratios"),
    "lag_mean": Metric("versions", "mean age of the trained samples, in snapshots"),
    "lag_max": Metric("versions", "age of the oldest trained sample, in snapshots"),
    # one held-out evaluation
    "kl": Metric("nats/token", "tail-bucket KL(teacher || student) on fixed held-out responses"),
    "exact_match": Metric("share", "held-out prompts answered right, greedy decoding"),
    "num_prompts": Metric("prompts", "held-out prompts evaluated"),
    "num_answers": Metric("prompts", "of them, those with an answer to match"),
    "num_tokens": Metric("tokens", "held-out response tokens compared"),
    # the run as a whole
    "tokens_per_second": Metric("tokens/s", "a stage's tokens over the seconds it worked"),
    "samples_per_hour": Metric("samples/h", "samples trained out over wall time, all stages in it"),
    "peak_memory": Metric("MiB", "peak memory of a worker"),
    "window_live": Metric("samples", "live samples: generated or on their way, not yet left"),
    "version": Metric("versions", "newest published snapshot"),
    "asked": Metric("samples", "samples asked for so far"),
    "trained_out": Metric("samples", "samples trained on as often as wanted"),
    "rejected": Metric("samples", "samples a filter refused"),
    "stale": Metric("samples", "samples that grew older than max_lag"),
    "failed": Metric("samples", "samples given up after errors"),
    "delta_median": Metric("1", "median Δ-IFD of a scored shard"),
    "kept_share": Metric("share", "samples judged since the last line that all filters kept"),
}


def metric(name: str) -> Metric:
    """Look up `name` (the part before `/`); an unknown one is an AssertionError."""
    base = name.partition("/")[0]
    assert base in METRICS, f"metric {name!r} is not in npd.observe.metrics.METRICS"
    return METRICS[base]


class MetricsWriter:
    """Appends one line a call to `path`: step, kind, time (unix seconds) and the values."""

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
    """The lines of `path` as written (of one `kind`), each with step, kind, time and its values.

    A line torn off by a crash is left out; a damaged one elsewhere is a StoreError.
    """
    lines = read_json_lines(path)
    return [line for line in lines if kind is None or line.get("kind") == kind]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
