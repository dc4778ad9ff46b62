"""Files of rollouts and scored rollouts: one Arrow stream per shard, followed by a checksum.

Promises: a file is complete or absent. A truncated or altered file raises a StoreError and is never
read as wrong numbers. Records own their memory. Files are plain Arrow streams, readable by any
Arrow library; the 8 bytes after the end mark are npd's checksum. Files are not compressed, so that
the page cache can serve them.

The teacher's top-k log-probs are stored as float16, with one float32 correction per position: the
log of the mass that rounding moved. It keeps the support's mass exact, from which the `tail` loss
computes the log of the rest. All other log-probs are float32.
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
from npd.store.files import write_atomic
from npd.types import DEFAULT_TEACHER, FinishReason, FloatArray, Rollout, SampleRef, Scored

Kind: TypeAlias = Literal["rollouts", "scored"]
_Array: TypeAlias = NDArray[Any]

_TRAILER = struct.Struct("<4sI")
_MAGIC = b"npd1"
_REMEDY = "delete it and resume the run, which regenerates it"

_INTS = pa.large_list(pa.int32())
_FLOATS = pa.large_list(pa.float32())
# Older releases of pyarrow provide this only if pandas is installed.
_NUMPY: dict[pa.DataType, type] = {
    pa.int32(): np.int32,
    pa.int64(): np.int64,
    pa.uint64(): np.uint64,
    pa.float16(): np.float16,
    pa.float32(): np.float32,
    pa.float64(): np.float64,
}
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
# Written only if a sample has a teacher other than the default one.
_TEACHER = pa.field("teacher", pa.string())


def write_rollouts(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Write a shard of rollouts, atomically. Seeds must be in [0, 2**64).

    Raises RunError if the disk is full or not writable.
    """
    _write(path, "rollouts", [_rollout_row(rollout) for rollout in rollouts])


def write_scored(path: Path, scored: Sequence[Scored]) -> None:
    """Write a shard of scored rollouts, rollouts included, atomically. Raises RunError."""
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
    """Reads single samples from many shards, by reference; at most `capacity` shards stay mapped.

    `path_of` gives a shard's file, e.g. `RunLayout(root).scored`. A file's checksum is verified at
    its first opening only. Not thread-safe. Raises StoreError.
    """

    def __init__(self, path_of: Callable[[int], Path], kind: Kind, *, capacity: int = 64) -> None:
        self._path_of, self._kind, self._capacity = path_of, kind, capacity
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._verified: set[tuple[int, int, int]] = set()

    def read(self, ref: SampleRef) -> Rollout | Scored:
        """The sample, as a Rollout or a Scored by the kind of shard."""
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
        """Unmap every shard. Records that were returned stay valid."""
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
    """One mapped file: scalar columns as lists, list columns as views, sliced on demand."""

    def __init__(self, path: Path, kind: Kind, *, is_verified: bool = False) -> None:
        self._path = path
        batch = _map(path, kind, is_verified=is_verified)
        self._scalars: dict[str, list[Any]] = {}
        self._lists: dict[str, tuple[_Array, _Array]] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if pa.types.is_large_list(column.type):
                offsets, values = np.from_dlpack(column.offsets), np.from_dlpack(column.values)
                self._lists[name] = (offsets, values)
            else:
                self._scalars[name] = column.to_pylist()
        self._rows = {sample: row for row, sample in enumerate(self._scalars["sample_id"])}
        self._teachers = self._scalars.get("teacher") or [DEFAULT_TEACHER] * len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def row_of(self, sample_id: int) -> int:
        if sample_id not in self._rows:
            raise StoreError(f"{self._path} does not contain sample {sample_id}: {_REMEDY}")
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
    """Float16 log-probs, and for each position the correction that keeps the row's total mass."""
    lowest = float(np.finfo(np.float16).min)
    rounded = np.where(np.isneginf(logprobs_LK), -np.inf, np.maximum(logprobs_LK, lowest))
    halves = rounded.astype(np.float16)
    mass, kept = (np.exp(x.astype(np.float64)).sum(axis=1) for x in (logprobs_LK, halves))
    is_measured = (mass > 0) & (kept > 0)
    ratio = np.divide(mass, kept, out=np.ones_like(mass), where=is_measured)
    return halves, np.log(ratio).astype(np.float32)


# `pa.array` and `to_numpy` import pandas where it is installed: 0.3 s and 40 MiB in every process.


def _column(name: str, kind: pa.DataType, rows: Sequence[dict[str, Any]]) -> pa.Array:
    cells = [row[name] for row in rows]
    if pa.types.is_string(kind):
        return _texts(cells)
    if not pa.types.is_large_list(kind):
        return _numbers(cells, kind)
    dtype = _NUMPY[kind.value_type]
    offsets = np.cumsum([0, *(len(cell) for cell in cells)], dtype=np.int64)
    flat = np.concatenate([np.empty(0, dtype), *(np.asarray(cell, dtype) for cell in cells)])
    return pa.LargeListArray.from_arrays(
        _filled(offsets, pa.int64()), _filled(flat, kind.value_type)
    )


def _texts(cells: Sequence[str]) -> pa.Array:
    texts = [cell.encode() for cell in cells]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(texts))]
    return pa.Array.from_buffers(pa.string(), len(texts), buffers)


def _numbers(cells: Sequence[float | None], kind: pa.DataType) -> pa.Array:
    is_there = np.array([cell is not None for cell in cells], bool)
    values: _Array = np.array([0 if cell is None else cell for cell in cells], _NUMPY[kind])
    return _filled(values, kind, None if is_there.all() else is_there)


def _filled(values: _Array, kind: pa.DataType, is_there: _Array | None = None) -> pa.Array:
    mask = None if is_there is None else pa.py_buffer(np.packbits(is_there, bitorder="little"))
    return pa.Array.from_buffers(kind, len(values), [mask, pa.py_buffer(values)])


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
        raise StoreError(f"{path} is truncated or not a shard: {_REMEDY}")
    if not is_verified and zlib.crc32(body) != checksum:
        raise StoreError(f"{path} does not match its checksum: {_REMEDY}")
    return _parse(path, kind, body)


def _parse(path: Path, kind: Kind, body: pa.Buffer) -> pa.RecordBatch:
    with pa.ipc.open_stream(pa.BufferReader(body)) as reader:
        known = (_SCHEMAS[kind], _SCHEMAS[kind].append(_TEACHER))
        if not any(reader.schema.equals(schema, check_metadata=True) for schema in known):
            raise StoreError(f"{path} has no {kind} that this version of npd can read: {_REMEDY}")
        return reader.read_next_batch()


def _identity(path: Path) -> tuple[int, int, int]:
    """A file's inode, change time and size: different once another file has this path."""
    try:
        stat = os.stat(path)
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing: resume the run, which regenerates it") from error
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
