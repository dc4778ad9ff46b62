"""Where everything of a run lies. Paths only: no file is opened here.

runs/<name>/ config.json  ledger.db  metrics.jsonl  trace.jsonl  trace.json  report.html
             heldout.arrow  logs/  probes/v000003/  rollouts/000012.arrow  scored/000012.arrow
             snapshots/v000003/  snapshots/LATEST  checkpoints/step-000200/  student/
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
        """The ledger (SQLite); beside it `ledger.db-wal` while it is open, and `ledger.lock`."""
        return self.root / "ledger.db"

    @property
    def metrics_jsonl(self) -> Path:
        """One line a step and a segment."""
        return self.root / "metrics.jsonl"

    @property
    def trace_jsonl(self) -> Path:
        """Spans as they end."""
        return self.root / "trace.jsonl"

    @property
    def trace_json(self) -> Path:
        """The same for Perfetto."""
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
        """One log file a worker."""
        return self.root / "logs"

    @property
    def snapshots(self) -> Path:
        """Published students and the `LATEST` pointer."""
        return self.root / "snapshots"

    @property
    def probes(self) -> Path:
        """What each snapshot says of a few fixed texts, kept for comparison by servers' users."""
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

    @property
    def directories(self) -> tuple[Path, ...]:
        """Every directory that writers put files into."""
        names = ("rollouts", "scored", "logs", "snapshots", "checkpoints")
        return (self.root, *(self.root / name for name in names))

    def create(self) -> None:
        """Make the directories. Raises RunError when the place cannot be written."""
        with files.explain_write(self.root):
            for directory in self.directories:
                directory.mkdir(parents=True, exist_ok=True)

    def sweep(self) -> list[Path]:
        """Remove what killed writers left; returns it.

        Only for the holder of the run's ledger, before it starts any worker: a live writer's
        unfinished file looks just the same.
        """
        with files.explain_write(self.root):
            return [path for directory in self.directories for path in files.sweep(directory)]
