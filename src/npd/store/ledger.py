"""The ledger of a run: events, samples, segments, snapshots and checkpoints in one SQLite file.

Promises: one writer at a time. A transaction is applied completely or not at all, and a committed
one survives `kill -9`. A power cut may lose the last transactions but never the file. The first
event, and transactions that name a snapshot or a checkpoint, are flushed to disk at once, because
older ones are deleted afterwards. No sample leaves twice, so `conservation()` holds at any moment.
Makes no decisions, and reads no clock.

A ledger belongs to the thread that opened it. Readers (`Ledger.reader`) never wait for the writer.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Cursor
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from npd.errors import StoreError
from npd.store import database, files
from npd.types import Outcome, Row, SampleRef, Segment, Step

# Rows fetched at a time; an event or a segment has a few kilobytes.
_PAGE = 100
_COUNT = "INSERT INTO tally VALUES(?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n"
_DUMPS = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


class Ledger:
    """The one writer of a run's ledger, which is created if missing.

    Each write method outside of `transaction()` is a transaction of its own. Raises RunError if
    another process writes the ledger or the disk is full, StoreError if the file is damaged.

    Example: `with ledger.transaction(): ledger.append_event("Tick", {}); ledger.add_uses([7])`
    """

    def __init__(self, path: Path, *, is_reader: bool = False) -> None:
        self.path = path
        self._lock = None if is_reader else database.lock(path)
        self._depth = 0
        self._is_durable = False
        try:
            self._db = database.connect(path, is_reader=is_reader)
        except BaseException:
            self._unlock()
            raise

    @classmethod
    def reader(cls, path: Path) -> Ledger:
        """A read-only view, even of a running run. Raises StoreError if there is no ledger."""
        if not path.exists():
            raise StoreError(
                f"{path} is missing: restore it (with {path.name}-wal and {path.name}-shm, if "
                "there are any), or give another run directory"
            )
        return cls(path, is_reader=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and release the lock. Closing twice is allowed."""
        self._db.close()
        self._unlock()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes of the block or none of them; nested transactions join the outermost one.

        An error rolls back the outermost transaction, even if an outer block catches it.
        """
        assert not self._depth or self._db.in_transaction, "this transaction was undone by an error"
        if not self._depth:
            self._execute("BEGIN IMMEDIATE")
        self._depth += 1
        try:
            yield
            if self._depth == 1:
                self._commit()
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        finally:
            self._depth -= 1
            self._is_durable &= self._depth > 0

    def append_event(self, kind: str, payload: dict[str, Any]) -> int:
        """Append an event (a JSON object); returns its sequence number, from 1."""
        with self.transaction():
            row = (kind, _DUMPS(payload))
            added = self._execute("INSERT INTO events(kind, payload) VALUES(?, ?)", row)
            assert added.lastrowid is not None
            # Files beside a ledger without events belong to a ledger that was lost.
            self._is_durable |= added.lastrowid == 1
            return added.lastrowid

    def num_events(self) -> int:
        """The number of events."""
        return int(self._all("SELECT COALESCE(MAX(seq), 0) FROM events")[0][0])

    def events(self, after: int = 0) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """(seq, kind, payload) of the events after number `after`, in order; a lazy iterator."""
        query = "SELECT seq, kind, payload FROM events WHERE seq > ? ORDER BY seq LIMIT ?"
        while rows := self._all(query, (after, _PAGE)):
            yield from ((seq, kind, json.loads(payload)) for seq, kind, payload in rows)
            after = rows[-1][0]

    def add_samples(self, shard: int, samples: Sequence[tuple[int, int, int]]) -> None:
        """Record requested samples of a shard: (sample_id, prompt_index, version)."""
        rows = [(sample, prompt, shard, version) for sample, prompt, version in samples]
        columns = "samples(sample_id, prompt_index, shard, version)"
        query = f"INSERT OR IGNORE INTO {columns} VALUES(?, ?, ?, ?)"
        with self.transaction():
            self._execute("INSERT OR IGNORE INTO shards VALUES(?, 'asked')", (shard,))
            self._update(query, rows, "requested twice")
            self._execute(_COUNT, ("asked", "", len(rows)))

    def add_uses(self, sample_ids: Iterable[int]) -> None:
        """Count one more training use of each sample, which must be live; repeated ids add up."""
        query = "UPDATE samples SET uses = uses + 1 WHERE sample_id = ? AND outcome IS NULL"
        # Sorted, so that rows of the same page are updated together.
        self._update(query, [(sample,) for sample in sorted(sample_ids)], "used, but not live")

    def set_outcomes(self, outcomes: Sequence[tuple[int, Outcome, str]]) -> None:
        """Record that live samples left: (sample_id, outcome, reason)."""
        query = "UPDATE samples SET outcome = ?, reason = ? WHERE sample_id = ? AND outcome IS NULL"
        # `_value_` is `value` without a descriptor call, which counts for a million samples.
        rows = [(outcome._value_, reason, sample) for sample, outcome, reason in outcomes]
        counts = Counter([(outcome, reason) for outcome, reason, _ in rows])
        with self.transaction():
            self._update(query, rows, "left, but not live")
            self._execute_many(_COUNT, [(*key, n) for key, n in counts.items()])

    def set_shard(self, shard: int, state: ShardState) -> None:
        """Record the state of a shard."""
        self._update(
            "UPDATE shards SET state = ? WHERE shard = ?",
            [(state, shard)],
            "shards never requested",
        )

    def add_segment(self, segment: Segment) -> None:
        """Record a decided segment, which has at least one step."""
        first, last = segment.steps[0].index, segment.steps[-1].index
        row = (segment.index, first, last, _DUMPS(encode_segment(segment)))
        self._insert("INSERT INTO segments VALUES(?, ?, ?, ?)", row)

    def add_snapshot(self, version: int, step: int, path: Path, checksum: str) -> None:
        """Record a published snapshot, durably; the same version again replaces it."""
        row = (version, step, self._relative(path), checksum)
        self._insert("INSERT OR REPLACE INTO snapshots VALUES(?, ?, ?, ?)", row, is_durable=True)

    def add_checkpoint(self, step: int, path: Path) -> None:
        """Record a saved checkpoint, durably; the same step again replaces it."""
        row = (step, self._relative(path))
        self._insert("INSERT OR REPLACE INTO checkpoints VALUES(?, ?)", row, is_durable=True)

    def segments_after(self, step: int) -> Iterator[Segment]:
        """Segments with a step above `step`, in order; a lazy iterator.

        Steps count from 1, so 0 gives all segments.
        """
        columns = "last_step, payload FROM segments WHERE last_step > ? ORDER BY last_step LIMIT ?"
        while rows := self._all(f"SELECT {columns}", (step, _PAGE)):
            yield from (decode_segment(json.loads(payload)) for _, payload in rows)
            step = rows[-1][0]

    def snapshots(self) -> list[SnapshotRow]:
        """Every recorded snapshot, oldest first; its directory may have been pruned."""
        rows = self._all("SELECT version, step, path, checksum FROM snapshots ORDER BY version")
        return [SnapshotRow(row[0], row[1], self.path.parent / row[2], row[3]) for row in rows]

    def checkpoints(self) -> list[CheckpointRow]:
        """Every recorded checkpoint, by step; its directory may have been pruned."""
        rows = self._all("SELECT step, path FROM checkpoints ORDER BY step")
        return [CheckpointRow(step, self.path.parent / path) for step, path in rows]

    def last_checkpoint(self) -> CheckpointRow | None:
        """The checkpoint of the highest step; None before the first."""
        rows = self._all("SELECT step, path FROM checkpoints ORDER BY step DESC LIMIT 1")
        return CheckpointRow(rows[0][0], self.path.parent / rows[0][1]) if rows else None

    def shards(self) -> dict[int, ShardState]:
        """The state of each shard, by number."""
        return dict(self._all("SELECT shard, state FROM shards ORDER BY shard"))

    def shard_of(self, sample_id: int) -> int:
        """The shard of a sample. Raises StoreError for an unknown one."""
        rows = self._all("SELECT shard FROM samples WHERE sample_id = ?", (sample_id,))
        if not rows:
            raise StoreError(f"{self.path} has no sample {sample_id}: check the id")
        return int(rows[0][0])

    def samples(
        self,
        outcome: Outcome | Literal["live"] | None = None,
        limit: int | None = None,
        *,
        every: int = 1,
    ) -> list[SampleRow]:
        """Samples by id: all, those of an outcome, or live ones; at most `limit`, evenly spaced."""
        by = "1" if outcome is None else "outcome IS NULL" if outcome == "live" else "outcome = ?"
        keys = (outcome.value,) if isinstance(outcome, Outcome) else ()
        query = (
            "SELECT sample_id, prompt_index, shard, version, uses, outcome, reason "
            f"FROM samples WHERE {by} AND sample_id % ? = 0 ORDER BY sample_id LIMIT ?"
        )
        rows = self._all(query, (*keys, every, -1 if limit is None else limit))
        return [_sample_row(*row) for row in rows]

    def conservation(self) -> Conservation:
        """The number of samples by state, in one consistent view; cheap at any size."""
        query = (
            "SELECT what, SUM(n) FROM tally GROUP BY what "
            "UNION ALL SELECT 'live', COUNT(*) FROM samples WHERE outcome IS NULL"
        )
        counts = dict.fromkeys(("asked", *(outcome.value for outcome in Outcome)), 0)
        return Conservation(**(counts | dict(self._all(query))))

    def reasons(self) -> dict[tuple[Outcome, str], int]:
        """The number of samples that left, by outcome and reason."""
        rows = self._all("SELECT what, reason, n FROM tally WHERE what <> 'asked'")
        return {(Outcome(what), reason): n for what, reason, n in rows}

    def unused(self) -> dict[tuple[Outcome, str], int]:
        """The number of samples that left without a training use, by outcome and reason."""
        left = "FROM samples WHERE outcome IS NOT NULL AND uses = 0"
        rows = self._all(f"SELECT outcome, reason, COUNT(*) {left} GROUP BY outcome, reason")
        return {(Outcome(what), reason): n for what, reason, n in rows}

    def _all(self, query: str, keys: Sequence[object] = ()) -> list[Any]:
        with database.explain(self.path):
            return self._db.execute(query, keys).fetchall()

    def _execute(self, query: str, row: Sequence[object] = ()) -> Cursor:
        with database.explain(self.path):
            return self._db.execute(query, row)

    def _execute_many(self, query: str, rows: Sequence[Sequence[object]]) -> int:
        with database.explain(self.path):
            return self._db.executemany(query, rows).rowcount if rows else 0

    def _insert(self, query: str, row: Sequence[object], *, is_durable: bool = False) -> None:
        with self.transaction():
            self._execute(query, row)
            self._is_durable |= is_durable

    def _update(self, query: str, rows: Sequence[Sequence[object]], problem: str) -> None:
        with self.transaction():
            changed = self._execute_many(query, rows)
            if changed != len(rows):
                raise AssertionError(f"{len(rows) - changed} of {len(rows)} {problem}")

    def _commit(self) -> None:
        assert self._db.in_transaction, "this transaction was undone by an error"
        self._execute("COMMIT")
        if self._is_durable:
            # A commit is in the write-ahead log, a file on which SQLite takes no locks.
            with files.explain_write(self.path):
                files.sync(database.log_of(self.path))
            mark = f"{self.num_events()}\n".encode()
            files.write_atomic(_mark(self.path), lambda file: file.write(mark))

    def _relative(self, path: Path) -> str:
        """Relative to the run directory for paths inside it, so that the directory can be moved."""
        home = self.path.parent
        return str(path.relative_to(home) if path.is_relative_to(home) else path.absolute())

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def recorded_events(path: Path) -> int:
    """The number of events in the ledger at `path`; 0 if it is missing or empty.

    Raises:
        StoreError: the ledger is damaged.
    """
    # Until SQLite's first checkpoint all data is in its log, and the file itself is empty.
    if not path.exists() or (path.stat().st_size == 0 and not database.log_of(path).exists()):
        return 0
    reader = database.connect(path, is_reader=True, may_be_new=True)
    with closing(reader) as db, database.explain(path):
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'events'").fetchone():
            return 0
        return int(db.execute("SELECT COALESCE(MAX(seq), 0) FROM events").fetchone()[0])


def marked_events(path: Path) -> int:
    """The number of events of the ledger at `path` that were flushed to disk, by `ledger.mark`.

    The mark is written with the first event, each snapshot and each checkpoint. A ledger with fewer
    events is incomplete, e.g. a bad copy; a power cut cannot cause that.
    """
    try:
        return int(_mark(path).read_text())
    except (FileNotFoundError, ValueError):
        return 0


def _mark(path: Path) -> Path:
    return path.with_suffix(".mark")


def _sample_row(
    sample_id: int,
    prompt_index: int,
    shard: int,
    version: int,
    uses: int,
    outcome: str | None,
    reason: str,
) -> SampleRow:
    left = Outcome(outcome) if outcome is not None else None
    return SampleRow(sample_id, prompt_index, shard, version, uses, left, reason)


ShardState: TypeAlias = Literal["asked", "generated", "scored", "failed"]


@dataclass(frozen=True, slots=True)
class Conservation:
    """The number of samples requested, and by state; `holds` unless the ledger is broken."""

    asked: int
    trained_out: int
    rejected: int
    stale: int
    failed: int
    live: int

    @property
    def holds(self) -> bool:
        """asked == trained_out + rejected + stale + failed + live."""
        left = self.trained_out + self.rejected + self.stale + self.failed
        return self.asked == left + self.live


@dataclass(frozen=True, slots=True)
class SampleRow:
    """The ledger's record of one sample; `outcome` None means live."""

    sample_id: int
    prompt_index: int
    shard: int
    version: int
    uses: int
    outcome: Outcome | None
    reason: str


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """A snapshot that was published after `step` optimiser steps."""

    version: int
    step: int
    path: Path
    checksum: str


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """A checkpoint that was saved after `step` optimiser steps."""

    step: int
    path: Path


def encode_segment(segment: Segment) -> dict[str, Any]:
    """A segment as compact JSON: steps -> ranks -> rows -> [sample_id, shard, version, tokens].

    Floats survive exactly.
    """
    return {
        "index": segment.index,
        "version": segment.version,
        "steps": [[step.index, step.lr, _encode_ranks(step)] for step in segment.steps],
    }


def decode_segment(value: dict[str, Any]) -> Segment:
    """The inverse of `encode_segment`."""
    steps = tuple(Step(index, lr, _decode_ranks(ranks)) for index, lr, ranks in value["steps"])
    return Segment(value["index"], value["version"], steps)


def _encode_ranks(step: Step) -> list[Any]:
    # A SampleRef is a tuple, which JSON writes as the list of its values.
    return [[row.samples for row in rows] for rows in step.ranks]


def _decode_ranks(ranks: list[Any]) -> tuple[tuple[Row, ...], ...]:
    return tuple(
        tuple(Row(tuple(SampleRef(*ref) for ref in row)) for row in rows) for rows in ranks
    )
