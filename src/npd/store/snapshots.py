"""Published model directories: versioned, checksummed, whole or absent.

Promises: a directory with a valid `manifest.json` holds what its writer wrote, to the byte. Serves
snapshots (`v000003`), checkpoints (`step-000200`) and the final student alike. Does not know
models: the caller writes the files. Files beside those of the manifest are ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from npd.errors import StoreError
from npd.store import files

MANIFEST = "manifest.json"
_LATEST = "LATEST"
_VERSIONED = re.compile(r"(?:v|step-)(\d{6,})")


def publish(final_dir: Path, write: Callable[[Path], None]) -> str:
    """Make `final_dir` hold what `write` puts into the directory it is given; returns a checksum.

    The checksum covers names and contents of all files. Where `final_dir` is already valid nothing
    is written; where it was published but is damaged, it is replaced. Raises RunError when the disk
    is full, StoreError where something is that was not published.
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
            checksum = _fill(tmp, write)
            os.replace(tmp, final_dir)
            files.sync(final_dir.parent)
    except SafetensorError as error:
        raise files.write_error(final_dir, error) from error
    finally:
        files.remove(tmp)
    return checksum


def verify(directory: Path) -> str:
    """Check every file against the manifest; returns the checksum.

    Raises StoreError naming the first file that is missing or altered.
    """
    listed = _listed(directory)
    for name, entry in sorted(listed.items()):
        if describe(directory / name) != entry:
            raise _damaged(directory, f"{name} does not match {MANIFEST}")
    return _checksum(listed)


def is_whole(directory: Path) -> bool:
    """Whether `verify` finds nothing wrong."""
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
    """The version LATEST points at; None before the first. Raises StoreError when it is gone."""
    pointer = root / _LATEST
    if not pointer.exists():
        return None
    named = _VERSIONED.fullmatch(pointer.read_text().strip())
    if named is None or not _directory(root, int(named[1])).is_dir():
        raise StoreError(f"{pointer} names no snapshot: delete it and resume the run")
    return int(named[1])


def prune(root: Path, keep: Collection[int]) -> list[int]:
    """Remove versions (or checkpoint steps) not in `keep` and older than the newest of it.

    Never LATEST's, nor what is newer: that may have been written this moment. Returns the removed.
    """
    kept: set[int | None] = {*keep, latest(root)}
    newest, found = max(keep, default=0), _published(root)
    removed = [number for number in sorted(found) if number not in kept and number < newest]
    for number in removed:
        _discard(found[number])
    return removed


def drop_newer(root: Path, newest: int) -> None:
    """Remove versions (or steps) that are newer, and LATEST where it names one of them."""
    for number, path in sorted(_published(root).items()):
        if number > newest:
            if (root / _LATEST).exists() and latest(root) == number:
                files.remove(root / _LATEST)
            _discard(path)


def _published(root: Path) -> dict[int, Path]:
    numbered = [(path, number_of(path.name)) for path in sorted(root.glob("*")) if path.is_dir()]
    return {number: path for path, number in numbered if number is not None}


def number_of(name: str) -> int | None:
    """The version or step that a directory is named after (`v000003`, `step-000200`), or None."""
    match = _VERSIONED.fullmatch(name)
    return None if match is None else int(match[1])


def _directory(root: Path, version: int) -> Path:
    return root / f"v{version:06d}"


def _discard(directory: Path) -> None:
    """Remove a directory so that no half of it is ever seen under its name."""
    if directory.exists():
        tmp = files.temporary(directory)
        with files.explain_write(directory):
            os.replace(directory, tmp)
        files.remove(tmp)


def _fill(tmp: Path, write: Callable[[Path], None]) -> str:
    """Let `write` work, then put everything on disk and a manifest beside it."""
    write(tmp)
    paths = [path for path in sorted(tmp.rglob("*")) if path.is_file()]
    listed = {str(path.relative_to(tmp)): describe(path) for path in paths}
    for path in (*paths, *(path for path in tmp.rglob("*") if path.is_dir())):
        files.sync(path)
    checksum = _checksum(listed)
    files.write_json(tmp / MANIFEST, {"format": 1, "checksum": checksum, "files": listed})
    return checksum


def describe(path: Path) -> dict[str, Any] | None:
    """Size and checksum of a file, as in a manifest; None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _is_published(final_dir: Path) -> bool:
    """Whether our manifest is there; what has none is not ours to replace."""
    if (final_dir / MANIFEST).exists():
        return True
    if final_dir.exists() and (not final_dir.is_dir() or any(final_dir.iterdir())):
        raise StoreError(f"{final_dir} exists and holds no {MANIFEST}: move it out of the way")
    return False


def _listed(directory: Path) -> dict[str, Any]:
    """The files of the manifest, after checking it against itself."""
    try:
        manifest = files.read_json(directory / MANIFEST)
    except StoreError as error:
        raise _damaged(directory, f"{MANIFEST} is missing or unreadable") from error
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict) or manifest.get("checksum") != _checksum(listed):
        raise _damaged(directory, f"{MANIFEST} contradicts itself")
    return listed


def _damaged(directory: Path, what: str) -> StoreError:
    return StoreError(
        f"{directory} is damaged ({what}): delete it and resume the run to have it made again"
    )


def _checksum(listed: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
