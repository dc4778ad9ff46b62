"""What a server answered, made into arrays: all of it is as it should be, or it is no answer.

Promises: whatever a 200 holds (a missing key, a null, a NaN, a list too short), there is one error
for it, an `Unavailable` that names the server. Asks nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from npd.servers.base import ENDINGS, Ending
from npd.servers.http import Unavailable
from npd.types import FloatArray, IntArray

_LARGEST, _LARGEST_ID = np.finfo(np.float32).max, np.iinfo(np.int32).max
# What taking an answer apart raises where it has another shape.
_MISREAD = (AttributeError, LookupError, OverflowError, TypeError, ValueError)


@contextmanager
def reading(server: str) -> Iterator[None]:
    """Around what takes an answer of `server` apart, and nothing else: raises Unavailable."""
    try:
        yield
    except _MISREAD as error:
        cause = "it has no " * isinstance(error, KeyError) + " ".join(str(error).split())[:200]
        raise Unavailable(server, f"answers with something npd cannot read: {cause}") from error


def ids_of(found: object, *shape: int) -> IntArray:
    """Token ids of a `shape`; ValueError where they are none."""
    raw = _numbers(found, "token ids", "iu", shape)
    if raw.size and not (raw.min() >= 0 and raw.max() <= _LARGEST_ID):
        raise ValueError(f"token ids from {raw.min()} to {raw.max()}")
    return raw.astype(np.int32)


def logprobs_of(found: object, *shape: int) -> FloatArray:
    """Log-probs of a `shape`; ValueError where they are none, or not finite."""
    raw = _numbers(found, "log-probs", "fiu", shape)
    if not (np.abs(raw) <= _LARGEST).all():  # NaN too
        raise ValueError(
            "log-probs that are not finite: its weights are damaged, or its dtype is too narrow "
            "(try float32)"
        )
    return raw.astype(np.float32)


def ending_of(found: object) -> Ending:
    """Why a response ended; ValueError or TypeError where npd does not know the reason."""
    if found not in ENDINGS:
        raise ValueError(f"finish_reason {found!r}")
    return ENDINGS[found]


def _numbers(found: object, what: str, kinds: str, shape: tuple[int, ...]) -> np.ndarray:
    """`found` as an array; of nothing at all any empty shape can be made."""
    raw = np.array(found)
    if raw.size == 0 and 0 in shape:
        return np.zeros(shape)
    if raw.dtype.kind not in kinds or raw.shape != shape:
        raise ValueError(f"{what} that are not {list(shape)} numbers")
    return raw
