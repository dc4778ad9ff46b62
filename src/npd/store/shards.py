"""Rollouts and scored rollouts as files: one Arrow stream a shard, closed by a checksum.

Promises: a file is whole or absent; one that was truncated or altered since is a StoreError, never
wrong numbers. What is read owns its memory. Files stay plain Arrow streams (any Arrow library reads
them; the 8 bytes after the end mark are ours). Does not compress: the page cache is the cache.

The teacher's top-k log-probs are kept as float16 and one float32 a position, the log of the mass
that rounding moved, so that the mass inside the support survives exactly (the `tail` loss takes the
log of what is left of it). All other log-probs are float32.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from npd.errors import StoreError
from npd.names import DEFAULT_TEACHER
from npd.store.files import write_atomic
from npd.types import FinishReason, FloatArray, Rollout, SampleRef, Scored

Kind: TypeAlias = Literal["rollouts", "scored"]
_Array: TypeAlias = NDArray[Any]

_TRAILER = struct.Struct("<4sI")
_MAGIC = b"npd1"
_REMEDY = "delete it and resume the run to have it made again"

_INTS = pa.large_list(pa.int32())
_FLOATS = pa.large_list(pa.float32())
_ROLLOUT_FIELDS = {
    "sample_id": pa.int64(),
    "prompt_index": pa.int64(),
    "version": pa.int64(),
    "seed": pa.uint64(),
    "finish": pa.string(),
    "prompt_ids": _INTS,
    "header_ids": _INTS,
    "response_ids": _INTS,
    "logprobs": _FLOATS,
    "versions": _INTS,
}
_OPTIONAL = ("nll_teacher_alone", "nll_student", "nll_student_alone", "overlap")
_SCORED_FIELDS = {
    **_ROLLOUT_FIELDS,
    "topk_ids": _INTS,
    "topk_logprobs": pa.large_list(pa.float16()),
    "topk_shift": _FLOATS,
    "teacher_logprobs": _FLOATS,
    "nll_teacher": pa.float64(),
    **dict.fromkeys(_OPTIONAL, pa.float64()),
}
_SCHEMAS: dict[Kind, pa.Schema] = {
    "rollouts": pa.schema(_ROLLOUT_FIELDS, metadata={"npd": "rollouts/2"}),
    "scored": pa.schema(_SCORED_FIELDS, metadata={"npd": "scored/2"}),
}
# Only where a sample has a teacher other than the default one.
_TEACHER = pa.field("teacher", pa.string())


def write_rollouts(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Write a shard of rollouts, atomically. Seeds must be in [0, 2**64).

    Raises RunError when the disk is full or the place cannot be written.
    """
    _write(path, "rollouts", [_rollout_row(rollout) for rollout in rollouts])


def write_scored(path: Path, scored: Sequence[Scored]) -> None:
    """Write a shard of scored rollouts (the rollouts with them), atomically. Raises RunError."""
    _write(path, "scored", [_scored_row(item) for item in scored])


def read_rollouts(path: Path) -> list[Rollout]:
    """Read a whole shard in the order written. Raises StoreError (missing, truncated, altered)."""
    shard = _Shard(path, "rollouts")
    return [shard.rollout(row) for row in range(len(shard))]


def read_scored(path: Path) -> list[Scored]:
    """Read a whole scored shard in the order written. Raises StoreError."""
    shard = _Shard(path, "scored")
    return [shard.scored(row) for row in range(len(shard))]


def verify_shard(path: Path, kind: Kind) -> None:
    """Check a whole shard against its checksum. Raises StoreError."""
    _map(path, kind, is_verified=False)


