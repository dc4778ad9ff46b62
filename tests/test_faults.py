"""Everything but `kill -9` that a machine does to a run, by real means: disks, clocks, hangs.

A run either goes on, or stops with one line that says what, where and what to do, and `--resume`
ends it once the cause is mended: books balanced, and in one process the student of an undisturbed
run bit for bit.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from pathlib import Path

import pytest

from npd.observe.metrics import read_metrics
from npd.observe.trace import read_trace
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.types import Outcome
from run_process import FAULTY, LIMIT, WINDOWED, Run, check_all_steps, check_books, child_named
from small_disk import DyingDisk, SmallDisk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def make(make_run):
    """As `make_run`; `disk` is where the run's directory lies."""

    def build(disk: SmallDisk | DyingDisk | None = None, **sections) -> Run:
        run = make_run(**sections)
        if disk is not None:
            run.prefix = disk.prefix
            run.layout = RunLayout(disk.view(run.layout.root))
        return run

    return build


@pytest.fixture(scope="module")
def expected(tmp_path_factory, tiny_model_dir, tiny_teacher_dir):
    """The student of an undisturbed inline run, and how many events that takes."""
    with Run(tmp_path_factory.mktemp("whole"), tiny_model_dir, tiny_teacher_dir) as run:
        run.finish()
        return student_bytes(run), run.num_events()


def student_bytes(run: Run) -> bytes:
    return (run.layout.student / "model.safetensors").read_bytes()


def complaint(run: Run, process=None) -> str:
    """The one line with which the run stops, now."""
    before = run.log.read_text() if process is None and run.log.exists() else ""
    process = process or run.start()
    assert process.wait(LIMIT) == 1, run.log.read_text()[-2000:]
    said = run.log.read_text()[len(before) :]
    assert "Traceback" not in said
    assert "a bug of npd" not in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert said.rstrip().endswith(errors[0])
    return errors[0]


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, under its old time of change."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_disk_that_is_always_too_small_costs_nothing_but_time(make, tmp_path, expected):
    with SmallDisk(tmp_path / "run", kib=4) as disk:
        run = make(disk)
        tries = 0
        while (process := run.start()).wait(LIMIT) != 0:
            tries += 1
            lines = run.log.read_text().splitlines()
            assert "no space left" in lines[-1] or "free disk space" in lines[-1], lines[-1]
            assert lines[-1].startswith("error: ")
            assert str(tmp_path / "run") in lines[-1]
            disk.resize(6 * disk.kib)
        assert process.returncode == 0
        assert tries >= 3
        assert "Traceback" not in run.log.read_text()
        assert student_bytes(run) == expected[0]
        run.layout = RunLayout(disk.copied(tmp_path / "copy"))
        check_books(run.layout, reuse=2)
        assert run.num_events() == expected[1]


def test_what_cannot_be_written_is_named_and_mended(make, tmp_path, expected):
    with SmallDisk(tmp_path / "run", kib=24) as disk:
        run = make(disk)
        assert "ledger" in complaint(run), "room for the record of the run and no more"
        disk.resize(64 * 1024)
        for folder in (".", "rollouts", "checkpoints"):
            disk.set_read_only(tmp_path / "run" / folder)
            line = complaint(run)
            assert f"cannot write {(tmp_path / 'run' / folder).resolve()}" in line
            assert "Read-only file system" in line
            assert "check that directory and its permissions" in line
            disk.set_writable(tmp_path / "run" / folder)
        run.finish()
        check_books(RunLayout(disk.copied(tmp_path / "copy")), reuse=2)
        assert student_bytes(run) == expected[0]


def test_damaged_files_are_found_named_and_made_again(make, expected):
    run = make()
    run.environment = {"PYTHONPATH": _with_faults(), "NPD_TEST_SLOW_DISK": "0.05"}
    process = run.start()
    assert run.wait_for(int(0.7 * expected[1]), process)
    process.kill()
    process.wait()
    run.environment = {}
    flip(run.layout.heldout)
    assert f"{run.layout.heldout} does not match its checksum: delete it" in complaint(run)
    run.layout.heldout.unlink()
    with Ledger.reader(run.layout.ledger_db) as ledger:
        checkpoint, snapshot = ledger.last_checkpoint(), ledger.snapshots()[-1]
    # More may lie there: one just saved and not recorded yet, and the one before it.
    for file in run.layout.checkpoints.glob("step-*/optimizer.safetensors"):
        flip(file)
    for file in run.layout.snapshots.glob("v*/model.safetensors"):
        flip(file)
    for shard, path in enumerate(sorted(run.layout.rollouts(0).parent.glob("*.arrow"))):
        path.write_bytes(path.read_bytes()[: 8 * shard])
    for path in run.layout.scored(0).parent.glob("*.arrow"):
        flip(path)
    run.finish()
    said = run.log.read_text()
    assert f"{checkpoint.path} is damaged" in said
    assert f"snapshot v{snapshot.version}, which was missing or damaged" in said
    assert re.search(r"regenerated: \d+ missing or damaged shard files", said)
    check_books(run.layout, reuse=2)
    assert student_bytes(run) == expected[0]


