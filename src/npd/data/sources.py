"""Finds what a source of prompts is: a file, a folder of files, or a Hugging Face data set.

Promises: records come in the order of the source, the files of a folder sorted by path, each record
with its place for messages; a missing source is a DataError with the remedy. Does not read files
(`npd.data.formats`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npd.config.paths import data_kind, why_no_path, why_unreadable
from npd.data.formats import file_records, of_arrow
from npd.errors import DataError
from npd.text import shown_path

# Endings of data that npd does not read; like those it reads, they mean a file, so that a mistyped
# file name does not start a download.
_UNREAD = (".txt", ".arrow", ".gz", ".zst", ".zip", ".bz2", ".xz", ".7z", ".xlsx")
# What makes a folder a data set of the `datasets` library: its descriptions, and names of splits.
_DESCRIPTIONS = ("README.md", "dataset_info.json", "dataset_dict.json", "state.json")
_SPLIT = re.compile(
    r"(?:^|[-._ 0-9/])(?:train|training|test|testing|eval|evaluation|valid|validation|val|dev)"
    r"(?=[-._ 0-9/]|$)"
)
_MOST_FILES = 100_000


def read_records(source: str, split: str) -> Iterator[tuple[str, Any]]:
    """Each record of a source with its place (`train.jsonl:7`), in order.

    A record is any value, usually a dict, or `Unreadable` if it does not parse. `split` applies to
    Hugging Face data sets only.

    Raises:
        DataError: the source cannot be opened.
    """
    files = data_files(source)
    if files is None:
        return _dataset_records(source, split)
    return (record for file in files for record in file_records(file))


def data_files(source: str) -> list[Path] | None:
    """The files of a source, in order; None if the `datasets` library is to read it.

    Raises:
        DataError: the source is a file that is missing or cannot be read, or a folder with files
            that npd cannot read.
    """
    if (why := why_no_path(source)) is not None:
        raise DataError(f"data file {shown_path(source)} {why}: correct the path")
    if "://" in source:
        raise DataError(f"data file {shown_path(source)} is a URL: download it, and give its path")
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return _shards(path)
    is_file = bool(data_kind(source)[0]) or path.suffix.lower() in _UNREAD
    is_path = is_file or source.startswith(("/", ".", "~")) or source.count("/") > 1
    if not (os.path.exists(path) or is_path):
        return None
    if (why := why_unreadable(path)) is not None:
        raise DataError(
            f"data file {shown_path(source)} {why} (looked from {shown_path(Path.cwd())}): check "
            "the path, or name a Hugging Face dataset"
        )
    return [path]


def _shards(folder: Path) -> list[Path] | None:
    """The data files in a folder, sorted by path; None if it is a data set with splits."""
    if any((folder / name).exists() for name in _DESCRIPTIONS):
        return None
    files = sorted(_files_below(folder), key=lambda path: path.relative_to(folder).as_posix())
    found = [path for path in files if data_kind(path.name)[0]]
    if not found or any(_SPLIT.search(path.relative_to(folder).as_posix()) for path in found):
        return None
    for path in files:
        is_data = path.suffix.lower() in _UNREAD and path.suffix.lower() != ".txt"
        if is_data and path not in found:
            raise DataError(
                f"the folder {shown_path(folder)} has {shown_path(path.name)} beside data files, "
                "which is none itself: convert it (.jsonl, .csv, .parquet), or move it away"
            )
        if path in found and (why := why_unreadable(path)) is not None:
            raise DataError(f"data file {shown_path(path)} {why}: correct it, or move it away")
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder and its folders, without hidden ones."""
    count = 0
    for above, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        for name in names:
            count += 1
            if count > _MOST_FILES:
                raise DataError(
                    f"the folder {shown_path(folder)} has over {_MOST_FILES:,} files: name the "
                    "folder that holds the data"
                )
            if not name.startswith((".", "_")):
                yield Path(above, name)


def _dataset_records(source: str, split: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise DataError(
            f"{source} is not a file, and reading a Hugging Face dataset needs `pip install "
            "'npd[datasets]'`: install it, or name a .jsonl, .csv or .parquet file"
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
            "network, or name a .jsonl, .csv or .parquet file"
        ) from error
    return (
        (f"{source} ({split}) row {i}", of_arrow(record)) for i, record in enumerate(dataset, 1)
    )