class ShardReader:
    """Single samples out of many shards, by reference; at most `capacity` shards stay mapped.

    `path_of` gives a shard's file, e.g. `RunLayout(root).scored`. A file's checksum is verified the
    first time it is opened, not each time it comes back. For one thread at a time. Raises
    StoreError.
    """

    def __init__(self, path_of: Callable[[int], Path], kind: Kind, *, capacity: int = 64) -> None:
        self._path_of, self._kind, self._capacity = path_of, kind, capacity
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._verified: set[tuple[int, int, int]] = set()

    def read(self, ref: SampleRef) -> Rollout | Scored:
        """The sample as its kind of shard holds it."""
        return self.rollout(ref) if self._kind == "rollouts" else self.scored(ref)

    def rollout(self, ref: SampleRef) -> Rollout:
        """The rollout of a sample, from either kind of shard."""
        shard = self._shard(ref.shard)
        return shard.rollout(shard.row_of(ref.sample_id))

    def scored(self, ref: SampleRef) -> Scored:
        """The scored rollout of a sample; only of scored shards."""
        assert self._kind == "scored", "rollout shards hold no scores"
        shard = self._shard(ref.shard)
        return shard.scored(shard.row_of(ref.sample_id))

    def close(self) -> None:
        """Unmap every shard. Records already handed out stay valid."""
        self._open.clear()

    def _shard(self, index: int) -> _Shard:
        if index not in self._open:
            while len(self._open) >= self._capacity:
                self._open.popitem(last=False)
            self._open[index] = self._load(self._path_of(index))
        self._open.move_to_end(index)
        return self._open[index]

    def _load(self, path: Path) -> _Shard:
        identity = _identity(path)
        shard = _Shard(path, self._kind, is_verified=identity in self._verified)
        self._verified.add(identity)
        return shard


class _Shard:
    """One mapped file: scalar columns as lists, list columns as views cut out on demand."""

    def __init__(self, path: Path, kind: Kind, *, is_verified: bool = False) -> None:
        self._path = path
        batch = _map(path, kind, is_verified=is_verified)
        self._scalars: dict[str, list[Any]] = {}
        self._lists: dict[str, tuple[_Array, _Array]] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if pa.types.is_large_list(column.type):
                self._lists[name] = (column.offsets.to_numpy(), column.values.to_numpy())
            else:
                self._scalars[name] = column.to_pylist()
        self._rows = {sample: row for row, sample in enumerate(self._scalars["sample_id"])}
        self._teachers = self._scalars.get("teacher") or [DEFAULT_TEACHER] * len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def row_of(self, sample_id: int) -> int:
        if sample_id not in self._rows:
            raise StoreError(f"{self._path} does not hold sample {sample_id}: {_REMEDY}")
        return self._rows[sample_id]

    def rollout(self, row: int) -> Rollout:
        logprobs, versions = self._cut("logprobs", row), self._cut("versions", row)
        return Rollout(
            sample_id=self._scalars["sample_id"][row],
            prompt_index=self._scalars["prompt_index"][row],
            version=self._scalars["version"][row],
            prompt_ids=self._cut("prompt_ids", row),
            header_ids=self._cut("header_ids", row),
            response_ids=self._cut("response_ids", row),
            logprobs=logprobs if len(logprobs) else None,
            finish=FinishReason(self._scalars["finish"][row]),
            seed=self._scalars["seed"][row],
            versions=versions if len(versions) else None,
            teacher=self._teachers[row],
        )

    def scored(self, row: int) -> Scored:
        rollout = self.rollout(row)
        shape = (len(rollout.response_ids), -1)
        shift = self._cut("topk_shift", row)
        rounded = self._cut("topk_logprobs", row).astype(np.float32)
        return Scored(
            rollout=rollout,
            topk_ids=self._cut("topk_ids", row).reshape(shape),
            topk_logprobs=rounded.reshape(shape) + shift[:, None],
            teacher_logprobs=self._cut("teacher_logprobs", row),
            nll_teacher=self._scalars["nll_teacher"][row],
            **{name: self._scalars[name][row] for name in _OPTIONAL},
        )

    def _cut(self, name: str, row: int) -> _Array:
        offsets, values = self._lists[name]
        return values[offsets[row] : offsets[row + 1]].copy()


def _rollout_row(rollout: Rollout) -> dict[str, Any]:
    length = len(rollout.response_ids)
    logprobs = () if rollout.logprobs is None else rollout.logprobs
    versions = () if rollout.versions is None else rollout.versions
    assert length >= 1, f"sample {rollout.sample_id} has no response"
    assert len(logprobs) in (0, length), f"sample {rollout.sample_id}: log-probs of another length"
    assert len(versions) in (0, length), f"sample {rollout.sample_id}: versions of another length"
    row = {name: getattr(rollout, name) for name in (*_ROLLOUT_FIELDS, "teacher")}
    return row | {"logprobs": logprobs, "versions": versions, "finish": rollout.finish.value}


