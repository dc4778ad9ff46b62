"""Lanes of what each worker did over time, as inline SVG.

Promises: work that ran at the same time stands above each other at the same x; with very many
spans, neighbours of one kind closer than the eye can tell are drawn as one (and say so). Does not
compute totals: `npd.observe.trace` does, from all spans.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from npd.observe.report.charts import bottom_axis, label_at, svg
from npd.observe.report.html import Html, el
from npd.observe.report.scales import Scale, duration, time_ticks
from npd.observe.trace import Interval, Span

_WIDTH, _LEFT, _RIGHT = 1120, 132, 16
_LANE, _BAR, _TOP, _BOTTOM = 34, 22, 22, 40


@dataclass(frozen=True, slots=True)
class Block:
    """One or more spans of one worker and kind, drawn as one; `busy` is their own time."""

    worker: str
    name: str
    start: float
    end: float
    count: int
    busy: float
    note: str = ""


def gantt(
    spans: Sequence[Span],
    origin: float,
    colors: Mapping[str, str],
    *,
    shared: Sequence[Interval] = (),
    max_blocks: int = 2000,
    label: str,
) -> Html:
    """One lane a worker; `shared` intervals are shaded over all lanes; times since `origin`."""
    workers = list(dict.fromkeys(span.worker for span in sorted(spans, key=lambda s: s.worker)))
    end = max(span.end for span in spans)
    x = Scale(0.0, max(end - origin, 1e-3), _LEFT, _WIDTH - _RIGHT)
    base = _TOP + _LANE * len(workers)
    rows = {worker: _TOP + _LANE * i for i, worker in enumerate(workers)}
    at = time_ticks(x.high)
    return svg(
        *(_shade(x, origin, interval, base) for interval in _thin(shared, x)),
        *(el("line", x1=x.at(t), x2=x.at(t), y1=_TOP, y2=base, class_="grid") for t in at),
        *(label_at(_LEFT - 10, y + 21, name[:18], "name", "end") for name, y in rows.items()),
        *(_block(x, origin, rows[b.worker], b, colors) for b in merge(spans, max_blocks)),
        bottom_axis(x, base, at, [duration(t) for t in at], "time since the start"),
        width=_WIDTH,
        height=base + _BOTTOM,
        label=label,
    )


def merge(spans: Sequence[Span], max_blocks: int) -> list[Block]:
    """At most about `max_blocks` blocks: neighbours join over a gap that doubles until it fits."""
    groups: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda s: s.start):
        groups[span.worker, span.name].append(span)
    whole = max(s.end for s in spans) - min(s.start for s in spans)
    gap = float("-inf")
    while True:
        blocks = [block for group in groups.values() for block in _join_close(group, gap)]
        if len(blocks) <= max(max_blocks, len(groups)):
            return blocks
        gap = max(gap * 2, whole / max_blocks / 8)


def _join_close(spans: Sequence[Span], gap: float) -> list[Block]:
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


def _thin(shared: Sequence[Interval], x: Scale) -> list[Interval]:
    """Shaded stretches no finer than half a pixel."""
    gap = (x.high - x.low) / (x.end - x.start) / 2
    joined: list[Interval] = []
    for start, end in shared:
        if joined and start - joined[-1][1] < gap:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _shade(x: Scale, origin: float, interval: Interval, base: float) -> Html:
    left, right = x.at(interval[0] - origin), x.at(interval[1] - origin)
    return el(
        "rect", x=left, y=_TOP - 8, width=right - left, height=base - _TOP + 8, class_="shade"
    )


def _block(x: Scale, origin: float, y: float, block: Block, colors: Mapping[str, str]) -> Html:
    left, right = x.at(block.start - origin), x.at(block.end - origin)
    count = "" if block.count == 1 else f"{block.count} × "
    when = f"{duration(block.start - origin)} to {duration(block.end - origin)}"
    title = f"{block.worker}: {count}{block.name}, {duration(block.busy)}\n{when}"
    return el(
        "rect",
        el("title", title + (f"\n{block.note}" if block.note else "")),
        x=left,
        y=y + (_LANE - _BAR) / 2,
        width=max(0.8, right - left - 0.5),
        height=_BAR,
        rx=1.5,
        class_=f"fill block {colors.get(block.name, 'c6')}",
    )
