"""The main program of a worker process: takes requests from one socket and answers them in turn.

Frames are an 8-byte length and that many bytes. The first frame is the pickled factory, later ones
are pickled `(method, args)`; an empty frame asks the process to end. It never outlives its parent:
a listening thread ends it when the socket closes or its parent process changes.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from npd.runtime.host import Host
from npd.runtime.wire import Shipped, answer, configure_logging

HEADER = struct.Struct(">Q")
# The socket tells of a dead parent at once, unless a fork of the parent holds it open too; then the
# parent's id does. A second is soon enough for that and costs nothing.
_PARENT_CHECK_SECONDS = 1.0


def main(fd: int, parent: int, name: str, log_file: str) -> None:
    """Serve the socket `fd` until an empty frame comes or the process `parent` is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging()
    with socket.socket(fileno=fd) as channel:
        channel.set_inheritable(False)
        inbox: SimpleQueue[bytes] = SimpleQueue()
        Thread(target=_listen, args=(channel, parent, inbox), name="listen", daemon=True).start()
        host = Host(name, Shipped(inbox.get()), Path(log_file))
        while request := inbox.get():
            reply = answer(host, request)
            channel.sendall(HEADER.pack(len(reply)) + reply)
        host.close()


def _listen(channel: socket.socket, parent: int, inbox: SimpleQueue[bytes]) -> None:
    """Produces requests; unblocked by the parent, by its death, and every second."""
    while os.getppid() == parent:
        try:
            is_ready = select.select([channel], [], [], _PARENT_CHECK_SECONDS)[0]
        except (OSError, ValueError):
            if channel.fileno() >= 0:
                raise
            return  # closed, at any moment: the program is ending by itself
        if not is_ready:
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
