"""A real `npd run` in a process of its own, on tiny models, and what the kernel says of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import yaml

from npd.errors import NpdError
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.shards import read_rollouts
from npd.types import Outcome
from process_tree import children
from tiny_run import tiny_settings, write_prompts

# A run of seconds may take minutes on a machine that others use too.
LIMIT = 600.0
FAULTY = Path(__file__).parent / "faulty"
# Stages overlap, samples come and go, snapshots are refreshed: what there is to be lost.
WINDOWED = {
    "epochs": None, "steps": 24, "window": 20, "reuse": 2, "max_lag": 2,
    "refresh": {"every_steps": 6},
}  # fmt: skip
WORKERS = ("generator-0", "scorer-0", "trainer")


class Run:
    """One run directory, driven by as many `npd run` processes as it takes.

    `prefix` is put before the command, `environment` over this process's own. As a context it ends
    what it started; in a test, `make_run` of conftest.py does.
    """

    def __init__(
        self, folder: Path, student: Path, teacher: Path, *, num_prompts: int = 24, **sections
    ) -> None:
        prompts = write_prompts(folder / "prompts.jsonl", num_prompts)
        self.prefix: list[str] = []
        self.environment: dict[str, str] = {}
        self.layout = RunLayout(folder / "run")
        settings = tiny_settings(student, teacher, prompts, self.layout.root, **sections)
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(settings))
        self.log = folder / "out.log"
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self) -> subprocess.Popen:
        resume = ["--resume"] if self.layout.config_json.exists() else []
        command = [*self.prefix, sys.executable, "-m", "npd", "run", str(self.config), *resume]
        environment = {**os.environ, **self.environment}
        with self.log.open("ab") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment
            )
        self._started.append(process)
        return process

    def end(self) -> None:
        """Kill what is still running of it; its workers go with it."""
        for process in self._started:
            process.kill()
            process.wait()

    def finish(self, process: subprocess.Popen | None = None) -> None:
        process = process or self.start()
        assert process.wait(LIMIT) == 0, self.log.read_text()[-3000:]

    def finish_killing(self, process: subprocess.Popen) -> None:
        """Let it end, each worker killed twice: while it loads, and after some of its work."""
        for victim in WORKERS:
            os.kill(wait_for_child(process, victim), signal.SIGKILL)
        for victim, events in zip(WORKERS, (12, 18, 24), strict=True):
            assert self.wait_for(events, process), self.log.read_text()[-2000:]
            os.kill(wait_for_child(process, victim), signal.SIGKILL)
        self.finish(process)

    def finish_killed(
        self, moments: Collection[float], made: tuple[Path, str], *, lost: Path | None = None
    ) -> None:
        """Kill the controller after each of these numbers of events, then let it end.

        No file in the folder and of the pattern `made` is made twice. The folder `lost` is deleted
        after each kill.
        """
        times: dict[Path, int] = {}
        for moment in moments:
            process = self.start()
            assert self.wait_for(int(moment), process), self.log.read_text()[-2000:]
            process.kill()
            process.wait()
            assert not self.layout.student.exists()
            if lost is not None:
                shutil.rmtree(lost)
            times = {path: path.stat().st_mtime_ns for path in made[0].rglob(made[1])} | times
        self.finish()
        assert {path: path.stat().st_mtime_ns for path in times} == times, "made twice"

    def num_events(self) -> int:
        return len(self.kinds())

    def hold_checkpoints(self) -> Path:
        """Let every thread that writes a checkpoint wait while the file returned exists."""
        held = self.config.with_name("held")
        held.touch()
        path = os.pathsep.join([str(FAULTY), os.environ.get("PYTHONPATH", "")])
        self.environment |= {"PYTHONPATH": path, "NPD_TEST_HELD_CHECKPOINT": str(held)}
        return held

    def start_and_hold_a_checkpoint(self) -> tuple[subprocess.Popen, Path]:
        """Start, and wait until training has gone on beside a checkpoint that is not written.

        It is written once the file that is returned is gone.
        """
        held = self.hold_checkpoints()
        process = self.start()
        self.wait_until_trained_beside_a_write(process)
        return process, held

    def wait_until_trained_beside_a_write(self, process: subprocess.Popen) -> None:
        """Wait until steps were trained while a checkpoint was being written."""
        deadline = time.monotonic() + LIMIT
        while not _is_ahead_of_a_write(self.kinds()):
            assert process.poll() is None, self.log.read_text()[-2000:]
            assert time.monotonic() < deadline, "training waits for the checkpoint"
            time.sleep(0.01)

    def kinds(self) -> list[str]:
        """The kinds of the recorded events."""
        if not self.layout.ledger_db.exists():
            return []
        try:
            with Ledger.reader(self.layout.ledger_db) as ledger:
                return [kind for _, kind, _ in ledger.events()]
        except NpdError:
            return []  # the file is there, its tables not yet

    def wait_for(self, events: int, process: subprocess.Popen) -> bool:
        """Wait until so many events are recorded; False when the run ended before."""
        deadline = time.monotonic() + LIMIT
        while self.num_events() < events and time.monotonic() < deadline:
            if process.poll() is not None:
                return False
            time.sleep(0.01)
        return process.poll() is None


def _is_ahead_of_a_write(kinds: list[str]) -> bool:
    if "CheckpointCopied" not in kinds:
        return False
    since = kinds[len(kinds) - kinds[::-1].index("CheckpointCopied") :]
    return "SegmentTrained" in since and "CheckpointSaved" not in since


def child_named(parent: int, name: str) -> int | None:
    """The process id of `parent`'s worker called `name`."""
    for pid in children(parent):
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if name.encode() in arguments:
            return int(pid)
    return None


def wait_for_child(process: subprocess.Popen, name: str, known: Collection[int] = ()) -> int:
    """The same, as soon as there is one that is not among the `known`; the run must go on."""
    deadline = time.monotonic() + LIMIT
    while (pid := child_named(process.pid, name)) is None or pid in known:
        assert process.poll() is None, f"the run ended without {name}"
        assert time.monotonic() < deadline, f"no {name}"
        time.sleep(0.01)
    return pid


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def check_all_steps(run: Run) -> None:
    """A run of `WINDOWED` that has ended lost no sample, and each step counts once."""
    assert check_books(run.layout, reuse=2)[Outcome.FAILED] == 0
    with Ledger.reader(run.layout.ledger_db) as ledger:
        steps = [step.index for segment in ledger.segments_after(-1) for step in segment.steps]
    assert steps == list(range(1, WINDOWED["steps"] + 1))


def check_books(layout: RunLayout, *, reuse: int) -> Counter:
    """The conservation law, and the uses of every sample; returns the outcomes."""
    with Ledger.reader(layout.ledger_db) as ledger:
        conservation, rows = ledger.conservation(), ledger.samples()
    assert conservation.holds
    assert conservation.asked == len(rows)
    for row in rows:
        assert row.uses <= reuse
        assert (row.outcome is Outcome.TRAINED_OUT) == (row.uses == reuse)
    files = [r.sample_id for path in sorted(layout.rollouts(0).parent.glob("*.arrow"))
             for r in read_rollouts(path)]  # fmt: skip
    assert len(files) == len(set(files)), "a sample was generated twice"
    return Counter(row.outcome for row in rows)
