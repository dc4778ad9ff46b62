"""Uploads and downloads of shards and published directories, complete and verified.

Promises: an object at the URL counts only if it is complete, because its manifest (size and
checksum of each file) is written last and removed first. A download equals the upload, byte for
byte. A file's manifest is `<name>.json` beside it; a published directory contains its own. Names
are paths below the local root, which has the same layout as the URL. Independent of workers and of
the content of files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import Any

from npd.errors import StoreError
from npd.remote.objects import ObjectStore
from npd.store import files
from npd.store.snapshots import MANIFEST, describe, number_of, verify

# A retry removes damage in transit, but not damage at the URL.
_TRIES = 3
_Manifest = dict[str, Any]
_Identity = tuple[int, int, int]


class ArtifactSync:
    """Keeps files below `root` in step with the objects of `remote`."""

    def __init__(self, remote: ObjectStore, root: Path) -> None:
        self.remote, self._root = remote, root
        # Paths that are equal on both sides, with their file identity at that time.
        self._same: dict[Path, _Identity | None] = {}

    def has(self, path: Path) -> bool:
        """Whether a shard or published directory is at the URL, by its manifest."""
        return self._manifest(path) is not None

    def upload(self, path: Path) -> None:
        """Upload `path` unless the URL is known to have it; replaces an older version.

        Raises:
            RunError: the upload fails.
        """
        if self._is_known(path):
            return
        manifest = describe(path) if _is_file(path) else files.read_json(path / MANIFEST)
        assert manifest is not None, f"{path} is to be uploaded and does not exist"
        name, manifest_name = self._name(path), self._manifest_name(path)
        self.remote.remove(manifest_name)
        for part in [""] if _is_file(path) else sorted(manifest["files"]):
            self.remote.upload(path / part, f"{name}/{part}" if part else name)
        self.remote.write(manifest_name, json.dumps(manifest).encode())
        self._same[path] = _identity(path)

    def download(self, path: Path) -> bool:
        """Download `path`; whether it is at the URL. If not, nothing changes here.

        A path is transferred only once, because it does not change during a run.

        Raises:
            StoreError: the objects at the URL are damaged.
            RunError: the store cannot be read.
        """
        if self._is_known(path):
            return True
        for tries_left in reversed(range(_TRIES)):
            manifest = self._manifest(path)
            if manifest is None:
                return False
            if not _is_same(path, manifest):
                wrong = self._fetch(path, manifest)
                if wrong and tries_left:
                    continue
                if wrong:
                    raise StoreError(
                        f"{self.remote.url}/{wrong} is missing or does not match its checksum: "
                        "restore it, or (unless a server wrote it) delete "
                        f"{self._manifest_name(path)} there and resume, which regenerates it"
                    )
            self._same[path] = _identity(path)
            return True
        raise AssertionError("unreachable")

    def prune(self, root: Path, keep: Collection[int]) -> None:
        """Remove published versions (or checkpoint steps) in `root` that are not in `keep`.

        Versions newer than all of `keep` stay, because they may still be uploading.
        """
        newest = max(keep, default=0)
        self._remove_where(root, lambda number, _: number < newest and number not in keep)

    def drop_newer(self, root: Path, newest: int) -> None:
        """Remove versions (or steps) in `root` after `newest`. Only while no worker writes."""
        self._remove_where(root, lambda number, _: number > newest)

    def remove_incomplete(self, root: Path) -> None:
        """Remove incomplete directories of killed workers. Only while no worker writes."""
        self._remove_where(root, lambda _, path: self._manifest(path) is None)

    def set_latest(self, pointer: Path, version: int) -> None:
        """Set the pointer (`snapshots/LATEST`) to a version."""
        self.remote.write(self._name(pointer), f"v{version:06d}\n".encode())

    def latest(self, pointer: Path) -> int | None:
        """The version that the pointer names; None before the first."""
        return number_of((self.remote.read(self._name(pointer)) or b"").decode().strip())

    def remove(self, path: Path) -> None:
        """Remove `path` at the URL and on this machine."""
        self.remote.remove(self._manifest_name(path))
        self.remote.remove(self._name(path))
        self.remove_local(path)

    def remove_local(self, path: Path) -> None:
        """Remove `path` on this machine; it stays at the URL."""
        self._same.pop(path, None)
        files.remove(path)

    def _remove_where(self, root: Path, is_unwanted: Callable[[int, Path], bool]) -> None:
        for name in self.remote.names(self._name(root)):
            number, path = number_of(name), root / name
            if number is not None and is_unwanted(number, path):
                self.remote.remove(self._manifest_name(path))
                self.remote.remove(self._name(path))

    def _fetch(self, path: Path, manifest: _Manifest) -> str | None:
        """Download the files of `manifest`; the name of the first that differs from it, or None."""
        tmp, name = files.temporary(path), self._name(path)
        parts = {"": manifest} if _is_file(path) else manifest["files"]
        with files.explain_write(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                for part, wanted in parts.items():
                    into, source = tmp / part, f"{name}/{part}" if part else name
                    into.parent.mkdir(parents=True, exist_ok=True)
                    if not self._fetch_object(source, into) or describe(into) != wanted:
                        return source
                if not _is_file(path):
                    files.write_json(tmp / MANIFEST, manifest)
                    files.remove(path)
                os.replace(tmp, path)
            finally:
                files.remove(tmp)
        return None

    def _fetch_object(self, source: str, into: Path) -> bool:
        try:
            self.remote.download(source, into)
        except FileNotFoundError:
            return False
        return True

    def _manifest(self, path: Path) -> _Manifest | None:
        """The manifest at the URL; None if it is missing or incomplete."""
        found = self.remote.read(self._manifest_name(path))
        try:
            manifest = None if found is None else json.loads(found)
        except ValueError:
            return None
        wanted = "sha256" if _is_file(path) else "files"
        if not isinstance(manifest, dict) or wanted not in manifest:
            return None
        outside = [name for name in manifest.get("files", ()) if not _is_below(name)]
        if outside:
            raise StoreError(
                f"{self.remote.url}/{self._manifest_name(path)} names {outside[0]}, a file outside "
                "its directory, which npd never writes: check who else writes to that location"
            )
        return manifest

    def _is_known(self, path: Path) -> bool:
        return path in self._same and self._same[path] == _identity(path)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def _manifest_name(self, path: Path) -> str:
        return f"{self._name(path)}.json" if _is_file(path) else f"{self._name(path)}/{MANIFEST}"


def _is_file(path: Path) -> bool:
    """Shards are files; everything else is a published directory."""
    return path.suffix == ".arrow"


def _is_below(name: str) -> bool:
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _is_same(path: Path, manifest: _Manifest) -> bool:
    """Whether the local file or directory matches `manifest`, byte for byte."""
    if _is_file(path):
        return describe(path) == manifest
    try:
        verify(path)
    except StoreError:
        return False
    return bool(files.read_json(path / MANIFEST) == manifest)


def _identity(path: Path) -> _Identity | None:
    """Inode, mtime and size, which change if the path is replaced; None if it is missing."""
    try:
        stat = (path if _is_file(path) else path / MANIFEST).stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
