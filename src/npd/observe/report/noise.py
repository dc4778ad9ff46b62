"""Whether a held-out measure changed by more than the choice of held-out prompts explains.

Noise of training itself (another seed) comes on top, and one run cannot show it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev

from npd.observe.report.data import Numbers, by_step


def is_noise(change: float, error: float | None) -> bool:
    """Whether a change lies within two standard errors; where they are unknown, if it is 0."""
    return abs(change) <= 2 * (error or 0.0)


def change_error(evals: Sequence[Numbers], name: str) -> float | None:
    """Standard error of the change of a measure from its first evaluation to its last.

    Known of `kl`, by the differences of each response (the same ones each time), and of
    `exact_match`, as of two independent shares, which is more than it is. None where unknown.
    """
    known = [e for e in by_step(evals) if e.get(name) is not None]
    if len(known) < 2:
        return None
    first, last = known[0], known[-1]
    if name == "kl":
        return _paired(first.get("kl_sums", ()), last.get("kl_sums", ()), last.get("num_tokens", 0))
    if name == "exact_match":
        errors = [share_error(evaluation[name], evals) for evaluation in (first, last)]
        return math.hypot(*(error or 0.0 for error in errors)) if any(errors) else None
    return None


def _paired(before: Sequence[float], after: Sequence[float], num_tokens: int) -> float | None:
    """Of a mean over tokens, from its sums by response: responses are the sample, not tokens."""
    if len(before) != len(after) or len(before) < 2 or not num_tokens:
        return None
    changes = [b - a for a, b in zip(before, after, strict=True)]
    return stdev(changes) * math.sqrt(len(changes)) / num_tokens


def share_error(share: float, evals: Sequence[Numbers]) -> float | None:
    """Standard error of a share of the held-out prompts with an answer, each right or wrong."""
    counts = (e.get("num_answers") or e.get("num_prompts") for e in evals)
    prompts = next(filter(None, counts), None)
    return math.sqrt(max(0.0, share * (1 - share)) / prompts) if prompts else None
