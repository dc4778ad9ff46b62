"""What a report is made from: records of plain numbers and texts, nothing that needs a model.

Steps and evaluations are mappings with the names of `npd.observe.metrics.METRICS`, such as
`dataclasses.asdict(step_report)` or a line of `metrics.jsonl`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from npd.observe.trace import Span
from npd.types import Outcome, SampleStats

Numbers = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ReportSample:
    """One sample: how it left (None while live), why, its age when trained on, and its Δ-IFD."""

    stats: SampleStats
    outcome: Outcome | None = None
    reason: str = ""
    lag: int | None = None
    delta: float | None = None


@dataclass(frozen=True, slots=True)
class FilterBounds:
    """Δ-IFD is kept in [low - tolerance, high]."""

    low: float
    high: float
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class StageRate:
    """What a stage (generate, score, train) got through in the seconds its workers were busy."""

    tokens: int
    samples: int
    busy_seconds: float
    num_workers: int = 1

    @property
    def tokens_per_second(self) -> float:
        """Tokens per busy second of the stage's workers together; 0 if it never worked."""
        busy = self.busy_seconds / self.num_workers
        return self.tokens / busy if busy > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Example:
    """A training sample to show, kept or rejected."""

    prompt: str
    response: str
    outcome: Outcome | None = None
    reason: str = ""
    delta: float | None = None
    nll_teacher: float | None = None
    nll_student: float | None = None


@dataclass(frozen=True, slots=True)
class HeldoutText:
    """The student's greedy answer to a held-out prompt, after the run and (if known) before it."""

    prompt: str
    response: str
    before: str | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class ReportData:
    """A whole run as its report shows it.

    `started`, `ended`: unix seconds. `steps`: StepReport fields each (a step trained twice, after a
    crash, counts as its last). `evals`: EvalReport fields each, with `time` (unix seconds) where
    known. `snapshots`: (version, step it was published at). `throughput`: stage -> rate.
    `conservation`: asked, trained_out, rejected, stale, failed, live. `reasons`: samples that left,
    by outcome and reason; `unused`: those without a single use. `samples` are one in `every`.
    `origins`: dotted config key -> where its value came from.
    """

    title: str
    config: Mapping[str, Any]
    started: float
    ended: float
    steps: Sequence[Numbers] = ()
    evals: Sequence[Numbers] = ()
    samples: Sequence[ReportSample] = ()
    every: int = 1
    bounds: FilterBounds | None = None
    conservation: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[tuple[Outcome, str], int] = field(default_factory=dict)
    unused: Mapping[tuple[Outcome, str], int] = field(default_factory=dict)
    spans: Sequence[Span] = ()
    snapshots: Sequence[tuple[int, int]] = ()
    throughput: Mapping[str, StageRate] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    heldout_texts: Sequence[HeldoutText] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def wall_seconds(self) -> float:
        """How long the run took."""
        return max(0.0, self.ended - self.started)

    @property
    def deltas(self) -> list[float]:
        """Δ-IFD of every sample that has a finite one."""
        found = (sample.delta for sample in self.samples if sample.delta is not None)
        return [delta for delta in found if math.isfinite(delta)]


def by_step(records: Sequence[Numbers]) -> list[Numbers]:
    """Records in order of step, the last written of each."""
    latest = {int(record["step"]): record for record in records}
    return [latest[step] for step in sorted(latest)]


def points(records: Sequence[Numbers], name: str) -> list[tuple[float, float]]:
    """(step, value) where `name` was measured and finite."""
    found = ((record["step"], record.get(name)) for record in by_step(records))
    known = ((float(step), float(value)) for step, value in found if value is not None)
    return [point for point in known if math.isfinite(point[1])]


def teachers(data: ReportData) -> list[str]:
    """Names of the teachers that the held-out KL is told of, where there are several."""
    names = {name for record in data.evals for name in record if name.startswith("kl/")}
    return sorted(name.removeprefix("kl/") for name in names)
