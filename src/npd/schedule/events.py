"""Events and actions: the inputs and outputs of a plan.

Events are facts that workers report. They are stored in the ledger as JSON, and replayed to resume.
Actions are decisions. The ledger stores only a digest of them, because the same events give the
same actions. Also converts events to JSON and back. Pure.
"""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from operator import attrgetter
from typing import Any, Literal, NamedTuple, TypeAlias

from npd.types import (
    EvalReport,
    FinishReason,
    Outcome,
    SampleStats,
    Segment,
    SegmentReport,
    StepReport,
)

Stage: TypeAlias = Literal["generate", "score"]


@dataclass(frozen=True, slots=True)
class Started:
    """The run begins, with this many training prompts."""

    num_prompts: int


@dataclass(frozen=True, slots=True)
class SnapshotPublished:
    """Snapshot `version`, the student after `step` optimiser steps, is in the run directory."""

    version: int
    step: int
    checksum: str


@dataclass(frozen=True, slots=True)
class ShardGenerated:
    """The samples of a shard are generated and stored; `failed`: samples that the generator failed
    on, with the reason."""

    shard: int
    stats: tuple[SampleStats, ...]
    failed: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ShardScored:
    """The samples of a shard that passed the pre-filters are scored and stored; `failed`: samples
    that the teacher failed to score, with the reason."""

    shard: int
    stats: tuple[SampleStats, ...]
    failed: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ShardFailed:
    """One attempt at a shard's stage failed, because its worker was lost."""

    shard: int
    stage: Stage
    error: str


@dataclass(frozen=True, slots=True)
class SegmentTrained:
    """The trainer finished a segment."""

    report: SegmentReport


@dataclass(frozen=True, slots=True)
class CheckpointDue:
    """`checkpoint.every_minutes` have passed since the last checkpoint, and steps were trained."""


