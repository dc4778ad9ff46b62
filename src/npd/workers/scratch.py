"""A worker's own copy of the run directory, on its machine, where runs exchange files by a URL.

Promises: a path that is asked for holds what lies at the URL, if anything does; after each call
what the worker wrote there lies at the URL too, before anybody is told of it. Engines and workers
know nothing of it: they are given this layout in place of the run directory's. What the copy holds
is bounded: shards of the last calls, the last two snapshots.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from npd.errors import RunError
from npd.probe import FILE
from npd.store import files
from npd.store.exchange import Exchange
from npd.store.layout import RunLayout
from npd.store.snapshots import MANIFEST, set_latest

# A trainer comes back to the shards of its window every few segments; what it has passed over this
# often has left the window. Costs disk: the shards of so many calls.
_SHARD_CALLS = 32
# Around a refresh two snapshots are in use: the old one's samples, and the new one.
_SNAPSHOTS = 2


@dataclass(frozen=True)
class ScratchLayout(RunLayout):
    """The paths of a scratch directory; what is exchanged is brought there as it is asked for."""

    scratch: Scratch

    @property
    def heldout(self) -> Path:
        """Scored held-out responses."""
        return self.scratch.brought(super().heldout)

    @property
    def student(self) -> Path:
        """The final student: only ever written here."""
        return self.scratch.asked(super().student)

    @property
    def snapshots(self) -> Path:
        """Where snapshots are, the one that LATEST names among them."""
        return self.scratch.with_latest(super().snapshots)

    @property
    def probes(self) -> Path:
        """What each snapshot says of a few fixed texts, those of other workers too."""
        return self.scratch.with_probes(super().probes)

    def rollouts(self, shard: int) -> Path:
        """The rollouts of a shard."""
        return self.scratch.brought(super().rollouts(shard))

    def scored(self, shard: int) -> Path:
        """The scored rollouts of a shard."""
        return self.scratch.brought(super().scored(shard))

    def snapshot(self, version: int) -> Path:
        """A published student."""
        return self.scratch.brought(RunLayout(self.root).snapshot(version))

    def checkpoint(self, step: int) -> Path:
        """A trainer state."""
        return self.scratch.brought(super().checkpoint(step))


@dataclass(slots=True)
class Scratch:
    """Remembers which paths a worker asked for, and when (in calls). For one call at a time."""

    root: Path
    exchange: Exchange
    _asked: dict[Path, int] = field(default_factory=dict)
    _calls: int = 0
    _latest: int | None = None
    _probes: set[str] = field(default_factory=set)

    def open(self) -> ScratchLayout:
        """Make the directory, or take over what an earlier life of the worker left."""
        layout = ScratchLayout(self.root, self)
        layout.create()
        layout.sweep()
        self._asked = dict.fromkeys(_left_in(self.root), 0)
        return layout

    def asked(self, path: Path) -> Path:
        """`path`, remembered: what is written there is pushed."""
        self._asked.pop(path, None)  # the latest last
        self._asked[path] = self._calls + 1
        return path

    def brought(self, path: Path) -> Path:
        """`path`, with what lies at the URL. Raises StoreError, RunError (see `Exchange.pull`)."""
        self.exchange.pull(path)
        return self.asked(path)

    def with_latest(self, snapshots: Path) -> Path:
        """`snapshots`, with the newest snapshot and LATEST in it."""
        version = self.exchange.pointed(snapshots / "LATEST")
        if version is not None:
            newest = self.brought(RunLayout(self.root).snapshot(version))
            if version != self._latest and newest.exists():  # else pruned already: another follows
                set_latest(snapshots, version)
                self._latest = version
        return snapshots

    def with_probes(self, probes: Path) -> Path:
        """`probes`, with what lies at the URL. A few KiB each, so without notes."""
        for version in self.exchange.remote.names("probes"):
            found = self.exchange.remote.read(_probe(version))
            if found is not None:
                (probes / version).mkdir(parents=True, exist_ok=True)
                (probes / version / FILE).write_bytes(found)
                self._probes.add(version)
        return probes

    def settle(self) -> None:
        """After a call: push what it wrote, let go of what is not needed here any longer."""
        self._calls += 1
        for path in [path for path, call in self._asked.items() if call == self._calls]:
            if (path if path.suffix == ".arrow" else path / MANIFEST).exists():
                self.exchange.push(path)
        for made in RunLayout(self.root).probes.glob(f"v*/{FILE}"):
            if made.parent.name not in self._probes:
                self.exchange.remote.write(_probe(made.parent.name), made.read_bytes())
                self._probes.add(made.parent.name)
        for path in list(self._unneeded()):
            self.exchange.forget(path)
            del self._asked[path]

    def put_logs(self, worker: str) -> None:
        """Upload the logs of a worker's servers, for people, to `logs/<worker>/`."""
        for log in sorted(RunLayout(self.root).logs.glob("*.log")):
            self.exchange.remote.upload(log, f"logs/{worker}/{log.name}")

    def close(self) -> None:
        """Remove the directory, and the run's around it where no other worker has one."""
        files.remove(self.root)
        with suppress(OSError):
            self.root.parent.rmdir()

    def _unneeded(self) -> Iterator[Path]:
        snapshots = [path for path in self._asked if path.parent.name == "snapshots"]
        yield from snapshots[:-_SNAPSHOTS]
        for path, call in self._asked.items():
            kind = path.parent.name
            is_old = kind in ("rollouts", "scored") and call <= self._calls - _SHARD_CALLS
            # Written once or read once, and the largest things there are.
            if is_old or kind == "checkpoints" or path.name == "student":
                yield path


def scratch_root(chosen: Path | None, run: str, worker: str) -> Path:
    """Where a worker's scratch directory is: the same in each of its lives.

    Raises:
        RunError: the place for temporary files is another user's.
    """
    if chosen is not None:
        return chosen.absolute() / run / worker
    ours = Path(tempfile.gettempdir()) / f"npd-{os.getuid()}"
    with files.explain_write(ours):
        ours.mkdir(mode=0o700, exist_ok=True)
        if ours.is_symlink() or ours.stat().st_uid != os.getuid():
            raise RunError(f"{ours} is another user's: set runtime.scratch to a place of your own")
    return ours / run / worker


def _probe(version: str) -> str:
    return f"probes/{version}/{FILE}"


def _left_in(root: Path) -> list[Path]:
    patterns = ("rollouts/*.arrow", "scored/*.arrow", "snapshots/v*", "checkpoints/step-*")
    return [path for pattern in patterns for path in sorted(root.glob(pattern))]
