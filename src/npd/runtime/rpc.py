"""Remote procedure calls: builds a worker's object, runs its methods, and reports its errors.

Threads, processes and Ray actors share this code, so their errors look the same. Requests and
results are pickled; both sides are the same version of npd and were started by the same run, and
nothing else is ever unpickled.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npd import errors
from npd.errors import NpdError, RunError
from npd.redaction import learn_environment
from npd.runtime.base import CallResult, Factory
from npd.terminal import LineFormatter, safe_text

# Long enough for an error about tensor shapes, short enough for one line of a terminal log.
_CAUSE_CHARS = 300


class ObjectServer:
    """Builds one worker's object at the first call, and runs its methods. Not thread-safe."""

    def __init__(self, name: str, factory: Factory, log_file: Path) -> None:
        self._name = name
        self._factory = factory
        self._log_file = log_file
        self._target: object | None = None

    def call(self, method: str, args: tuple[Any, ...]) -> CallResult:
        """Run a method of the object, and build the object first if needed; times cover both."""
        started, began = time.time(), time.monotonic()
        if self._target is None:
            self._target = self._factory()
        value = getattr(self._target, method)(*args)
        # From a monotonic clock, because the system clock may change during the call.
        return CallResult(value, started, started + time.monotonic() - began)

    def close(self) -> None:
        """Call the object's `close`, if it has one. A failure is only logged.

        No caller could act on a failure, and other workers must still be closed.
        """
        close = getattr(self._target, "close", None)
        self._target = None
        if close is not None:
            with suppress(NpdError), self.reporting_errors("close"):
                close()

    @contextmanager
    def reporting_errors(self, method: str) -> Iterator[None]:
        """Pass npd's errors on; log the traceback of any other exception and raise a RunError."""
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
        text = safe_text(f"{now} {self._name}: {method}() failed\n{traceback.format_exc()}")
        try:
            with open(self._log_file, "a", encoding="utf-8", opener=no_link) as log:
                log.write(text)
        except OSError:  # a full disk, or not mounted on this machine; Ray stores stderr
            with suppress(OSError):
                sys.stderr.write(text)


def no_link(path: str, flags: int) -> int:
    """An opener for `open` that refuses symbolic links, which another user may have created."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    cut = text if len(text) <= _CAUSE_CHARS else text[: _CAUSE_CHARS - 3] + "..."
    return f"{type(error).__name__}: {cut}" if cut else type(error).__name__


# Messages between processes.


@dataclass(frozen=True, slots=True)
class Failure:
    """An npd error in a worker, with its traceback, for the caller."""

    kind: type[NpdError]
    message: str
    trace: str


class InWorker(Exception):
    """The traceback in a worker, as the cause of the error that the caller gets."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True, slots=True)
class Shipped:
    """A pickled factory. The first call unpickles it, so that a failing import is reported."""

    data: bytes

    def __call__(self) -> object:
        factory: Callable[[], object] = pickle.loads(self.data)
        return factory()


def handle_request(server: ObjectServer, request: bytes) -> bytes:
    """A pickled CallResult or Failure. Tensors are copied, so no shared memory can leak."""
    method = "request"
    try:
        with server.reporting_errors(method):
            method, args = pickle.loads(request)
        with server.reporting_errors(method):
            return pickle.dumps(server.call(method, args))
    except NpdError as error:
        return pickle.dumps(Failure(_known(error), str(error), traceback.format_exc()))


def unpack_reply(data: bytes) -> CallResult:
    """The result in `data`. Raises the worker's error if `data` is a Failure."""
    content = pickle.loads(data)
    if isinstance(content, Failure):
        raise content.kind(content.message) from InWorker(content.trace)
    assert isinstance(content, CallResult)
    return content


def configure_logging() -> None:
    """Set up logging in a worker process: INFO and above, to its log."""
    learn_environment(os.environ)
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else it logs every request


def _known(error: NpdError) -> Any:
    """The nearest base class in npd.errors, which the caller can rebuild from a message."""
    return next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
