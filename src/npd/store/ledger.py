"""The ledger of a run: what was asked, what became of it, what was decided, in one SQLite file.

Promises: one writer at a time; a transaction is there whole or not at all, and an acknowledged one
survives `kill -9`. A loss of power may cost the last transactions but never the file; those that
name a snapshot or a checkpoint are forced onto the disk at once, because older ones are removed on
their strength. Every sample leaves at most once, so that `conservation()` holds at every moment.
Does not decide anything, and knows no clock.

A ledger belongs to the thread that opened it. Readers (`Ledger.reader`) never wait for the writer.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import Cursor
from types import TracebackType
from typing import Any, Literal, Self

from npd.errors import StoreError
from npd.store import database, files
from npd.store.records import (
    CheckpointRow,
    Conservation,
    SampleRow,
    ShardState,
    SnapshotRow,
    decode_segment,
    encode_segment,
)
from npd.types import Outcome, Segment

__all__ = ["CheckpointRow", "Conservation", "Ledger", "SampleRow", "ShardState", "SnapshotRow"]

# Rows read at once: an event or a segment is some kilobytes.
_PAGE = 100
_COUNT = "INSERT INTO tally VALUES(?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n"
_DUMPS = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


class Ledger:
    """The one writer of a run's ledger, created when missing.

    Write methods outside of `transaction()` are a transaction each. Raises RunError when another
    process writes it or the disk is full, StoreError when the file is damaged.

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
        """A read-only view, also while the run goes on. Raises StoreError when there is none."""
        if not path.exists():
            raise StoreError(f"{path} is missing: {path.parent} is not a run directory")
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
        """Close the file and let the next writer in. Closing twice is fine."""
        self._db.close()
        self._unlock()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes of the block or none of them; nested ones join the outermost.

        An error undoes the whole outermost transaction, even if the block swallows it further out.
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
        """Append an event (a JSON object); returns its place in the order, from 1."""
        with self.transaction():
            row = (kind, _DUMPS(payload))
            added = self._execute("INSERT INTO events(kind, payload) VALUES(?, ?)", row)
            assert added.lastrowid is not None
            return added.lastrowid

    def events(self, after: int = 0) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """(seq, kind, payload) in order, from the one after `after`; may be long, so lazily."""
        query = "SELECT seq, kind, payload FROM events WHERE seq > ? ORDER BY seq LIMIT ?"
        while rows := self._all(query, (after, _PAGE)):
            yield from ((seq, kind, json.loads(payload)) for seq, kind, payload in rows)
            after = rows[-1][0]

    def add_samples(self, shard: int, samples: Sequence[tuple[int, int, int]]) -> None:
        """Note samples as asked for: (sample_id, prompt_index, version) of a shard."""
        rows = [(sample, prompt, shard, version) for sample, prompt, version in samples]
        columns = "samples(sample_id, prompt_index, shard, version)"
        query = f"INSERT OR IGNORE INTO {columns} VALUES(?, ?, ?, ?)"
        with self.transaction():
            self._execute("INSERT OR IGNORE INTO shards VALUES(?, 'asked')", (shard,))
            self._update(query, rows, "asked for twice")
            self._execute(_COUNT, ("asked", "", len(rows)))

    def add_uses(self, sample_ids: Iterable[int]) -> None:
        """Count one more use in training for each; they must be live. Repeated ids count twice."""
        query = "UPDATE samples SET uses = uses + 1 WHERE sample_id = ? AND outcome IS NULL"
        # In their order, so that those of one page are changed one after another.
        self._update(query, [(sample,) for sample in sorted(sample_ids)], "used, but not live")

    def set_outcomes(self, outcomes: Sequence[tuple[int, Outcome, str]]) -> None:
        """Note that samples left: (sample_id, outcome, reason). They must be live (leave once)."""
        query = "UPDATE samples SET outcome = ?, reason = ? WHERE sample_id = ? AND outcome IS NULL"
        # `_value_`: the same as `value`, and no descriptor's call for each of a million samples.
        rows = [(outcome._value_, reason, sample) for sample, outcome, reason in outcomes]
        counts = Counter([(outcome, reason) for outcome, reason, _ in rows])
        with self.transaction():
            self._update(query, rows, "left, but not live")
            self._execute_many(_COUNT, [(*key, n) for key, n in counts.items()])

    def set_shard(self, shard: int, state: ShardState) -> None:
        """Note how far a shard is."""
        self._update(
            "UPDATE shards SET state = ? WHERE shard = ?",
            [(state, shard)],
            "shards never asked for",
        )

    def add_segment(self, segment: Segment) -> None:
        """Note a decided segment; it has at least one step."""
        first, last = segment.steps[0].index, segment.steps[-1].index
        row = (segment.index, first, last, _DUMPS(encode_segment(segment)))
        self._insert("INSERT INTO segments VALUES(?, ?, ?, ?)", row)

    def add_snapshot(self, version: int, step: int, path: Path, checksum: str) -> None:
        """Note a published snapshot, durably; the same version again replaces it."""
        row = (version, step, self._relative(path), checksum)
        self._insert("INSERT OR REPLACE INTO snapshots VALUES(?, ?, ?, ?)", row, is_durable=True)

    def add_checkpoint(self, step: int, path: Path) -> None:
        """Note a saved checkpoint, durably; the same step again replaces it."""
        row = (step, self._relative(path))
        self._insert("INSERT OR REPLACE INTO checkpoints VALUES(?, ?)", row, is_durable=True)

    def segments_after(self, step: int) -> Iterator[Segment]:
        """Segments with a step above `step`, in order (steps count from 1, so 0: all of them).

        May be long, so lazily, as events are.
        """
        columns = "last_step, payload FROM segments WHERE last_step > ? ORDER BY last_step LIMIT ?"
        while rows := self._all(f"SELECT {columns}", (step, _PAGE)):
            yield from (decode_segment(json.loads(payload)) for _, payload in rows)
            step = rows[-1][0]

    def snapshots(self) -> list[SnapshotRow]:
        """Every snapshot noted, oldest first (its directory may have been pruned)."""
        rows = self._all("SELECT version, step, path, checksum FROM snapshots ORDER BY version")
        return [SnapshotRow(row[0], row[1], self.path.parent / row[2], row[3]) for row in rows]

    def checkpoints(self) -> list[CheckpointRow]:
        """Every checkpoint noted, by step (its directory may have been pruned)."""
        rows = self._all("SELECT step, path FROM checkpoints ORDER BY step")
        return [CheckpointRow(step, self.path.parent / path) for step, path in rows]

    def last_checkpoint(self) -> CheckpointRow | None:
        """The checkpoint of the highest step; None before the first."""
        rows = self._all("SELECT step, path FROM checkpoints ORDER BY step DESC LIMIT 1")
        return CheckpointRow(rows[0][0], self.path.parent / rows[0][1]) if rows else None

    def shards(self) -> dict[int, ShardState]:
        """How far each shard is, by number."""
        return dict(self._all("SELECT shard, state FROM shards ORDER BY shard"))

    def shard_of(self, sample_id: int) -> int:
        """The shard of a sample. Raises StoreError for an unknown one."""
        rows = self._all("SELECT shard FROM samples WHERE sample_id = ?", (sample_id,))
        if not rows:
            raise StoreError(f"{self.path} knows no sample {sample_id}: check the id")
        return int(rows[0][0])

    def samples(
        self,
        outcome: Outcome | Literal["live"] | None = None,
        limit: int | None = None,
        *,
        every: int = 1,
    ) -> list[SampleRow]:
        """Samples by id: all, those of an outcome, or live ones; at most `limit`, every k-th id."""
        by = "1" if outcome is None else "outcome IS NULL" if outcome == "live" else "outcome = ?"
        keys = (outcome.value,) if isinstance(outcome, Outcome) else ()
        query = (
            "SELECT sample_id, prompt_index, shard, version, uses, outcome, reason "
            f"FROM samples WHERE {by} AND sample_id % ? = 0 ORDER BY sample_id LIMIT ?"
        )
        rows = self._all(query, (*keys, every, -1 if limit is None else limit))
        return [_sample_row(*row) for row in rows]

    def conservation(self) -> Conservation:
        """Where the samples are; cheap (counts kept, live ones by index), one consistent view."""
        query = (
            "SELECT what, SUM(n) FROM tally GROUP BY what "
            "UNION ALL SELECT 'live', COUNT(*) FROM samples WHERE outcome IS NULL"
        )
        counts = dict.fromkeys(("asked", *(outcome.value for outcome in Outcome)), 0)
        return Conservation(**(counts | dict(self._all(query))))

    def reasons(self) -> dict[tuple[Outcome, str], int]:
        """How many left, by outcome and reason."""
        rows = self._all("SELECT what, reason, n FROM tally WHERE what <> 'asked'")
        return {(Outcome(what), reason): n for what, reason, n in rows}

    def unused(self) -> dict[tuple[Outcome, str], int]:
        """How many left without a single use, by outcome and reason."""
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
            # What a commit wrote is in the write-ahead log; SQLite takes no locks on that file.
            with files.explain_write(self.path):
                files.sync(self.path.with_name(f"{self.path.name}-wal"))

    def _relative(self, path: Path) -> str:
        """Relative to the run directory where it lies in it, so that the directory may move."""
        home = self.path.parent
        return str(path.relative_to(home) if path.is_relative_to(home) else path.absolute())

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


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
