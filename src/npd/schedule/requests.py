"""Which prompt and which seed each sample gets. Pure functions.

Every arbitrary choice of a run follows from its seed by `hash64`: the order of prompts, the seeds
of samples, the shuffles of the replay buffer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import lru_cache

from npd.config import RunConfig
from npd.schedule.events import RequestRef


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


def prompt_of(sample_id: int, *, seed: int, num_prompts: int, samples_per_prompt: int) -> int:
    """The prompt of a request: rounds over all prompts, with a prompt's samples in a row."""
    round_index, offset = divmod(sample_id, num_prompts * samples_per_prompt)
    return prompt_order(seed, round_index, num_prompts)[offset // samples_per_prompt]


@lru_cache(maxsize=2)
def prompt_order(seed: int, round_index: int, num_prompts: int) -> tuple[int, ...]:
    """The order in which round `round_index` requests every prompt once."""
    order = list(range(num_prompts))
    random.Random(hash64(seed, round_index)).shuffle(order)
    return tuple(order)


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
