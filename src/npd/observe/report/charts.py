"""Line charts as inline SVG, and the axes that every chart shares (`bars.py`, `gantt.py`).

Promises: colours come only from CSS classes (so that one drawing serves light and dark), text is
escaped, every mark has its numbers in a <title>. Draws what it is given; missing data is the
caller's to explain.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from npd.observe.report.html import Html, el, join
from npd.observe.report.scales import (
    Scale,
    nice_bounds,
    number,
    percent,
    tick_labels,
    ticks,
    widen,
)

WIDTH, HEIGHT = 560, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 26, 40
_MAX_POINTS = 400
_MAX_HOVERS = 80
_SMOOTH_FROM = 50


@dataclass(frozen=True, slots=True)
class Series:
    """A line: `points` (x, y) in order of x; `color` is a CSS class c1..c6."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A straight line across the plot at `value`, with its label."""

    value: float
    label: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Axes:
    """What the axes say. `as_percent` writes y ticks as per cent; `whole_x` keeps x ticks whole."""

    x: str
    y: str
    as_percent: bool = False
    whole_x: bool = True
    from_zero: bool = False


def svg(*children: Html | None, width: int, height: int, label: str) -> Html:
    """An SVG that scales with the page; `label` is read out by screen readers."""
    body = join(*children)
    return el(
        "svg",
        body,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=label,
        xmlns="http://www.w3.org/2000/svg",
    )


def label_at(x: float, y: float, content: str, css: str = "tick", anchor: str = "middle") -> Html:
    """Text at a pixel."""
    return el("text", content, x=x, y=y, class_=css, text_anchor=anchor)


def line_chart(
    series: Sequence[Series],
    axes: Axes,
    *,
    label: str,
    rules: Sequence[Rule] = (),
    markers: Sequence[Rule] = (),
) -> Html:
    """Lines over a whole-number x. `rules` are horizontal, `markers` vertical.

    Long noisy series are drawn twice: each point thin, the moving mean (which starts anew at each
    marker) bold.
    """
    x_values = [x for s in series for x, _ in s.points]
    y_values = [y for s in series for _, y in s.points] + [r.value for r in rules]
    low = min(0.0, *y_values) if axes.from_zero else min(y_values)
    x = Scale(*widen(min(x_values), max(x_values)), _LEFT, WIDTH - _RIGHT)
    y = Scale(*nice_bounds(low, max(y_values)), HEIGHT - _BOTTOM, _TOP)
    inside = sorted((m for m in markers if x.low <= m.value <= x.high), key=lambda m: m.value)
    return svg(
        _grid(x, y, axes),
        *(_marker(x, y, m, i) for i, m in enumerate(inside)),
        *(_rule(y, r) for r in rules),
        *(_line(s, x, y, [m.value for m in inside]) for s in series),
        _hovers(series, x, y, axes),
        width=WIDTH,
        height=HEIGHT,
        label=label,
    )


def _grid(x: Scale, y: Scale, axes: Axes) -> Html:
    y_ticks = ticks(y.low, y.high)
    y_texts = tick_labels([100 * t for t in y_ticks] if axes.as_percent else y_ticks)
    x_ticks = ticks(x.low, x.high, 7, whole=axes.whole_x)
    rows = [
        join(
            el("line", x1=x.start, x2=x.end, y1=y.at(t), y2=y.at(t), class_="grid"),
            label_at(x.start - 8, y.at(t) + 4, name, anchor="end"),
        )
        for t, name in zip(y_ticks, y_texts, strict=True)
    ]
    return join(*rows, bottom_axis(x, y.start, x_ticks, tick_labels(x_ticks), axes.x), _unit(axes))


def _unit(axes: Axes) -> Html:
    return label_at(_LEFT - 44, 9, axes.y, "axis", "start")


def bottom_axis(x: Scale, y: float, at: Sequence[float], names: Sequence[str], title: str) -> Html:
    """The x axis at pixel `y`: line, ticks, labels and its title."""
    marks = [
        join(
            el("line", x1=x.at(t), x2=x.at(t), y1=y, y2=y + 4, class_="base"),
            label_at(x.at(t), y + 17, name),
        )
        for t, name in zip(at, names, strict=True)
    ]
    base = el("line", x1=x.start, x2=x.end, y1=y, y2=y, class_="base")
    return join(base, *marks, label_at(x.end, y + 33, title, "axis", "end"))


