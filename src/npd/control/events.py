"""What happens (events) and what is to be done about it (actions): the plan's whole vocabulary.

Events are facts a worker reported; they are stored in the ledger (`npd.control.codec`) and replayed
to resume. Actions are decisions; they are not stored, because the same events give the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from npd.reports import EvalReport, SegmentReport
from npd.types import Outcome, SampleStats, Segment

Stage: TypeAlias = Literal["generate", "score"]


@dataclass(frozen=True, slots=True)
class Started:
    """The run begins, with this many training prompts."""

    num_prompts: int


@dataclass(frozen=True, slots=True)
class SnapshotPublished:
    """Snapshot `version`, the student after `step` optimiser steps, lies in the run directory."""

    version: int
    step: int
    checksum: str


@dataclass(frozen=True, slots=True)
class ShardGenerated:
    """The samples of a shard are written and stored; `failed` are those that could not be written,
    each with its reason."""

    shard: int
    stats: tuple[SampleStats, ...]
    failed: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ShardScored:
    """The samples of a shard that passed the pre-filters are scored and stored; `failed` are those
    that the teacher could not be had to read, each with its reason."""

    shard: int
    stats: tuple[SampleStats, ...]
    failed: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ShardFailed:
    """One try at a shard's stage failed (worker lost, refused request)."""

    shard: int
    stage: Stage
    error: str


@dataclass(frozen=True, slots=True)
class SegmentTrained:
    """The trainer finished a segment."""

    report: SegmentReport


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
    | CheckpointSaved
    | Evaluated
)


class AskRef(NamedTuple):
    """One sample to be written: its prompt (index into the run's prompts) and its seed."""

    sample_id: int
    prompt: int
    seed: int


@dataclass(frozen=True, slots=True)
class Generate:
    """Write a shard with snapshot `version`."""

    shard: int
    version: int
    asks: tuple[AskRef, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Score these samples of a generated shard; `version` is the snapshot that wrote them."""

    shard: int
    version: int
    sample_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Train:
    """Train a segment."""

    segment: Segment


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish the student as it is after `step` as snapshot `version`."""

    version: int
    step: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Save the trainer's state after `step`."""

    step: int


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Evaluate the student after `step`."""

    step: int


@dataclass(frozen=True, slots=True)
class Retire:
    """These samples have left, each with its outcome and reason."""

    samples: tuple[tuple[int, Outcome, str], ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """Nothing is left to do, or (`failed`) nothing that could be done would help."""

    reason: str
    failed: bool = False


Action: TypeAlias = Generate | Score | Train | Publish | Checkpoint | Evaluate | Retire | Stop


def key(item: Event | Action) -> tuple[str, int]:
    """What an action and the event that ends it have in common, e.g. ("score", shard)."""
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
        case Checkpoint(step) | CheckpointSaved(step) | Evaluate(step):
            return type(item).__name__[:5].lower(), step
        case Evaluated(report):
            return "evalu", report.step
        case _:
            return type(item).__name__, 0
