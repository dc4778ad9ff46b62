"""Reads the records of one data file: JSON lines, a JSON list, CSV, TSV or Parquet; gzip or zstd.

Promises: records come in the order of the file, each with its place for messages; a broken file is
a DataError with the remedy. A file is read as a stream, except for a JSON list, which is parsed at
once. Does not know what a prompt is, nor where files are (`npd.data.sources`).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, BinaryIO, cast

from npd.config.paths import data_kind
from npd.errors import DataError
from npd.text import first_line, shown

_BATCH = 1024
_BLANK = b" \t\r\n\xef\xbb\xbf"
_LONGEST_LINE = 2**26  # bytes; a longer line is not a record, and could fill memory
_LONGEST_LIST = 2**30  # bytes of a file that is one JSON list, which is read at once
_TOO_LONG = f"a line of over {_LONGEST_LINE >> 20} MiB: write one JSON object per line"
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars"}


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that does not parse, with the reason."""

    why: str


def file_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a file with its place (`train.jsonl:7`), in order.

    A record is any value, usually a dict, or `Unreadable` if it does not parse.

    Raises:
        DataError: the file cannot be read, or is of a kind that npd does not read.
    """
    kind, _ = data_kind(str(path))
    if not kind:
        raise DataError(
            f"data file {path} is none of .jsonl, .json, .csv, .tsv and .parquet (each also .gz or "
            ".zst): convert it to one of them"
        )
    if kind == ".parquet":
        return _parquet_records(path)
    return _table_records(path, kind) if kind in _DELIMITERS else _json_records(path)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The content of a file, decompressed; errors in reading it become a DataError."""
    compression = _COMPRESSIONS.get(data_kind(str(path))[1], "")
    try:
        with _decompressed(path, compression) as file:
            yield file
    except PermissionError as error:
        raise DataError(f"cannot read {path} ({error}): check its permissions") from error
    except (OSError, EOFError, zlib.error) as error:
        check = f"is whole and {compression}" if compression else "can be read"
        raise DataError(
            f"cannot read {path} ({shown(first_line(error), 100)}): check that the file {check}"
        ) from error


def _decompressed(path: Path, compression: str) -> BinaryIO:
    if compression == "gzip":
        return cast("BinaryIO", gzip.open(path))
    if compression == "zstd":
        import pyarrow as pa

        stream = pa.input_stream(str(path), compression="zstd")
        return cast("BinaryIO", io.BufferedReader(stream, 2**16))
    return path.open("rb")


# ---- JSON


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        is_list = _is_list(path, file)
    with _opened(path) as file:
        if is_list:
            yield from _listed(path, file)
            return
        number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            if len(line) > _LONGEST_LINE:
                yield f"{path}:{number}", Unreadable(_TOO_LONG)
                _skip_line(file)
            elif line.strip(_BLANK):
                yield f"{path}:{number}", _parsed(line)


def _is_list(path: Path, file: BinaryIO) -> bool:
    """Whether a file is one JSON list.

    A `.json` file is a list if it begins with `[`. In a `.jsonl` file a line may be a list (a bad
    record with its line), so the file is a list only if its first line alone is not JSON, or is its
    only line and a list of records. A list of messages is one conversation.
    """
    lines = (line for line in iter(lambda: file.readline(_LONGEST_LINE), b"") if line.strip(_BLANK))
    first = next(lines, b"").lstrip(_BLANK)
    if not first.startswith(b"[") or data_kind(str(path))[0] == ".json":
        return first.startswith(b"[")
    found, has_more = _parsed(first), next(lines, None) is not None
    if isinstance(found, Unreadable):
        return has_more and first[1:].lstrip()[:1] in (b"{", b"]", b"")
    records = [isinstance(record, dict) and "role" not in record for record in found]
    return not has_more and bool(records) and all(records)


def _listed(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """The records of a file that is one JSON list."""
    text = file.read(_LONGEST_LIST + 1)
    if len(text) > _LONGEST_LIST:
        raise DataError(
            f"{path} is one JSON list of over {_LONGEST_LIST >> 30} GiB: write one JSON object per "
            "line, as .jsonl"
        )
    found = _parsed(text)
    if isinstance(found, Unreadable):
        raise DataError(f"{path}: {found.why}")
    for number, record in enumerate(found, 1):
        yield f"{path} item {number}", record


def _skip_line(file: BinaryIO) -> None:
    while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
        pass


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError:
        return Unreadable("not UTF-8 text: save the file as UTF-8")
    except RecursionError:
        return Unreadable("too deeply nested JSON: write one flat JSON object per line")
    except _DuplicateKeyError as error:
        return Unreadable(f"the key {error} is twice in one object: keep one of them")
    except ValueError as error:
        why = "a number of too many digits" if "digits" in str(error) else shown(error)
        return Unreadable(f"not JSON ({why}): write one JSON object per line")


class _DuplicateKeyError(Exception):
    """A key that is twice in an object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise _DuplicateKeyError(repr(twice)[:60])
    return found


# ---- CSV and TSV


def _table_records(path: Path, kind: str) -> Iterator[tuple[str, Any]]:
    """The rows below the header of a CSV or TSV file; an empty cell is null."""
    csv.field_size_limit(_LONGEST_LINE)
    with _opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        # Strict, so that a quote that is never closed is no cell of half the file.
        rows = csv.reader(text, delimiter=_DELIMITERS[kind], strict=True)
        start = 1
        try:
            names = next((row for row in rows if row), [])
            _check_header(path, names, _DELIMITERS[kind])
            start = rows.line_num + 1
            for row in rows:
                if row:
                    yield f"{path}:{start}", _row(row, names)
                start = rows.line_num + 1
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 text, after line {rows.line_num}: save the file as UTF-8"
            ) from error
        except csv.Error as error:
            raise DataError(
                f"{path}:{start}: a row that is not {kind[1:].upper()} ({error}): put cells with "
                'quotes or line breaks in quotes, and double the quotes within ("")'
            ) from error


def _check_header(path: Path, names: list[str], delimiter: str) -> None:
    _check_names(path, names)
    others = [name for name in _OTHER_DELIMITERS if name != delimiter]
    other = next((each for each in others if len(names) == 1 and each in names[0]), None)
    if other is not None:
        raise DataError(
            f"{path}: its header {names[0]!r:.60} is divided by {_OTHER_DELIMITERS[other]}: save "
            "the file with commas, or with tabs as .tsv"
        )


def _row(row: list[str], names: list[str]) -> Any:
    if len(row) != len(names):
        return Unreadable(
            f"a row of {len(row)} cells under a header of {len(names)}: put cells with commas, "
            "tabs or line breaks in quotes"
        )
    return {name: cell or None for name, cell in zip(names, row, strict=True)}


# ---- Parquet


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with _seekable(path) as source, pq.ParquetFile(source) as file:
            _check_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", of_arrow(record)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"cannot read {path} as Parquet ({error}): check that the file is complete"
        ) from error


@contextmanager
def _seekable(path: Path) -> Iterator[Path | IO[bytes]]:
    """A Parquet file; a compressed one is unpacked to a temporary file, as it is no stream."""
    if not data_kind(str(path))[1]:
        yield path
        return
    with TemporaryFile() as unpacked:
        with _opened(path) as file:
            shutil.copyfileobj(file, unpacked)
        yield unpacked


def _check_names(path: Path, names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path} has two columns called {twice[0]!r}: rename or drop one of them")


def of_arrow(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the null keys that Arrow adds to objects whose neighbours have the key."""
    return {name: _without_nulls(value) for name, value in record.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
