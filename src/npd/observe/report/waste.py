"""Whether a run left most of its samples aside, why, and which setting would change that.

Pure text from a `ReportData`. Knows the reasons of `npd.filters` and of the plan; judges no sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from npd.observe.report.data import ReportData
from npd.types import Outcome
from npd.wording import counted

# Below a quarter, more than three samples were written, and mostly scored, for each one trained on;
# and what is left is what happened to pass (only the short answers, say), no longer the student's
# own text. Filters that work as meant are far above: Δ-IFD cuts the tails of a distribution.
_LEAST_SHARE = 0.25
_MOST_REASONS = 5
_CONTROLS = ("random", "teacher_nll", "overlap", "length")

Settings = Mapping[str, Any]


def wasted_line(data: ReportData) -> str | None:
    """What was left aside, by reason, and the remedy for the first; None where enough was used.

    Enough is a quarter of the samples asked for; live ones count as used, they may still be.
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
    """A quarter, or half of the share that a control was told to keep."""
    found = config.get("filter", {})
    keep = found.get("keep") if found.get("name") in _CONTROLS else None
    return _LEAST_SHARE if keep is None else min(_LEAST_SHARE, keep / 2)


def _remedy(reason: str, config: Settings) -> str:
    """What to do about the most frequent reason."""
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
        f"Raise generate.max_new_tokens ({longest}), or keep what was cut off with "
        "filter.drop_truncated: false"
    )


def _short(config: Settings) -> str:
    least = config.get("filter", {}).get("min_response_tokens")
    return (
        f"Lower filter.min_response_tokens ({least}) if short answers are meant; else look at the "
        "texts, and at the student's chat template"
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
            f"{verb} filter.{side} ({found.get(side)}){slack}, or take bounds from the samples "
            "themselves with filter.bounds: quantile"
        )

    return remedy


def _outlier(config: Settings) -> str:
    given = config.get("filter", {}).get("deviations")
    return (
        f"Look at their texts: the student would hardly write them. Or raise filter.deviations "
        f"({given})"
    )


def _stale(config: Settings) -> str:
    schedule = config.get("schedule", {})
    return (
        f"Snapshots outran them: raise schedule.max_lag ({schedule.get('max_lag')}), lower "
        f"schedule.window ({schedule.get('window')}), or refresh more rarely"
    )


def _look(config: Settings) -> str:
    return "Mend what the reasons name; logs/ of the run has more"


_REMEDIES: Mapping[str, Callable[[Settings], str]] = {
    "truncated": _truncated,
    "short": _short,
    "repeating": _repeating,
    "degenerate": _outside("low", "Lower"),
    "disconnect": _outside("high", "Raise"),
    "outlier": _outlier,
    "stale": _stale,
}
