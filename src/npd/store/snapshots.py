"""Published model directories: versioned, checksummed, complete or absent.

Promises: a directory with a valid `manifest.json` has the content that was published, to the byte.
Used for snapshots (`v000003`), checkpoints (`step-000200`) and the final student. Independent of
models: the caller writes the files. Files that the manifest does not list are ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeAlias

from safetensors import SafetensorError

from npd.errors import StoreError
from npd.store import files

MANIFEST = "manifest.json"
_LATEST = "LATEST"
_VERSIONED = re.compile(r"(?:v|step-)(\d{6,})")

Entry: TypeAlias = dict[str, Any]
"""Size and checksum of a file, as in a manifest."""


def publish(
    final_dir: Path,
    write: Callable[[Path], object],
    hashed: Mapping[str, Entry] = MappingProxyType({}),
) -> str:
    """Publish what `write` puts into a temporary directory as `final_dir`; returns a checksum.

    The checksum covers names and contents of all files. `hashed` has, once `write` returns, the
    entries of files that it wrote as `HashedFile`: they are not read again. A valid `final_dir` is
    left unchanged, a damaged one is replaced. Raises RunError if the disk is full, and StoreError
    if `final_dir` exists and was not published.
    """
    if _is_published(final_dir):
        try:
            return verify(final_dir)
        except StoreError:
            _discard(final_dir)
    tmp = files.temporary(final_dir)
    try:
        with files.explain_write(final_dir):
            tmp.mkdir(parents=True)
            checksum = _fill(tmp, write, hashed)
            os.replace(tmp, final_dir)
            files.sync(final_dir.parent)
    except SafetensorError as error:
        raise files.write_error(final_dir, error) from error
    finally:
        files.remove(tmp)
    return checksum


class HashedFile:
    """A new file of a published directory, hashed as it is written. Raises OSError.

    Its `entry` describes the bytes that were to be written, so a disk that keeps others is found by
    `verify`.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._hash, self._size = hashlib.sha256(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; other threads run meanwhile."""
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    @property
    def entry(self) -> Entry:
        """What was written so far."""
        return {"bytes": self._size, "sha256": self._hash.hexdigest()}


def verify(directory: Path) -> str:
    """Check every file against the manifest; returns the checksum.

    Raises StoreError, which names the first missing or altered file.
    """
    listed = _listed(directory)
    for name, entry in sorted(listed.items()):
        if describe(directory / name) != entry:
            raise _damaged(directory, f"{name} does not match {MANIFEST}")
    return _checksum(listed)


def contents(directory: Path) -> list[str]:
    """The names of the directory's files, verified."""
    verify(directory)
    return sorted(_listed(directory))


def is_whole(directory: Path) -> bool:
    """Whether `verify` succeeds."""
    try:
        verify(directory)
    except StoreError:
        return False
    return True


def set_latest(root: Path, version: int) -> None:
    """Point `root`/LATEST at a published version, atomically."""
    assert _directory(root, version).is_dir(), f"version {version} is not published"
    files.write_atomic(root / _LATEST, lambda file: file.write(f"v{version:06d}\n".encode()))


def latest(root: Path) -> int | None:
    """The version in LATEST; None before the first. Raises StoreError if its directory is gone."""
    pointer = root / _LATEST
    if not pointer.exists():
        return None
    named = _VERSIONED.fullmatch(pointer.read_text().strip())
    if named is None or not _directory(root, int(named[1])).is_dir():
        raise StoreError(f"{pointer} names no snapshot: delete it and resume the run")
    return int(named[1])


def prune(root: Path, keep: Collection[int]) -> list[int]:
    """Remove versions (or checkpoint steps) that are not in `keep` and older than its newest.

    Never removes LATEST's version, nor a newer one, which may have just been written. Returns the
    removed versions.
    """
    kept: set[int | None] = {*keep, latest(root)}
    newest, found = max(keep, default=0), _published(root)
    removed = [number for number in sorted(found) if number not in kept and number < newest]
    for number in removed:
        _discard(found[number])
    return removed


def drop_newer(root: Path, newest: int) -> None:
    """Remove newer versions (or steps), and LATEST if it points to one of them."""
    for number, path in sorted(_published(root).items()):
        if number > newest:
            if (root / _LATEST).exists() and latest(root) == number:
                files.remove(root / _LATEST)
            _discard(path)


def _published(root: Path) -> dict[int, Path]:
    numbered = [(path, number_of(path.name)) for path in sorted(root.glob("*")) if path.is_dir()]
    return {number: path for path, number in numbered if number is not None}


def number_of(name: str) -> int | None:
    """The version or step in a directory's name (`v000003`, `step-000200`), or None."""
    match = _VERSIONED.fullmatch(name)
    return None if match is None else int(match[1])


def _directory(root: Path, version: int) -> Path:
    return root / f"v{version:06d}"


def _discard(directory: Path) -> None:
    """Remove a directory atomically: it is renamed first."""
    if directory.exists():
        tmp = files.temporary(directory)
        with files.explain_write(directory):
            os.replace(directory, tmp)
        files.remove(tmp)


def _fill(tmp: Path, write: Callable[[Path], object], hashed: Mapping[str, Entry]) -> str:
    """Call `write`, flush everything to disk, then write the manifest."""
    write(tmp)
    files.give_usual_modes(tmp)
    paths = [path for path in sorted(tmp.rglob("*")) if path.is_file()]
    names = [str(path.relative_to(tmp)) for path in paths]
    listed = {n: hashed.get(n) or describe(p) for n, p in zip(names, paths, strict=True)}
    for path in (*paths, *(path for path in tmp.rglob("*") if path.is_dir())):
        files.sync(path)
    checksum = _checksum(listed)
    files.write_json(tmp / MANIFEST, {"format": 1, "checksum": checksum, "files": listed})
    return checksum


def describe(path: Path) -> Entry | None:
    """The entry of a file, read from the disk; None if it does not exist."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _is_published(final_dir: Path) -> bool:
    """Whether the directory has npd's manifest; one without it must not be replaced."""
    if (final_dir / MANIFEST).exists():
        return True
    if final_dir.exists() and (not final_dir.is_dir() or any(final_dir.iterdir())):
        raise StoreError(f"{final_dir} exists and has no {MANIFEST}: move it away")
    return False


def _listed(directory: Path) -> dict[str, Any]:
    """The files in the manifest, whose own checksum is verified."""
    try:
        manifest = files.read_json(directory / MANIFEST)
    except StoreError as error:
        raise _damaged(directory, f"{MANIFEST} is missing or unreadable") from error
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict) or manifest.get("checksum") != _checksum(listed):
        raise _damaged(directory, f"{MANIFEST} is inconsistent")
    if not all(_is_inside(name) for name in listed):
        raise _damaged(directory, f"{MANIFEST} names files outside the directory")
    return listed


def _is_inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _damaged(directory: Path, what: str) -> StoreError:
    return StoreError(
        f"{directory} is damaged ({what}): delete it and resume the run, which regenerates it"
    )


def _checksum(listed: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
