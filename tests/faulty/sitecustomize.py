"""Faults for every process of a run: Python imports this at its start where it is on the path.

`NPD_TEST_SLOW_DISK`: seconds that each flush and each rename takes. `NPD_TEST_CLOCK`: seconds by
which the wall clock jumps, forwards and backwards in turn, at every 20th look at it.
"""

import itertools
import os
import threading
import time
from pathlib import Path

SLOW = float(os.environ.get("NPD_TEST_SLOW_DISK", "0"))
JUMP = float(os.environ.get("NPD_TEST_CLOCK", "0"))
HELD = os.environ.get("NPD_TEST_HELD_CHECKPOINT")


def _slowly(call):
    def slow(*args, **kwargs):
        time.sleep(SLOW)
        return call(*args, **kwargs)

    return slow


def _jumping(call):
    looks = itertools.count()

    def clock():
        return call() + (JUMP if next(looks) // 20 % 2 else -JUMP)

    return clock


def _held(call):
    def held(*args, **kwargs):
        is_writer = threading.current_thread().name == "npd-checkpoint"
        while is_writer and Path(HELD).exists():
            time.sleep(0.01)
        return call(*args, **kwargs)

    return held


if HELD:
    os.fsync = _held(os.fsync)
if SLOW:
    os.fsync, os.replace = _slowly(os.fsync), _slowly(os.replace)
if JUMP:
    time.time = _jumping(time.time)
