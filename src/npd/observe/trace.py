"""What each worker did and when: spans, the file they are kept in, and what follows from them.

Promises: times are `time.time()` seconds as the worker measured them; `overlap_seconds` is the
measure behind every claim that stages run at the same time. Does not sample or profile.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from npd.observe.jsonl import JsonLines, read_json_lines
from npd.store.files import write_atomic

Interval: TypeAlias = tuple[float, float]


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
        """How long it took."""
        return self.end - self.start


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
    """The spans of `path` in the order written; none if the file does not exist."""
    return [Span(**record) for record in read_json_lines(path)]


def export_perfetto(source: Path, target: Path) -> int:
    """Write the spans of `source` as Chrome trace events, for ui.perfetto.dev; returns how many.

    One process, one thread lane per worker, 'X' events in microseconds since the first span.
    """
    spans = read_trace(source)
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
    """The same points in time as disjoint intervals, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def intersection(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """Where two lists of disjoint, ordered intervals both hold."""
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
    """Seconds in disjoint intervals."""
    return sum(end - start for start, end in intervals)


def busy_seconds(spans: Iterable[Span]) -> dict[tuple[str, str], float]:
    """Seconds each (worker, name) was at work; nested or repeated time counts once."""
    groups: dict[tuple[str, str], list[Interval]] = defaultdict(list)
    for span in spans:
        groups[span.worker, span.name].append((span.start, span.end))
    return {key: total(union(intervals)) for key, intervals in groups.items()}


def idle_shares(spans: Iterable[Span], started: float, ended: float) -> dict[str, float]:
    """Share of [started, ended] in which each worker did nothing."""
    groups: dict[str, list[Interval]] = defaultdict(list)
    for span in spans:
        groups[span.worker].append((max(span.start, started), min(span.end, ended)))
    wall = max(ended - started, 1e-9)
    busy = {w: total(union(i for i in group if i[0] < i[1])) for w, group in groups.items()}
    return {worker: min(1.0, max(0.0, 1.0 - seconds / wall)) for worker, seconds in busy.items()}


def overlap_intervals(
    spans: Iterable[Span], a_names: Iterable[str], b_names: Iterable[str]
) -> list[Interval]:
    """When any span named in `a_names` runs while any named in `b_names` does."""
    a_set, b_set, known = set(a_names), set(b_names), list(spans)
    a = union((s.start, s.end) for s in known if s.name in a_set)
    b = union((s.start, s.end) for s in known if s.name in b_set)
    return intersection(a, b)


def overlap_seconds(spans: Iterable[Span], a_names: Iterable[str], b_names: Iterable[str]) -> float:
    """Total time in which any span of `a_names` runs while any of `b_names` runs."""
    return total(overlap_intervals(spans, a_names, b_names))
