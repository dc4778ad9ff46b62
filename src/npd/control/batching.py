"""Makes requests, and steps from given samples: rows, learning rate. Pure functions.

Which samples are in a batch is decided in `plan` and `samples`. Also: whether drift asks for a
refresh.

Every arbitrary choice of a run follows from its seed by `hash64`: the order of prompts, the seeds
of samples, the shuffles.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from functools import lru_cache

from npd.config import RunConfig, TrainConfig
from npd.control.events import RequestRef
from npd.pack import balance, pack
from npd.types import Row, SampleRef, SegmentReport, Step


def make_requests(
    sample_ids: Sequence[int], config: RunConfig, requests_per_round: int
) -> tuple[RequestRef, ...]:
    """The requests with these sample ids; each prompt and seed follows from the run's seed.

    `requests_per_round` is prompts x samples_per_prompt.
    """
    seed, per_prompt = config.seed, config.generate.samples_per_prompt
    num_prompts = requests_per_round // per_prompt
    prompts = (
        prompt_of(sample_id, seed=seed, num_prompts=num_prompts, samples_per_prompt=per_prompt)
        for sample_id in sample_ids
    )
    return tuple(map(RequestRef, sample_ids, prompts, hash64_each((seed, 1), sample_ids)))


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


def has_drifted(report: SegmentReport, threshold: float | None) -> bool:
    """Whether the segment's mean KL(theta || gen) per token is above `threshold` (None: never)."""
    measured = [(s.drift, s.response_tokens) for s in report.steps if s.drift is not None]
    tokens = sum(count for _, count in measured)
    if threshold is None or tokens == 0:
        return False
    return sum(drift * count for drift, count in measured) / tokens > threshold


_MASK = (1 << 64) - 1
_START, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def hash64(*values: int) -> int:
    """A 63-bit hash of integers (splitmix64 finaliser), the same on every machine."""
    return _absorb(_START, values) >> 1


def hash64_each(prefix: tuple[int, ...], values: Iterable[int]) -> list[int]:
    """`hash64(*prefix, value)` for each value, with the prefix hashed once."""
    start, mixed = _absorb(_START, prefix), []
    for value in values:  # `_absorb` is inlined: its calls would take a third of the time
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
    """The order in which round `round_index` requests every prompt once."""
    order = list(range(num_prompts))
    random.Random(hash64(seed, round_index)).shuffle(order)
    return tuple(order)


def prompt_of(sample_id: int, *, seed: int, num_prompts: int, samples_per_prompt: int) -> int:
    """The prompt of a request: rounds over all prompts, with a prompt's samples in a row."""
    round_index, offset = divmod(sample_id, num_prompts * samples_per_prompt)
    return prompt_order(seed, round_index, num_prompts)[offset // samples_per_prompt]


def learning_rate(before: float, after: float, *, lr: float, min_lr: float, warmup: float) -> float:
    """A linear rise over the share `warmup` of the run, then a cosine from `lr` to `min_lr`.

    `before`, `after`: the progress (0 to 1) at the start and the end of the step.
    """
    rise = min(1.0, after / warmup) if warmup > 0 else 1.0
    done = max(0.0, before - warmup) / (1.0 - warmup) if warmup < 1.0 else 0.0
    return rise * (min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))
