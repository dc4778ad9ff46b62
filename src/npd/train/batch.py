"""Rows of samples as tensors: packed ids, the positions that predict a response, their targets.

Promises: only positions that predict a response token are listed, each document's own, in the order
given. Does not pack (the controller did), compute, or read files.

Dimensions: T tokens of a row, N response tokens of a row, K teacher support size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npd.config import LossConfig
from npd.modeling import PackedBatch, pack_documents
from npd.types import FloatArray, IntArray, Rollout, SampleRef, Scored

Sample: TypeAlias = Rollout | Scored
Read: TypeAlias = Callable[[SampleRef], Sample]


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One packed row and what its response positions are trained towards.

    A document is a prompt and its response but for the last token, which predicts nothing.
    `positions_N` index the row's T tokens: those whose next token, `labels_N`, is a response's.
    `topk_*_NK` are None for samples no teacher has seen. `behavior_N` are the newest snapshot's
    log-probs of the labels, NaN at tokens of other samples; None when the row has none.
    `num_skipped` response tokens are among the T but not the N (`only`).

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
        """The same on `device`; what is pinned is on its way there when this returns."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> TrainRow:
        """The same in page-locked memory, which a GPU copies from without the host waiting."""
        return self._each(Tensor.pin_memory)

    def only(self, kept_N: Tensor) -> TrainRow:
        """The same, to be trained at the kept positions alone; the others stay as context."""

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
    """Which response tokens `[L]` are trained on: none of the `skip_tokens` after an unlikely one.

    One that is left out leaves out what follows it all the same if it is unlikely itself. The first
    token always stays; and all of a sample that no teacher has seen.
    """
    is_kept = np.ones(len(rollout_of(sample).response_ids), dtype=np.bool_)
    if loss.skip_after > 0.0 and isinstance(sample, Scored):
        unlikely = np.flatnonzero(sample.teacher_logprobs < math.log(loss.skip_after))
        for distance in range(1, loss.skip_tokens + 1):
            after = unlikely + distance
            is_kept[after[after < len(is_kept)]] = False
    return is_kept


def build_row(samples: Sequence[Sample], *, version: int, device: str | torch.device) -> TrainRow:
    """Lay `samples` end to end, in order; drift is measured on those written by `version`."""
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
