"""Real `kill -9` of each process of a run, at several moments: nothing is lost or doubled.

The run is a real `npd run` in a process of its own, on tiny models; its children are found by what
the kernel says of them, and only they are killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from npd.errors import StoreError
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.types import Outcome
from test_run import check_books
from tiny_run import tiny_settings, write_prompts

LIMIT = 180.0


class Run:
    """One run directory, driven by as many `npd run` processes as it takes."""

    def __init__(self, folder: Path, student: Path, teacher: Path, **sections) -> None:
        prompts = write_prompts(folder / "prompts.jsonl")
        self.layout = RunLayout(folder / "run")
        settings = tiny_settings(student, teacher, prompts, self.layout.root, **sections)
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(settings))
        self.log = folder / "out.log"

    def start(self) -> subprocess.Popen:
        resume = ["--resume"] if self.layout.config_json.exists() else []
        command = [sys.executable, "-m", "npd", "run", str(self.config), *resume]
        with self.log.open("ab") as out:
            return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)

    def finish(self, process: subprocess.Popen | None = None) -> None:
        process = process or self.start()
        assert process.wait(LIMIT) == 0, self.log.read_text()[-3000:]

    def num_events(self) -> int:
        if not self.layout.ledger_db.exists():
            return 0
        try:
            with Ledger.reader(self.layout.ledger_db) as ledger:
                return sum(1 for _ in ledger.events())
        except StoreError:
            return 0  # the file is there, its tables not yet

    def wait_for(self, events: int, process: subprocess.Popen) -> bool:
        """Wait until so many events are recorded; False when the run ended before."""
        deadline = time.monotonic() + LIMIT
        while self.num_events() < events and time.monotonic() < deadline:
            if process.poll() is not None:
                return False
            time.sleep(0.01)
        return process.poll() is None


def child_named(parent: int, name: str) -> int | None:
    """The process id of `parent`'s worker called `name`."""
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        for pid in task.read_text().split():
            try:
                arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if name.encode() in arguments:
                return int(pid)
    return None


def student_bytes(run: Run) -> bytes:
    return (run.layout.student / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model_dir, tiny_teacher_dir):
    """An undisturbed inline run: its number of events and its student."""
    run = Run(tmp_path_factory.mktemp("whole"), tiny_model_dir, tiny_teacher_dir)
    run.finish()
    return run.num_events(), student_bytes(run)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.55, 0.8])
def test_a_killed_controller_resumes_to_the_same_student_bit_for_bit(
    share, whole, tmp_path, tiny_model_dir, tiny_teacher_dir
):
    events, expected = whole
    run = Run(tmp_path, tiny_model_dir, tiny_teacher_dir)
    process = run.start()
    assert run.wait_for(int(share * events), process)
    process.kill()
    process.wait()
    assert not run.layout.student.exists()
    made = {path: path.stat().st_mtime_ns for path in run.layout.root.rglob("*.arrow")}
    run.finish()
    check_books(run.layout, reuse=2)
    assert {path: path.stat().st_mtime_ns for path in made} == made, "something was made twice"
    assert student_bytes(run) == expected
    assert run.num_events() == events


@pytest.mark.parametrize("victim", ["generator-0", "scorer-0", "trainer"])
def test_a_killed_worker_is_replaced_and_nothing_is_lost(
    victim, tmp_path, tiny_model_dir, tiny_teacher_dir
):
    run = Run(
        tmp_path,
        tiny_model_dir,
        tiny_teacher_dir,
        runtime={"kind": "local"},
        schedule={"epochs": None, "steps": 24, "window": 20, "reuse": 2, "max_lag": 2,
                  "refresh": {"every_steps": 6}},
    )  # fmt: skip
    process = run.start()
    killed = 0
    for events in (1, 12, 30):
        if not run.wait_for(events, process):
            break
        pid = child_named(process.pid, victim)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            killed += 1
    run.finish(process)
    assert killed >= 2
    outcomes = check_books(run.layout, reuse=2)
    assert outcomes[Outcome.FAILED] == 0
    with Ledger.reader(run.layout.ledger_db) as ledger:
        steps = [step.index for segment in ledger.segments_after(-1) for step in segment.steps]
    assert steps == list(range(1, 25)), "each step counts once"


def test_a_killed_local_controller_takes_its_workers_along_and_resumes(
    tmp_path, tiny_model_dir, tiny_teacher_dir
):
    run = Run(tmp_path, tiny_model_dir, tiny_teacher_dir, runtime={"kind": "local"})
    process = run.start()
    for events in (3, 15):
        assert run.wait_for(events, process)
        names = ("generator-0", "scorer-0", "trainer")
        pids = [pid for name in names if (pid := child_named(process.pid, name)) is not None]
        assert pids
        process.kill()
        process.wait()
        deadline = time.monotonic() + 15
        while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(_is_alive(pid) for pid in pids), "a worker outlived its controller"
        process = run.start()
    run.finish(process)
    check_books(run.layout, reuse=2)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_sigterm_drains_saves_and_resumes_and_a_second_signal_stops_at_once(
    tmp_path, tiny_model_dir, tiny_teacher_dir, whole
):
    run = Run(tmp_path, tiny_model_dir, tiny_teacher_dir)
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


def test_workers_lost_while_loading_and_preparing_are_replaced(
    tmp_path, tiny_model_dir, tiny_teacher_dir
):
    run = Run(tmp_path, tiny_model_dir, tiny_teacher_dir, runtime={"kind": "local"})
    process = run.start()
    deadline = time.monotonic() + LIMIT
    for name in ("scorer-0", "trainer"):
        while (pid := child_named(process.pid, name)) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    run.finish(process)
    check_books(run.layout, reuse=2)
