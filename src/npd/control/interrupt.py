"""What Ctrl-C, SIGTERM and the interrupt of a notebook's cell do.

Promises: the first lets the controller finish running work and save, the second cancels its task
and saves nothing. A notebook has an event loop already, so a run there has a thread of its own.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

from npd.control.controller import Controller

T = TypeVar("T")


class Interrupt:
    """Stops a run that has its own thread, from the thread that waits for it."""

    def __init__(self) -> None:
        self._stop: Callable[[], object] | None = None
        self._is_requested = False

    def request(self) -> None:
        """Stop the run as a signal would, as soon as that is possible."""
        self._is_requested = True
        if self._stop is not None:
            with suppress(RuntimeError):  # its loop is closed: the run is ending by itself
                self._stop()

    def serve(self, stop: Callable[[], object]) -> None:
        """`stop` is what to call, from any thread; at once if the stop was requested already."""
        self._stop = stop
        if self._is_requested:
            stop()


def outside_loops(work: Callable[[], T], interrupt: Interrupt) -> T:
    """Do `work` here, or in its own thread if an event loop is running already (notebooks).

    There, interrupting the cell interrupts the run.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while True:
            try:
                return future.result()
            except KeyboardInterrupt:
                if future.done():
                    raise
                interrupt.request()


@contextmanager
def stop_on_signals(controller: Controller, interrupt: Interrupt) -> Iterator[None]:
    """The first SIGINT or SIGTERM drains and saves, the second stops at once."""
    loop, main, caught = asyncio.get_running_loop(), asyncio.current_task(), False

    def stop() -> None:
        nonlocal caught
        if caught and main is not None:
            main.cancel()
        caught = True
        controller.interrupt()

    if threading.current_thread() is not threading.main_thread():
        interrupt.serve(lambda: loop.call_soon_threadsafe(stop))
        yield
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
