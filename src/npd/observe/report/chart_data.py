"""The contents of a report's charts: records, their tables, and the thinning of long series.

Pure arithmetic without markup; `charts.py` draws. Promises: charts have a bounded size for runs of
any length; a histogram counts every value once, and values beyond the edges in the outer bins;
spans that are drawn as one block state their number.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from npd.observe.report.page import duration, number, percent
from npd.observe.trace import Interval, Span, busy_seconds

_MAX_POINTS, _MAX_STATIONS, _MAX_ROWS, _SMOOTH_FROM = 400, 120, 20, 50
_TIME_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200)
_DAY = 86400

Point: TypeAlias = tuple[float, float]


# -- what a chart shows --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Series:
    """A line: `points` (x, y) in order of x; `color` is c1..c6, as in all records here."""

    name: str
    points: Sequence[Point]
    color: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A straight line across the plot at `value`, with its label; `color` is a CSS variable."""

    value: float
    label: str
    color: str = "ink"


@dataclass(frozen=True, slots=True)
class Axes:
    """Titles of the axes. `as_percent` writes y in per cent; `from_zero` starts y at 0."""

    x: str
    y: str
    as_percent: bool = False
    from_zero: bool = False

    def write(self, value: float) -> str:
        """A value of y as text."""
        return percent(value) if self.as_percent else number(value, 4)


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines over a whole-number x. `rules` are horizontal, `markers` vertical.

    A long series is drawn twice: every point as a thin line, and the moving mean, which restarts at
    each marker, as a bold line.
    """

    series: Sequence[Series]
    axes: Axes
    rules: Sequence[Rule] = ()
    markers: Sequence[Rule] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """Values of a stacked histogram that share a colour."""

    name: str
    values: Sequence[float]
    color: str


@dataclass(frozen=True, slots=True)
class Histogram:
    """Stacked counts per bin; `rules` are vertical, such as the bounds of a filter."""

    groups: Sequence[Group]
    edges: Sequence[float]
    axes: Axes
    rules: Sequence[Rule] = ()


@dataclass(frozen=True, slots=True)
class Columns:
    """One column per category, in the given order, with its count above."""

    counts: Mapping[str, int]
    axes: Axes
    color: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar: label on the left, `text` after its end."""

    label: str
    value: float
    text: str
    color: str


@dataclass(frozen=True, slots=True)
class Bars:
    """Horizontal bars; `is_share`: the scale is from 0 to 100 %."""

    bars: Sequence[Bar]
    unit: str
    is_share: bool = False


@dataclass(frozen=True, slots=True)
class Timeline:
    """One lane per worker, times since `origin`; `shared` intervals are shaded over all lanes."""

    spans: Sequence[Span]
    origin: float
    colors: Mapping[str, str]
    shared: Sequence[Interval] = ()


Chart: TypeAlias = Lines | Histogram | Columns | Bars | Timeline


# -- tables --------------------------------------------------------------------------------------


def numbers(chart: Chart) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table of the chart; a long series has at most 20 rows."""
    match chart:
        case Lines(series, axes):
            rows = [[f"{x:,.0f}", *values] for x, values in stations(chart, _MAX_ROWS)]
            return [f">{axes.x}", *(f">{s.name}" for s in series)], rows
        case Histogram(groups, _, axes):
            return [axes.x, *(f">{group.name}" for group in groups)], _bin_table(chart)
        case Columns(counts, axes):
            return [axes.x, f">{axes.y}"], [[name, f"{n:,}"] for name, n in counts.items()]
        case Bars(bars, unit):
            return ["", f">{unit}"], [[bar.label, bar.text] for bar in bars]
        case Timeline(spans):
            busy = sorted(busy_seconds(spans).items())
            rows = [[worker, name, duration(spent)] for (worker, name), spent in busy]
            return ["worker", "work", ">time"], rows


def _bin_table(chart: Histogram) -> list[list[str]]:
    stacks = [count(group.values, chart.edges) for group in chart.groups]
    columns = zip(chart.edges, chart.edges[1:], *stacks, strict=False)
    return [
        [bin_name(a, b), *(f"{n:,}" for n in counts)] for a, b, *counts in columns if any(counts)
    ]


# -- thinning and counting -----------------------------------------------------------------------


def thin(points: Sequence[Point]) -> list[Point]:
    """At most 400 points that keep every peak: the lowest and highest of each interval."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (_MAX_POINTS // 2))
    kept = []
    for start in range(0, len(points), size):
        interval = points[start : start + size]
        extremes = {min(interval, key=lambda p: p[1]), max(interval, key=lambda p: p[1])}
        kept.extend(sorted(extremes))
    return kept


def is_long(series: Series) -> bool:
    """Whether a line has enough points to draw its moving mean over it."""
    return len(series.points) >= _SMOOTH_FROM


def bold(series: Series, breaks: Sequence[float]) -> Sequence[Point]:
    """The points of the bold line; for a long series its moving mean, restarted at `breaks`."""
    return thin(_trend(series.points, breaks)) if is_long(series) else series.points


