"""Files that are either whole or absent, and errors that say what to do.

Promises: after a crash at any moment a path holds its old content or its new one, never a part;
what a killed writer leaves behind is hidden, ends in `.tmp`, and is removed by `sweep`. Does not
lock: two writers of one path both succeed and the later one wins.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from npd.errors import RunError, StoreError

_SUFFIX = ".tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def temporary(path: Path) -> Path:
    """A fresh hidden name beside `path`, on the same file system so that a rename is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}")


def is_temporary(path: Path) -> bool:
    """Whether a path has a name that `temporary` gives: a killed writer's, if nobody writes."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


def sweep(directory: Path) -> list[Path]:
    """Remove what killed writers left directly in `directory`; returns what was removed."""
    left = sorted(directory.glob(f".*{_SUFFIX}"))
    for path in left:
        remove(path)
    return left


def remove(path: Path) -> None:
    """Remove a file, link or directory tree, as far as the disk lets it; nothing there is fine.

    It cleans up after errors, mostly, and must not hide them by one of its own.
    """
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Make `path` hold what `write` puts into the file it is given, durably and all at once.

    Raises RunError when the disk is full or the place cannot be written; `path` is then as before.
    """
    tmp = temporary(path)
    with explain_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tmp.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(tmp, path)
            sync(path.parent)
        finally:
            remove(tmp)


def sync(path: Path) -> None:
    """Force a file's content, or a directory's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(path: Path, error: Exception) -> RunError:
    """The RunError that says why `path` could not be written, and the remedy."""
    if is_full(error):
        return RunError(
            f"no space left while writing {path}: free space there or raise the quota, "
            "then resume the run"
        )
    return RunError(f"cannot write {path} ({error}): check that place and its permissions")


def is_full(error: Exception) -> bool:
    """Whether an error means a full disk, a quota or a size limit.

    Native writers (safetensors) tell the number only in their text: `... (os error 28)`.
    """
    if isinstance(error, OSError):
        return error.errno in _FULL
    told = re.search(r"os error (\d+)|code: (\d+)", str(error))
    return told is not None and int(told[1] or told[2]) in _FULL


@contextmanager
def explain_write(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into the RunError of `write_error`."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people to read, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises StoreError when it is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing: check the run directory") from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    except ValueError as error:
        raise StoreError(
            f"{path} is not valid JSON ({error}): restore it, or start a new run"
        ) from error
