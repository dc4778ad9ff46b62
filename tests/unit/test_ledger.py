"""The ledger: samples leave once, transactions are whole, errors say what to do."""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from npd.errors import RunError, StoreError
from npd.store import database
from npd.store.ledger import (
    CheckpointRow,
    Conservation,
    Ledger,
    SampleRow,
    SnapshotRow,
    marked_events,
    recorded_events,
)
from npd.types import Outcome, Row, SampleRef, Segment, Step
from store_samples import file_size_limit


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "ledger.db"


@pytest.fixture
def ledger(path):
    with Ledger(path) as ledger:
        yield ledger


def ask(ledger, shard, size=4, version=0):
    ids = range(shard * size, (shard + 1) * size)
    ledger.add_samples(shard, [(i, i % 10, version) for i in ids])
    return list(ids)


def make_segment(index, first_step, num_steps=2):
    def step(i):
        refs = tuple(SampleRef(10 * i + j, j, 1, 17 + j) for j in range(3))
        return Step(i, 0.1 / (i + 1), ((Row(refs[:2]), Row(refs[2:])), (Row(()),), ()))

    return Segment(index, 1, tuple(step(first_step + i) for i in range(num_steps)))


def test_events_come_back_in_order(ledger, path):
    payloads = [{"n": i, "x": i / 3, "text": "Δ\n'", "list": [1, None]} for i in range(2500)]
    with ledger.transaction():
        seqs = [ledger.append_event("Tick", payload) for payload in payloads]
    assert seqs == list(range(1, 2501))
    assert list(ledger.events()) == [
        (seq, "Tick", p) for seq, p in zip(seqs, payloads, strict=True)
    ]
    assert [seq for seq, _, _ in ledger.events(after=2498)] == [2499, 2500]


def test_a_sample_goes_through(ledger):
    ids = ask(ledger, shard=7)
    ledger.add_uses([ids[0], ids[0], ids[1]])
    ledger.set_outcomes(
        [(ids[0], Outcome.TRAINED_OUT, ""), (ids[1], Outcome.REJECTED, "degenerate")]
    )
    assert ledger.samples(limit=3) == [
        SampleRow(28, 8, 7, 0, 2, Outcome.TRAINED_OUT, ""),
        SampleRow(29, 9, 7, 0, 1, Outcome.REJECTED, "degenerate"),
        SampleRow(30, 0, 7, 0, 0, None, ""),
    ]
    assert [row.sample_id for row in ledger.samples("live")] == ids[2:]
    assert [row.sample_id for row in ledger.samples(Outcome.REJECTED)] == [29]
    assert ledger.samples(Outcome.STALE) == []
    assert ledger.shard_of(30) == 7
    with pytest.raises(StoreError, match="has no sample 99"):
        ledger.shard_of(99)


def test_conservation_and_reasons(ledger):
    assert ledger.conservation() == Conservation(0, 0, 0, 0, 0, 0)
    ids = ask(ledger, 0, size=6)
    ledger.set_outcomes([(ids[0], Outcome.REJECTED, "short")])
    ledger.set_outcomes(
        [
            (ids[1], Outcome.REJECTED, "short"),
            (ids[2], Outcome.REJECTED, "truncated"),
            (ids[3], Outcome.STALE, ""),
            (ids[4], Outcome.FAILED, "lost"),
        ]
    )
    assert ledger.conservation() == Conservation(6, 0, 3, 1, 1, 1)
    assert ledger.conservation().holds
    assert ledger.reasons() == {
        (Outcome.REJECTED, "short"): 2,
        (Outcome.REJECTED, "truncated"): 1,
        (Outcome.STALE, ""): 1,
        (Outcome.FAILED, "lost"): 1,
    }
    assert not Conservation(6, 0, 3, 1, 1, 0).holds


def test_conservation_notices_a_lost_sample(ledger):
    """The counts are kept apart from the rows, so the law is not true by construction."""
    ids = ask(ledger, 0)
    ledger._db.execute("DELETE FROM samples WHERE sample_id = ?", (ids[0],))
    assert not ledger.conservation().holds


def test_a_sample_leaves_once(ledger):
    ids = ask(ledger, 0)
    ledger.set_outcomes([(ids[0], Outcome.TRAINED_OUT, "")])
    for bad in ((ids[1], ids[0]), (ids[2], ids[2]), (ids[3], 99)):
        with pytest.raises(AssertionError, match="1 of 2 left, but not live"):
            ledger.set_outcomes([(i, Outcome.STALE, "") for i in bad])
    with pytest.raises(AssertionError, match="used, but not live"):
        ledger.add_uses([ids[0]])
    with pytest.raises(AssertionError, match="requested twice"):
        ask(ledger, 0)
    with pytest.raises(AssertionError, match="never requested"):
        ledger.set_shard(3, "scored")
    assert ledger.conservation() == Conservation(4, 1, 0, 0, 0, 3)
    assert [row.uses for row in ledger.samples()] == [0, 0, 0, 0]


