"""Makes an optimiser step of a given batch: rows, ranks, learning rate. Pure functions.

Which samples are in the batch is decided by `Plan._next_batch` and the replay buffer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from npd.config import TrainConfig
from npd.pack import balance, pack
from npd.types import Row, SampleRef, Step


def make_step(
    index: int,
    refs: Sequence[SampleRef],
    train: TrainConfig,
    *,
    progress: tuple[float, float],
    ranks: int = 1,
) -> Step:
    """Pack a batch into rows, distribute them over the ranks, and set the learning rate.

    `progress`: the finished share of the run at the start and at the end of the step, 0 to 1.
    """
    packed = pack([ref.num_tokens for ref in refs], train.row_tokens)
    rows = [Row(tuple([refs[i] for i in row])) for row in packed]
    lr = learning_rate(*progress, lr=train.lr, min_lr=train.min_lr, warmup=train.warmup)
    return Step(index, lr, _deal(rows, ranks))


def _deal(rows: Sequence[Row], ranks: int) -> tuple[tuple[Row, ...], ...]:
    """The rows of each rank, balanced by the cost of attention."""
    if ranks == 1:
        return (tuple(rows),)
    costs = [float(sum(ref.num_tokens**2 for ref in row.samples)) for row in rows]
    return tuple(tuple(rows[index] for index in indices) for indices in balance(costs, ranks))


def learning_rate(before: float, after: float, *, lr: float, min_lr: float, warmup: float) -> float:
    """A linear rise over the share `warmup` of the run, then a cosine from `lr` to `min_lr`.

    `before`, `after`: the progress (0 to 1) at the start and the end of the step.
    """
    rise = min(1.0, after / warmup) if warmup > 0 else 1.0
    done = max(0.0, before - warmup) / (1.0 - warmup) if warmup < 1.0 else 0.0
    return rise * (min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))
