"""The paths of a run directory. No file is opened here.

runs/<name>/ config.json  ledger.db  ledger.mark  metrics.jsonl  trace.jsonl  trace.json
             report.html  heldout.arrow  status.json  logs/  probes/v000003/
             rollouts/000012.arrow  scored/000012.arrow  snapshots/v000003/  snapshots/LATEST
             checkpoints/step-000200/  student/
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from npd.store import files


@dataclass(frozen=True, slots=True)
class RunLayout:
    """The paths of a run directory, e.g. `RunLayout(Path("runs/npd")).scored(12)`."""

    root: Path

    @property
    def config_json(self) -> Path:
        """The resolved config, versions and commit."""
        return self.root / "config.json"

    @property
    def ledger_db(self) -> Path:
        """The ledger (SQLite). Beside it: `ledger.db-wal` while it is open, `ledger.lock`, and
        `ledger.mark`, which records how much of it is safely on disk."""
        return self.root / "ledger.db"

    @property
    def metrics_jsonl(self) -> Path:
        """One line for each step and segment."""
        return self.root / "metrics.jsonl"

    @property
    def trace_jsonl(self) -> Path:
        """One line for each span, written when it ends."""
        return self.root / "trace.jsonl"

    @property
    def trace_json(self) -> Path:
        """The same spans in Perfetto's format."""
        return self.root / "trace.json"

    @property
    def report_html(self) -> Path:
        """The report, one self-contained file."""
        return self.root / "report.html"

    @property
    def heldout(self) -> Path:
        """Scored held-out responses, fixed for the run."""
        return self.root / "heldout.arrow"

    @property
    def student(self) -> Path:
        """The final student, Hugging Face format."""
        return self.root / "student"

    @property
    def logs(self) -> Path:
        """One log file for each worker."""
        return self.root / "logs"

    @property
    def trainer_step(self) -> Path:
        """The trainer's progress in its segment, for the live view; resuming does not use it."""
        return self.logs / "trainer.step"

    @property
    def status_json(self) -> Path:
        """The progress of a running run, for `npd show`."""
        return self.root / "status.json"

    @property
    def snapshots(self) -> Path:
        """Published students and the `LATEST` pointer."""
        return self.root / "snapshots"

    @property
    def probes(self) -> Path:
        """Each snapshot's fingerprint, against which servers are verified."""
        return self.root / "probes"

    @property
    def checkpoints(self) -> Path:
        """Trainer states for resuming."""
        return self.root / "checkpoints"

    def rollouts(self, shard: int) -> Path:
        """The rollouts of a shard."""
        return self.root / "rollouts" / f"{shard:06d}.arrow"

    def scored(self, shard: int) -> Path:
        """The scored rollouts of a shard."""
        return self.root / "scored" / f"{shard:06d}.arrow"

    def snapshot(self, version: int) -> Path:
        """A published student, e.g. `snapshots/v000003`."""
        return self.snapshots / f"v{version:06d}"

    def checkpoint(self, step: int) -> Path:
        """A trainer state, e.g. `checkpoints/step-000200`."""
        return self.checkpoints / f"step-{step:06d}"

    def store(self, path: Path) -> None:
        """Bring `path`, which was written by a thread beside the worker's calls, where it is kept.

        It is kept here; a worker's cache uploads it.
        """

    @property
    def directories(self) -> tuple[Path, ...]:
        """Every directory that writers put files into."""
        names = ("rollouts", "scored", "logs", "snapshots", "checkpoints")
        return (self.root, *(self.root / name for name in names))

    @property
    def everything(self) -> tuple[Path, ...]:
        """Everything that npd puts into the run directory."""
        ledger = self.ledger_db.name
        names = (ledger, f"{ledger}-wal", f"{ledger}-shm", "ledger.lock", "ledger.mark", "trackers")
        files_of_all = (
            *(self.config_json, self.metrics_jsonl, self.trace_jsonl, self.trace_json),
            *(self.report_html, self.heldout, self.status_json, self.student, self.probes),
        )
        return (*files_of_all, *(self.root / name for name in names), *self.directories[1:])

    def first_made(self) -> Path | None:
        """A file that proves recorded events, or None.

        Held-out responses and the trace do not count, because they precede the first event.
        """
        folders = ("checkpoints/step-*", "snapshots/v*", "scored/*.arrow", "rollouts/*.arrow")
        found = (path for pattern in folders for path in sorted(self.root.glob(pattern)))
        if (path := next(found, None)) is not None:
            return path
        if self.metrics_jsonl.exists() and self.metrics_jsonl.stat().st_size:
            return self.metrics_jsonl
        return self.student if self.student.exists() else None

    def create(self) -> None:
        """Create the directories. Raises RunError if the disk is not writable."""
        with files.explain_write(self.root):
            for directory in self.directories:
                directory.mkdir(parents=True, exist_ok=True)

    def remove_temporary(self) -> list[Path]:
        """Remove the temporary files of killed writers; returns them.

        Call it only with the ledger's lock and while no worker runs: a live writer's temporary
        files look the same.
        """
        with files.explain_write(self.root):
            return [
                path for directory in self.directories for path in files.remove_temporary(directory)
            ]
