"""Events as JSON for the ledger and back, and a checksum of what was decided upon them. Pure."""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from itertools import chain
from operator import attrgetter
from typing import Any

from npd.control import events as ev
from npd.reports import EvalReport, SegmentReport, StepReport
from npd.types import FinishReason, SampleStats

_EVENTS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        ev.Started,
        ev.SnapshotPublished,
        ev.ShardGenerated,
        ev.ShardScored,
        ev.ShardFailed,
        ev.SegmentTrained,
        ev.CheckpointSaved,
        ev.Evaluated,
    )
}
_STEP = attrgetter(*(field.name for field in fields(StepReport)))
_NUM_GENERATED = SampleStats._fields.index("nll_teacher")
_NOT_SCORED = (None,) * (len(SampleStats._fields) - _NUM_GENERATED)
_FINISH = SampleStats._fields.index("finish")
_FINISH_REASONS = {reason.value: reason for reason in FinishReason}
_DUMPS = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def encode(event: ev.Event) -> tuple[str, dict[str, Any]]:
    """An event as its kind and a JSON-able payload; `decode` gives the same event back.

    What there are many of is written as its values in the order of its fields.
    """
    payload: dict[str, Any]
    match event:
        case ev.ShardGenerated(shard, stats, failed) | ev.ShardScored(shard, stats, failed):
            payload = {"shard": shard, "stats": [_encode_stats(values) for values in stats]}
            payload |= {"failed": failed} if failed else {}
        case ev.SegmentTrained(report):
            steps = [_STEP(step) for step in report.steps]
            payload = {"segment": report.segment, "steps": steps, "peak": report.peak_memory_mib}
        case _:
            payload = asdict(event)
    return type(event).__name__, payload


def decode(kind: str, payload: dict[str, Any]) -> ev.Event:
    """The event that `encode` gave `kind` and `payload` for."""
    if kind in ("ShardGenerated", "ShardScored"):
        stats = tuple(_decode_stats(values) for values in payload["stats"])
        failed = tuple((sample_id, reason) for sample_id, reason in payload.get("failed", ()))
        event: ev.Event = _EVENTS[kind](payload["shard"], stats, failed)
    elif kind == "SegmentTrained":
        steps = tuple(StepReport(*step) for step in payload["steps"])
        event = ev.SegmentTrained(SegmentReport(payload["segment"], steps, payload["peak"]))
    elif kind == "Evaluated":
        report = payload["report"]
        pairs = {key: tuple(map(tuple, report.get(key, ()))) for key in ("samples", "teacher_kls")}
        sums = {"kl_sums": tuple(report.get("kl_sums", ()))}
        event = ev.Evaluated(EvalReport(**(report | pairs | sums)))
    else:
        event = _EVENTS[kind](**payload)
    return event


def digest(actions: Sequence[ev.Action]) -> int:
    """A checksum of decisions, stored beside the event they answer and compared on replay.

    Of every value of every action; as bytes, because texts of a million numbers take their time.
    """
    checksum = 0
    for action in actions:
        for part in _parts(action):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _parts(action: ev.Action) -> Iterator[bytes]:
    match action:
        case ev.Generate(shard, version, asks):
            yield f"Generate {shard} {version} {len(asks)}".encode()
            yield array("q", chain.from_iterable(asks)).tobytes()
        case ev.Score(shard, version, sample_ids):
            yield f"Score {shard} {version} {len(sample_ids)}".encode()
            yield array("q", sample_ids).tobytes()
        case ev.Train(segment):
            yield f"Train {segment.index} {segment.version}".encode()
            for step in segment.steps:
                sizes = [[len(row.samples) for row in rows] for rows in step.ranks]
                yield f"{step.index} {step.lr!r} {sizes}".encode()
                for row in chain.from_iterable(step.ranks):
                    yield array("q", chain.from_iterable(row.samples)).tobytes()
        case ev.Retire(samples):
            yield f"Retire {_DUMPS(samples)}".encode()
        case _:
            yield repr(action).encode()


def _encode_stats(stats: SampleStats) -> tuple[Any, ...]:
    is_scored = stats[_NUM_GENERATED:] != _NOT_SCORED
    return stats if is_scored else stats[:_NUM_GENERATED]


def _decode_stats(values: list[Any]) -> SampleStats:
    named = [*values]
    named[_FINISH] = _FINISH_REASONS[named[_FINISH]]
    return SampleStats(*named)
