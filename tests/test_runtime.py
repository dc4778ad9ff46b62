"""One contract over all runtimes, then what only processes can do: die, hang, and be orphaned."""

import asyncio
import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest

from npd.config import RuntimeConfig
from npd.errors import ModelError, RunError, WorkerLostError
from npd.runtime import CallResult, build_runtime, worker_main
from npd.runtime.local import LocalRuntime, search_path
from worker_factories import BrokenFactory, ClosingFactory, ToyFactory

TESTS = Path(__file__).parent


@pytest.fixture(params=["inline", "local", "ray"])
def kind(request):
    if request.param == "ray":
        request.getfixturevalue("ray_address")
    return request.param


@pytest.fixture(autouse=True)
def _no_thread_outlives_a_test():
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if "ray" not in thread.name and "grpc" not in thread.name]


def drive(kind, log_dir, story, **config):
    """Run `story(runtime)` in a fresh loop and close the runtime after it."""

    async def whole():
        if kind == "ray":
            config["ray"] = {"address": os.environ["RAY_ADDRESS"]}
        runtime = build_runtime(RuntimeConfig(kind=kind, **config), log_dir)
        try:
            return await story(runtime)
        finally:
            await runtime.close()

    return asyncio.run(whole())


def is_running(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def wait_until_gone(pid, seconds=600.0):
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


# --- the contract -------------------------------------------------------------------------------


def test_calls_keep_one_object_and_measure_themselves(kind, tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(start=10), threads=1)
        assert worker.name == "toy"
        first = await worker.call("add", 5)
        second = await worker.call("slow_add", 0.05, 1)
        return first, second

    before = time.time()
    first, second = drive(kind, tmp_path, story)
    assert isinstance(first, CallResult)
    assert (first.value, second.value) == (15, 16)
    assert before <= first.started <= first.ended <= second.started
    assert second.ended - second.started >= 0.05
    assert second.ended <= time.time()


def test_each_worker_has_a_place_of_its_own(kind, tmp_path):
    async def story(runtime):
        workers = [runtime.spawn(f"toy-{i}", ToyFactory(i), threads=1) for i in range(2)]
        places = [(await worker.call("place")).value for worker in workers]
        totals = [(await worker.call("add", 1)).value for worker in workers]
        again = [(await worker.call("place")).value for worker in workers]
        return places, again, totals, [worker.pid for worker in workers]

    places, again, totals, pids = drive(kind, tmp_path, story)
    assert len(set(places)) == 2
    assert places == again
    assert totals == [1, 2]
    inside = {pid for pid, _ in places}
    if kind == "inline":
        assert inside == {os.getpid()}
        assert pids == [None, None]
    else:
        assert os.getpid() not in inside
        assert [pid for pid, _ in places] == pids
        # Ray ends the process of an actor that is no more a moment later.
        assert all(wait_until_gone(pid, 600.0 if kind == "ray" else 0.0) for pid in pids)


def test_calls_of_one_worker_take_turns_in_order(kind, tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        calls = [worker.call("slow_add", 0.02, 10**i) for i in range(4)]
        return await asyncio.gather(*calls)

    replies = drive(kind, tmp_path, story)
    assert [reply.value for reply in replies] == [1, 11, 111, 1111]
    for earlier, later in itertools.pairwise(replies):
        assert earlier.ended <= later.started


def test_two_workers_overlap(kind, tmp_path):
    async def story(runtime):
        workers = [runtime.spawn(f"toy-{i}", ToyFactory(), threads=1) for i in range(2)]
        await asyncio.gather(*(worker.call("add", 0) for worker in workers))
        return await asyncio.gather(*(worker.call("slow_add", 0.4, 1) for worker in workers))

    one, two = drive(kind, tmp_path, story)
    assert max(one.started, two.started) < min(one.ended, two.ended)


def test_arrays_and_large_values_arrive_whole(kind, tmp_path):
    big = np.arange(3_000_000, dtype=np.int32)

    async def story(runtime):
        return await runtime.spawn("toy", ToyFactory(), threads=1).call("double", big)

    value = drive(kind, tmp_path, story).value
    assert value.dtype == np.int32
    np.testing.assert_array_equal(value, 2 * big)


@pytest.mark.parametrize(
    ("method", "error"), [("raise_model_error", ModelError), ("raise_run_error", RunError)]
)
def test_npd_errors_keep_class_and_message(kind, tmp_path, method, error):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        with pytest.raises(error) as caught:
            await worker.call(method, "what, where, remedy")
        assert (await worker.call("add", 1)).value == 1
        return caught.value

    caught = drive(kind, tmp_path, story)
    assert type(caught) is error
    assert str(caught) == "what, where, remedy"


def test_unknown_subclass_of_an_npd_error_is_still_that_error(kind, tmp_path):
    async def story(runtime):
        with pytest.raises(ModelError, match=r"^one and two$"):
            await runtime.spawn("toy", ToyFactory(), threads=1).call("raise_sharp_error")

    drive(kind, tmp_path, story)


def test_other_exceptions_arrive_as_run_error_with_traceback_in_the_log(kind, tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        with pytest.raises(RunError) as caught:
            await worker.call("raise_value_error", "bad\nshape")
        assert (await worker.call("add", 1)).value == 1
        return str(caught.value)

    message = drive(kind, tmp_path, story)
    log = tmp_path / "toy.log"
    assert "toy" in message
    assert "raise_value_error" in message
    assert "ValueError: bad shape" in message
    assert str(log) in message
    assert "\n" not in message
    text = log.read_text()
    assert "Traceback (most recent call last)" in text
    assert "raise ValueError(message)" in text


def test_unknown_method_is_a_run_error_and_not_the_end(kind, tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        with pytest.raises(RunError, match="no_such_method"):
            await worker.call("no_such_method")
        return (await worker.call("add", 2)).value

    assert drive(kind, tmp_path, story) == 2


def test_failed_build_is_reported_by_the_call_and_tried_again(kind, tmp_path):
    cure = tmp_path / "cure"

    async def story(runtime):
        worker = runtime.spawn("toy", BrokenFactory(cure), threads=1)
        for _ in range(2):
            with pytest.raises(ModelError, match="/nowhere does not exist"):
                await worker.call("add", 1)
        cure.touch()
        return (await worker.call("add", 1)).value

    assert drive(kind, tmp_path, story) == 8


def test_cancelled_caller_leaves_its_call_to_finish(kind, tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        await worker.call("add", 1)
        running = asyncio.create_task(worker.call("slow_add", 1.0, 10))
        waiting = asyncio.create_task(worker.call("add", 1000))
        await asyncio.sleep(0.1)
        waiting.cancel()
        running.cancel()
        results = await asyncio.gather(running, waiting, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        return [(await worker.call("add", 100)).value for _ in range(2)]

    assert drive(kind, tmp_path, story) == [111, 211]


def test_restart_gives_a_fresh_object(kind, tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(5), threads=1)
        await worker.call("add", 1)
        old = worker.pid
        await worker.restart()
        return (await worker.call("add", 1)).value, old, worker.pid

    value, old, new = drive(kind, tmp_path, story)
    assert value == 6
    assert (old is None and new is None) or old != new


def test_overrun_is_a_loss_until_restart(kind, tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        await worker.call("add", 1)
        with pytest.raises(WorkerLostError, match=r"toy.*slow_add\(\) within 0.1 s"):
            await worker.call("slow_add", 0.6, 1, timeout=0.1)
        with pytest.raises(WorkerLostError, match="slow_add"):
            await worker.call("add", 1)
        await worker.restart()
        return (await worker.call("add", 1)).value

    assert drive(kind, tmp_path, story) == 1


def test_the_runtime_has_a_default_timeout(kind, tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        await worker.call("add", 1, timeout=600)
        with pytest.raises(WorkerLostError, match=r"runtime\.call_timeout"):
            await worker.call("slow_add", 0.6, 1)

    drive(kind, tmp_path, story, call_timeout=0.1)


def test_close_lets_the_object_close_itself(kind, tmp_path):
    mark = tmp_path / "mark"

    async def story(runtime):
        worker = runtime.spawn("closing", ClosingFactory(mark), threads=1)
        assert (await worker.call("touch")).value is False
        await worker.close()
        assert mark.read_text() == "closed"
        with pytest.raises(WorkerLostError, match="closing is closed"):
            await worker.call("touch")
        await worker.close()

    drive(kind, tmp_path, story)


def test_close_with_a_call_running_ends_everything(kind, tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        await worker.call("add", 1)
        seconds = 0.5 if kind == "inline" else 60.0
        busy = asyncio.create_task(worker.call("slow_add", seconds, 1))
        await asyncio.sleep(0.1)
        await runtime.close()
        return worker.pid, await asyncio.gather(busy, return_exceptions=True)

    pid, (result,) = drive(kind, tmp_path, story)
    assert pid is None
    assert result.value == 2 if kind == "inline" else isinstance(result, WorkerLostError)


def test_a_worker_never_called_closes(kind, tmp_path):
    async def story(runtime):
        return runtime.spawn("idle", ToyFactory(), threads=1).pid

    pid = drive(kind, tmp_path, story)
    assert pid is None or not is_running(pid)


def test_torch_gets_the_threads_asked_for(kind, tmp_path):
    async def story(runtime):
        return (await runtime.spawn("toy", ToyFactory(), threads=1).call("torch_threads")).value

    assert drive(kind, tmp_path, story) == 1


# --- processes only -----------------------------------------------------------------------------


def test_threads_are_in_the_environment_of_a_process(tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=3)
        return (await worker.call("environment", "OMP_NUM_THREADS", "MKL_NUM_THREADS")).value

    assert drive("local", tmp_path, story) == ["3", "3"]
    assert os.environ["OMP_NUM_THREADS"] != "3"


@pytest.mark.parametrize("first", ["", ".", None])
def test_a_worker_runs_no_file_of_the_current_directory(tmp_path, monkeypatch, first):
    """Not as a notebook searches it, not by an empty part of PYTHONPATH."""
    for name in ("json", "socket", "pickle", "numpy", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"print('{name} was run'); raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path) if first is None else first, *sys.path])
    if first is not None:
        monkeypatch.setenv("PYTHONPATH", f"{first}{os.pathsep}/nowhere")

    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        return (await worker.call("add", 1)).value, (await worker.call("environment", "PYTHONPATH"))

    total, environment = drive("local", tmp_path, story)
    assert total == 1
    assert environment.value[0] in ("/nowhere", os.environ.get("PYTHONPATH"))
    assert (tmp_path / "toy.log").read_text() == ""


def test_what_a_factory_comes_from_is_found_in_the_current_directory_too(monkeypatch):
    monkeypatch.chdir(TESTS)
    assert search_path(ToyFactory())[-1] == str(TESTS)
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setattr(sys, "path", [str(TESTS), "", "/elsewhere"])
    assert search_path(ToyFactory())[:2] == [str(TESTS), "/elsewhere"]


def test_output_of_every_life_is_appended_to_the_log(tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        await worker.call("notify", "first life")
        await worker.restart()
        await worker.call("notify", "second life")

    drive("local", tmp_path, story)
    lines = (tmp_path / "toy.log").read_text().splitlines()
    assert lines == ["first life", "first life", "second life", "second life"]


@pytest.mark.parametrize("is_told_first", [True, False])
def test_a_listener_whose_socket_is_closed_at_any_moment_ends_quietly(is_told_first):
    class Closing(socket.socket):
        def fileno(self):
            """The number of a file that is closed as soon as somebody has it, or already was."""
            number = super().fileno()
            self.close()
            return number if is_told_first else super().fileno()

    ours, theirs = socket.socketpair()
    inbox = SimpleQueue()
    with theirs:
        worker_main._listen(Closing(fileno=ours.detach()), os.getppid(), inbox)
    assert inbox.empty()


@pytest.mark.parametrize(
    ("method", "argument", "fate"),
    [
        ("die", signal.SIGKILL, "SIGKILL"),
        ("die", signal.SIGTERM, "SIGTERM"),
        ("exit_hard", 3, "exited with code 3"),
    ],
)
def test_a_death_names_worker_fate_and_log(tmp_path, method, argument, fate):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        pid = worker.pid
        with pytest.raises(WorkerLostError) as caught:
            await worker.call(method, argument)
        assert worker.pid is None
        with pytest.raises(WorkerLostError, match=fate):
            await worker.call("add", 1)
        await worker.restart()
        assert worker.pid != pid
        assert (await worker.call("add", 1)).value == 1
        return str(caught.value)

    message = drive("local", tmp_path, story)
    for part in ("worker toy", fate, f"{method}()", str(tmp_path / "toy.log")):
        assert part in message
    assert "\n" not in message


def test_death_while_idle_is_found_by_the_next_call(tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        await worker.call("add", 1)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerLostError, match="SIGKILL"):
            await worker.call("add", 1)

    drive("local", tmp_path, story)


def test_calls_that_waited_for_a_lost_worker_are_lost_too(tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        calls = [worker.call("die", signal.SIGKILL), worker.call("add", 1), worker.call("add", 2)]
        return await asyncio.gather(*calls, return_exceptions=True)

    results = drive("local", tmp_path, story)
    assert all(isinstance(result, WorkerLostError) for result in results)


def test_restart_under_a_running_call(tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        await worker.call("add", 1)
        old = worker.pid
        running = asyncio.create_task(worker.call("slow_add", 30, 1))
        waiting = asyncio.create_task(worker.call("add", 1))
        await asyncio.sleep(0.1)
        await worker.restart()
        results = await asyncio.gather(running, waiting, return_exceptions=True)
        assert all(isinstance(result, WorkerLostError) for result in results)
        assert not is_running(old)
        return (await worker.call("add", 1)).value

    assert drive("local", tmp_path, story) == 1


def test_a_worker_that_somebody_stopped_goes_on(tmp_path, caplog):
    async def story():
        runtime = LocalRuntime(tmp_path, patience=0.2)
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        try:
            await worker.call("add", 1)
            os.kill(worker.pid, signal.SIGSTOP)
            value = (await worker.call("add", 1, timeout=60)).value
            os.kill(worker.pid, signal.SIGSTOP)  # idle: it still ends by itself
            return value
        finally:
            began = time.monotonic()
            await runtime.close()
            assert time.monotonic() - began < 9, "killed after the grace period"

    assert asyncio.run(story()) == 2
    assert "was stopped (SIGSTOP): continued" in caplog.text


def test_no_log_is_written_through_a_link(tmp_path):
    (tmp_path / "toy.log").symlink_to(tmp_path / "theirs")

    async def story(runtime):
        runtime.spawn("toy", ToyFactory(), threads=1)

    with pytest.raises(RunError, match=r"cannot start worker toy with its log in .*toy\.log"):
        drive("local", tmp_path, story)
    assert not (tmp_path / "theirs").exists()


def test_a_closed_worker_is_not_started_again(tmp_path):
    """As when one worker's error ends a run while another, killed with it, would be replaced."""

    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        restarting = asyncio.create_task(worker.restart())
        await asyncio.sleep(0)
        await worker.close()
        for restart in (restarting, worker.restart()):
            with pytest.raises(WorkerLostError, match="worker toy is closed"):
                await restart
        return worker.pid

    assert drive("local", tmp_path, story) is None


def test_a_frozen_process_cannot_hold_up_a_call(tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        await worker.call("add", 1)
        pid = worker.pid
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerLostError, match=r"within 0\.2 s"):
            await worker.call("double", np.zeros(5_000_000), timeout=0.2)
        return pid

    assert not is_running(drive("local", tmp_path, story))


def test_interrupt_is_left_to_the_controller(tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        value = (await worker.call("survive_interrupt")).value
        assert os.getsid(worker.pid) != os.getsid(0)
        return value

    assert drive("local", tmp_path, story) == "still here"


def test_a_reply_that_cannot_travel_is_an_error_and_not_the_end(tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        with pytest.raises(RunError, match="lambda_"):
            await worker.call("lambda_")
        with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
            await worker.call("double", lambda: 1)
        return (await worker.call("add", 1)).value

    assert drive("local", tmp_path, story) == 1


PARENT = """
import asyncio, os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from worker_factories import ToyFactory
from npd.config import RuntimeConfig
from npd.runtime import build_runtime

async def main():
    runtime = build_runtime(RuntimeConfig(kind="local"), Path({logs!r}))
    workers = [runtime.spawn(name, ToyFactory(), threads=1) for name in ("busy", "idle", "new")]
    for worker in workers[:2]:
        await worker.call("add", 1)
    call = asyncio.create_task(workers[0].call("slow_add", 600, 1))
    await asyncio.sleep(0.2)
    pids = [worker.pid for worker in workers]
    if {forks}:
        holder = os.fork()  # holds our ends of the sockets open after we are gone
        if holder == 0:
            time.sleep(60)
            os._exit(0)
        pids.append(holder)
    print(*pids, flush=True)
    await call

asyncio.run(main())
"""


@pytest.mark.parametrize("forks", [False, True])
def test_no_worker_outlives_a_killed_parent(tmp_path, forks):
    program = PARENT.format(tests=str(TESTS), logs=str(tmp_path), forks=forks)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        workers, holders = pids[:3], pids[3:]
        assert len(workers) == 3
        assert all(is_running(pid) for pid in pids)
        os.kill(workers[1], signal.SIGSTOP)  # one that cannot even listen
        parent.kill()
    try:
        assert [pid for pid in workers if not wait_until_gone(pid)] == []
        assert all(is_running(pid) for pid in holders)
    finally:
        for pid in holders:
            os.kill(pid, signal.SIGKILL)
