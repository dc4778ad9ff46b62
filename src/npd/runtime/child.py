"""The main program of a worker process: takes requests from one socket and answers them in turn.

Frames are an 8-byte length and that many bytes. The first frame is the pickled factory, later ones
are pickled `(method, args)`; an empty frame asks the process to end. It never outlives its parent:
a listening thread ends it when the socket closes or its parent process changes.
"""

from __future__ import annotations

import logging
import os
import pickle
import select
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from npd import errors
from npd.errors import NpdError
from npd.runtime.host import Host

HEADER = struct.Struct(">Q")
# The socket tells of a dead parent at once, unless a fork of the parent holds it open too; then the
# parent's id does. A second is soon enough for that and costs nothing.
_PARENT_CHECK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Failure:
    """An npd error on its way to the parent."""

    kind: type[NpdError]
    message: str


@dataclass(frozen=True, slots=True)
class _Shipped:
    """A factory still pickled, so that a failing import is reported by the call that needs it."""

    data: bytes

    def __call__(self) -> object:
        factory: Callable[[], object] = pickle.loads(self.data)
        return factory()


def main(fd: int, parent: int, name: str, log_file: str) -> None:
    """Serve the socket `fd` until an empty frame comes or the process `parent` is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _configure_logging()
    with socket.socket(fileno=fd) as channel:
        channel.set_inheritable(False)
        inbox: SimpleQueue[bytes] = SimpleQueue()
        Thread(target=_listen, args=(channel, parent, inbox), name="listen", daemon=True).start()
        host = Host(name, _Shipped(inbox.get()), Path(log_file))
        while request := inbox.get():
            answer = _answer(host, request)
            channel.sendall(HEADER.pack(len(answer)) + answer)
        host.close()


def _configure_logging() -> None:
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=line)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each of 100,000 requests


def _listen(channel: socket.socket, parent: int, inbox: SimpleQueue[bytes]) -> None:
    """Produces requests; unblocked by the parent, by its death, and every second."""
    while os.getppid() == parent:
        if channel.fileno() < 0:
            return  # the program is ending by itself, and takes longer than a second for it
        if not select.select([channel], [], [], _PARENT_CHECK_SECONDS)[0]:
            continue
        header = _receive(channel, HEADER.size)
        if not header:
            break
        inbox.put(_receive(channel, HEADER.unpack(header)[0]))
    os._exit(1)


def _receive(channel: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes, or none at all where the stream ended before."""
    data = bytearray()
    while len(data) < size:
        part = _receive_some(channel, size - len(data))
        if not part:
            return b""
        data += part
    return bytes(data)


def _receive_some(channel: socket.socket, size: int) -> bytes:
    try:
        return channel.recv(min(size, 1 << 20))
    except ConnectionError:
        return b""


def _answer(host: Host, request: bytes) -> bytes:
    """A pickled Reply or Failure. Tensors are copied by value: no shared memory to leak."""
    method = "request"
    try:
        with host.guard(method):
            method, args = pickle.loads(request)
        with host.guard(method):
            return pickle.dumps(host.call(method, args))
    except NpdError as error:
        return pickle.dumps(Failure(_known(error), str(error)))


def _known(error: NpdError) -> Any:
    """The nearest class of npd.errors: the parent can import it and build it from a message."""
    return next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
