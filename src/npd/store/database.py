"""The SQLite file under the ledger: its lock, its tables, and its errors in our words.

Promises: at most one writer at a time, decided by the operating system and not by a left-over file.
Does not know what the tables mean; that is `npd.store.ledger`.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from npd.errors import RunError, StoreError
from npd.store import files

_FORMAT = 2
# `tally` counts apart from `samples`, so that the two can contradict each other when one is wrong.
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
    """Take the run's lock; the system frees it when this process ends, however it ends."""
    lock_file = path.with_suffix(".lock")
    with files.explain_write(lock_file):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode().strip() or "unknown"
        os.close(descriptor)
        raise RunError(
            f"this run is already going (pid {holder} writes {path}): "
            "wait for it, end it, or choose another run_dir"
        ) from error
    try:
        with files.explain_write(lock_file):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def connect(path: Path, *, is_reader: bool) -> sqlite3.Connection:
    """Open the database, made and set up when missing; a reader cannot change it."""
    with explain(path):
        if not is_reader:
            return _open(path, "rwc", is_reader=False)
        try:
            return _open(path, "ro", is_reader=True)
        except sqlite3.OperationalError:
            # A power cut took the index of the log; only who may write makes that again.
            return _open(path, "rw", is_reader=True)


def _open(path: Path, mode: str, *, is_reader: bool) -> sqlite3.Connection:
    uri = f"file:{quote(str(path.absolute()))}?mode={mode}"
    db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30.0)
    try:
        _prepare(db, path, is_reader)
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path, is_reader: bool) -> None:
    """Set the connection up and make the tables of a new file."""
    found = db.execute("PRAGMA user_version").fetchone()[0]
    if found not in ((_FORMAT,) if is_reader else (0, _FORMAT)):
        raise StoreError(f"{path} has format {found}, not {_FORMAT}: use the npd that wrote it")
    if is_reader:
        db.execute("PRAGMA query_only = ON")
        return
    db.execute("PRAGMA journal_mode = WAL")
    # NORMAL: a commit is in the kernel, safe from kill -9, without a disk flush for each.
    db.execute("PRAGMA synchronous = NORMAL")
    if found == 0:
        db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {_FORMAT}; COMMIT;")


@contextmanager
def explain(path: Path) -> Iterator[None]:
    """Turn what SQLite says of the disk or the file into our errors; its other errors are bugs."""
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
