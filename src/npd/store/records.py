"""What the ledger hands out, and segments as compact JSON (floats survive exactly). No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from npd.types import Outcome, Row, SampleRef, Segment, Step

ShardState: TypeAlias = Literal["asked", "generated", "scored", "failed"]


@dataclass(frozen=True, slots=True)
class Conservation:
    """How many samples were asked for and where they are; `holds` unless the ledger is broken."""

    asked: int
    trained_out: int
    rejected: int
    stale: int
    failed: int
    live: int

    @property
    def holds(self) -> bool:
        """asked == trained_out + rejected + stale + failed + live."""
        left = self.trained_out + self.rejected + self.stale + self.failed
        return self.asked == left + self.live


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What the ledger knows of one sample; `outcome` None means live."""

    sample_id: int
    prompt_index: int
    shard: int
    version: int
    uses: int
    outcome: Outcome | None
    reason: str


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """A published snapshot: taken after `step` optimiser steps."""

    version: int
    step: int
    path: Path
    checksum: str


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """A saved trainer state, after `step` optimiser steps."""

    step: int
    path: Path


def encode_segment(segment: Segment) -> dict[str, Any]:
    """A segment as nested lists: steps -> ranks -> rows -> [sample_id, shard, version, tokens]."""
    return {
        "index": segment.index,
        "version": segment.version,
        "steps": [[step.index, step.lr, _encode_ranks(step)] for step in segment.steps],
    }


def decode_segment(value: dict[str, Any]) -> Segment:
    """The segment that `encode_segment` made this of."""
    steps = tuple(Step(index, lr, _decode_ranks(ranks)) for index, lr, ranks in value["steps"])
    return Segment(value["index"], value["version"], steps)


def _encode_ranks(step: Step) -> list[Any]:
    # A SampleRef is a tuple, which JSON writes as the list of its values.
    return [[row.samples for row in rows] for rows in step.ranks]


def _decode_ranks(ranks: list[Any]) -> tuple[tuple[Row, ...], ...]:
    return tuple(
        tuple(Row(tuple(SampleRef(*ref) for ref in row)) for row in rows) for rows in ranks
    )
