"""Atomic files, and write errors with a remedy.

Promises: after a crash at any moment a path has its old content or its new content, never a part. A
killed writer leaves only a hidden file with the suffix `.tmp`, which `remove_temporary` removes.
Does not lock: two writers of one path both succeed, and the later one wins.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from npd.errors import RunError, StoreError

_SUFFIX = ".tmp"
_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]+\.tmp")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def temporary(path: Path) -> Path:
    """A fresh hidden name beside `path`, on the same file system so that a rename is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}")


def is_temporary(path: Path) -> bool:
    """Whether a path's name is from `temporary`; without a live writer, it is a leftover."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_temporary(directory: Path) -> list[Path]:
    """Remove the temporary files of killed writers directly in `directory`; returns them."""
    left = sorted(filter(is_temporary, directory.glob(f".*{_SUFFIX}")))
    for path in left:
        remove(path)
    return left


def remove(path: Path) -> None:
    """Remove a file, link or directory tree; does nothing if there is none, and never raises.

    Most callers clean up after an error, which another error must not hide.
    """
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write `path` atomically and durably: `write` fills a temporary file, which is then renamed.

    Raises RunError if the disk is full or not writable; `path` is then unchanged.
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


def give_usual_modes(directory: Path) -> None:
    """Give the files below `directory` the mode that new files have here (0666 less the umask).

    Libraries that write weights make their files readable by the owner alone.
    """
    probe = temporary(directory / "mode")
    with explain_write(directory):
        try:
            probe.touch()
            mode = probe.stat().st_mode & 0o777
            for path in directory.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    path.chmod(mode)
        finally:
            remove(probe)


def replace_text(path: Path, text: str) -> None:
    """Replace `path`, even if it is a link, by a short text; atomic but not durable.

    Raises OSError.
    """
    tmp = temporary(path)
    try:
        with tmp.open("x") as file:
            file.write(text)
        os.replace(tmp, path)
    finally:
        remove(tmp)


def open_append(path: Path) -> BinaryIO:
    """Open a file of ours for appending, unbuffered; created if missing.

    Refuses links, pipes and devices: in a shared folder someone else may have put one under our
    name. Raises OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise _not_a_file(path, error) if path.is_symlink() else error from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_a_file(path, None)
    return open(descriptor, "r+b", buffering=0)


def _not_a_file(path: Path, error: OSError | None) -> OSError:
    number = errno.ELOOP if error is None else error.errno
    return OSError(
        number, "a link, pipe or device is there, and npd does not write to it: remove it"
    )


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk."""
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
    return RunError(f"cannot write {path} ({error}): check that directory and its permissions")


def is_full(error: Exception) -> bool:
    """Whether an error means a full disk, a quota or a size limit.

    Native writers (safetensors) give the number only in their text: `... (os error 28)`.
    """
    if isinstance(error, OSError):
        return error.errno in _FULL
    match = re.search(r"os error (\d+)|code: (\d+)", str(error))
    return match is not None and int(match[1] or match[2]) in _FULL


@contextmanager
def explain_write(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into the RunError of `write_error`."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises StoreError if it is missing, unreadable or not JSON."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or device may never end
            raise StoreError(f"{path} is not a file: check the run directory")
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing: check the run directory") from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{path} is not valid JSON ({error}): restore it, or start a new run"
        ) from error
