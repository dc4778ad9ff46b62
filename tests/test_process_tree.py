"""The tests' own look at processes."""

import os
import subprocess
import sys
import threading
import time

from process_tree import children


def test_children_are_seen_while_threads_end():
    """Also one whose thread has ended, so that it was left to another."""
    is_over = threading.Event()

    def start_threads():
        while not is_over.is_set():
            threading.Thread(target=time.sleep, args=(0.001,)).start()

    started = []

    def start_child():
        command = [sys.executable, "-c", "input()"]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE))
        time.sleep(0.05)

    starter = threading.Thread(target=start_threads)
    first = threading.Thread(target=start_child)
    try:
        starter.start()
        first.start()
        while not started:
            time.sleep(0.001)
        seen = [children(os.getpid()) for _ in range(1000)]
    finally:
        is_over.set()
        for thread in (starter, first):
            thread.join()
        for child in started:
            child.communicate()
    assert all(str(started[0].pid) in found for found in seen)
    assert str(started[0].pid) not in children(os.getpid())


def test_a_process_that_is_gone_has_none():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert children(child.pid) == set()
