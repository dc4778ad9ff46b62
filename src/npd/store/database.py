"""The SQLite file under the ledger: lock, tables, and SQLite's errors as npd's.

Promises at most one writer at a time, by a lock that the operating system releases when its process
ends. The meaning of the tables is in `npd.store.ledger`.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from npd.errors import RunError, StoreError
from npd.store import files

_FORMAT = 2
_OWNER_ONLY = 0o600
# `tally` is counted independently of `samples`, so that a comparison reveals a wrong one.
_TABLES = """
CREATE TABLE events(seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, payload TEXT NOT NULL);
CREATE TABLE samples(
    sample_id INTEGER PRIMARY KEY, prompt_index INTEGER NOT NULL, shard INTEGER NOT NULL,
    version INTEGER NOT NULL, uses INTEGER NOT NULL DEFAULT 0, outcome TEXT,
    reason TEXT NOT NULL DEFAULT '');
CREATE INDEX live ON samples(sample_id) WHERE outcome IS NULL;
CREATE TABLE tally(
    what TEXT NOT NULL, reason TEXT NOT NULL, n INTEGER NOT NULL, PRIMARY KEY(what, reason)
) WITHOUT ROWID;
CREATE TABLE shards(shard INTEGER PRIMARY KEY, state TEXT NOT NULL);
CREATE TABLE segments(
    "index" INTEGER PRIMARY KEY, first_step INTEGER NOT NULL, last_step INTEGER NOT NULL,
    payload TEXT NOT NULL);
CREATE INDEX segments_by_step ON segments(last_step);
CREATE TABLE snapshots(
    version INTEGER PRIMARY KEY, step INTEGER NOT NULL, path TEXT NOT NULL, checksum TEXT NOT NULL);
CREATE TABLE checkpoints(step INTEGER PRIMARY KEY, path TEXT NOT NULL);
"""


def lock(path: Path) -> int:
    """Take the run's lock. The system releases it when this process ends, even by kill -9.

    Only the owner of the file can open it, because anyone who can could take the lock.
    """
    lock_file = path.with_suffix(".lock")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with files.explain_write(lock_file):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock_file, flags, _OWNER_ONLY)
    try:
        with suppress(OSError):  # another user's file, or a file system without modes
            os.fchmod(descriptor, _OWNER_ONLY)
        with files.explain_write(lock_file):
            _flock(descriptor, path)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _flock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        noted = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        holders = _holders(path.with_suffix(".lock"))
        others = [pid for pid in holders if noted not in _numbers_of(pid)]
        if others:
            raise RunError(
                f"{path.with_suffix('.lock')} is locked by pid {others[0]} "
                f"({_name_of(others[0])}), which is not a run: end that process, or choose another "
                "run_dir"
            ) from error
        raise RunError(
            f"this run is already running (pid {holders[0] if holders else noted} writes {path}): "
            "wait for it, end it, or choose another run_dir"
        ) from error


def is_locked(path: Path) -> bool:
    """Whether a process on this machine has the lock of the ledger at `path` (Linux).

    Reads /proc/locks instead of trying the lock, which could disturb a run that is starting.
    """
    lock_file = path.with_suffix(".lock")
    holders = _holders(lock_file)
    try:
        # A file on another disk may have the same inode.
        noted = lock_file.read_text(encoding="ascii").strip()
        return any(noted in _numbers_of(pid) for pid in holders)
    except PermissionError:
        return bool(holders)
    except (OSError, ValueError):
        return False


def _holders(lock_file: Path) -> list[int]:
    """The processes on this machine with a lock on a file (Linux; elsewhere empty)."""
    try:
        inode = lock_file.stat().st_ino
        listed = Path("/proc/locks").read_text(encoding="ascii").splitlines()
        # 1: FLOCK  ADVISORY  WRITE 4711 08:02:131 0 EOF; an arrow marks a process that waits.
        held = [line.split() for line in listed if " -> " not in line]
        return [int(parts[4]) for parts in held if parts[5].rpartition(":")[2] == str(inode)]
    except (OSError, ValueError, IndexError):
        return []


def _numbers_of(pid: int) -> list[str]:
    """The ids of a process, here and in its containers (Linux)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return [str(pid)]
    found = next((line for line in status.splitlines() if line.startswith("NSpid:")), "")
    return [str(pid), *found.split()[1:]]


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "of another user"


def connect(path: Path, *, is_reader: bool, may_be_new: bool = False) -> sqlite3.Connection:
    """Open the database, creating it if missing; a reader opens it read-only.

    `may_be_new`: a reader accepts a file without tables.
    """
    formats = (0, _FORMAT) if may_be_new or not is_reader else (_FORMAT,)
    with explain(path):
        if not is_reader:
            return _open(path, "rwc", formats, is_reader=False)
        try:
            mode = "ro&immutable=1" if _is_at_rest(path) else "ro"
            return _open(path, mode, formats, is_reader=True)
        except sqlite3.OperationalError:
            # A power cut removed the log's index file; only a writer can restore it.
            return _open(path, "rw", formats, is_reader=True)


def _is_at_rest(path: Path) -> bool:
    """Whether all data is in the file itself, without a log; reading a log creates files."""
    try:
        has_log = log_of(path).stat().st_size > 0
    except FileNotFoundError:  # a run that ends may remove it at this moment
        has_log = False
    return not has_log and not is_locked(path)


def log_of(path: Path) -> Path:
    """SQLite's log beside the database at `path`; it exists while the database is open."""
    return path.with_name(f"{path.name}-wal")


def _open(
    path: Path, mode: str, formats: tuple[int, ...], *, is_reader: bool
) -> sqlite3.Connection:
    uri = f"file:{quote(str(path.absolute()))}?mode={mode}"
    db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30.0)
    try:
        _prepare(db, path, formats, is_reader)
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path, formats: tuple[int, ...], is_reader: bool) -> None:
    """Configure the connection, and create the tables of a new file."""
    found = db.execute("PRAGMA user_version").fetchone()[0]
    if found == 0 and found not in formats:
        raise StoreError(
            f"{path} is empty: restore it together with its {path.name}-wal and "
            f"{path.name}-shm, or start a new run"
        )
    if found not in formats:
        raise StoreError(f"{path} has format {found}, not {_FORMAT}: use the npd that wrote it")
    # The file may be from another user; its schema must not call functions with side effects.
    db.execute("PRAGMA trusted_schema = OFF")
    if is_reader:
        db.execute("PRAGMA query_only = ON")
        return
    db.execute("PRAGMA journal_mode = WAL")
    # NORMAL: a commit reaches the kernel and survives kill -9, without a disk flush each time.
    db.execute("PRAGMA synchronous = NORMAL")
    if found == 0:
        db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {_FORMAT}; COMMIT;")


@contextmanager
def explain(path: Path) -> Iterator[None]:
    """Turn SQLite's errors about the disk or the file into npd's; others are bugs and pass."""
    try:
        yield
    except sqlite3.Error as error:
        name = str(getattr(error, "sqlite_errorname", ""))
        if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
            raise RunError(
                f"cannot write {path} ({error}): free disk space, then resume"
            ) from error
        if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_BUSY")):
            raise RunError(f"cannot open {path} ({error}): check its permissions") from error
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise StoreError(
                f"{path} is damaged ({error}): restore a copy, or start a new run"
            ) from error
        raise
