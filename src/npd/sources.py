"""Where records come from: JSONL and Parquet files, and Hugging Face data sets.

Promises: records in the order of the source, each with its place for messages; a source that is
missing or broken is one DataError with the remedy. Does not know what a prompt is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npd.errors import DataError

_JSONL = (".jsonl", ".ndjson", ".json")
# Endings that can only be meant as a file: a typo in a file's name must not become a download.
_FILES = (*_JSONL, ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".zip")
_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that does not parse, and why."""

    why: str


def read_records(source: str, split: str) -> Iterator[tuple[str, Any]]:
    """Each record of a source with its place (`train.jsonl:7`), in order.

    A record is what the source holds there, usually a dict; `Unreadable` where it does not parse.
    `split` counts for Hugging Face data sets only. Raises DataError if the source cannot be opened.
    """
    path = Path(source).expanduser()
    ending = path.suffix.lower()
    is_path = ending in _FILES or source.startswith(("/", ".", "~")) or source.count("/") > 1
    if path.is_dir() or not (path.is_file() or is_path):
        return _dataset_records(source, split)
    if not path.is_file():
        raise DataError(
            f"data file {source} does not exist (looked from {Path.cwd()}): check the path, or "
            "name a Hugging Face dataset"
        )
    if ending == ".parquet":
        return _parquet_records(path)
    if ending in _JSONL:
        return _jsonl_records(path)
    raise DataError(f"data file {source} is neither .jsonl nor .parquet: convert it to one of them")


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _parsed(line)
    except OSError as error:
        raise DataError(f"cannot read {path} ({error}): check its permissions") from error


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Unreadable("not UTF-8 text: save the file as UTF-8")
    except ValueError as error:
        return Unreadable(f"not JSON ({error}): write one JSON object a line")


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", record
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path} as Parquet ({error}): is it complete?") from error


def _dataset_records(source: str, split: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise DataError(
            f"{source} is no file, and reading a Hugging Face dataset needs `pip install "
            "'npd[datasets]'`: install it, or name a .jsonl or .parquet file"
        ) from error
    name, _, subset = source.partition(":")
    try:
        dataset = load_dataset(name, subset or None, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source} (split {split}) is no file here and cannot be loaded as a Hugging Face "
            f"dataset: {reason}; check the name, subset and split, download it where there is a "
            "network, or name a .jsonl or .parquet file"
        ) from error
    return ((f"{source} ({split}) row {i}", record) for i, record in enumerate(dataset, 1))
