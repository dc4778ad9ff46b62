"""The data of a report: records of plain numbers and texts, independent of any model.

`npd.control.report_data` fills them; `sections` chooses what each chart shows.

Steps and evaluations are mappings with the names of `npd.observe.metrics.METRICS`, such as
`dataclasses.asdict(step_report)` or a line of `metrics.jsonl`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import stdev
from typing import Any

from npd.observe.trace import Interval, Span, total
from npd.types import Outcome, SampleStats

Numbers = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ReportSample:
    """One sample: its outcome (None while live) and reason, its lag when trained on, its Δ-IFD."""

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
    """Tokens and samples of a stage (generate, score, train), and its workers' busy seconds."""

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
    """The data of a whole run.

    `started`, `ended`: unix seconds. `going`: the sessions between them; empty means one session.
    `steps`: StepReport fields of each step (the last report of a step trained twice, after a
    crash). `evals`: EvalReport fields of each evaluation, with `time` (unix seconds) if known.
    `snapshots`: (version, step of publication). `throughput`: stage -> rate. `conservation`: the
    counts asked, trained_out, rejected, stale, failed, live. `reasons`: finalized samples by
    outcome and reason; `unused`: the same for samples without a single use. `samples`: one in
    `every`. `origins`: dotted config key -> origin of its value. `parameters`, `context`: the
    student's, if its directory is on this machine. `is_done`: the run finished.
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
    going: Sequence[Interval] = ()
    parameters: int | None = None
    context: int | None = None
    is_done: bool = True

    @property
    def wall_seconds(self) -> float:
        """The run's duration without the time between its sessions."""
        if self.going:
            return total(self.going)
        return max(0.0, self.ended - self.started)

    @property
    def deltas(self) -> list[float]:
        """Δ-IFD of every sample with a finite Δ-IFD."""
        found = (sample.delta for sample in self.samples if sample.delta is not None)
        return [delta for delta in found if math.isfinite(delta)]


def by_step(records: Sequence[Numbers]) -> list[Numbers]:
    """Records in order of step, only the last record of each step."""
    latest = {int(record["step"]): record for record in records}
    return [latest[step] for step in sorted(latest)]


def points(records: Sequence[Numbers], name: str) -> list[tuple[float, float]]:
    """(step, value) of each record in which `name` is finite."""
    found = ((record["step"], record.get(name)) for record in by_step(records))
    known = ((float(step), float(value)) for step, value in found if value is not None)
    return [point for point in known if math.isfinite(point[1])]


def teachers(data: ReportData) -> list[str]:
    """Names of the teachers with their own held-out KL, if there are several teachers."""
    names = {name for record in data.evals for name in record if name.startswith("kl/")}
    return sorted(name.removeprefix("kl/") for name in names)


# -- noise ---------------------------------------------------------------------------------------
# Only the noise from the choice of held-out prompts; training with another seed adds its own.


def is_noise(change: float, error: float | None) -> bool:
    """Whether a change is within two standard errors; if the error is unknown, whether it is 0."""
    return abs(change) <= 2 * (error or 0.0)


def change_error(evals: Sequence[Numbers], name: str) -> float | None:
    """Standard error of the change of a measure from its first evaluation to its last.

    For `kl` it follows from the paired differences of the responses, which are the same each time.
    For `exact_match` it is that of two independent shares, an upper bound. None if unknown.
    """
    known = [e for e in by_step(evals) if e.get(name) is not None]
    if len(known) < 2:
        return None
    first, last = known[0], known[-1]
    if name == "kl":
        return _paired(first.get("kl_sums", ()), last.get("kl_sums", ()), last.get("num_tokens", 0))
    if name == "exact_match":
        errors = [share_error(evaluation[name], evals) for evaluation in (first, last)]
        return math.hypot(*(error or 0.0 for error in errors)) if any(errors) else None
    return None


def _paired(before: Sequence[float], after: Sequence[float], num_tokens: int) -> float | None:
    """Standard error of a paired change of a mean over tokens, with responses as the sample."""
    if len(before) != len(after) or len(before) < 2 or not num_tokens:
        return None
    changes = [b - a for a, b in zip(before, after, strict=True)]
    return stdev(changes) * math.sqrt(len(changes)) / num_tokens


def share_error(share: float, evals: Sequence[Numbers]) -> float | None:
    """Standard error of the share of correct answers among held-out prompts with an answer."""
    counts = (e.get("num_answers") or e.get("num_prompts") for e in evals)
    prompts = next(filter(None, counts), None)
    return math.sqrt(max(0.0, share * (1 - share)) / prompts) if prompts else None
