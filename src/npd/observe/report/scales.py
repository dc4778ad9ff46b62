"""Axes: where a value lands on the page, which ticks are nice, and how numbers are written.

Pure arithmetic, no markup. Ticks are multiples of 1, 2 or 5 times a power of ten (of natural units
of time for durations).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_TIME_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200)
_DAY = 86400


@dataclass(frozen=True, slots=True)
class Scale:
    """Linear from [low, high] in data to [start, end] in pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Pixel of `value`."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def nice_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 5 x 10^n that cuts `span` > 0 into at most `count` parts."""
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= raw * (1 - 1e-9))


def widen(low: float, high: float) -> tuple[float, float]:
    """[low, high], made wider around itself when it is a single point (but for rounding)."""
    size = max(abs(low), abs(high))
    if high - low > max(1e-12, 1e-9 * size):
        return low, high
    half = 0.1 * size if size > 1e-12 else 0.5
    return low - half, high + half


def nice_bounds(low: float, high: float, count: int = 5) -> tuple[float, float]:
    """The least range of whole ticks around [low, high]."""
    low, high = widen(low, high)
    step = nice_step(high - low, count)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Nice ticks inside [low, high]; `whole` keeps them integers."""
    step = nice_step(high - low, count)
    step = max(1.0, step) if whole else step
    return _multiples(low, high, step)


def time_ticks(seconds: float, count: int = 8) -> list[float]:
    """Ticks in [0, seconds] at round seconds, minutes, hours or days."""
    fits = (float(s) for s in _TIME_STEPS if seconds / s <= count)
    step = next(fits, _DAY * max(1.0, nice_step(seconds / _DAY, count)))
    return _multiples(0.0, seconds, step)


def _multiples(low: float, high: float, step: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step + 0.0 for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Labels with just the decimals that tell `values` apart."""
    gap = min((b - a for a, b in pairwise(values)), default=1.0)
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9)) if gap > 0 else 0
    return [f"{0.0 if v == 0 else v:,.{decimals}f}".replace("-", "−") for v in values]


def number(value: float | None, digits: int = 3) -> str:
    """`value` to `digits` significant digits, thousands apart: 0.0421, 3.14, 12,345; None is –."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    if decimals > 8:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{value:,.{max(0, decimals)}f}".replace("-", "−")


def percent(share: float | None) -> str:
    """A share as `71.4 %`."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """`0.8 s`, `42 s`, `12 min 5 s`, `3 h 7 min`; whole units drop the rest."""
    if seconds < 10:
        return f"{number(seconds, 2)} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    big, small, names = (whole // 60, whole % 60, ("min", "s"))
    if whole >= 3600:
        big, small, names = (whole // 3600, whole % 3600 // 60, ("h", "min"))
    return f"{big} {names[0]}" + (f" {small} {names[1]}" if small else "")
