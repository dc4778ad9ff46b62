"""Real `kill -9` in runs that exchange files by a URL: nothing is lost, nothing is left behind."""

from __future__ import annotations

import os
import signal

import pytest

from run_process import WINDOWED, Run, check_all_steps, wait_for_child
from test_crash import student_bytes
from test_ray_run import seats
from test_run import check_books

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def make_shared(make_run, tmp_path):
    """Makes a run that exchanges its files by way of `tmp_path`."""
    places = {"shared": f"file://{tmp_path}/store", "scratch": str(tmp_path / "scratch")}

    def make(**sections) -> Run:
        runtime = {"kind": "inline", **places, **sections.pop("runtime", {})}
        return make_run(runtime=runtime, **sections)

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model_dir, tiny_teacher_dir):
    """An undisturbed inline run in one folder: its number of events and its student."""
    with Run(tmp_path_factory.mktemp("whole"), tiny_model_dir, tiny_teacher_dir) as run:
        run.finish()
        return run.num_events(), student_bytes(run)


@pytest.mark.slow
@pytest.mark.parametrize(("shares", "keeps_scratch"), [((0.1, 0.8), True), ((0.5,), False)])
def test_a_killed_controller_resumes_to_the_same_student_bit_for_bit(
    shares, keeps_scratch, whole, tmp_path, make_shared
):
    """With what its workers left on their machine, or on a machine that has nothing."""
    events, expected = whole
    run = make_shared()
    run.finish_killed(
        [share * events for share in shares],
        made=(tmp_path / "store", "*.arrow.json"),
        lost=None if keeps_scratch else tmp_path / "scratch",
    )
    assert student_bytes(run) == expected
    assert run.num_events() == events
    check_books(run.layout, reuse=2)
    assert not any((tmp_path / "scratch").iterdir())
    assert not (tmp_path / "store" / "tiny" / "arrivals").exists()


@pytest.mark.slow
def test_killed_workers_are_replaced_and_nothing_is_lost(tmp_path, make_shared):
    run = make_shared(runtime={"kind": "local"}, schedule=WINDOWED)
    run.finish_killing(run.start())
    check_all_steps(run)
    assert not any((tmp_path / "scratch").iterdir())


@pytest.mark.slow
def test_a_trainer_of_two_ranks_exchanges_files_too(make_shared):
    run = make_shared(runtime={"kind": "local"}, train={"ranks": 2})
    process = run.start()
    assert run.wait_for(20, process)
    os.kill(wait_for_child(process, "trainer-1"), signal.SIGKILL)
    run.finish(process)
    check_books(run.layout, reuse=2)
    assert student_bytes(run)


@pytest.mark.slow
def test_actors_on_ray_that_share_no_folder_exchange_files(tmp_path, make_shared, ray_address):
    """Their run directory is the controller's alone; the trainer's actor is killed half way."""
    run = make_shared(
        runtime={"kind": "ray", "device": "cpu", "threads": 1, "ray": {"address": ray_address}},
    )
    process = run.start()
    assert run.wait_for(20, process)
    pid = seats(run.layout.root)["trainer"]
    os.kill(pid, signal.SIGKILL)
    run.finish(process)
    check_books(run.layout, reuse=2)
    assert student_bytes(run)
    assert not list(run.layout.root.glob("*/*.arrow"))
    assert not any((tmp_path / "scratch").glob("*/trainer"))
