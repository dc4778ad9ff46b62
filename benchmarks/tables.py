"""Tables of Markdown, and means with their 95 % t-intervals as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

# Student's t, two-sided 95 %, by degrees of freedom; beyond, that of 9, which is wider than right.
_T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t-interval (NaN for a single value).

    >>> interval([1.0, 2.0, 3.0])
    (2.0, 2.4843...)
    """
    if len(values) < 2:
        return mean(values), math.nan
    t = _T95[min(len(values) - 1, 9)]
    return mean(values), t * stdev(values) / len(values) ** 0.5


def head(*cells: str) -> list[str]:
    """The first two lines of a table."""
    return [row(*cells), row(*["---"] * len(cells))]


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def points(values: Sequence[float], *, signed: bool = False) -> str:
    """Shares in per cent: mean and interval."""
    return number([100 * value for value in values], 1, signed=signed)


def number(values: Sequence[float | None], digits: int, *, signed: bool = False) -> str:
    """Mean and interval of the values that are known; nothing where none is."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    middle, half = interval(known)
    shown = f"{middle:{'+' if signed else ''}.{digits}f}"
    return shown if math.isnan(half) else f"{shown} ± {half:.{digits}f}"
