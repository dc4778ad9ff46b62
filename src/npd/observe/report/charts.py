"""Draws a report's charts with Altair as Vega-Lite, inside the page.

Promises: a drawing holds its own data, takes its width from the page and its colours from the
page's style (so one drawing serves light and dark, phone and desktop), and needs neither network
nor `eval`. Text is cleaned, and `<`, `>` and `&` never appear in the JSON. Only this module imports
Altair and vl-convert (the extra `report`); without them a chart is a table.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeAlias

from npd.errors import RunError
from npd.observe.report.chart_data import (
    Bars,
    Block,
    Chart,
    Columns,
    Histogram,
    Lines,
    Point,
    Rule,
    Series,
    Timeline,
    bin_name,
    bold,
    count,
    is_long,
    join_close,
    merge,
    nice_bounds,
    numbers,
    stations,
    thin,
    time_ticks,
    widen,
)
from npd.observe.report.page import Html, clean, duration, el, table
from npd.store.files import write_atomic

_MAX_LABELS, _DOTS_BELOW, _MAX_BLOCKS, _FINEST = 8, 25, 2000, 2000
_HEIGHT, _ROW, _HIGH_ROW, _LANE, _LONG_NAME = 230, 27, 42, 34, 16
_HALO: Mapping[str, Any] = {"stroke": "var(--card)", "strokeWidth": 3, "fontSize": 11.5}

Rows: TypeAlias = list[dict[str, Any]]
# `_Drawn`: layers, each with the name of its rows; the rows; further properties of the drawing.
_Layers: TypeAlias = list[tuple[str, Any]]
_Drawn: TypeAlias = tuple[_Layers, dict[str, Rows], dict[str, Any]]


# -- on the page ---------------------------------------------------------------------------------


def draw(chart: Chart, label: str) -> Html:
    """The chart as markup; screen readers read `label`."""
    if not can_draw():
        return table(*numbers(chart))
    try:
        content = _compact(spec(chart) | {"description": clean(label)})
    except Exception:  # noqa: BLE001 - a library error in a chart must not end a run
        return table(*numbers(chart))
    fallback = el("noscript", "This chart needs JavaScript.")
    target = el("div", fallback, class_="chart", role="img", aria_label=label)
    return Html(f"{target}{_DATA}{_inert(content)}</script>")


def can_draw() -> bool:
    """Whether the extra `report` is installed, with versions that fit each other."""
    try:
        import altair  # noqa: F401
        import vl_convert  # noqa: F401

        _library()
    except Exception:  # noqa: BLE001 - with any error of the libraries the report has tables
        return False
    return True


def remedy(run: str = "RUN") -> str:
    """The command that adds charts to the report of `run`."""
    return f"pip install 'npd[report]', then npd show --report {run}"


def scripts(body: str) -> list[str]:
    """The JavaScript that draws the charts of `body`; empty for a page without drawings."""
    return [_library(), _START.replace("THEME", _compact(_THEME))] if _DATA in body else []


@cache
def _library() -> str:
    """The bundle of Vega, Vega-Lite and vega-embed for the schema that Altair writes.

    Bundling takes seconds, so the bundle of each version is kept in the user's cache directory.
    """
    import altair
    import vl_convert

    version = altair.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]
    kept = _cached(f"vega-{version}-{metadata.version('vl-convert-python')}-{_FORMAT}.js")
    if kept is not None and (found := _read_own(kept)) is not None:
        return found
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version) + _END
    if kept is not None:
        with suppress(OSError, RunError):  # without a cache the next report is slower
            write_atomic(kept, lambda file: file.write(bundle.encode()))
    return bundle


def _cached(name: str) -> Path | None:
    """The path of a file in the user's cache directory; None if there is no such directory."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    root = given if os.path.isabs(given) else os.path.expanduser("~/.cache")
    return Path(root, "npd", name) if os.path.isabs(root) else None


def _read_own(path: Path) -> str | None:
    """The text of a complete bundle that only this user can have written, else None."""
    with suppress(OSError, UnicodeDecodeError):
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            found = os.fstat(file.fileno())
            is_own = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()
            text = file.read().decode() if is_own and not found.st_mode & 0o022 else ""
        if text.endswith(_END):
            return text
    return None


# The version of the bundle's format in cache file names, and the bundle's last line.
_FORMAT, _END = 1, "\n// end of bundle\n"


