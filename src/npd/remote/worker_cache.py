"""A worker's local cache of the run directory, for runs whose files are at a URL.

Promises: a path that the worker accesses is downloaded first, if it is at the URL. Files that a
call writes are uploaded before the call returns. Workers are unaware of the cache, because it has
the interface of the run directory's layout. It is bounded to the shards of the last calls and the
last two snapshots.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from npd.errors import RunError
from npd.models.fingerprint import FILE
from npd.remote.sync import ArtifactSync
from npd.store import files
from npd.store.layout import RunLayout
from npd.store.snapshots import MANIFEST, set_latest

# A trainer rereads the shards of its window every few segments, so a shard unused for this many
# calls has left the window. The price is disk space for the shards of these calls.
_SHARD_CALLS = 32
# Around a refresh two snapshots are in use: the one that generated the samples, and the new one.
_SNAPSHOTS = 2


@dataclass(frozen=True)
class CacheLayout(RunLayout):
    """The paths of a cache directory; files at the URL are downloaded on access."""

    cache: WorkerCache

    @property
    def heldout(self) -> Path:
        """Scored held-out responses."""
        return self.cache.downloaded(super().heldout)

    @property
    def student(self) -> Path:
        """The final student, which workers only write."""
        return self.cache.track(super().student)

    @property
    def snapshots(self) -> Path:
        """The snapshots, with the one in LATEST downloaded."""
        return self.cache.with_latest(super().snapshots)

    @property
    def probes(self) -> Path:
        """The fingerprints of all snapshots, including those of other workers."""
        return self.cache.with_fingerprints(super().probes)

    def rollouts(self, shard: int) -> Path:
        """The rollouts of a shard."""
        return self.cache.downloaded(super().rollouts(shard))

    def scored(self, shard: int) -> Path:
        """The scored rollouts of a shard."""
        return self.cache.downloaded(super().scored(shard))

    def snapshot(self, version: int) -> Path:
        """A published student."""
        return self.cache.downloaded(RunLayout(self.root).snapshot(version))

    def checkpoint(self, step: int) -> Path:
        """A trainer state."""
        return self.cache.downloaded(super().checkpoint(step))

    def store(self, path: Path) -> None:
        """Upload `path` and remove it here, in the calling thread; no call may access it."""
        self.cache.sync.upload(path)
        self.cache.sync.remove_local(path)


@dataclass(slots=True)
class WorkerCache:
    """Tracks the paths that a worker accesses, by call; for one call at a time."""

    root: Path
    sync: ArtifactSync
    _accessed: dict[Path, int] = field(default_factory=dict)
    _calls: int = 0
    _latest: int | None = None
    _probes: set[str] = field(default_factory=set)

    def open(self) -> CacheLayout:
        """Create the directory, or reuse the one of an earlier incarnation of the worker."""
        layout = CacheLayout(self.root, self)
        layout.create()
        layout.remove_temporary()
        self._accessed = dict.fromkeys(_cached_in(self.root), 0)
        return layout

    def track(self, path: Path) -> Path:
        """Track `path` and return it; if this call writes it, it is uploaded."""
        self._accessed.pop(path, None)  # reinserted at the end, as the most recent
        self._accessed[path] = self._calls + 1
        return path

    def downloaded(self, path: Path) -> Path:
        """Download and track `path`; returns it. Raises the errors of `ArtifactSync.download`."""
        self.sync.download(path)
        return self.track(path)

    def with_latest(self, snapshots: Path) -> Path:
        """Download the newest snapshot and LATEST into `snapshots`; returns it."""
        version = self.sync.latest(snapshots / "LATEST")
        if version is not None:
            newest = self.downloaded(RunLayout(self.root).snapshot(version))
            if (
                version != self._latest and newest.exists()
            ):  # else it was pruned, and a newer one follows
                set_latest(snapshots, version)
                self._latest = version
        return snapshots

    def with_fingerprints(self, probes: Path) -> Path:
        """Download all fingerprints into `probes`; returns it. They are small: no manifests."""
        for version in self.sync.remote.names("probes"):
            found = self.sync.remote.read(_fingerprint_name(version))
            if found is not None:
                (probes / version).mkdir(parents=True, exist_ok=True)
                (probes / version / FILE).write_bytes(found)
                self._probes.add(version)
        return probes

    def end_call(self) -> None:
        """End a call: upload the files it wrote, and remove local files no longer needed."""
        self._calls += 1
        for path in [path for path, call in self._accessed.items() if call == self._calls]:
            if (path if path.suffix == ".arrow" else path / MANIFEST).exists():
                self.sync.upload(path)
        for made in RunLayout(self.root).probes.glob(f"v*/{FILE}"):
            if made.parent.name not in self._probes:
                self.sync.remote.write(_fingerprint_name(made.parent.name), made.read_bytes())
                self._probes.add(made.parent.name)
        for path in list(self._unneeded()):
            self.sync.remove_local(path)
            del self._accessed[path]

    def put_logs(self, worker: str) -> None:
        """Upload the logs of a worker's servers to `logs/<worker>/`, for people to read."""
        for log in sorted(RunLayout(self.root).logs.glob("*.log")):
            self.sync.remote.upload(log, f"logs/{worker}/{log.name}")

    def close(self) -> None:
        """Remove the directory, and the run's folder around it if no other worker uses it."""
        files.remove(self.root)
        with suppress(OSError):
            self.root.parent.rmdir()

    def _unneeded(self) -> Iterator[Path]:
        snapshots = [path for path in self._accessed if path.parent.name == "snapshots"]
        yield from snapshots[:-_SNAPSHOTS]
        for path, call in self._accessed.items():
            kind = path.parent.name
            is_old = kind in ("rollouts", "scored") and call <= self._calls - _SHARD_CALLS
            # These are written or read once, and are the largest files of a run.
            if is_old or kind == "checkpoints" or path.name == "student":
                yield path


def cache_root(chosen: Path | None, run: str, worker: str) -> Path:
    """A worker's cache directory, the same for each of its incarnations.

    Raises:
        RunError: the directory for temporary files belongs to another user.
    """
    if chosen is not None:
        return chosen.absolute() / run / worker
    ours = Path(tempfile.gettempdir()) / f"npd-{os.getuid()}"
    with files.explain_write(ours):
        ours.mkdir(mode=0o700, exist_ok=True)
        if ours.is_symlink() or ours.stat().st_uid != os.getuid():
            raise RunError(f"{ours} is another user's: set runtime.scratch to your own directory")
    return ours / run / worker


def _fingerprint_name(version: str) -> str:
    return f"probes/{version}/{FILE}"


def _cached_in(root: Path) -> list[Path]:
    patterns = ("rollouts/*.arrow", "scored/*.arrow", "snapshots/v*", "checkpoints/step-*")
    return [path for pattern in patterns for path in sorted(root.glob(pattern))]
