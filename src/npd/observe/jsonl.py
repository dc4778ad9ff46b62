"""Append-only files with one JSON object per line, robust to crashes.

Promises: a record is readable after `append` has returned. A record that a full disk wrote in part
is removed again. Readers and the next writer drop an incomplete last line, as after a crash. Does
not fsync, because important data is in the ledger too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from npd.errors import StoreError
from npd.store.files import explain_write, open_append

# Bytes read at once when searching for the last line end; a line has a few hundred bytes.
_LOOK_BYTES = 65536
# Built once; `json.dumps` with options would build an encoder each time.
_ENCODE = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode


class JsonLines:
    """Appends to `path`, which is created with its folder; one writer at a time."""

    def __init__(self, path: Path) -> None:
        with explain_write(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: data that a full disk refused must not be written on close.
            self._file = open_append(path)
            _drop_torn_tail(self._file)
        self._path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record. RunError if the disk is full or not writable."""
        data, written = memoryview(f"{_ENCODE(record)}\n".encode()), 0
        with explain_write(self._path):
            try:
                while written < len(data):  # a full disk can write a part before it fails
                    written += self._file.write(data[written:])
            except OSError:
                self._remove_last(written)
                raise

    def _remove_last(self, size: int) -> None:
        """Remove the last `size` bytes, so that the next record starts on a new line."""
        with suppress(OSError):
            self._file.truncate(self._file.seek(0, os.SEEK_END) - size)

    def close(self) -> None:
        """Close the file; appending afterwards is an error."""
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All complete records of `path`, none if it does not exist. StoreError for a damaged line."""
    return [_parse(path, number, line) for number, line in _lines(path)]


def read_good_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of `path`, skipping damaged lines."""
    for number, line in _lines(path):
        with suppress(StoreError, RecursionError):
            yield _parse(path, number, line)


def _lines(path: Path) -> list[tuple[int, str]]:
    """Complete, non-empty lines with their numbers; none if `path` is not a file."""
    if not path.is_file():
        return []
    complete, _, _torn = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    lines = enumerate(complete.split("\n"), start=1)
    return [(number, line) for number, line in lines if line.strip()]


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise StoreError(
            f"{path}, line {number} is not JSON ({error.msg}): delete that line to read the rest"
        ) from error
    if not isinstance(record, dict):
        raise StoreError(
            f"{path}, line {number} is not a record: delete that line to read the rest"
        )
    return record


def _drop_torn_tail(file: BinaryIO) -> None:
    """Remove an incomplete last line, searching from the end."""
    at = size = file.seek(0, os.SEEK_END)
    while at > 0:
        start = max(0, at - _LOOK_BYTES)
        file.seek(start)
        end = file.read(at - start).rfind(b"\n")
        if end >= 0:
            at = start + end + 1
            break
        at = start
    if at != size:
        file.truncate(at)
