"""Append-only files of one JSON object a line, as a crash may leave them.

Promises: a record is readable once `append` has returned; what a full disk took of one is cut off
again, and a line that a crash tore off at the end is dropped by readers and by the next writer
alike. Does not fsync: a lost last line of metrics costs nothing that the ledger does not keep.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from npd.errors import StoreError
from npd.store.files import explain_write

# Made once: `json.dumps` with options makes an encoder each time.
_ENCODE = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode


class JsonLines:
    """Appends to `path` (created with its folder); one writer at a time."""

    def __init__(self, path: Path) -> None:
        with explain_write(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_tail(path)
            # Unbuffered: what a full disk refuses must not come again when the file is closed.
            self._file = path.open("ab", buffering=0)
        self._path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record. RunError when the disk does not take it."""
        data, written = memoryview(f"{_ENCODE(record)}\n".encode()), 0
        with explain_write(self._path):
            try:
                while written < len(data):  # a disk that fills up takes a part, refuses the rest
                    written += self._file.write(data[written:])
            except OSError:
                self._take_back(written)
                raise

    def _take_back(self, size: int) -> None:
        """Cut the last `size` bytes off, so that the next line does not go on from half a one."""
        with suppress(OSError):
            self._file.truncate(self._file.seek(0, os.SEEK_END) - size)

    def close(self) -> None:
        """Close the file; appending afterwards is an error."""
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All complete records of `path`, none if it does not exist. StoreError on a damaged line."""
    if not path.exists():
        return []
    complete, _, _torn = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    lines = enumerate(complete.split("\n"), start=1)
    return [_parse(path, number, line) for number, line in lines if line.strip()]


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise StoreError(
            f"{path}, line {number} is not JSON ({error.msg}); delete that line to read the rest"
        ) from error
    if not isinstance(record, dict):
        raise StoreError(f"{path}, line {number} is not a record; delete that line to go on")
    return record


def _drop_torn_tail(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end != len(data):
        with path.open("r+b") as file:
            file.truncate(end)
