"""Reads records from JSONL and Parquet files and from Hugging Face data sets.

Promises: records come in the order of the source, each with its place for messages; a missing or
broken source is a DataError with the remedy. Does not know what a prompt is.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from npd.config.paths import why_no_path, why_unreadable
from npd.errors import DataError
from npd.text import shown, shown_path

_JSONL = (".jsonl", ".ndjson", ".json")
# Extensions that mean a file, so that a mistyped file name does not start a download.
_FILES = (*_JSONL, ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".zip")
_BATCH = 1024
_BLANK = b" \t\r\n\xef\xbb\xbf"
_LONGEST_LINE = 2**26  # bytes; a longer line is not a record, and could fill memory
_LONGEST_LIST = 2**30  # bytes of a file that is one JSON list, which is read at once
_TOO_LONG = f"a line of over {_LONGEST_LINE >> 20} MiB: write one JSON object per line"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that does not parse, with the reason."""

    why: str


def read_records(source: str, split: str) -> Iterator[tuple[str, Any]]:
    """Each record of a source with its place (`train.jsonl:7`), in order.

    A record is any value, usually a dict, or `Unreadable` if it does not parse. `split` applies to
    Hugging Face data sets only. Raises DataError if the source cannot be opened.
    """
    if (why := why_no_path(source)) is not None:
        raise DataError(f"data file {shown_path(source)} {why}: correct the path")
    if "://" in source:
        raise DataError(f"data file {shown_path(source)} is a URL: download it, and give its path")
    path = Path(os.path.expanduser(source))
    ending = path.suffix.lower()
    is_path = ending in _FILES or source.startswith(("/", ".", "~")) or source.count("/") > 1
    if os.path.isdir(path) or not (os.path.exists(path) or is_path):
        return _dataset_records(source, split)
    if (why := why_unreadable(path)) is not None:
        raise DataError(
            f"data file {shown_path(source)} {why} (looked from {shown_path(Path.cwd())}): check "
            "the path, or name a Hugging Face dataset"
        )
    if ending == ".parquet":
        return _parquet_records(path)
    if ending in _JSONL:
        return _jsonl_records(path)
    raise DataError(f"data file {source} is neither .jsonl nor .parquet: convert it to one of them")


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open("rb") as file:
            if _is_list(path, file):
                yield from _listed(path, file)
                return
            number = 0
            while line := file.readline(_LONGEST_LINE + 1):
                number += 1
                if len(line) > _LONGEST_LINE:
                    yield f"{path}:{number}", Unreadable(_TOO_LONG)
                    _skip_line(file)
                elif line.strip():
                    yield f"{path}:{number}", _parsed(line)
    except OSError as error:
        raise DataError(f"cannot read {path} ({error}): check its permissions") from error


def _is_list(path: Path, file: BinaryIO) -> bool:
    """Whether a file is one JSON list. Rewinds the file.

    A `.json` file is a list if it begins with `[`. In a `.jsonl` file a line may be a list (a bad
    record with its line), so the file is a list only if its first line alone is not JSON, or is its
    only line and a list of records. A list of messages is one conversation.
    """
    start = file.read(_BATCH).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    if not start.startswith(b"[") or path.suffix.lower() == ".json":
        return start.startswith(b"[")
    lines = (line for line in iter(lambda: file.readline(_LONGEST_LINE), b"") if line.strip(_BLANK))
    first, has_more = next(lines), next(lines, None) is not None
    file.seek(0)
    found = _parsed(first)
    if isinstance(found, Unreadable):
        return has_more and start[1:].lstrip()[:1] in (b"{", b"]", b"")
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


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", _of_arrow(record)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"cannot read {path} as Parquet ({error}): check that the file is complete"
        ) from error


def _check_names(path: Path, names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path} has two columns called {twice[0]!r}: rename or drop one of them")


def _of_arrow(record: dict[str, Any]) -> dict[str, Any]:
    return {name: _without_nulls(value) for name, value in record.items()}


def _without_nulls(value: Any) -> Any:
    """The value without null keys, which Arrow adds to objects whose neighbours have the key."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _dataset_records(source: str, split: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise DataError(
            f"{source} is not a file, and reading a Hugging Face dataset needs `pip install "
            "'npd[datasets]'`: install it, or name a .jsonl or .parquet file"
        ) from error
    if os.path.isdir(os.path.expanduser(source)):
        name, subset = os.path.abspath(os.path.expanduser(source)), ""
    else:
        name, _, subset = source.partition(":")
    try:
        dataset = load_dataset(name, subset or None, split=split)
    except (OSError, ValueError, LookupError, DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source} (split {split}) is not a file and cannot be loaded as a Hugging Face "
            f"dataset: {reason}; check the name, subset and split, download it where there is a "
            "network, or name a .jsonl or .parquet file"
        ) from error
    return (
        (f"{source} ({split}) row {i}", _of_arrow(record)) for i, record in enumerate(dataset, 1)
    )
