"""Going on with less at a time when a device is out of memory.

Promises: an attempt that ran out of memory is made again with half of it at a time, as often as
needed, and what fitted is remembered. A second size gets smaller once the first cannot. Other
errors pass. Ranks do not try again: the others would wait in a collective for one that begins anew.
An attempt must be one that may be repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from npd.errors import RunError
from npd.models.device import free_cached

T = TypeVar("T")

_log = logging.getLogger(__name__)
# What libraries say when an allocation fails, besides torch.OutOfMemoryError: CUDA's own errors
# (torch.AcceleratorError), cuBLAS, cuDNN, and torch's allocator on a CPU.
_SAYINGS = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
# A 256th of a configured size is no size to work with.
_LARGEST_DIVISOR = 256


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated.

    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."))
    True
    >>> is_out_of_memory(RuntimeError("The size of tensor a (3) must match"))
    False
    """
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAYINGS)


class Fitting:
    """How large a part of the configured size fits: 1 / `divisor`.

    `setting` is the config's name of the size, and `remedy` what helps if no part fits. `is_alone`:
    what is attempted needs no other rank, even where there are some. `then` is a second size: it
    gets smaller once this one cannot.
    """

    def __init__(
        self,
        setting: str,
        size: int,
        remedy: str = "",
        *,
        is_alone: bool = False,
        then: Fitting | None = None,
    ) -> None:
        self.divisor = 1
        self._setting, self._size, self._remedy = setting, size, remedy
        self._is_alone, self._then = is_alone, then

    def of(self, size: int) -> int:
        """The part of `size` that is used."""
        return max(1, size // self.divisor)

    def run(self, attempt: Callable[[], T], *, doing: str = "", least: int = 1) -> T:
        """The result of `attempt`, which looks at `of`; repeated with half after each failure.

        `doing` begins the message of an error, such as `step 3: `. Below `least` nothing gets
        smaller: the longest sample.

        Raises:
            RunError: there is not enough memory for the smallest part, or for one of several ranks.
        """
        while True:
            try:
                return attempt()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                smaller = self._smaller(least) if self._may_repeat() else None
                if smaller is None:
                    raise RunError(
                        f"{doing}the device is out of memory with {self._limit(least)}: "
                        f"{self._remedy}"
                    ) from error
            # Here, where the traceback no longer holds what the attempt had allocated.
            was = smaller.of(smaller._size)
            smaller._halve(least if smaller is self._then else None)
            free_cached()
            _log.warning(
                "%sout of memory with %s %d: going on with %d",
                *(doing, smaller._setting, was, smaller.of(smaller._size)),
            )

    def _smaller(self, least: int) -> Fitting | None:
        """The size that gets smaller now; None if none can."""
        if self.of(self._size) > least and self.divisor < _LARGEST_DIVISOR:
            return self
        second = self._then
        return second if second is not None and second.of(second._size) > 1 else None

    def _halve(self, below: int | None) -> None:
        """Half the size; a second one, at once so small that it is `below` the longest sample."""
        self.divisor *= 2
        while below is not None and self.of(self._size) >= max(2, below):
            self.divisor *= 2

    def _limit(self, least: int) -> str:
        """What does not fit."""
        now = self.of(self._size)
        what = f"{self._setting} {now}"
        if least > 1 and now <= least:
            what = f"a sample of {least} tokens"
        second = self._then
        if second is None or second.divisor == 1:
            return what
        return f"{what} and {second._setting} {second.of(second._size)}"

    def _may_repeat(self) -> bool:
        return self._is_alone or not _is_in_group()


def _is_in_group() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
