"""Parses server responses into arrays. A response is valid as a whole, or it is an error.

Promises: anything wrong with a 200 response (a missing key, a null, a NaN, a short list) raises one
error, an `Unavailable` that names the server. Sends nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from npd.engines.base import ENDINGS, Ending
from npd.engines.client import Unavailable
from npd.types import FloatArray, IntArray

_LARGEST, _LARGEST_ID = np.finfo(np.float32).max, np.iinfo(np.int32).max
# Limits of a response in bytes: its fixed part, each token, and each log-prob of a token. They are
# several times what engines send, so that only unrequested content exceeds them.
_AROUND, _OF_TOKEN, _OF_LOGPROB = 2**20, 2**10, 2**8
# Exceptions that parsing raises if a response has an unexpected structure.
_MISREAD = (AttributeError, LookupError, OverflowError, TypeError, ValueError)


@contextmanager
def parsing(server: str) -> Iterator[None]:
    """Turn parse errors of a response of `server` into Unavailable; wrap only parsing in it."""
    try:
        yield
    except _MISREAD as error:
        cause = "it has no " * isinstance(error, KeyError) + " ".join(str(error).split())[:200]
        raise Unavailable(server, f"sends a response that npd cannot parse: {cause}") from error


def max_response_bytes(*, scored: int = 0, generated: int = 0, k: int = 0) -> int:
    """The largest valid response: `scored` tokens with `k` log-probs each, `generated` tokens."""
    return _AROUND + generated * _OF_TOKEN + scored * (k + 2) * _OF_LOGPROB


def ids_of(found: object, *shape: int) -> IntArray:
    """`found` as token ids of `shape`. Raises ValueError if it is anything else."""
    raw = _numbers(found, "token ids", "iu", shape)
    if raw.size and not (raw.min() >= 0 and raw.max() <= _LARGEST_ID):
        raise ValueError(f"token ids from {raw.min()} to {raw.max()}")
    return raw.astype(np.int32)


def logprobs_of(found: object, *shape: int) -> FloatArray:
    """`found` as finite log-probs of `shape`. Raises ValueError if it is anything else."""
    raw = _numbers(found, "log-probs", "fiu", shape)
    if not (np.abs(raw) <= _LARGEST).all():  # NaN too
        raise ValueError(
            "log-probs are not finite: the weights are damaged, or the server's dtype is too "
            "narrow (try float32)"
        )
    return raw.astype(np.float32)


def ending_of(found: object) -> Ending:
    """Why a response ended. Raises ValueError or TypeError for an unknown reason."""
    if found not in ENDINGS:
        raise ValueError(f"finish_reason {found!r}")
    return ENDINGS[found]


def _numbers(found: object, what: str, kinds: str, shape: tuple[int, ...]) -> np.ndarray:
    """`found` as an array of `shape`; an empty list fits any empty shape."""
    raw = np.array(found)
    if raw.size == 0 and 0 in shape:
        return np.zeros(shape)
    if raw.dtype.kind not in kinds or raw.shape != shape:
        raise ValueError(f"{what} are not numbers of shape {list(shape)}")
    return raw
