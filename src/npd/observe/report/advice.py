"""The advice of a run's report: findings, and a warning if most samples were unused.

Pure text from a `ReportData`. Knows the reasons of `npd.filters` and of the plan; judges no sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from npd.config.sources import SMOKE
from npd.observe.findings import Finding, RunFacts, findings
from npd.observe.report.data import (
    Numbers,
    ReportData,
    by_step,
    change_error,
    is_noise,
    points,
)
from npd.observe.trace import total, union
from npd.text import counted
from npd.types import FinishReason, Outcome

_SECTIONS = {"data", "generate", "score", "filter", "loss", "train", "schedule"}
# Reasons of the pre-filters, which do not count as the filter's rejections.
_PREFILTERS = ("truncated", "short", "repeating")
# A single step's drift is noisy, so the mean of this many consecutive steps is used.
_STEPS_TOGETHER = 4
# Without the KL's sums per response the noise is unknown; a smaller relative rise is ignored.
_LEAST_RISE = 0.02

# Below a quarter, more than three samples were generated, and mostly scored, for each one trained
# on, and the rest is a biased selection (e.g. only short answers) of the student's text. Filters
# that work as intended keep far more: Δ-IFD cuts only the tails of a distribution.
_LEAST_SHARE = 0.25
_MOST_REASONS = 5
_CONTROLS = ("random", "teacher_nll", "overlap", "length")

Settings = Mapping[str, Any]


def advice(data: ReportData) -> list[Finding]:
    """The findings for the run; none for a smoke run, whose numbers mean nothing."""
    is_smoke = SMOKE in data.origins.values()
    return [] if is_smoke or not set(data.config) >= _SECTIONS else findings(facts_of(data))


def facts_of(data: ReportData) -> RunFacts:
    """The facts of a run; its number of steps is known only when it is done."""
    steps, kls = by_step(data.steps), [value for _, value in points(data.evals, "kl")]
    is_written = data.config["generate"]["source"] != "dataset"
    finishes = [sample.stats.finish for sample in data.samples] if is_written else []
    rejected, judged = _judged(data)
    idle, busiest = _waiting(data)
    return RunFacts(
        config=data.config,
        steps=len(steps) if data.is_done else None,
        lr_sum=sum(step.get("lr") or 0.0 for step in steps) if data.is_done else None,
        parameters=data.parameters,
        context=data.context,
        generated=len(finishes),
        truncated=sum(finish is FinishReason.LENGTH for finish in finishes),
        judged=judged,
        rejected=rejected,
        drift=_largest_drift(steps),
        mass=_mean([value for _, value in points(steps, "teacher_mass")]),
        kl=(kls[0], kls[-1]) if len(kls) > 1 else None,
        is_worse=len(kls) > 1 and _has_risen(data, kls[0], kls[-1]),
        idle=idle,
        busiest=busiest,
        wall=data.wall_seconds,
    )


def _judged(data: ReportData) -> tuple[int, int]:
    """The number of samples that the filter rejected, and of all that it judged."""
    rejected = sum(
        count
        for (outcome, reason), count in data.reasons.items()
        if outcome is Outcome.REJECTED and reason not in _PREFILTERS
    )
    kept = data.conservation.get("trained_out", 0) + data.conservation.get("stale", 0)
    return rejected, rejected + kept


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _largest_drift(steps: Sequence[Numbers]) -> float | None:
    drifts = [value for _, value in points(steps, "drift")]
    size = min(_STEPS_TOGETHER, len(drifts))
    starts = range(len(drifts) - size + 1)
    return max((sum(drifts[i : i + size]) / size for i in starts), default=None) if size else None


def _has_risen(data: ReportData, before: float, after: float) -> bool:
    error = change_error(data.evals, "kl")
    if error is None:
        return after > (1 + _LEAST_RISE) * before
    return after > before and not is_noise(after - before, error)


def _waiting(data: ReportData) -> tuple[float | None, str | None]:
    """The share of the run in which the trainer was idle, and the busiest other stage."""
    feeding = {
        stage: rate.busy_seconds / rate.num_workers
        for stage, rate in data.throughput.items()
        if stage != "train"
    }
    own = union((s.start, s.end) for s in data.spans if s.worker.startswith("trainer"))
    if not feeding or not own or data.wall_seconds <= 0:
        return None, None
    idle = max(0.0, 1.0 - total(own) / data.wall_seconds)
    return idle, max(feeding, key=lambda stage: feeding[stage])


# -- unused samples ------------------------------------------------------------------------------


def wasted_line(data: ReportData) -> str | None:
    """The unused samples by reason, and the remedy for the first; None if enough were used.

    Enough is a quarter of the requested samples. Live samples count as used.
    """
    asked, wasted = data.conservation.get("asked", 0), sum(data.unused.values())
    if asked - wasted >= _least_share(data.config) * asked:
        return None
    counts: Counter[str] = Counter()
    for (outcome, reason), count in data.unused.items():
        counts[reason if outcome is Outcome.REJECTED else outcome.value] += count
    most = counts.most_common(_MOST_REASONS)
    listed = ", ".join(f"{reason} {count:,}" for reason, count in most)
    share = f"{wasted:,} of {counted(asked, 'sample')} ({100 * wasted / asked:.0f} %)"
    return f"{share} left without being trained on: {listed}. {_remedy(most[0][0], data.config)}"


def _least_share(config: Settings) -> float:
    """A quarter, or half of a control's `filter.keep` if that is less."""
    found = config.get("filter", {})
    keep = found.get("keep") if found.get("name") in _CONTROLS else None
    return _LEAST_SHARE if keep is None else min(_LEAST_SHARE, keep / 2)


