"""The learning rate of a step, by the share of the run that is done. Pure."""

from __future__ import annotations

import math


def learning_rate(before: float, after: float, *, lr: float, min_lr: float, warmup: float) -> float:
    """A linear rise over the share `warmup` of the run, then a cosine from `lr` to `min_lr`.

    `before`, `after`: the progress (0 to 1) at the start and the end of the step.
    """
    rise = min(1.0, after / warmup) if warmup > 0 else 1.0
    done = max(0.0, before - warmup) / (1.0 - warmup) if warmup < 1.0 else 0.0
    return rise * (min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))