def test_a_failed_transaction_leaves_nothing(ledger):
    def turn():
        with ledger.transaction():
            ledger.append_event("Tick", {})
            ask(ledger, 0)
            ledger.add_checkpoint(9, Path("/c"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        turn()
    assert list(ledger.events()) == []
    assert ledger.conservation().asked == 0
    assert ledger.shards() == {}
    assert ledger.last_checkpoint() is None


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_swallowed_error_undoes_the_whole_transaction(ledger, goes_on):
    def turn():
        with ledger.transaction():
            ask(ledger, 0)
            with suppress(AssertionError):
                ledger.add_uses([99])
            if goes_on:
                ledger.append_event("Tick", {})

    with pytest.raises(AssertionError, match="undone by an error"):
        turn()
    assert ledger.conservation().asked == 0
    assert list(ledger.events()) == []
    assert ask(ledger, 1)


def test_other_errors_of_a_transaction_pass_unchanged(ledger):
    with pytest.raises(FileNotFoundError), ledger.transaction():
        Path("/nonexistent/file").read_text()


def test_nothing_to_do_is_fine(ledger):
    ledger.add_uses([])
    ledger.set_outcomes([])
    ledger.add_samples(0, [])
    assert ledger.shards() == {0: "asked"}
    assert ledger.conservation().asked == 0


def test_segments(ledger):
    segments = [make_segment(0, 1), make_segment(1, 3), make_segment(2, 5, 1)]
    for segment in segments:
        ledger.add_segment(segment)
    assert list(ledger.segments_after(0)) == segments
    assert list(ledger.segments_after(2)) == segments[1:]
    assert list(ledger.segments_after(3)) == segments[1:]
    assert list(ledger.segments_after(5)) == []


def test_many_segments_come_page_by_page(ledger):
    segments = [make_segment(i, 1 + 2 * i) for i in range(250)]
    with ledger.transaction():
        for segment in segments:
            ledger.add_segment(segment)
    assert list(ledger.segments_after(0)) == segments
    assert list(ledger.segments_after(101)) == segments[50:]


def test_shard_states(ledger):
    ask(ledger, 0)
    ask(ledger, 1)
    ledger.set_shard(0, "generated")
    ledger.set_shard(0, "scored")
    assert ledger.shards() == {0: "scored", 1: "asked"}


def test_snapshots_and_checkpoints_move_with_the_run(ledger, path, tmp_path):
    assert ledger.last_checkpoint() is None
    ledger.add_snapshot(0, 0, path.parent / "snapshots" / "v000000", "abc")
    ledger.add_snapshot(0, 0, path.parent / "snapshots" / "v000000", "abd")
    ledger.add_snapshot(1, 8, Path("/elsewhere/v000001"), "def")
    ledger.add_checkpoint(200, path.parent / "checkpoints" / "step-000200")
    ledger.add_checkpoint(100, path.parent / "checkpoints" / "step-000100")
    ledger.close()
    moved = tmp_path / "moved"
    shutil.move(path.parent, moved)
    with Ledger(moved / "ledger.db") as ledger:
        assert ledger.snapshots() == [
            SnapshotRow(0, 0, moved / "snapshots" / "v000000", "abd"),
            SnapshotRow(1, 8, Path("/elsewhere/v000001"), "def"),
        ]
        want = CheckpointRow(200, moved / "checkpoints" / "step-000200")
        assert ledger.last_checkpoint() == want


def test_checkpoint_inside_a_larger_transaction(ledger, path):
    with ledger.transaction():
        ledger.append_event("CheckpointSaved", {"step": 8})
        ledger.add_checkpoint(8, path.parent / "c")
    assert ledger.last_checkpoint().step == 8


def test_second_writer_is_refused_and_told_who_writes(ledger, path):
    with pytest.raises(RunError, match=rf"already running \(pid {os.getpid()} writes"):
        Ledger(path)
    ledger.append_event("Tick", {})  # the first goes on
    ledger.close()
    ledger.close()
    with Ledger(path) as second:
        assert len(list(second.events())) == 1


def test_reader_looks_while_the_writer_writes(ledger, path):
    ask(ledger, 0)
    with Ledger.reader(path) as reader, ledger.transaction():
        ledger.append_event("Tick", {})
        ask(ledger, 1)
        assert reader.conservation() == Conservation(4, 0, 0, 0, 0, 4)
    with Ledger.reader(path) as reader:
        assert reader.conservation().asked == 8
        with pytest.raises(RunError):
            reader.append_event("Tick", {})
        assert reader.conservation().holds
    ledger.close()
    with Ledger.reader(path) as reader:
        assert reader.conservation().asked == 8


def test_the_lock_is_its_owners_and_who_holds_it_is_named(path):
    path.parent.mkdir()
    lock_file = path.with_suffix(".lock")
    lock_file.touch(0o644)
    Ledger(path).close()
    assert lock_file.stat().st_mode & 0o777 == 0o600
    hold = (
        f"import fcntl; f = open({str(lock_file)!r}); fcntl.flock(f, 2); print(flush=True); input()"
    )
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(RunError, match=rf"locked by pid {other.pid} \(python.*not a run: end"):
            Ledger(path)
        other.communicate(b"\n")
    Ledger(path).close()


def test_a_link_for_a_lock_is_not_followed(path):
    path.parent.mkdir()
    path.with_suffix(".lock").symlink_to(path.parent / "theirs")
    with pytest.raises(RunError, match=r"cannot write .*ledger\.lock"):
        Ledger(path)
    assert not (path.parent / "theirs").exists()


def test_the_mark_is_how_much_was_safe_at_the_first_event_and_when_a_snapshot_was(path):
    with Ledger(path) as ledger:
        assert marked_events(path) == 0
        ledger.append_event("Tick", {})
        assert marked_events(path) == 1
        ledger.append_event("Tock", {})
        assert marked_events(path) == 1
        ledger.add_snapshot(0, 0, path.parent / "v0", "checksum")
        ledger.append_event("Tick", {})
        assert (marked_events(path), recorded_events(path)) == (2, 3)
    assert recorded_events(path) == 3
    path.unlink()
    assert recorded_events(path) == 0


def test_reader_of_nothing(tmp_path):
    with pytest.raises(StoreError, match="is missing: restore it"):
        Ledger.reader(tmp_path / "ledger.db")
    assert list(tmp_path.iterdir()) == []


HOLD = (
    "import sys; from pathlib import Path; from npd.store import database; "
    "held = database.lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


def test_a_run_in_a_container_is_known(path):
    """There its process has another number, which it has noted."""
    command = ["unshare", "-Urpf", sys.executable, "-c", HOLD, str(path)]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as run:
        if run.stdout.readline() != b"held\n":
            pytest.skip("no containers here")
        assert path.with_suffix(".lock").read_text() == "1\n"
        assert database.is_locked(path)
        with pytest.raises(RunError, match=r"already running \(pid (?!1 )\d+ writes"):
            database.lock(path)
        run.stdin.close()
    assert not database.is_locked(path)


def test_reading_a_run_at_rest_leaves_nothing(ledger, path):
    ledger.append_event("Tick", {})
    ledger.close()
    before = {file.name: file.stat().st_mtime_ns for file in path.parent.iterdir()}
    path.parent.chmod(0o555)
    try:
        with Ledger.reader(path) as reader:
            assert reader.num_events() == recorded_events(path) == 1
    finally:
        path.parent.chmod(0o755)
    assert {file.name: file.stat().st_mtime_ns for file in path.parent.iterdir()} == before


def test_damaged_or_foreign_file_is_told(path):
    path.parent.mkdir()
    path.write_bytes(b"this is not a database, at all" * 100)
    with pytest.raises(StoreError, match=r"ledger\.db is damaged"):
        Ledger(path)
    path.unlink()
    with Ledger(path) as ledger:  # the refused one has let the lock go
        for number in (1, 99):  # an earlier one, a later one
            ledger._db.execute(f"PRAGMA user_version = {number}")
            with pytest.raises(StoreError, match=f"has format {number}, not 2: use the npd that"):
                Ledger.reader(path)
    with pytest.raises(StoreError, match="has format 99"):
        Ledger(path)


def test_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        Ledger(tmp_path / "file" / "ledger.db")


def test_full_disk_is_told_and_leaves_the_ledger_whole(ledger, path):
    ask(ledger, 0)
    size = path.with_name("ledger.db-wal").stat().st_size

    def turn():
        with ledger.transaction():
            ledger.append_event("Big", {"x": "y" * 100_000})
            ask(ledger, 1)

    with file_size_limit(size + 1000), pytest.raises(RunError, match="free disk space"):
        turn()
    assert list(ledger.events()) == []
    assert ledger.conservation() == Conservation(4, 0, 0, 0, 0, 4)
    ledger.append_event("Tick", {})
    assert len(list(ledger.events())) == 1