def _remedy(reason: str, config: Settings) -> str:
    """The remedy for the most frequent reason."""
    found = config.get("filter", {})
    if reason in _CONTROLS:
        given = found.get("keep")
        return (
            f"Raise filter.keep ({given})" if given is not None else _REMEDIES["disconnect"](config)
        )
    return _REMEDIES.get(reason, _look)(config)


def _truncated(config: Settings) -> str:
    longest = config.get("generate", {}).get("max_new_tokens")
    return (
        f"Raise generate.max_new_tokens ({longest}), or keep truncated responses with "
        "filter.drop_truncated: false"
    )


def _short(config: Settings) -> str:
    least = config.get("filter", {}).get("min_response_tokens")
    return (
        f"Lower filter.min_response_tokens ({least}) if short answers are intended; else read the "
        "texts, and check the student's chat template"
    )


def _repeating(config: Settings) -> str:
    most = config.get("filter", {}).get("max_repeat")
    return (
        "The student repeats itself: fine-tune it on the teacher's text first (preset seqkd), or "
        f"raise filter.max_repeat ({most})"
    )


def _outside(side: str, verb: str) -> Callable[[Settings], str]:
    """The remedy for samples beyond one bound of Δ-IFD."""

    def remedy(config: Settings) -> str:
        found = config.get("filter", {})
        if found.get("bounds") == "quantile":
            key = f"filter.{side}_quantile"
            return f"{verb} {key} ({found.get(f'{side}_quantile')})"
        slack = f", or raise filter.tolerance ({found.get('tolerance')})" if side == "low" else ""
        return (
            f"{verb} filter.{side} ({found.get(side)}){slack}, or take the bounds from recent "
            "samples with filter.bounds: quantile"
        )

    return remedy


def _outlier(config: Settings) -> str:
    given = config.get("filter", {}).get("deviations")
    return (
        "Read their texts, which the student would hardly write, or raise filter.deviations "
        f"({given})"
    )


def _stale(config: Settings) -> str:
    schedule = config.get("schedule", {})
    return (
        f"Refreshes were too frequent: raise schedule.max_lag ({schedule.get('max_lag')}), lower "
        f"schedule.window ({schedule.get('window')}), or refresh less often"
    )


def _look(config: Settings) -> str:
    return "Fix the cause that the reasons name; the run's logs/ have details"


_REMEDIES: Mapping[str, Callable[[Settings], str]] = {
    "truncated": _truncated,
    "short": _short,
    "repeating": _repeating,
    "degenerate": _outside("low", "Lower"),
    "disconnect": _outside("high", "Raise"),
    "outlier": _outlier,
    "stale": _stale,
}
