"""Every arbitrary choice of a run, derived from its seed: order of prompts, sample seeds, shuffles.

Pure and stateless but for a cache; the learning-rate schedule is here too, as a function of the
run's progress.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from functools import lru_cache

_MASK = (1 << 64) - 1
_START, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(*values: int) -> int:
    """A 63-bit hash of integers (splitmix64 finaliser): equal inputs, equal outputs, everywhere."""
    return _absorb(_START, values) >> 1


def mix_each(prefix: tuple[int, ...], values: Iterable[int]) -> list[int]:
    """`mix(*prefix, value)` for each value, with the prefix taken in once."""
    start, mixed = _absorb(_START, prefix), []
    for value in values:  # `_absorb` once more: calls would be a third of the time
        state = (start ^ (value & _MASK)) * _FIRST & _MASK
        state = (state ^ (state >> 27)) * _SECOND & _MASK
        mixed.append((state ^ state >> 31) >> 1)
    return mixed


def _absorb(state: int, values: Iterable[int]) -> int:
    for value in values:
        state = (state ^ (value & _MASK)) * _FIRST & _MASK
        state = (state ^ (state >> 27)) * _SECOND & _MASK
        state ^= state >> 31
    return state


@lru_cache(maxsize=2)
def prompt_order(seed: int, round_index: int, num_prompts: int) -> tuple[int, ...]:
    """The order in which round `round_index` asks every prompt once."""
    order = list(range(num_prompts))
    random.Random(mix(seed, round_index)).shuffle(order)
    return tuple(order)


def prompt_of(sample_id: int, *, seed: int, num_prompts: int, samples_per_prompt: int) -> int:
    """The prompt of an ask: rounds over all prompts, a prompt's samples together."""
    round_index, place = divmod(sample_id, num_prompts * samples_per_prompt)
    return prompt_order(seed, round_index, num_prompts)[place // samples_per_prompt]


def learning_rate(before: float, after: float, *, lr: float, min_lr: float, warmup: float) -> float:
    """Cosine from `lr` to `min_lr` over progress 0..1, after a linear rise over `warmup` of it.

    `before` and `after` are the progress at the start and the end of the step.
    """
    rise = min(1.0, after / warmup) if warmup > 0 else 1.0
    done = max(0.0, before - warmup) / (1.0 - warmup) if warmup < 1.0 else 0.0
    return rise * (min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))
