"""Where the controller finds what workers leave for each other: the run directory, or a URL.

One small interface, so that the controller asks and prunes without knowing which it is. Paths are
always those of the run directory; with a URL, what they stand for is there instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from npd.config import RunConfig
from npd.errors import StoreError
from npd.store import files, snapshots
from npd.store.exchange import Exchange
from npd.store.layout import RunLayout
from npd.store.remote import Remote
from npd.store.shards import Kind, read_rollouts, verify_shard
from npd.workers.scratch import Scratch


class Place(Protocol):
    """Where shards, snapshots and checkpoints of a run are."""

    def has(self, path: Path) -> bool:
        """Whether a shard, snapshot or checkpoint is there."""
        ...

    def is_whole(self, path: Path, kind: Kind | None = None) -> bool:
        """Whether it is there and undamaged; `kind` is that of a shard."""
        ...

    def versions(self, path: Path) -> set[int]:
        """The snapshots that wrote a shard of rollouts; none if that cannot be told."""
        ...

    def remove(self, path: Path) -> None:
        """Remove it, whole or not, so that it can be made again."""
        ...

    def forget(self, root: Path, newest: int) -> None:
        """Remove snapshots or checkpoints in `root` that are newer than this. Nobody may write."""
        ...

    def point(self, root: Path, version: int) -> None:
        """Point `root`/LATEST at a snapshot, if that is there."""
        ...

    def prune(self, root: Path, keep: Collection[int]) -> None:
        """Remove snapshots or checkpoints in `root` that are not in `keep`."""
        ...

    def bring(self, path: Path) -> None:
        """Have a published directory in the run directory."""
        ...


class Folder:
    """The run directory itself, which every worker sees."""

    def has(self, path: Path) -> bool:
        """See `Place`."""
        return path.exists()

    def is_whole(self, path: Path, kind: Kind | None = None) -> bool:
        """See `Place`."""
        if kind is None:
            return snapshots.is_whole(path)
        try:
            verify_shard(path, kind)
        except StoreError:
            return False
        return True

    def versions(self, path: Path) -> set[int]:
        """See `Place`."""
        try:
            return {rollout.version for rollout in read_rollouts(path)}
        except StoreError:
            return set()

    def remove(self, path: Path) -> None:
        """See `Place`."""
        files.remove(path)

    def forget(self, root: Path, newest: int) -> None:
        """See `Place`."""
        snapshots.drop_newer(root, newest)

    def point(self, root: Path, version: int) -> None:
        """See `Place`."""
        if (root / f"v{version:06d}").exists():
            snapshots.set_latest(root, version)

    def prune(self, root: Path, keep: Collection[int]) -> None:
        """See `Place`."""
        snapshots.prune(root, keep)

    def bring(self, path: Path) -> None:
        """It is there."""


class Elsewhere:
    """The place at a URL. Raises RunError where that does not answer."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def has(self, path: Path) -> bool:
        """See `Place`."""
        return self._exchange.has(path)

    def is_whole(self, path: Path, kind: Kind | None = None) -> bool:
        """See `Place`. Notes are written last; what lies under one is checked when it is taken."""
        return self._exchange.has(path)

    def versions(self, path: Path) -> set[int]:
        """See `Place`. Nothing: that would take the file itself."""
        return set()

    def remove(self, path: Path) -> None:
        """See `Place`."""
        self._exchange.remove(path)

    def forget(self, root: Path, newest: int) -> None:
        """See `Place`."""
        self._exchange.drop_newer(root, newest)

    def point(self, root: Path, version: int) -> None:
        """See `Place`."""
        if self._exchange.has(root / f"v{version:06d}"):
            self._exchange.point(root / "LATEST", version)

    def prune(self, root: Path, keep: Collection[int]) -> None:
        """See `Place`."""
        self._exchange.prune(root, keep)

    def bring(self, path: Path) -> None:
        """See `Place`. Raises StoreError where there is none."""
        if not self._exchange.pull(path):
            raise StoreError(f"{path.name} is not at {self._exchange.remote.url}: resume the run")


@contextmanager
def readable(layout: RunLayout, config: RunConfig) -> Iterator[RunLayout]:
    """A layout whose shards can be read here: brought from the URL, as asked for, for so long."""
    url = config.shared_url
    if url is None:
        yield layout
        return
    with TemporaryDirectory(prefix="npd-") as folder:
        root = Path(folder) / "shards"
        yield Scratch(root, Exchange(Remote(url, pauses=()), root)).open()