def _rule(y: Scale, rule: Rule) -> Html:
    at = y.at(rule.value)
    return join(
        el("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at, class_=f"rule {rule.style}"),
        label_at(WIDTH - _RIGHT, at - 5, rule.label, f"rulelabel {rule.style}", "end"),
    )


def _marker(x: Scale, y: Scale, marker: Rule, index: int) -> Html:
    at = x.at(marker.value)
    return el(
        "g",
        el("line", x1=at, x2=at, y1=y.end, y2=y.start, class_="marker"),
        label_at(at + 4, y.end + 9 + 12 * (index % 2), marker.label, "rulelabel", "start"),
        el("title", f"{marker.label} at {number(marker.value, 6)}"),
    )


def _line(series: Series, x: Scale, y: Scale, breaks: Sequence[float]) -> Html:
    color, points = series.color, series.points
    if len(points) == 1:
        return el(
            "circle", cx=x.at(points[0][0]), cy=y.at(points[0][1]), r=4, class_=f"dot {color}"
        )
    if len(points) < _SMOOTH_FROM:
        dots = [
            el("circle", cx=x.at(a), cy=y.at(b), r=2.5, class_=f"dot {color}") for a, b in points
        ]
        return join(_path(points, x, y, f"line {color}"), *(dots if len(points) < 25 else ()))
    return join(
        _path(thin(points), x, y, f"line faint {color}"),
        _path(thin(_trend(points, breaks)), x, y, f"line {color}"),
    )


def _path(points: Sequence[tuple[float, float]], x: Scale, y: Scale, css: str) -> Html:
    steps = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in points)
    return el("path", d=f"M{steps}", class_=css)


def _trend(
    points: Sequence[tuple[float, float]], breaks: Sequence[float]
) -> list[tuple[float, float]]:
    """The moving mean of each stretch between `breaks`, so that a real jump stays one."""
    stretches: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        stretches.setdefault(bisect.bisect_left(breaks, point[0]), []).append(point)
    reach = len(points) // 25
    return [point for stretch in stretches.values() for point in moving_mean(stretch, reach)]


def moving_mean(points: Sequence[tuple[float, float]], reach: int) -> list[tuple[float, float]]:
    """Each y as the mean of itself and up to `reach` neighbours on each side."""
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    bounds = [(max(0, i - reach), min(len(points), i + reach + 1)) for i in range(len(points))]
    means = [(sums[b] - sums[a]) / (b - a) for a, b in bounds]
    return [(point[0], mean) for point, mean in zip(points, means, strict=True)]


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 400 points that keep every peak: the lowest and highest of each stretch."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (_MAX_POINTS // 2))
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        extremes = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept.extend(sorted(extremes))
    return kept


def _hovers(series: Sequence[Series], x: Scale, y: Scale, axes: Axes) -> Html:
    """Invisible columns that show, on hover, every line's value there."""
    lookup = [(s.name, dict(s.points)) for s in series]
    known = sorted({at for _, points in lookup for at in points})
    shown = known[:: math.ceil(len(known) / _MAX_HOVERS)]
    half = (x.end - x.start) / len(shown) / 2
    return join(*(_hover(at, lookup, x, y, axes, half) for at in shown))


def _hover(
    at: float,
    lookup: Sequence[tuple[str, dict[float, float]]],
    x: Scale,
    y: Scale,
    axes: Axes,
    half: float,
) -> Html:
    lines = [f"{name}: {_written(points[at], axes)}" for name, points in lookup if at in points]
    px, height = x.at(at), y.start - y.end
    return el(
        "g",
        el("title", "\n".join([f"{axes.x} {number(at, 6)}", *lines])),
        el("rect", x=px - half, y=y.end, width=2 * half, height=height, class_="hit"),
        el("line", x1=px, x2=px, y1=y.end, y2=y.start, class_="guide"),
        class_="hover",
    )


def _written(value: float, axes: Axes) -> str:
    return percent(value) if axes.as_percent else number(value, 4)
