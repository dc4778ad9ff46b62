"""A ledger whose writer is ended by kill -9, at random moments: nothing acknowledged is lost."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from npd.errors import RunError
from npd.store.ledger import Conservation, Ledger


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "ledger.db"


WRITER = """
import sys
from pathlib import Path
from npd.store.ledger import Ledger
from npd.types import Outcome
with Ledger(Path(sys.argv[1])) as ledger:
    for turn in range(len(list(ledger.events())), 10**9):
        ids = range(8 * turn, 8 * turn + 8)
        with ledger.transaction():
            ledger.append_event("Turn", {"turn": turn, "pad": "x" * 500})
            ledger.add_samples(turn, [(i, i, 0) for i in ids])
            ledger.add_uses(ids)
            ledger.set_outcomes([(i, Outcome.REJECTED, "short") for i in ids[:3]])
            if turn:
                ledger.set_outcomes([(i - 8, Outcome.TRAINED_OUT, "") for i in ids[3:]])
            if turn % 50 == 0:
                ledger.add_checkpoint(turn, Path(sys.argv[1]).parent / str(turn))
        sys.stdout.write(f"{turn}\\n")
        sys.stdout.flush()
"""


def acknowledged(path, delay):
    """Run a writer, end it with SIGKILL `delay` seconds after its first commit; its last word."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as run:
        first = run.stdout.readline()
        time.sleep(delay)
        run.send_signal(signal.SIGKILL)
        rest = run.stdout.read()
    whole_lines = [line for line in (first + rest).splitlines(keepends=True) if line[-1:] == b"\n"]
    return int(whole_lines[-1])


def test_kill_9_loses_nothing_acknowledged(path):
    rng = random.Random(2)
    total = 0
    for _ in range(6):
        acked = acknowledged(path, rng.uniform(0.0, 0.15))
        with Ledger(path) as ledger:
            events = list(ledger.events())
            assert [payload["turn"] for _, _, payload in events] == list(range(len(events)))
            assert acked + 1 <= len(events) <= acked + 2
            assert len(events) > total
            total = len(events)
            found = ledger.conservation()
            assert found == Conservation(8 * total, 5 * (total - 1), 3 * total, 0, 0, 5)
            assert found.holds
            assert {row.uses for row in ledger.samples()} == {1}
            assert ledger.last_checkpoint().step == (total - 1) // 50 * 50
            assert ledger._db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_the_next_writer_is_let_in_after_kill_9(path):
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
        run.stdout.readline()
        with pytest.raises(RunError, match=rf"pid {run.pid} writes"):
            Ledger(path)
        with Ledger.reader(path) as reader:
            assert reader.conservation().holds
        run.send_signal(signal.SIGKILL)
        run.stdout.read()
    with Ledger(path) as ledger:
        assert ledger.conservation().holds


def test_a_reader_needs_no_index_of_the_log_that_a_power_cut_took(path, tmp_path):
    with Ledger(path) as ledger:
        ledger.add_samples(0, [(0, 0, 0), (1, 1, 0)])
        for name in ("ledger.db", "ledger.db-wal"):
            shutil.copy(path.with_name(name), tmp_path / name)
    with Ledger.reader(tmp_path / "ledger.db") as reader:
        assert reader.conservation() == Conservation(2, 0, 0, 0, 0, 2)
        with pytest.raises(RunError, match="readonly"):
            reader.add_samples(1, [(2, 0, 0)])
