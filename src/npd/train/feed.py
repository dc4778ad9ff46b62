"""Rows ahead of the step that trains on them, so that reading is not on the step's path.

Promises: while a step trains, one thread reads and builds the rows of the next one, no further;
steps come in order; what goes wrong in reading is raised where the step that needs it would begin;
no thread outlives the iteration. Rows for a GPU lie in pinned memory, from where they are copied
without the host waiting. Does not choose rows or train on them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from npd.config import LossConfig
from npd.train.batch import Read, TrainRow, build_row, kept
from npd.types import SampleRef, Segment, Step


@dataclass(frozen=True, slots=True)
class StepRows:
    """What a rank trains on in a step: `rows`, then `idle` ones with weight 0.

    The latter fill the turns in which only other ranks still have a row: the step's shortest
    sample, each time.
    """

    step: Step
    rows: tuple[TrainRow, ...]
    idle: tuple[TrainRow, ...]

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Response tokens of the rows: trained on, and skipped."""
        trained = sum(len(row.labels_N) for row in self.rows)
        return trained, sum(row.num_skipped for row in self.rows)


def feed(
    segment: Segment, read: Read, loss: LossConfig, *, rank: int, is_pinned: bool
) -> Generator[StepRows, None, None]:
    """The segment's steps in order, each with the rows of `rank` in main memory, without what
    `loss` skips.

    `read` is called by one thread at a time, which is another in each segment.
    """

    def row_of(refs: Sequence[SampleRef]) -> TrainRow:
        samples = [read(ref) for ref in refs]
        row = build_row(samples, version=segment.version, device="cpu")
        if loss.skip_after > 0.0:
            is_kept = np.concatenate([kept(sample, loss) for sample in samples])
            row = row.only(torch.from_numpy(is_kept))
        return row.pinned() if is_pinned else row

    def prepare(step: Step) -> StepRows:
        rows = tuple(row_of(row.samples) for row in step.ranks[rank])
        num_idle = max(map(len, step.ranks)) - len(rows)
        return StepRows(step, rows, (row_of([_shortest(step)]),) * num_idle if num_idle else ())

    with ThreadPoolExecutor(1, "npd-feed") as thread:
        coming = [thread.submit(prepare, step) for step in segment.steps[:1]]
        for step in [*segment.steps[1:], None]:
            if not coming:
                return
            ready = coming.pop().result()
            if step is not None:
                coming.append(thread.submit(prepare, step))
            yield ready


def _shortest(step: Step) -> SampleRef:
    refs = [ref for rank in step.ranks for row in rank for ref in row.samples]
    return min(refs, key=lambda ref: (ref.num_tokens, ref.sample_id))
