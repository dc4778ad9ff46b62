"""No process, shared memory or temporary file is left of a run, however it or a server ends."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from leak_checks import LeakCheck
from npd.engines import supervisor
from run_process import LIMIT, check_books, wait_for_child

SCHEDULE = {
    "epochs": None, "steps": 120, "window": 20, "reuse": 2, "max_lag": 2,
    "refresh": {"every_steps": 6},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_leaves_nothing_behind_however_it_ends(make_run, tmp_path):
    run = make_run(
        runtime={"kind": "local"},
        train={"row_tokens": 112, "ranks": 2},
        schedule=SCHEDULE,
    )
    around = LeakCheck(tmp_path)
    run.environment = around.environment

    def started():
        before, process = run.num_events(), run.start()
        assert run.wait_for(before + 8, process), run.log.read_text()[-2000:]
        around.look()
        assert len(around.processes()) >= 5, "the controller and its workers are seen"
        return process

    process = started()
    os.kill(wait_for_child(process, "trainer-1"), signal.SIGKILL)
    process.terminate()
    assert process.wait(LIMIT) == 130, run.log.read_text()[-2000:]
    assert around.left(run.layout.root) == [], "SIGTERM"

    process = started()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert process.wait(LIMIT) in (1, 130), run.log.read_text()[-2000:]
    assert around.left(run.layout.root) == [], "SIGINT twice"

    process = started()
    size = run.layout.ledger_db.with_name("ledger.db-wal").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    assert process.wait(LIMIT) == 1, run.log.read_text()[-2000:]
    assert around.left(run.layout.root) == [], "failure"

    run.finish()
    assert around.left(run.layout.root) == [], "success"
    check_books(run.layout, reuse=2)


# A server that keeps shared memory: some of its own, some that was there, some of its own that
# somebody else uses too. It has a child that is killed with it, as vLLM has.
SERVER = """
import subprocess, sys, time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
resource_tracker.register = resource_tracker.unregister = lambda *_: None
import multiprocessing
lock = multiprocessing.get_context("spawn").Lock()
kept = [SharedMemory(create=True, size=4096) for _ in range(2)] + [SharedMemory(sys.argv[1])]
print(kept[0].name, kept[1].name, "sem." + lock._semlock.name.strip("/"), flush=True)
time.sleep(600)
"""


def test_the_shared_memory_of_a_killed_server_goes_and_nobody_elses(monkeypatch):
    # Python would remove what it only attached to when this process ends.
    monkeypatch.setattr(resource_tracker, "register", lambda *_: None)
    monkeypatch.setattr(resource_tracker, "unregister", lambda *_: None)
    with ExitStack() as stack:

        def hold(segment: SharedMemory) -> SharedMemory:
            stack.callback(lambda: Path("/dev/shm", segment.name).unlink(missing_ok=True))
            stack.callback(segment.close)
            return segment

        before = hold(SharedMemory(create=True, size=4096))
        watched, ours = os.pipe()
        stack.callback(os.close, ours)
        command = [sys.executable, "-c", SERVER, before.name]
        guard = subprocess.Popen(
            [sys.executable, "-S", "-E", supervisor.__file__, str(watched), *command],
            stdout=subprocess.PIPE,
            pass_fds=(watched,),
            text=True,
        )
        os.close(watched)
        own, used, semaphore = guard.stdout.readline().split()
        assert Path("/dev/shm", semaphore).exists()
        user = hold(SharedMemory(used))
        [server] = Path(f"/proc/{guard.pid}/task/{guard.pid}/children").read_text().split()
        time.sleep(supervisor._LOOK_SECONDS + 2.0)
        os.kill(int(server), signal.SIGKILL)
        assert guard.wait(20) == 128 + signal.SIGKILL
        guard.stdout.close()
        assert not Path("/dev/shm", own).exists()
        assert not Path("/dev/shm", semaphore).exists()
        assert Path("/dev/shm", user.name).exists(), "somebody uses it"
        assert Path("/dev/shm", before.name).exists(), "it was there before"
