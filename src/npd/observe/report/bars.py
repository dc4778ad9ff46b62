"""Histograms and horizontal bars as inline SVG; the counting is `bin_edges` and `count`.

Promises: every value is counted once; what lies beyond the edges is counted in the outer bins.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from npd.observe.report.charts import HEIGHT, WIDTH, Axes, Rule, bottom_axis, label_at, svg
from npd.observe.report.html import Html, el, join
from npd.observe.report.scales import Scale, nice_bounds, nice_step, number, tick_labels, ticks

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 30, 40
_ROW = 26
_Y_TICKS = 4


@dataclass(frozen=True, slots=True)
class Group:
    """Values of a stacked histogram that share a colour (CSS class c1..c6)."""

    name: str
    values: Sequence[float]
    color: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar: label on the left, `text` after its end."""

    label: str
    value: float
    text: str
    color: str


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
    """How many values fall in each [edge, next edge); those beyond go to the outer bins."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        place = bisect.bisect_right(edges, value) - 1
        counts[min(max(place, 0), len(counts) - 1)] += 1
    return counts


def histogram(
    groups: Sequence[Group],
    edges: Sequence[float],
    axes: Axes,
    *,
    label: str,
    rules: Sequence[Rule] = (),
) -> Html:
    """Stacked counts per bin; `rules` are vertical lines, such as the bounds of a filter."""
    stacks = [count(group.values, edges) for group in groups]
    highest = max(sum(column) for column in zip(*stacks, strict=True))
    x = Scale(edges[0], edges[-1], _LEFT, WIDTH - _RIGHT)
    y = Scale(*nice_bounds(0.0, max(1.0, highest), _Y_TICKS), HEIGHT - _BOTTOM, _TOP)
    at = ticks(x.low, x.high, 8)
    columns = zip(edges, edges[1:], *stacks, strict=False)
    return svg(
        _rows(x, y, axes.y),
        *(_column(x, y, a, b, c, groups) for a, b, *c in columns),
        bottom_axis(x, y.start, at, tick_labels(at), axes.x),
        *(_bound(x, y, rule) for rule in rules),
        width=WIDTH,
        height=HEIGHT,
        label=label,
    )


def category_chart(counts: Mapping[str, int], axes: Axes, color: str, *, label: str) -> Html:
    """One column a category, in the order given, with its count above."""
    y = Scale(*nice_bounds(0.0, max(1, *counts.values()), _Y_TICKS), HEIGHT - _BOTTOM, _TOP)
    x = Scale(-0.5, len(counts) - 0.5, _LEFT, WIDTH - _RIGHT)
    half = min(30.0, 0.36 * (x.end - x.start) / len(counts))
    total = max(1, sum(counts.values()))
    columns = [
        el(
            "g",
            el("title", f"{axes.x} {name}: {n:,} ({100 * n / total:.1f} %)"),
            _box(x.at(i) - half, y.at(n), 2 * half, y.start - y.at(n), color),
            label_at(x.at(i), y.at(n) - 5, f"{n:,}", "value"),
            class_="mark",
        )
        for i, (name, n) in enumerate(counts.items())
    ]
    places = [float(i) for i in range(len(counts))]
    axis = bottom_axis(x, y.start, places, list(counts), axes.x)
    return svg(_rows(x, y, axes.y), *columns, axis, width=WIDTH, height=HEIGHT, label=label)


def bar_chart(bars: Sequence[Bar], unit: str, *, label: str, full: float | None = None) -> Html:
    """Horizontal bars; `full` fixes the right end of the scale (1.0 for shares)."""
    left = 20 + 7.2 * min(22, max(len(bar.label) for bar in bars))
    height = 8 + _ROW * len(bars) + _BOTTOM
    end = full or nice_bounds(0.0, max(1e-9, *(bar.value for bar in bars)))[1]
    x = Scale(0.0, end, left, WIDTH - 64)
    base = height - _BOTTOM
    at = ticks(0.0, end, 5)
    names = tick_labels([100 * t for t in at] if full == 1.0 else at)
    lines = (el("line", x1=x.at(t), x2=x.at(t), y1=4, y2=base, class_="grid") for t in at)
    rows = (_bar(x, 8 + _ROW * i, bar) for i, bar in enumerate(bars))
    axis = bottom_axis(x, base, at, names, unit)
    return svg(*lines, *rows, axis, width=WIDTH, height=height, label=label)


def _rows(x: Scale, y: Scale, unit: str) -> Html:
    at = ticks(0.0, y.high, _Y_TICKS, whole=True)
    rows = [
        join(
            el("line", x1=x.start, x2=x.end, y1=y.at(t), y2=y.at(t), class_="grid"),
            label_at(x.start - 8, y.at(t) + 4, name, anchor="end"),
        )
        for t, name in zip(at, tick_labels(at), strict=True)
    ]
    return join(*rows, label_at(8, 9, unit, "axis", "start"))


def _column(
    x: Scale, y: Scale, low: float, high: float, counts: Sequence[int], groups: Sequence[Group]
) -> Html | None:
    if not any(counts):
        return None
    marks, below = [], 0
    gap = min(1.0, 0.1 * (x.at(high) - x.at(low)))
    for n, group in zip(counts, groups, strict=True):
        top, bottom = y.at(below + n), y.at(below)
        marks.append(
            _box(x.at(low) + gap, top, x.at(high) - x.at(low) - 2 * gap, bottom - top, group.color)
        )
        below += n
    told = [f"{group.name}: {n:,}" for n, group in zip(counts, groups, strict=True) if n]
    title = "\n".join([f"{number(low)} to {number(high)}", *told])
    return el("g", el("title", title), *marks, class_="mark")


def _box(x: float, y: float, width: float, height: float, color: str) -> Html:
    return el("rect", x=x, y=y, width=width, height=max(0.0, height), class_=f"fill {color}")


def _bound(x: Scale, y: Scale, rule: Rule) -> Html:
    at = min(max(x.at(rule.value), x.start), x.end)
    is_right = at > (x.start + x.end) / 2
    anchor, shift = ("end", -5) if is_right else ("start", 5)
    return join(
        el("line", x1=at, x2=at, y1=y.end - 8, y2=y.start, class_=f"rule {rule.style}"),
        label_at(at + shift, y.end - 1, rule.label, f"rulelabel {rule.style}", anchor),
    )


def _bar(x: Scale, y: float, bar: Bar) -> Html:
    width = x.at(min(bar.value, x.high)) - x.start
    name = bar.label if len(bar.label) <= 22 else bar.label[:21] + "…"
    return el(
        "g",
        el("title", f"{bar.label}: {bar.text}"),
        label_at(x.start - 8, y + 13, name, "name", "end"),
        el(
            "rect",
            x=x.start,
            y=y,
            width=max(1.0, width),
            height=18,
            rx=2,
            class_=f"fill {bar.color}",
        ),
        label_at(x.start + width + 6, y + 13, bar.text, "value", "start"),
        class_="mark",
    )