def _compact(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _inert(content: str) -> str:
    """JSON without characters that an HTML parser takes for markup."""
    for mark in "<>&":
        content = content.replace(mark, f"\\u{ord(mark):04x}")
    return content


_DATA = '<script type="application/json">'
# `ast`: expressions are interpreted, because the content security policy forbids compiling them.
_START = """
for (const block of document.querySelectorAll('script[type="application/json"]')) {
  const target = block.previousElementSibling;
  target.replaceChildren();
  vegaEmbed(target, JSON.parse(block.textContent), {
    mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false,
    tooltip: {disableDefaultStyle: true}, config: THEME
  }).catch(error => { target.textContent = "This chart cannot be drawn: " + error; });
}
"""

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Inter, Arial, sans-serif'
_AXIS_TITLE = {"titleColor": "var(--soft)", "titleFontWeight": "normal", "titleFontSize": 12}
_THEME: Mapping[str, Any] = {
    "background": "transparent",
    "font": _FONT,
    "padding": {"left": 0, "top": 4, "right": 4, "bottom": 4},
    "view": {"stroke": None},
    "title": {
        "anchor": "start",
        "frame": "bounds",
        "color": "var(--soft)",
        "fontSize": 12,
        "fontWeight": "normal",
        "offset": 8,
    },
    "axis": {
        "labelColor": "var(--soft)",
        "labelFontSize": 12,
        "labelOverlap": True,
        "gridColor": "var(--grid)",
        "domainColor": "var(--c6)",
        "tickColor": "var(--c6)",
        "tickSize": 4,
        **_AXIS_TITLE,
    },
    "axisX": {"grid": False, "titleAnchor": "end", "titlePadding": 6},
    "axisY": {"domain": False, "ticks": False, "labelPadding": 6},
    "text": {"color": "var(--ink)", "fontSize": 12},
    "rule": {"color": "var(--ink)"},
}


# -- drawings ------------------------------------------------------------------------------------


def spec(chart: Chart) -> dict[str, Any]:
    """The chart as a Vega-Lite specification with its data, validated against the schema."""
    import altair as alt

    layers, data, rest = _DRAWN[type(chart)](alt, chart)
    filled = [layer for name, layer in layers if data[name]]
    drawn = alt.layer(*filled).properties(width="container", **{"height": _HEIGHT, **rest})
    made: dict[str, Any] = drawn.to_dict()
    made.pop("config", None)  # the page has one config for all charts
    return made | {"datasets": {name: _plain(rows) for name, rows in data.items() if rows}}


def _plain(rows: Rows) -> Rows:
    """The rows with cleaned text, and numbers of six digits, which is enough for a drawing."""
    return [{key: _value(value) for key, value in row.items()} for row in rows]


def _value(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _css(color: str) -> str:
    return f"var(--{color})"


def _over(alt: Any, name: str) -> Any:
    """A chart of the rows called `name`."""
    return alt.Chart(alt.NamedData(name=name))


def _own_color(alt: Any) -> Any:
    """The colour given in each row."""
    return alt.Color("color:N", scale=None)


def _scale(alt: Any, low: float, high: float) -> Any:
    # Rounded, so that a binary rounding error does not remove a tick at either end.
    ends = [float(f"{low:.12g}"), float(f"{high:.12g}")]
    return alt.Scale(domain=ends, nice=False, zero=False)


def _tooltip(alt: Any, title: str, names: Sequence[str]) -> list[Any]:
    """The rows of a tooltip: the position, then the value of each name."""
    # Two rows cannot have the same title, and `title` and `image` are special in a tooltip.
    taken = {title, "title", "image"}
    titles = [f"{clean(name)} (line)" if clean(name) in taken else clean(name) for name in names]
    values = [alt.Tooltip(f"v{i}:N", title=shown) for i, shown in enumerate(titles)]
    return [alt.Tooltip("at:N", title=title), *values]


def _lines(alt: Any, chart: Lines) -> _Drawn:
    xs = [x for line in chart.series for x, _ in line.points]
    low, high = widen(min(xs), max(xs))
    axis = alt.Axis(format=",d", tickMinStep=1, tickCount=7)
    x = alt.X("x:Q", title=chart.axes.x, axis=axis, scale=_scale(alt, low, high))
    axis = alt.Axis(format="~%" if chart.axes.as_percent else ",~r", tickCount=5)
    y = alt.Y("y:Q", title=None, axis=axis, scale=_scale(alt, *_extent(chart)))
    pointer = _pointer(alt, x, _tooltip(alt, chart.axes.x, [s.name for s in chart.series]))
    layers = [*_markers(alt, x), *_rules(alt, y), *_curves(alt, x, y), *_names(alt, y), pointer]
    return layers, _line_rows(chart, low, high), {"title": chart.axes.y}


def _extent(chart: Lines) -> Point:
    values = [y for s in chart.series for _, y in s.points] + [r.value for r in chart.rules]
    return nice_bounds(min(0.0, *values) if chart.axes.from_zero else min(values), max(values))


def _line_rows(chart: Lines, low: float, high: float) -> dict[str, Rows]:
    markers = [rule for rule in chart.markers if low <= rule.value <= high]
    breaks = sorted(rule.value for rule in markers)
    return {
        "faint": _points((s, thin(s.points)) for s in chart.series if is_long(s)),
        "bold": _points((s, bold(s, breaks)) for s in chart.series),
        "dots": _points((s, s.points) for s in chart.series if len(s.points) < _DOTS_BELOW),
        "rules": [{"y": r.value, "label": r.label, "color": _css(r.color)} for r in chart.rules],
        "markers": [_marker(rule) for rule in markers],
        "labels": [_marker(rule) for rule in markers[:: 1 + len(markers) // _MAX_LABELS]],
        "hover": _hovers(chart, low, high),
    }


def _points(lines: Iterable[tuple[Series, Sequence[Point]]]) -> Rows:
    return [
        {"name": series.name, "color": _css(series.color), "x": x, "y": y}
        for series, points in lines
        for x, y in points
    ]


def _marker(rule: Rule) -> dict[str, Any]:
    return {"x": rule.value, "label": rule.label}


def _hovers(chart: Lines, low: float, high: float) -> Rows:
    """A strip around each x with the values of the lines there; `v0` is the first line's."""
    shown = stations(chart)
    halfway = [(a + b) / 2 for (a, _), (b, _) in pairwise(shown)]
    strips = zip(shown, [low, *halfway], [*halfway, high], strict=True)
    return [
        {"x": left, "x2": right, "at": f"{x:,.0f}", **_named(values)}
        for (x, values), left, right in strips
    ]


def _named(values: Sequence[str]) -> dict[str, str]:
    return {f"v{i}": value for i, value in enumerate(values)}


def _markers(alt: Any, x: Any) -> _Layers:
    dotted = _over(alt, "markers").mark_rule(color=_css("c6"), strokeDash=[2, 3])
    name = _over(alt, "labels").mark_text(
        color=_css("soft"), align="left", baseline="top", dx=4, fontSize=11
    )
    return [
        ("markers", dotted.encode(x=x)),
        ("labels", name.encode(x=x, y=alt.value(0), text=alt.Text("label:N"))),
    ]


def _rules(alt: Any, y: Any) -> _Layers:
    rule = _over(alt, "rules").mark_rule(strokeDash=[5, 4], strokeWidth=1.2)
    return [("rules", rule.encode(y=y, color=_own_color(alt)))]


def _names(alt: Any, y: Any) -> _Layers:
    """The labels of the rules, drawn over all lines."""
    title = _over(alt, "rules").mark_text(align="right", baseline="bottom", dy=-4, **_HALO)
    fill = alt.Fill("color:N", scale=None)
    return [("rules", title.encode(x=alt.value("width"), y=y, text="label:N", fill=fill))]


def _curves(alt: Any, x: Any, y: Any) -> _Layers:
    shared = {"x": x, "y": y, "color": _own_color(alt), "detail": alt.Detail("name:N")}
    shape = {"strokeJoin": "round", "strokeCap": "round"}
    faint = _over(alt, "faint").mark_line(strokeWidth=1, opacity=0.3, **shape)
    bold = _over(alt, "bold").mark_line(strokeWidth=2, **shape)
    dots = _over(alt, "dots").mark_point(filled=True, opacity=1, size=28)
    return [
        ("faint", faint.encode(**shared)),
        ("bold", bold.encode(**shared)),
        ("dots", dots.encode(**shared)),
    ]


def _pointer(alt: Any, x: Any, tooltip: Sequence[Any]) -> tuple[str, Any]:
    """Strips over the whole height with a tooltip of their values."""
    strip = _over(alt, "hover").mark_rect(opacity=0).properties(name="pointer")
    whole = {"y": alt.value(0), "y2": alt.value("height")}
    return "hover", strip.encode(x=x, x2="x2:Q", **whole, tooltip=tooltip)


def _histogram(alt: Any, chart: Histogram) -> _Drawn:
    scale = _scale(alt, chart.edges[0], chart.edges[-1])
    axis = alt.Axis(tickCount=8, format="~r")
    x = alt.X("x:Q", title=chart.axes.x, axis=axis, scale=scale)
    y = alt.Y("y:Q", title=None, axis=_count_axis(alt))
    bins = _over(alt, "bins").mark_rect(stroke=_css("card"), strokeWidth=0.5)
    tooltip = _tooltip(
        alt, chart.axes.x.partition(" = ")[0], [group.name for group in chart.groups]
    )
    layers = [
        ("bins", bins.encode(x=x, x2="x2:Q", y=y, y2="y2:Q", color=_own_color(alt))),
        _pointer(alt, x, tooltip),
        *_bounds(alt, x),
    ]
    return layers, _bin_rows(chart), {"title": _above(chart.axes.y, 34 if chart.rules else 8)}


def _bin_rows(chart: Histogram) -> dict[str, Rows]:
    stacks = [count(group.values, chart.edges) for group in chart.groups]
    bins: Rows = []
    hover: Rows = []
    for low, high, *counts in zip(chart.edges, chart.edges[1:], *stacks, strict=False):
        if not any(counts):
            continue
        written = _named([f"{n:,}" for n in counts])
        hover.append({"x": low, "x2": high, "at": bin_name(low, high), **written})
        for group, n, end in zip(chart.groups, counts, accumulate(counts), strict=True):
            row = {"name": group.name, "color": _css(group.color), "n": n, "y": end - n, "y2": end}
            bins.extend([{"x": low, "x2": high, **row}] if n else [])
    rules = [_bound(chart, rule, row) for row, rule in enumerate(chart.rules)]
    return {"bins": bins, "hover": hover, "rules": rules}


def _bound(chart: Histogram, rule: Rule, row: int) -> dict[str, Any]:
    """A vertical rule with its label on the side with more room; each label has its own row."""
    first, last = chart.edges[0], chart.edges[-1]
    x = min(max(rule.value, first), last)
    is_right = x > (first + last) / 2
    side = {"align": "right", "dx": -5} if is_right else {"align": "left", "dx": 5}
    dy = -14 if row else 0
    return {"x": x, "label": rule.label, "color": _css(rule.color), **side, "dy": dy}


def _bounds(alt: Any, x: Any) -> _Layers:
    rule = _over(alt, "rules").mark_rule(strokeDash=[5, 4], strokeWidth=1.2)
    title = _over(alt, "rules").mark_text(
        **{name: alt.ExprRef(f"datum.{name}") for name in ("align", "dx", "dy")},
        baseline="bottom",
        **_HALO,
    )
    # The labels are above the plot, where there are no bars.
    ends = {"y": alt.value(-27), "y2": alt.value("height")}
    label = {"y": alt.value(-2), "text": alt.Text("label:N")}
    return [
        ("rules", rule.encode(x=x, **ends, color=_own_color(alt))),
        ("rules", title.encode(x=x, **label)),
    ]


def _above(title: str, room: int) -> dict[str, Any]:
    """A title with `room` pixels for labels between it and the plot."""
    return {"text": title, "offset": room}


def _count_axis(alt: Any) -> Any:
    return alt.Axis(tickCount=4, tickMinStep=1, format=",d")


def _columns(alt: Any, chart: Columns) -> _Drawn:
    whole = max(1, sum(chart.counts.values()))
    rows = [
        {"x": name, "y": n, "label": f"{n:,}", "v0": f"{n:,} ({100 * n / whole:.1f} %)", "at": name}
        for name, n in chart.counts.items()
    ]
    x = alt.X("x:N", title=chart.axes.x, sort=None, axis=alt.Axis(labelAngle=0, ticks=False))
    y = alt.Y("y:Q", title=None, axis=_count_axis(alt))
    tooltip = _tooltip(alt, chart.axes.x, [chart.axes.y])
    shape = {"width": {"band": min(0.7, 0.12 * len(rows))}, "cornerRadiusEnd": 2}
    columns = _over(alt, "columns").mark_bar(color=_css(chart.color), **shape)
    text = _over(alt, "columns").mark_text(baseline="bottom", dy=-4).encode(text="label:N")
    layers = [
        ("columns", columns.encode(x=x, y=y, tooltip=tooltip)),
        ("columns", text.encode(x=x, y=y)),
    ]
    return layers, {"columns": rows}, {"title": _above(chart.axes.y, 20)}


def _bars(alt: Any, chart: Bars) -> _Drawn:
    rows = [
        {"y": b.label, "x": b.value, "label": b.text, "color": _css(b.color)} for b in chart.bars
    ]
    end = 1.0 if chart.is_share else nice_bounds(0.0, max(1e-9, *(b.value for b in chart.bars)))[1]
    axis = alt.Axis(tickCount=5, format="~%" if chart.is_share else ",~r", grid=True, domain=False)
    x = alt.X("x:Q", title=chart.unit, axis=axis, scale=_scale(alt, 0.0, end))
    # Long names are above their bars; on the left they would leave no room for bars on a phone.
    is_above = max(len(bar.label) for bar in chart.bars) > _LONG_NAME
    y_axis = None if is_above else alt.Axis(labelColor=_css("ink"))
    y = alt.Y("y:N", title=None, sort=None, axis=y_axis)
    tooltip = [alt.Tooltip("y:N", title=" "), alt.Tooltip("label:N", title=chart.unit)]
    bars = _over(alt, "bars").mark_bar(height=17, yOffset=8 if is_above else 0, cornerRadiusEnd=2)
    text = _over(alt, "bars").mark_text(align="left", dx=6, dy=8 if is_above else 0)
    name = _over(alt, "bars").mark_text(align="left", dy=-10, limit=320)
    layers = [
        ("bars", bars.encode(x=x, y=y, color=_own_color(alt), tooltip=tooltip)),
        ("bars", text.encode(x=x, y=y, text="label:N")),
        *([("bars", name.encode(x=alt.value(0), y=y, text="y:N"))] if is_above else []),
    ]
    beyond = 14 + 7 * max(len(bar.text) for bar in chart.bars)  # room for texts beyond the plot
    padding = {"left": 0, "top": 4, "bottom": 4, "right": beyond}
    height = (_HIGH_ROW if is_above else _ROW) * len(rows)
    return layers, {"bars": rows}, {"height": height, "padding": padding}


def _timeline(alt: Any, chart: Timeline) -> _Drawn:
    workers = sorted({span.worker for span in chart.spans})
    length = max(max(span.end for span in chart.spans) - chart.origin, 1e-3)
    at = time_ticks(length)
    names = {f"{t:.0f}": duration(t) if t > 10 else f"{t:.0f} s" for t in at}
    axis = alt.Axis(values=at, labelExpr=f"{json.dumps(names)}[datum.value]", grid=True)
    x = alt.X("x:Q", title="time since the start", axis=axis, scale=_scale(alt, 0.0, length))
    lanes = alt.Axis(labelLimit=120, labelColor=_css("ink"))
    y = alt.Y("y:N", title=None, sort=None, axis=lanes, scale=alt.Scale(domain=workers))
    shade = _over(alt, "shared").mark_rect(color=_css("shade"))
    block = _over(alt, "blocks").mark_bar(height={"band": 0.66}, cornerRadius=1.5, strokeWidth=0.8)
    stroke = alt.Stroke("color:N", scale=None)  # makes the shortest blocks visible
    tooltip = [alt.Tooltip(f"{name}:N", title=name) for name in ("work", "time")]
    blocks = block.encode(
        x=x, x2="x2:Q", y=y, color=_own_color(alt), stroke=stroke, tooltip=tooltip
    )
    layers = [("shared", shade.encode(x=x, x2="x2:Q")), ("blocks", blocks)]
    return layers, _lane_rows(chart, length), {"height": _LANE * len(workers)}


def _lane_rows(chart: Timeline, length: float) -> dict[str, Rows]:
    shared = join_close(chart.shared, length / _FINEST)
    return {
        "shared": [{"x": a - chart.origin, "x2": b - chart.origin} for a, b in shared],
        "blocks": [_block_row(chart, block) for block in merge(chart.spans, _MAX_BLOCKS)],
    }


def _block_row(chart: Timeline, block: Block) -> dict[str, Any]:
    start, end = block.start - chart.origin, block.end - chart.origin
    note = f" ({block.note})" if block.note else ""
    count = "" if block.count == 1 else f"{block.count} × "
    return {
        "y": block.worker,
        "x": start,
        "x2": end,
        "color": _css(chart.colors.get(block.name, "c6")),
        "work": f"{count}{block.name}, {duration(block.busy)}{note}",
        "time": f"{duration(start)} to {duration(end)}",
    }


_DRAWN: Mapping[type[Chart], Callable[[Any, Any], _Drawn]] = {
    Lines: _lines,
    Histogram: _histogram,
    Columns: _columns,
    Bars: _bars,
    Timeline: _timeline,
}