def _scored_row(scored: Scored) -> dict[str, Any]:
    length = len(scored.rollout.response_ids)
    fits = len(scored.topk_ids) == len(scored.teacher_logprobs) == length
    problem = f"sample {scored.rollout.sample_id}: teacher arrays do not fit {length} tokens"
    assert fits, problem
    assert scored.topk_ids.ndim == 2, problem
    assert scored.topk_ids.shape == scored.topk_logprobs.shape, problem
    rounded, shift = _round(np.asarray(scored.topk_logprobs, np.float32))
    row = {name: getattr(scored, name) for name in (*_OPTIONAL, "nll_teacher", "teacher_logprobs")}
    topk = {"topk_ids": scored.topk_ids.ravel(), "topk_logprobs": rounded.ravel()}
    return _rollout_row(scored.rollout) | row | topk | {"topk_shift": shift}


def _round(logprobs_LK: FloatArray) -> tuple[NDArray[np.float16], FloatArray]:
    """Float16 log-probs, and per position what to add to them to keep the row's total mass."""
    lowest = float(np.finfo(np.float16).min)
    rounded = np.where(np.isneginf(logprobs_LK), -np.inf, np.maximum(logprobs_LK, lowest))
    halves = rounded.astype(np.float16)
    mass, kept = (np.exp(x.astype(np.float64)).sum(axis=1) for x in (logprobs_LK, halves))
    is_measured = (mass > 0) & (kept > 0)
    ratio = np.divide(mass, kept, out=np.ones_like(mass), where=is_measured)
    return halves, np.log(ratio).astype(np.float32)


def _column(name: str, kind: pa.DataType, rows: Sequence[dict[str, Any]]) -> pa.Array:
    cells = [row[name] for row in rows]
    if not pa.types.is_large_list(kind):
        return pa.array(cells, kind)
    dtype = kind.value_type.to_pandas_dtype()
    offsets = np.cumsum([0, *(len(cell) for cell in cells)], dtype=np.int64)
    flat = np.concatenate([np.empty(0, dtype), *(np.asarray(cell, dtype) for cell in cells)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat, kind.value_type))


def _write(path: Path, kind: Kind, rows: Sequence[dict[str, Any]]) -> None:
    assert len({row["sample_id"] for row in rows}) == len(rows), f"{path}: a sample comes twice"
    is_default = all(row["teacher"] == DEFAULT_TEACHER for row in rows)
    schema = _SCHEMAS[kind] if is_default else _SCHEMAS[kind].append(_TEACHER)
    columns = [_column(field.name, field.type, rows) for field in schema]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    body = sink.getvalue()
    trailer = _TRAILER.pack(_MAGIC, zlib.crc32(body))
    write_atomic(path, lambda file: file.writelines((body, trailer)))


def _map(path: Path, kind: Kind, *, is_verified: bool) -> pa.RecordBatch:
    """The record batch of a file, its buffers in the memory map. Raises StoreError."""
    if _identity(path)[2] <= _TRAILER.size:
        raise StoreError(f"{path} is truncated: {_REMEDY}")
    try:
        with pa.memory_map(str(path)) as file:
            content = file.read_buffer()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}; check the disk") from error
    body = content.slice(0, content.size - _TRAILER.size)
    magic, checksum = _TRAILER.unpack(content.slice(body.size))
    if magic != _MAGIC:
        raise StoreError(f"{path} is truncated or not a shard of npd: {_REMEDY}")
    if not is_verified and zlib.crc32(body) != checksum:
        raise StoreError(f"{path} does not match its checksum: {_REMEDY}")
    return _parse(path, kind, body)


def _parse(path: Path, kind: Kind, body: pa.Buffer) -> pa.RecordBatch:
    with pa.ipc.open_stream(pa.BufferReader(body)) as reader:
        known = (_SCHEMAS[kind], _SCHEMAS[kind].append(_TEACHER))
        if not any(reader.schema.equals(schema, check_metadata=True) for schema in known):
            raise StoreError(f"{path} holds no {kind} this version of npd can read: {_REMEDY}")
        return reader.read_next_batch()


def _identity(path: Path) -> tuple[int, int, int]:
    """What changes when another file takes this path: inode, time of change, size."""
    try:
        stat = os.stat(path)
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing: resume the run to have it made again") from error
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
