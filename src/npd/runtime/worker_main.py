"""The main program of a worker process: reads requests from a socket and replies in order.

A frame is an 8-byte length and that many bytes. The first frame is the pickled factory, later ones
are pickled `(method, args)`; an empty frame requests the process to exit. The process never
outlives its parent: a listening thread ends it when the socket closes or the parent changes.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TextIO, cast

from npd.runtime.rpc import ObjectServer, Shipped, configure_logging, handle_request
from npd.terminal import Stream

HEADER = struct.Struct(">Q")
# The socket closes when the parent dies, unless a fork of the parent keeps it open; then the parent
# id changes. Checking it once a second is cheap.
_PARENT_CHECK_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


def main(fd: int, parent: int, name: str, log_file: str) -> None:
    """Serve the socket `fd` until an empty frame arrives or the process `parent` has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    configure_logging()
    # A log on a full disk loses lines, not the worker.
    sys.stdout, sys.stderr = cast(TextIO, Stream(sys.stdout)), cast(TextIO, Stream(sys.stderr))
    with socket.socket(fileno=fd) as channel:
        channel.set_inheritable(False)
        inbox: SimpleQueue[bytes] = SimpleQueue()
        Thread(target=_listen, args=(channel, parent, inbox), name="listen", daemon=True).start()
        server = ObjectServer(name, Shipped(inbox.get()), Path(log_file))
        while request := inbox.get():
            reply = handle_request(server, request)
            channel.sendall(HEADER.pack(len(reply)) + reply)
        server.close()


def _end_with_parent() -> None:
    """On Linux, let the kernel kill this process with its parent, even if it is stopped."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _listen(channel: socket.socket, parent: int, inbox: SimpleQueue[bytes]) -> None:
    """Produces: requests. Unblocked by: the parent, its death, and once every second."""
    while os.getppid() == parent:
        try:
            is_ready = select.select([channel], [], [], _PARENT_CHECK_SECONDS)[0]
        except (OSError, ValueError):
            if channel.fileno() >= 0:
                raise
            return  # the main thread closed it, because the program is exiting
        if not is_ready:
            continue
        header = _receive(channel, HEADER.size)
        if not header:
            break
        inbox.put(_receive(channel, HEADER.unpack(header)[0]))
    os._exit(1)


def _receive(channel: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes, or none if the stream ends first."""
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
