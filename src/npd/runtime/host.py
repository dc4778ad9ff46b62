"""The inside of a worker: builds its object at the first call, runs methods, keeps the traceback.

The same code runs in a thread (inline) and in a process (local), so errors look the same in both.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from npd.errors import NpdError, RunError
from npd.runtime.base import Factory, Reply

# Long enough for a tensor-shape complaint, short enough for one line of a terminal log.
_CAUSE_CHARS = 300


class Host:
    """Holds the object of one worker. Not thread-safe: one call at a time."""

    def __init__(self, name: str, factory: Factory, log_file: Path) -> None:
        self._name = name
        self._factory = factory
        self._log_file = log_file
        self._target: object | None = None

    def call(self, method: str, args: tuple[Any, ...]) -> Reply:
        """Build the object if need be and run its method; the times cover both."""
        started = time.time()
        if self._target is None:
            self._target = self._factory()
        value = getattr(self._target, method)(*args)
        return Reply(value, started, time.time())

    def close(self) -> None:
        """Let the object close itself, if it was built and knows how to; a failure is only logged.

        Nobody is left to act on it, and other workers still have to be closed.
        """
        close = getattr(self._target, "close", None)
        self._target = None
        if close is not None:
            with suppress(NpdError), self.guard("close"):
                close()

    @contextmanager
    def guard(self, method: str) -> Iterator[None]:
        """Let npd errors pass; log any other exception's traceback and raise a RunError for it."""
        try:
            yield
        except NpdError:
            raise
        except Exception as error:
            self._log_traceback(method)
            raise RunError(
                f"worker {self._name}: {method}() failed: {_one_line(error)}; "
                f"the traceback is in {self._log_file}"
            ) from error

    def _log_traceback(self, method: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        text = f"{now} {self._name}: {method}() failed\n{traceback.format_exc()}"
        try:
            with self._log_file.open("a", encoding="utf-8") as log:
                log.write(text)
        except OSError:  # full, or on a machine that does not see the folder: Ray keeps this
            with suppress(OSError):
                sys.stderr.write(text)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    cut = text if len(text) <= _CAUSE_CHARS else text[: _CAUSE_CHARS - 3] + "..."
    return f"{type(error).__name__}: {cut}" if cut else type(error).__name__
