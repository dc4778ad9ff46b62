"""Traces: spans of each worker's work, their file, and measures of idle time and overlap.

Times are `steady_time()` seconds of the controller; the workers measure durations. Every claim that
stages overlap is measured with `overlap_seconds`. Does not sample or profile.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from npd.observe.jsonl import JsonLines, read_good_lines
from npd.store.files import write_atomic

# The last time whose year has four digits in every time zone.
_MAX_TIME = 253_402_000_000
Interval: TypeAlias = tuple[float, float]
CONTROLLER = "controller"
"""The worker of empty spans, which mark the start of a session of the run."""


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work, e.g. `Span("trainer", "train", 10.0, 12.5, {"segment": 3})`.

    `name` is the kind of work: generate, score, train, load, refresh, publish, checkpoint,
    evaluate.
    """

    worker: str
    name: str
    start: float
    end: float
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The span's duration."""
        return self.end - self.start


def steady_time() -> float:
    """Unix seconds at the start of this process, plus monotonic time since then.

    Setting the machine's clock does not change durations.
    """
    return _origin() + time.monotonic()


@cache
def _origin() -> float:
    return time.time() - time.monotonic()


class TraceWriter:
    """Appends spans to `trace.jsonl`."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def append(self, span: Span) -> None:
        """Write one span. RunError on a full disk."""
        assert span.end >= span.start, f"span ends before it starts: {span}"
        self._lines.append(asdict(span))

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def read_trace(path: Path) -> list[Span]:
    """The spans of `path` in the order written; none if the file does not exist.

    A line that is not a span is skipped; a damaged trace must not cost the run its result.
    """
    found = (_span(record) for record in read_good_lines(path))
    return [span for span in found if span is not None]


def _span(record: Mapping[str, Any]) -> Span | None:
    try:
        span = Span(**record)
    except TypeError:
        return None
    is_named = isinstance(span.worker, str) and isinstance(span.name, str)
    is_timed = _is_time(span.start) and _is_time(span.end) and span.start <= span.end
    return span if is_named and is_timed and isinstance(span.args, dict) else None


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < _MAX_TIME


def sessions(spans: Iterable[Span]) -> list[Interval]:
    """The intervals in which the run was active: from each start mark to the last work after it.

    Without start marks it is one interval from the first span to the last. `spans` must be in the
    order of writing, which is right even if the clock was set back between two sessions.
    """
    known, found = list(spans), list[list[Span]]()
    for span in known:
        if span.worker == CONTROLLER or not found:
            found.append([])
        found[-1].append(span)
    work = any(span.worker != CONTROLLER for span in known)
    return [_extent(session) for session in found] if work else []


def _extent(session: Sequence[Span]) -> Interval:
    marked = [span.start for span in session if span.worker == CONTROLLER]
    start = min(marked or (span.start for span in session))
    return start, max(start, *(span.end for span in session))


def export_perfetto(source: Path, target: Path) -> int:
    """Write the spans of `source` as Chrome trace events (ui.perfetto.dev); returns their number.

    One process, one thread lane per worker, 'X' events in microseconds since the first span.
    """
    spans = [span for span in read_trace(source) if span.worker != CONTROLLER]
    lanes = {worker: lane for lane, worker in enumerate(dict.fromkeys(s.worker for s in spans), 1)}
    origin = min((span.start for span in spans), default=0.0)
    events = [_metadata("process_name", 0, "npd")]
    events += [_metadata("thread_name", lane, worker) for worker, lane in lanes.items()]
    events += [_event(span, lanes[span.worker], origin) for span in spans]
    document = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"origin": origin}}
    write_atomic(target, lambda file: file.write(json.dumps(document).encode()))
    return len(spans)


def _metadata(kind: str, lane: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": 1, "tid": lane, "args": {"name": name}}


def _event(span: Span, lane: int, origin: float) -> dict[str, Any]:
    return {
        "name": span.name,
        "cat": "npd",
        "ph": "X",
        "pid": 1,
        "tid": lane,
        "ts": round((span.start - origin) * 1e6),
        "dur": round(span.seconds * 1e6),
        "args": dict(span.args),
    }


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of the intervals, as disjoint intervals in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def intersection(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """The intersection of two lists of disjoint, ordered intervals."""
    both: list[Interval] = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            both.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return both


def total(intervals: Iterable[Interval]) -> float:
    """The total seconds of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def busy_seconds(spans: Iterable[Span]) -> dict[tuple[str, str], float]:
    """Busy seconds of each (worker, name); overlapping spans count once."""
    groups: dict[tuple[str, str], list[Interval]] = defaultdict(list)
    for span in spans:
        groups[span.worker, span.name].append((span.start, span.end))
    return {key: total(union(intervals)) for key, intervals in groups.items()}


def idle_shares(spans: Iterable[Span], started: float, ended: float) -> dict[str, float]:
    """The share of [started, ended] in which each worker was idle."""
    groups: dict[str, list[Interval]] = defaultdict(list)
    for span in spans:
        groups[span.worker].append((max(span.start, started), min(span.end, ended)))
    wall = max(ended - started, 1e-9)
    busy = {w: total(union(i for i in group if i[0] < i[1])) for w, group in groups.items()}
    return {worker: min(1.0, max(0.0, 1.0 - seconds / wall)) for worker, seconds in busy.items()}


def overlap_intervals(
    spans: Iterable[Span], a_names: Iterable[str], b_names: Iterable[str]
) -> list[Interval]:
    """The intervals in which a span of `a_names` and a span of `b_names` run at the same time."""
    a_set, b_set, known = set(a_names), set(b_names), list(spans)
    a = union((s.start, s.end) for s in known if s.name in a_set)
    b = union((s.start, s.end) for s in known if s.name in b_set)
    return intersection(a, b)


def overlap_seconds(spans: Iterable[Span], a_names: Iterable[str], b_names: Iterable[str]) -> float:
    """The total seconds of `overlap_intervals`."""
    return total(overlap_intervals(spans, a_names, b_names))
