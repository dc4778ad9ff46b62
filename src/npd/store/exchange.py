"""Shards and published directories by way of a URL: pushed whole, pulled and checked.

Promises: what is there is whole, because its note (size and checksum of each file) is written last
and removed first; what is pulled is what was pushed, to the byte. A file's note is `<name>.json`
beside it, a published directory's is its own manifest. Names are paths below the local root, which
is laid out like the place at the URL. Knows neither workers nor what is in a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import Any

from npd.errors import StoreError
from npd.store import files
from npd.store.remote import Remote
from npd.store.snapshots import MANIFEST, describe, number_of, verify

# What was damaged on its way comes whole the next time; what lies there damaged does not.
_TRIES = 3
_Note = dict[str, Any]
_Identity = tuple[int, int, int]


class Exchange:
    """The place at `remote` and its copy below `root`."""

    def __init__(self, remote: Remote, root: Path) -> None:
        self.remote, self._root = remote, root
        # What is known to be the same here and there, and how it looked then.
        self._same: dict[Path, _Identity | None] = {}

    def has(self, path: Path) -> bool:
        """Whether a shard or a published directory is there, by its note."""
        return self._note(path) is not None

    def push(self, path: Path) -> None:
        """Have what lies at `path` there too, in place of an older one; if it is not already.

        Raises:
            RunError: the store does not take it.
        """
        if self._is_known(path):
            return
        note = describe(path) if _is_file(path) else files.read_json(path / MANIFEST)
        assert note is not None, f"{path} is to be pushed and not there"
        name, note_name = self._name(path), self._note_name(path)
        self.remote.remove(note_name)
        for part in [""] if _is_file(path) else sorted(note["files"]):
            self.remote.upload(path / part, f"{name}/{part}" if part else name)
        self.remote.write(note_name, json.dumps(note).encode())
        self._same[path] = _identity(path)

    def pull(self, path: Path) -> bool:
        """Have at `path` what lies there; False, and nothing changed, where nothing does.

        What was pulled or pushed before is not asked for again: it does not change in a run.

        Raises:
            StoreError: what lies there is damaged.
            RunError: the store does not give it.
        """
        if self._is_known(path):
            return True
        for tries_left in reversed(range(_TRIES)):
            note = self._note(path)
            if note is None:
                return False
            if not _is_same(path, note):
                wrong = self._fetch(path, note)
                if wrong and tries_left:
                    continue
                if wrong:
                    raise StoreError(
                        f"{self.remote.url}/{wrong} is damaged or gone, says its checksum: bring "
                        f"it back, or (unless a server wrote it) delete {self._note_name(path)} "
                        "there and resume, to have it made again"
                    )
            self._same[path] = _identity(path)
            return True
        raise AssertionError("unreachable")

    def prune(self, root: Path, keep: Collection[int]) -> None:
        """Remove published versions (or checkpoint steps) in `root` older than the newest of `keep`
        and not among them; what is newer may be on its way.
        """
        newest = max(keep, default=0)
        self._remove_where(root, lambda number, _: number < newest and number not in keep)

    def drop_newer(self, root: Path, newest: int) -> None:
        """Remove versions (or steps) in `root` that are newer. Only while nobody writes."""
        self._remove_where(root, lambda number, _: number > newest)

    def sweep(self, root: Path) -> None:
        """Remove parts of directories that killed writers left. Only while nobody writes."""
        self._remove_where(root, lambda _, path: self._note(path) is None)

    def point(self, pointer: Path, version: int) -> None:
        """Have the pointer (`snapshots/LATEST`) name a version."""
        self.remote.write(self._name(pointer), f"v{version:06d}\n".encode())

    def pointed(self, pointer: Path) -> int | None:
        """The version that the pointer names; None before the first."""
        return number_of((self.remote.read(self._name(pointer)) or b"").decode().strip())

    def remove(self, path: Path) -> None:
        """Remove what lies there, and here."""
        self.remote.remove(self._note_name(path))
        self.remote.remove(self._name(path))
        self.forget(path)

    def forget(self, path: Path) -> None:
        """Remove what lies here; there it stays."""
        self._same.pop(path, None)
        files.remove(path)

    def _remove_where(self, root: Path, is_unwanted: Callable[[int, Path], bool]) -> None:
        for name in self.remote.names(self._name(root)):
            number, path = number_of(name), root / name
            if number is not None and is_unwanted(number, path):
                self.remote.remove(self._note_name(path))
                self.remote.remove(self._name(path))

    def _fetch(self, path: Path, note: _Note) -> str | None:
        """Download what `note` describes to `path`; the name of what is not so, or None."""
        tmp, name = files.temporary(path), self._name(path)
        with files.explain_write(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                for part, wanted in {"": note}.items() if _is_file(path) else note["files"].items():
                    into, source = tmp / part, f"{name}/{part}" if part else name
                    into.parent.mkdir(parents=True, exist_ok=True)
                    if not self._download(source, into) or describe(into) != wanted:
                        return source
                if not _is_file(path):
                    files.write_json(tmp / MANIFEST, note)
                    files.remove(path)
                os.replace(tmp, path)
            finally:
                files.remove(tmp)
        return None

    def _download(self, source: str, into: Path) -> bool:
        try:
            self.remote.download(source, into)
        except FileNotFoundError:
            return False
        return True

    def _note(self, path: Path) -> _Note | None:
        """What the note there says; None where there is none, or a part of one."""
        found = self.remote.read(self._note_name(path))
        try:
            note = None if found is None else json.loads(found)
        except ValueError:
            return None
        wanted = "sha256" if _is_file(path) else "files"
        if not isinstance(note, dict) or wanted not in note:
            return None
        outside = [name for name in note.get("files", ()) if not _is_below(name)]
        if outside:
            raise StoreError(
                f"{self.remote.url}/{self._note_name(path)} names {outside[0]}, a file outside its "
                "directory, which npd never writes: see who else writes to that place"
            )
        return note

    def _is_known(self, path: Path) -> bool:
        return path in self._same and self._same[path] == _identity(path)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def _note_name(self, path: Path) -> str:
        return f"{self._name(path)}.json" if _is_file(path) else f"{self._name(path)}/{MANIFEST}"


def _is_file(path: Path) -> bool:
    """Shards are files; all else that is exchanged is a published directory."""
    return path.suffix == ".arrow"


def _is_below(name: str) -> bool:
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _is_same(path: Path, note: _Note) -> bool:
    """Whether what lies here, to the last byte, is what `note` says."""
    if _is_file(path):
        return describe(path) == note
    try:
        verify(path)
    except StoreError:
        return False
    return bool(files.read_json(path / MANIFEST) == note)


def _identity(path: Path) -> _Identity | None:
    """What changes when something else takes this path; None where nothing is."""
    try:
        stat = (path if _is_file(path) else path / MANIFEST).stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
