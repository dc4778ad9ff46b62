"""The tests' own look at processes."""

import os
import subprocess
import sys
import threading
import time

from process_tree import children


def test_children_are_seen_while_threads_end():
    is_over = threading.Event()

    def start_threads():
        while not is_over.is_set():
            threading.Thread(target=time.sleep, args=(0.001,)).start()

    starter = threading.Thread(target=start_threads)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        starter.start()
        seen = [children(os.getpid()) for _ in range(1000)]
    finally:
        is_over.set()
        starter.join()
        child.communicate()
    assert all(str(child.pid) in found for found in seen)
    assert str(child.pid) not in children(os.getpid())


def test_a_process_that_is_gone_has_none():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert children(child.pid) == set()