def test_a_disk_that_is_full_at_the_end_of_a_checkpoint_stops_the_run_in_one_line(
    make, tmp_path, expected
):
    with SmallDisk(tmp_path / "run", kib=64 * 1024) as disk:
        run = make(disk)
        held = run.hold_checkpoints()
        process = run.start()
        while not (metrics := run.layout.metrics_jsonl).exists() or not any(
            line["step"] > 5 for line in read_metrics(metrics)
        ):
            assert process.poll() is None, run.log.read_text()[-2000:]
            time.sleep(0.01)
        assert list(run.layout.checkpoints.glob(".step-000005.*")), "it is being written"
        filler = tmp_path / "run" / "filler"
        disk.do("sh", "-c", f"cat /dev/zero > {filler} 2>/dev/null || true")
        held.unlink()
        line = complaint(run, process)
        assert "no space left while writing" in line or "free disk space" in line
        disk.do("rm", str(filler))
        run.finish()
        run.layout = RunLayout(disk.copied(tmp_path / "copy"))
        check_books(run.layout, reuse=2)
        assert not list(run.layout.checkpoints.glob(".*"))
        assert student_bytes(run) == expected[0]
        assert run.num_events() == expected[1]


def test_a_slow_disk_only_takes_longer(make, expected):
    run = make()
    run.environment = {"PYTHONPATH": _with_faults(), "NPD_TEST_SLOW_DISK": "0.05"}
    run.finish()
    check_books(run.layout, reuse=2)
    assert student_bytes(run) == expected[0]


def test_a_clock_that_jumps_changes_nothing(make):
    run = make(runtime={"kind": "local"}, schedule=WINDOWED, observe={"report": True})
    run.environment = {"PYTHONPATH": _with_faults(), "NPD_TEST_CLOCK": "100000"}
    run.finish()
    assert check_books(run.layout, reuse=2)[Outcome.FAILED] == 0
    assert run.layout.report_html.exists()
    times = [line["time"] for line in read_metrics(run.layout.metrics_jsonl)]
    assert max(times) - min(times) > 100000, "the clock did jump"
    spans = read_trace(run.layout.trace_jsonl)
    assert max(span.end for span in spans) - min(span.start for span in spans) < LIMIT


def _with_faults() -> str:
    return os.pathsep.join([str(FAULTY), os.environ.get("PYTHONPATH", "")])


def test_workers_that_hang_are_replaced(make):
    run = make(runtime={"kind": "local", "call_timeout": 20.0},
               schedule={**WINDOWED, "max_tries": 9})  # fmt: skip
    process = run.start()
    assert run.wait_for(8, process)
    pids = {name: child_named(process.pid, name) for name in ("generator-0", "scorer-0", "trainer")}
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    run.finish(process)
    assert check_books(run.layout, reuse=2)[Outcome.FAILED] == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


def test_a_ledger_that_takes_no_more_stops_the_run_in_one_line(make):
    run = make(runtime={"kind": "local"}, schedule=WINDOWED)
    process = run.start()
    assert run.wait_for(8, process)
    size = run.layout.ledger_db.with_name("ledger.db-wal").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    line = complaint(run, process)
    assert f"cannot write {run.layout.ledger_db} (" in line
    assert "then resume" in line
    run.finish()
    check_all_steps(run)


def test_a_disk_that_dies_costs_only_what_it_had_not_taken_in(make, tmp_path, expected):
    with DyingDisk(tmp_path / "run") as disk:
        run = make(disk)
        process = run.start()
        while len(list(run.layout.scored(0).parent.glob("*.arrow"))) < 5:
            assert process.poll() is None, run.log.read_text()[-2000:]
            time.sleep(0.01)
        disk.die()
        assert str(tmp_path / "run") in complaint(run, process)
        disk.revive()
        run.finish()
        check_books(RunLayout(disk.copied(tmp_path / "copy")), reuse=2)
        assert student_bytes(run) == expected[0]
