"""How many prompts each of several sources gives, and which: pure functions of sizes and a seed.

Promises: the same sizes, weights and seed give the same prompts in every version of Python; no
prompt is taken twice. Does not read prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from hashlib import sha256


def drawn_order(count: int, seed: int, name: str = "") -> list[int]:
    """The indices below `count` in random order; `name` is the source's, if there are several."""
    key = f"{seed} {name} " if name else f"{seed} "
    # Ordered by hash, because a hash is the same in every version of Python.
    return sorted(range(count), key=lambda i: sha256(f"{key}{i}".encode()).digest())


def mixed_size(sizes: Sequence[int], weights: Sequence[float] | None) -> int:
    """The most prompts that sources of these sizes give in proportion to `weights`.

    Without weights every prompt is used.

    >>> mixed_size([100, 30], [0.5, 0.5]), mixed_size([100, 30], None)
    (60, 130)
    """
    if weights is None:
        return sum(sizes)
    shares = _shares(weights)
    return min(int(size / share) for size, share in zip(sizes, shares, strict=True))


def apportioned(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided in proportion to `weights`, by the method of largest remainders.

    >>> apportioned(10, [1, 1, 1]), apportioned(64, [0.9, 0.1])
    ([4, 3, 3], [58, 6])
    """
    exact = [total * share for share in _shares(weights)]
    counts = [int(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _shares(weights: Sequence[float]) -> list[Fraction]:
    """The weights as exact shares of their sum, as they are written in decimal."""
    exact = [Fraction(str(weight)) for weight in weights]
    return [each / sum(exact) for each in exact]