def stations(chart: Lines, most: int = _MAX_STATIONS) -> list[tuple[float, list[str]]]:
    """At most `most` evenly chosen x, each with the value of every line as text; – if none."""
    lookup = [dict(series.points) for series in chart.series]
    known = sorted({x for points in lookup for x in points})
    last, write = len(known) - 1, chart.axes.write
    parts = min(last, most - 1)
    shown = sorted({round(i * last / max(1, parts)) for i in range(parts + 1)})
    return [
        (x, [write(points[x]) if x in points else "–" for points in lookup])
        for x in (known[i] for i in shown)
    ]


def _trend(points: Sequence[Point], breaks: Sequence[float]) -> list[Point]:
    """The moving mean within each interval between `breaks`, so that a real jump is kept."""
    intervals: dict[int, list[Point]] = {}
    for point in points:
        intervals.setdefault(bisect.bisect_left(breaks, point[0]), []).append(point)
    reach = len(points) // 25
    return [point for interval in intervals.values() for point in moving_mean(interval, reach)]


def moving_mean(points: Sequence[Point], reach: int) -> list[Point]:
    """Each y as the mean of itself and up to `reach` neighbours on each side."""
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    bounds = [(max(0, i - reach), min(len(points), i + reach + 1)) for i in range(len(points))]
    means = [(sums[b] - sums[a]) / (b - a) for a, b in bounds]
    return [(point[0], mean) for point, mean in zip(points, means, strict=True)]


def bin_edges(
    values: Sequence[float], num_bins: int = 40, cover: Sequence[float] = ()
) -> list[float]:
    """Edges at round numbers over the middle 99 % of `values` and all of `cover`.

    The width is 1, 2 or 5 x 10^n, so that round bounds fall on an edge.
    """
    ordered = sorted(values)
    cut = math.floor(0.005 * len(ordered))
    inner = [*ordered[cut : len(ordered) - cut], *cover]
    low, high = min(inner), max(inner)
    width = nice_step(max(high - low, 1e-3), num_bins)
    first, last = math.floor(low / width + 1e-9), math.floor(high / width + 1e-9) + 1
    return [i * width for i in range(first, last + 1)]


def count(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """The number of values in each [edge, next edge); values beyond are in the outer bins."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        index = bisect.bisect_right(edges, value) - 1
        counts[min(max(index, 0), len(counts) - 1)] += 1
    return counts


def bin_name(low: float, high: float) -> str:
    """The name of a bin, `0.1 to 0.2`."""
    return f"{number(low)} to {number(high)}"


@dataclass(frozen=True, slots=True)
class Block:
    """One or more spans of one worker and kind, drawn as one; `busy`: the sum of their seconds."""

    worker: str
    name: str
    start: float
    end: float
    count: int
    busy: float
    note: str = ""


def merge(spans: Sequence[Span], max_blocks: int) -> list[Block]:
    """At most about `max_blocks` blocks: neighbours are joined over a gap that grows as needed."""
    groups: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda s: s.start):
        groups[span.worker, span.name].append(span)
    whole = max(s.end for s in spans) - min(s.start for s in spans)
    gap = float("-inf")
    while True:
        blocks = [block for group in groups.values() for block in _join_spans(group, gap)]
        if len(blocks) <= max(max_blocks, len(groups)):
            return blocks
        gap = max(gap * 2, whole / max_blocks / 8)


def _join_spans(spans: Sequence[Span], gap: float) -> list[Block]:
    blocks: list[Block] = []
    for span in spans:
        note = ", ".join(f"{key} {value}" for key, value in span.args.items())
        new = Block(span.worker, span.name, span.start, span.end, 1, span.seconds, note)
        if blocks and span.start - blocks[-1].end <= gap:
            blocks[-1] = _joined(blocks[-1], new)
        else:
            blocks.append(new)
    return blocks


def _joined(a: Block, b: Block) -> Block:
    end = max(a.end, b.end)
    return Block(a.worker, a.name, a.start, end, a.count + b.count, a.busy + b.busy)


def join_close(intervals: Sequence[Interval], gap: float) -> list[Interval]:
    """The intervals in order, with neighbours less than `gap` apart joined."""
    joined: list[Interval] = []
    for start, end in intervals:
        if joined and start - joined[-1][1] < gap:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


# -- round numbers -------------------------------------------------------------------------------


def nice_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 5 x 10^n that divides `span` > 0 into at most `count` parts."""
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= raw * (1 - 1e-9))


def widen(low: float, high: float) -> Point:
    """[low, high], widened if it is a single point up to rounding."""
    size = max(abs(low), abs(high))
    if high - low > max(1e-12, 1e-9 * size):
        return low, high
    half = 0.1 * size if size > 1e-12 else 0.5
    return low - half, high + half


def nice_bounds(low: float, high: float, count: int = 5) -> Point:
    """The smallest range of whole steps that contains [low, high]."""
    low, high = widen(low, high)
    step = nice_step(high - low, count)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def time_ticks(seconds: float, count: int = 8) -> list[float]:
    """Ticks in [0, seconds] at round seconds, minutes, hours or days."""
    fits = (float(s) for s in _TIME_STEPS if seconds / s <= count)
    step = next(fits, _DAY * max(1.0, nice_step(seconds / _DAY, count)))
    return [i * step for i in range(math.floor(seconds / step + 1e-9) + 1)]
