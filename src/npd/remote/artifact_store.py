"""The controller's access to shards, snapshots and checkpoints, in the run directory or at a URL.

One small interface hides which of the two it is. Paths are always paths of the run directory; with
a URL they name the objects there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from npd.config import RunConfig
from npd.errors import StoreError
from npd.remote.objects import ObjectStore
from npd.remote.sync import ArtifactSync
from npd.remote.worker_cache import WorkerCache
from npd.store import files, snapshots
from npd.store.layout import RunLayout
from npd.store.shards import Kind, read_rollouts, verify_shard


class ArtifactStore(Protocol):
    """Holds the shards, snapshots and checkpoints of a run."""

    def has(self, path: Path) -> bool:
        """Whether a shard, snapshot or checkpoint exists."""
        ...

    def is_whole(self, path: Path, kind: Kind | None = None) -> bool:
        """Whether it exists and is undamaged; `kind` is the kind of a shard."""
        ...

    def versions(self, path: Path) -> set[int]:
        """The versions of the snapshots that wrote a shard of rollouts; empty if unknown."""
        ...

    def remove(self, path: Path) -> None:
        """Remove it, complete or not, so that it can be regenerated."""
        ...

    def drop_newer(self, root: Path, newest: int) -> None:
        """Remove snapshots or checkpoints in `root` newer than this, while no worker writes."""
        ...

    def set_latest(self, root: Path, version: int) -> None:
        """Point `root`/LATEST at a snapshot, if it exists."""
        ...

    def prune(self, root: Path, keep: Collection[int]) -> None:
        """Remove snapshots or checkpoints in `root` that are not in `keep`."""
        ...

    def fetch(self, path: Path) -> None:
        """Make a published directory available in the run directory."""
        ...


class LocalStore:
    """The run directory itself, which every worker sees."""

    def has(self, path: Path) -> bool:
        """See `ArtifactStore`."""
        return path.exists()

    def is_whole(self, path: Path, kind: Kind | None = None) -> bool:
        """See `ArtifactStore`."""
        if kind is None:
            return snapshots.is_whole(path)
        try:
            verify_shard(path, kind)
        except StoreError:
            return False
        return True

    def versions(self, path: Path) -> set[int]:
        """See `ArtifactStore`."""
        try:
            return {rollout.version for rollout in read_rollouts(path)}
        except StoreError:
            return set()

    def remove(self, path: Path) -> None:
        """See `ArtifactStore`."""
        files.remove(path)

    def drop_newer(self, root: Path, newest: int) -> None:
        """See `ArtifactStore`."""
        snapshots.drop_newer(root, newest)

    def set_latest(self, root: Path, version: int) -> None:
        """See `ArtifactStore`."""
        if (root / f"v{version:06d}").exists():
            snapshots.set_latest(root, version)

    def prune(self, root: Path, keep: Collection[int]) -> None:
        """See `ArtifactStore`."""
        snapshots.prune(root, keep)

    def fetch(self, path: Path) -> None:
        """See `ArtifactStore`. Nothing to do."""


class RemoteStore:
    """The objects at a URL. Raises RunError if the store cannot be reached."""

    def __init__(self, sync: ArtifactSync) -> None:
        self._sync = sync

    def has(self, path: Path) -> bool:
        """See `ArtifactStore`."""
        return self._sync.has(path)

    def is_whole(self, path: Path, kind: Kind | None = None) -> bool:
        """See `ArtifactStore`. Manifests are written last; content is verified on download."""
        return self._sync.has(path)

    def versions(self, path: Path) -> set[int]:
        """See `ArtifactStore`. Empty: it would need a download."""
        return set()

    def remove(self, path: Path) -> None:
        """See `ArtifactStore`."""
        self._sync.remove(path)

    def drop_newer(self, root: Path, newest: int) -> None:
        """See `ArtifactStore`."""
        self._sync.drop_newer(root, newest)

    def set_latest(self, root: Path, version: int) -> None:
        """See `ArtifactStore`."""
        if self._sync.has(root / f"v{version:06d}"):
            self._sync.set_latest(root / "LATEST", version)

    def prune(self, root: Path, keep: Collection[int]) -> None:
        """See `ArtifactStore`."""
        self._sync.prune(root, keep)

    def fetch(self, path: Path) -> None:
        """See `ArtifactStore`. Raises StoreError if it is not at the URL."""
        if not self._sync.download(path):
            raise StoreError(f"{path.name} is not at {self._sync.remote.url}: resume the run")


@contextmanager
def readable(layout: RunLayout, config: RunConfig) -> Iterator[RunLayout]:
    """A layout whose shards can be read here; those at a URL are downloaded on access."""
    url = config.shared_url
    if url is None:
        yield layout
        return
    with TemporaryDirectory(prefix="npd-") as folder:
        root = Path(folder) / "shards"
        yield WorkerCache(root, ArtifactSync(ObjectStore(url, pauses=()), root)).open()
