"""Rows of samples as tensors, built one step ahead of the trainer.

A `TrainRow` has packed ids, the positions that predict a response token, and their targets. Samples
keep their order. `prefetch` reads and builds the rows of the next step, and no further ones, in a
thread while a step trains. A read error is raised at the start of its step, and no thread outlives
the iteration. Rows for a GPU are in pinned memory, so that copies do not block the host. Does not
pack rows (the plan does), train, or read files itself.

Dimensions: T tokens of a row, N response tokens of a row, K teacher support size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npd.config import LossConfig
from npd.models.loading import PackedBatch, pack_documents
from npd.types import FloatArray, IntArray, Rollout, SampleRef, Scored, Segment, Step

Sample: TypeAlias = Rollout | Scored
Read: TypeAlias = Callable[[SampleRef], Sample]


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One packed row, and the targets of its response positions.

    A document is a prompt and its response without the last token, which predicts no label.
    `positions_N` index the row's T tokens, and select those whose next token (`labels_N`) belongs
    to a response. `topk_*_NK` are None for samples without a teacher. `behavior_N` are log-probs of
    the labels under the newest snapshot, NaN for samples of other snapshots, and None for a row
    without any. `num_skipped` response tokens are among the T but not the N (see `only`).

    Example: prompt [5, 6], response [7, 2] packs to ids [5, 6, 7], positions [1, 2], labels [7, 2].
    """

    packed: PackedBatch
    positions_N: Tensor
    labels_N: Tensor
    topk_ids_NK: Tensor | None
    topk_logprobs_NK: Tensor | None
    behavior_N: Tensor | None
    num_skipped: int = 0

    def to(self, device: str | torch.device) -> TrainRow:
        """The row on `device`; copies from pinned memory may still be running on return."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> TrainRow:
        """The row in pinned memory, from which copies to a GPU do not block the host."""
        return self._each(Tensor.pin_memory)

    def only(self, kept_N: Tensor) -> TrainRow:
        """The row, trained only at the kept positions; the others remain as context."""

        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[kept_N]

        return replace(
            self,
            positions_N=self.positions_N[kept_N],
            labels_N=self.labels_N[kept_N],
            topk_ids_NK=of(self.topk_ids_NK),
            topk_logprobs_NK=of(self.topk_logprobs_NK),
            behavior_N=of(self.behavior_N),
            num_skipped=int((~kept_N).sum()),
        )

    def parts(self, most: int) -> list[TrainRow]:
        """The row cut between documents into rows of at most `most` tokens, where documents allow.

        A longer document is a row by itself.
        """
        if self.packed.input_ids.shape[1] <= most:
            return [self]
        bounds, starts = self.packed.cu_seqlens, [0]
        for end_of_last, end in pairwise(bounds[1:]):
            if end - starts[-1] > most:
                starts.append(end_of_last)
        return [self._part(first, last) for first, last in pairwise([*starts, bounds[-1]])]

    def _part(self, first: int, last: int) -> TrainRow:
        """The documents at tokens `first` to `last` of the row."""
        packed = self.packed
        is_inside = (self.positions_N >= first) & (self.positions_N < last)
        inside = self.only(is_inside)
        return replace(
            inside,
            packed=replace(
                packed,
                input_ids=packed.input_ids[:, first:last],
                position_ids=packed.position_ids[:, first:last],
                cu_seqlens=tuple(b - first for b in packed.cu_seqlens if first <= b <= last),
            ),
            positions_N=inside.positions_N - first,
            num_skipped=0,
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> TrainRow:
        def maybe(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        ids, positions = change(self.packed.input_ids), change(self.packed.position_ids)
        return TrainRow(
            replace(self.packed, input_ids=ids, position_ids=positions),
            change(self.positions_N),
            change(self.labels_N),
            maybe(self.topk_ids_NK),
            maybe(self.topk_logprobs_NK),
            maybe(self.behavior_N),
            self.num_skipped,
        )


def rollout_of(sample: Sample) -> Rollout:
    """The rollout inside `sample`, scored or not."""
    return sample.rollout if isinstance(sample, Scored) else sample


def kept(sample: Sample, loss: LossConfig) -> NDArray[np.bool_]:
    """A mask [L] of the response tokens to train on.

    The `skip_tokens` after an unlikely token are skipped. A skipped token that is unlikely itself
    extends the skip. The first token is always kept, and so are all tokens without a teacher.
    """
    is_kept = np.ones(len(rollout_of(sample).response_ids), dtype=np.bool_)
    if loss.skip_after > 0.0 and isinstance(sample, Scored):
        unlikely = np.flatnonzero(sample.teacher_logprobs < math.log(loss.skip_after))
        for distance in range(1, loss.skip_tokens + 1):
            after = unlikely + distance
            is_kept[after[after < len(is_kept)]] = False
    return is_kept


def build_row(samples: Sequence[Sample], *, version: int, device: str | torch.device) -> TrainRow:
    """Pack `samples` in order; drift is measured on the samples of snapshot `version`."""
    rollouts = [rollout_of(sample) for sample in samples]
    assert all(len(r.prompt_ids) for r in rollouts), "a response needs a token before it"
    documents = [np.concatenate([r.prompt_ids, r.response_ids[:-1]]) for r in rollouts]
    packed = pack_documents(documents, "cpu")
    ends = zip(packed.cu_seqlens[1:], rollouts, strict=True)
    positions = np.concatenate([np.arange(end - len(r.response_ids), end) for end, r in ends])
    scored = [sample for sample in samples if isinstance(sample, Scored)]
    assert len(scored) in (0, len(samples)), "a row mixes scored and unscored samples"
    behavior = [_behavior(r, version) for r in rollouts]
    measured = not all(np.isnan(part).all() for part in behavior)
    row = TrainRow(
        packed,
        torch.from_numpy(positions),
        _ids([r.response_ids for r in rollouts]),
        _ids([s.topk_ids for s in scored]) if scored else None,
        _floats([s.topk_logprobs for s in scored]) if scored else None,
        _floats(behavior) if measured else None,
    )
    return row.to(device)


def _behavior(rollout: Rollout, version: int) -> FloatArray:
    if rollout.version == version and rollout.logprobs is not None:
        return rollout.logprobs
    return np.full(len(rollout.response_ids), np.nan, dtype=np.float32)


def _ids(parts: Sequence[IntArray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _floats(parts: Sequence[FloatArray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


@dataclass(frozen=True, slots=True)
class StepRows:
    """A rank's rows of a step: `rows`, then `idle` rows with weight 0.

    All ranks must process the same number of rows, so a rank with fewer rows gets idle ones. An
    idle row is the step's shortest sample.
    """

    step: Step
    rows: tuple[TrainRow, ...]
    idle: tuple[TrainRow, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest document of the rows."""
        rows = (*self.rows, *self.idle)
        return max((b - a for row in rows for a, b in pairwise(row.packed.cu_seqlens)), default=1)

    @property
    def num_tokens(self) -> tuple[int, int]:
        """The number of response tokens trained on, and of those skipped."""
        trained = sum(len(row.labels_N) for row in self.rows)
        return trained, sum(row.num_skipped for row in self.rows)


def prefetch(
    segment: Segment, read: Read, loss: LossConfig, *, rank: int, is_pinned: bool
) -> Generator[StepRows, None, None]:
    """The segment's steps in order, each with the rows of `rank` in main memory.

    Positions that `loss` skips are left out. `read` is called by one thread at a time; each call of
    `prefetch` starts one.
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

    with ThreadPoolExecutor(1, "npd-prefetch") as thread:
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