@dataclass(frozen=True, slots=True)
class CheckpointCopied:
    """The trainer's state after `step` is copied, so that the trainer can go on."""

    step: int


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """The trainer's state after `step` is on disk."""

    step: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The student after `report.step` steps was evaluated."""

    report: EvalReport


Event: TypeAlias = (
    Started
    | SnapshotPublished
    | ShardGenerated
    | ShardScored
    | ShardFailed
    | SegmentTrained
    | CheckpointDue
    | CheckpointCopied
    | CheckpointSaved
    | Evaluated
)


class RequestRef(NamedTuple):
    """One sample to generate: its prompt (index into the run's prompts) and its seed."""

    sample_id: int
    prompt: int
    seed: int


@dataclass(frozen=True, slots=True)
class Generate:
    """Generate a shard with snapshot `version`."""

    shard: int
    version: int
    requests: tuple[RequestRef, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Score these samples of a generated shard; `version` is their oldest snapshot."""

    shard: int
    version: int
    sample_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Train:
    """Train a segment."""

    segment: Segment


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish the student after `step` as snapshot `version`."""

    version: int
    step: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Copy the trainer's state after `step`, to be saved."""

    step: int


@dataclass(frozen=True, slots=True)
class WriteCheckpoint:
    """Write the copied state after `step`; the trainer may go on meanwhile."""

    step: int


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Evaluate the student after `step`."""

    step: int


@dataclass(frozen=True, slots=True)
class Finalize:
    """These samples are finalized, each with its outcome and reason."""

    samples: tuple[tuple[int, Outcome, str], ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """The run is done, or (`failed`) cannot make progress."""

    reason: str
    failed: bool = False


Action: TypeAlias = (
    Generate | Score | Train | Publish | Checkpoint | WriteCheckpoint | Evaluate | Finalize | Stop
)


def key(item: Event | Action) -> tuple[str, int]:
    """The common key of an action and the event that ends it, e.g. ("score", shard).

    A checkpoint has one key from its decision until it is on disk.
    """
    match item:
        case Generate(shard) | ShardGenerated(shard):
            return "generate", shard
        case Score(shard) | ShardScored(shard):
            return "score", shard
        case ShardFailed(shard, stage):
            return stage, shard
        case Train(segment):
            return "train", segment.index
        case SegmentTrained(report):
            return "train", report.segment
        case Publish(version) | SnapshotPublished(version):
            return "publish", version
        case Checkpoint(step) | CheckpointCopied(step):
            return "checkpoint", step
        case WriteCheckpoint(step) | CheckpointSaved(step):
            return "checkpoint", step
        case Evaluate(step):
            return "evaluate", step
        case Evaluated(report):
            return "evaluate", report.step
        case _:
            return type(item).__name__, 0


_EVENTS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        Started,
        SnapshotPublished,
        ShardGenerated,
        ShardScored,
        ShardFailed,
        SegmentTrained,
        CheckpointDue,
        CheckpointCopied,
        CheckpointSaved,
        Evaluated,
    )
}
_STEP = attrgetter(*(field.name for field in fields(StepReport)))
_NUM_GENERATED = SampleStats._fields.index("nll_teacher")
_NOT_SCORED = (None,) * (len(SampleStats._fields) - _NUM_GENERATED)
_FINISH = SampleStats._fields.index("finish")
_FINISH_REASONS = {reason.value: reason for reason in FinishReason}
_DUMPS = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def encode(event: Event) -> tuple[str, dict[str, Any]]:
    """An event as its kind and a JSON-serialisable payload; `decode` is the inverse.

    Stats and step reports, which are many, are lists of values in the order of their fields.
    """
    payload: dict[str, Any]
    match event:
        case ShardGenerated(shard, stats, failed) | ShardScored(shard, stats, failed):
            payload = {"shard": shard, "stats": [_encode_stats(values) for values in stats]}
            payload |= {"failed": failed} if failed else {}
        case SegmentTrained(report):
            steps = [_STEP(step) for step in report.steps]
            payload = {"segment": report.segment, "steps": steps, "peak": report.peak_memory_mib}
        case _:
            payload = asdict(event)
    return type(event).__name__, payload


def decode(kind: str, payload: dict[str, Any]) -> Event:
    """The event that `encode` turned into `kind` and `payload`."""
    if kind in ("ShardGenerated", "ShardScored"):
        stats = tuple(_decode_stats(values) for values in payload["stats"])
        failed = tuple((sample_id, reason) for sample_id, reason in payload.get("failed", ()))
        event: Event = _EVENTS[kind](payload["shard"], stats, failed)
    elif kind == "SegmentTrained":
        steps = tuple(StepReport(*step) for step in payload["steps"])
        event = SegmentTrained(SegmentReport(payload["segment"], steps, payload["peak"]))
    elif kind == "Evaluated":
        report = payload["report"]
        pairs = {key: tuple(map(tuple, report.get(key, ()))) for key in ("samples", "teacher_kls")}
        sums = {"kl_sums": tuple(report.get("kl_sums", ()))}
        event = Evaluated(EvalReport(**(report | pairs | sums)))
    else:
        event = _EVENTS[kind](**payload)
    return event


def digest(actions: Sequence[Action]) -> int:
    """A checksum of every value of every action, stored with the event and compared on replay.

    Numbers are hashed as bytes, because formatting a million of them is slow.
    """
    checksum = 0
    for action in actions:
        for part in _parts(action):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _parts(action: Action) -> Iterator[bytes]:
    # A file format: ledgers hold checksums of these words, and of the names in these reprs.
    match action:
        case Generate(shard, version, requests):
            yield f"Generate {shard} {version} {len(requests)}".encode()
            yield array("q", chain.from_iterable(requests)).tobytes()
        case Score(shard, version, sample_ids):
            yield f"Score {shard} {version} {len(sample_ids)}".encode()
            yield array("q", sample_ids).tobytes()
        case Train(segment):
            yield f"Train {segment.index} {segment.version}".encode()
            for step in segment.steps:
                sizes = [[len(row.samples) for row in rows] for rows in step.ranks]
                yield f"{step.index} {step.lr!r} {sizes}".encode()
                for row in chain.from_iterable(step.ranks):
                    yield array("q", chain.from_iterable(row.samples)).tobytes()
        case Finalize(samples):
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
