"""Real `kill -9` of each process of a run, at several moments: nothing is lost or doubled.

The run is a real `npd run` in a process of its own, on tiny models; its children are found by what
the kernel says of them, and only they are killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import time

import pytest

from npd.store.ledger import Ledger
from run_process import (
    LIMIT,
    WINDOWED,
    WORKERS,
    Run,
    check_all_steps,
    check_books,
    child_named,
    is_alive,
    wait_for_child,
)

pytestmark = pytest.mark.timeout(1200)
# As threads of one process are, so that the student is the same bit for bit.
IN_TURN = {"overlap": False}


def student_bytes(run: Run) -> bytes:
    return (run.layout.student / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model_dir, tiny_teacher_dir):
    """An undisturbed inline run: its number of events and its student."""
    with Run(tmp_path_factory.mktemp("whole"), tiny_model_dir, tiny_teacher_dir) as run:
        run.finish()
        return run.num_events(), student_bytes(run)


def test_a_controller_killed_four_times_makes_the_same_student_bit_for_bit(whole, make_run):
    events, expected = whole
    run = make_run()
    moments = [share * events for share in (0.05, 0.3, 0.55, 0.8)]
    run.finish_killed(moments, made=(run.layout.root, "*.arrow"))
    check_books(run.layout, reuse=2)
    assert student_bytes(run) == expected
    assert run.num_events() == events


def check_is_as_undisturbed(run: Run, whole) -> None:
    check_books(run.layout, reuse=2)
    assert student_bytes(run) == whole[1]
    assert run.num_events() == whole[0]
    assert not list(run.layout.checkpoints.glob(".*")), "a part of a checkpoint"


@pytest.mark.parametrize("kind", ["inline", "local"])
def test_a_run_killed_while_a_checkpoint_is_written_beside_training_goes_on_before_it(
    kind, whole, make_run
):
    run = make_run(runtime={"kind": kind}, schedule=IN_TURN)
    process, held = run.start_and_hold_a_checkpoint()
    process.kill()
    process.wait()
    with Ledger.reader(run.layout.ledger_db) as ledger:
        assert ledger.last_checkpoint() is None, "it does not count before it is complete"
    held.unlink()
    run.finish()
    check_is_as_undisturbed(run, whole)


def test_a_trainer_killed_while_a_checkpoint_is_written_makes_it_again(whole, make_run):
    run = make_run(runtime={"kind": "local"}, schedule=IN_TURN)
    process, held = run.start_and_hold_a_checkpoint()
    os.kill(wait_for_child(process, "trainer"), signal.SIGKILL)
    held.unlink()
    run.finish(process)
    check_is_as_undisturbed(run, whole)
    with Ledger.reader(run.layout.ledger_db) as ledger:
        assert ledger.checkpoints()[0].step == 5


@pytest.mark.parametrize("kind", ["inline", "local"])
def test_a_signal_while_a_checkpoint_is_written_waits_for_it(kind, whole, make_run):
    run = make_run(runtime={"kind": kind}, schedule=IN_TURN)
    process, held = run.start_and_hold_a_checkpoint()
    process.send_signal(signal.SIGINT)
    while "stopping: waiting for running work" not in run.log.read_text():
        time.sleep(0.01)
    held.unlink()
    assert process.wait(LIMIT) == 130, run.log.read_text()[-2000:]
    with Ledger.reader(run.layout.ledger_db) as ledger:
        saved = [row.step for row in ledger.checkpoints()]
    assert len(saved) == 2, "the one being written, and the one of the end"
    assert saved[0] == 5
    run.finish()
    check_is_as_undisturbed(run, whole)


def test_a_second_signal_drops_the_checkpoint_that_is_being_written(whole, make_run):
    run = make_run(runtime={"kind": "local"}, schedule=IN_TURN)
    process, held = run.start_and_hold_a_checkpoint()
    for said in ("stopping: waiting for running work", "stopped without saving"):
        process.send_signal(signal.SIGINT)
        while said not in run.log.read_text():
            time.sleep(0.01)
    assert process.wait(LIMIT) == 1, run.log.read_text()[-2000:]
    with Ledger.reader(run.layout.ledger_db) as ledger:
        assert ledger.last_checkpoint() is None
    held.unlink()
    run.finish()
    check_is_as_undisturbed(run, whole)


def test_checkpoints_by_time_are_recorded_and_change_nothing_else(whole, make_run):
    run = make_run(checkpoint={"every_steps": 5, "every_minutes": 1e-4}, schedule=IN_TURN)
    run.finish_killed([0.4 * whole[0], 0.8 * whole[0]], made=(run.layout.root, "*.arrow"))
    check_books(run.layout, reuse=2)
    assert student_bytes(run) == whole[1]
    with Ledger.reader(run.layout.ledger_db) as ledger:
        saved = [row.step for row in ledger.checkpoints()]
    assert "CheckpointDue" in run.kinds()
    assert any(step % 5 for step in saved[:-1]), "by time"
    assert {5, 10} <= {*saved}, "and by steps"


def test_killed_workers_are_replaced_and_nothing_is_lost(make_run):
    run = make_run(runtime={"kind": "local"}, schedule=WINDOWED)
    run.finish_killing(run.start())
    check_all_steps(run)


def test_a_run_does_not_go_on_with_another_teacher(tmp_path, tiny_model_dir, tiny_teacher_dir):
    """By a worker that is started again; by `--resume` neither. Brought back, it is."""
    teacher = shutil.copytree(tiny_teacher_dir, tmp_path / "teacher")
    sections = {"runtime": {"kind": "local"}, "schedule": WINDOWED}
    with Run(tmp_path, tiny_model_dir, teacher, **sections) as run:
        process = run.start()
        assert run.wait_for(12, process)
        shutil.copytree(tiny_model_dir, teacher, dirs_exist_ok=True)
        os.kill(wait_for_child(process, "scorer-0"), signal.SIGKILL)
        assert process.wait(LIMIT) == 2
        said = f"error: the teacher {teacher} changed since the run was started"
        assert said in run.log.read_text()
        again = run.start()
        assert again.wait(LIMIT) == 2
        assert "the teacher changed since" in run.log.read_text()
        shutil.copytree(tiny_teacher_dir, teacher, dirs_exist_ok=True)
        run.finish()
        check_all_steps(run)


def test_a_killed_local_controller_takes_its_workers_along_and_resumes(make_run):
    run = make_run(runtime={"kind": "local"})
    process = run.start()
    assert run.wait_for(8, process)
    pids = [pid for name in WORKERS if (pid := child_named(process.pid, name)) is not None]
    assert pids
    process.kill()
    process.wait()
    deadline = time.monotonic() + LIMIT
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in pids), "a worker outlived its controller"
    run.finish()
    check_books(run.layout, reuse=2)


def test_sigterm_drains_saves_and_resumes_and_a_second_signal_stops_at_once(make_run, whole):
    run = make_run()
    process = run.start()
    assert run.wait_for(8, process)
    process.terminate()
    assert process.wait(LIMIT) == 130, run.log.read_text()[-2000:]
    with Ledger.reader(run.layout.ledger_db) as ledger:
        assert ledger.last_checkpoint() is not None
    process = run.start()
    assert run.wait_for(12, process)
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.05)
    # -15: the drain was over already, and the signal met a program that only wrote its report.
    assert process.wait(LIMIT) in (1, 130, -signal.SIGTERM), run.log.read_text()[-2000:]
    assert "Traceback" not in run.log.read_text()
    run.finish()
    check_books(run.layout, reuse=2)
    assert student_bytes(run) == whole[1]
