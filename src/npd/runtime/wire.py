"""What crosses the border between two processes: a factory, requests, replies and errors, pickled.

Both sides are npd, of one version, started by the same run: nothing else is ever unpickled.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from npd import errors
from npd.errors import NpdError
from npd.runtime.base import Reply
from npd.runtime.host import Host


@dataclass(frozen=True, slots=True)
class Failure:
    """An npd error on its way back."""

    kind: type[NpdError]
    message: str


@dataclass(frozen=True, slots=True)
class Shipped:
    """A factory still pickled, so that a failing import is reported by the call that needs it."""

    data: bytes

    def __call__(self) -> object:
        factory: Callable[[], object] = pickle.loads(self.data)
        return factory()


def answer(host: Host, request: bytes) -> bytes:
    """A pickled Reply or Failure. Tensors are copied by value: no shared memory to leak."""
    method = "request"
    try:
        with host.guard(method):
            method, args = pickle.loads(request)
        with host.guard(method):
            return pickle.dumps(host.call(method, args))
    except NpdError as error:
        return pickle.dumps(Failure(_known(error), str(error)))


def opened(data: bytes) -> Reply:
    """The reply in `data`; the error, where that is what came."""
    content = pickle.loads(data)
    if isinstance(content, Failure):
        raise content.kind(content.message)
    assert isinstance(content, Reply)
    return content


def configure_logging() -> None:
    """The log lines of a worker process."""
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=line)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each of 100,000 requests


def _known(error: NpdError) -> Any:
    """The nearest class of npd.errors: the asker can import it and build it from a message."""
    return next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
