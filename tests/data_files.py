"""The same conversations in every form of record, and writers of data files, for tests of data."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Turn = tuple[str, str]
"""Role and text."""

_SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system"}


def as_messages(system: str, asked: str, answered: str) -> dict[str, Any]:
    turns = [("system", system)] if system else []
    turns += [("user", asked), ("assistant", answered)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def as_parts(system: str, asked: str, answered: str) -> dict[str, Any]:
    turns = as_messages(system, asked, answered)["messages"]
    return {
        "messages": [
            {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]}
            for turn in turns
        ]
    }


def as_prompt(system: str, asked: str, answered: str) -> dict[str, Any]:
    return {"prompt": asked, "completion": answered} | _system(system)


def as_prompt_messages(system: str, asked: str, answered: str) -> dict[str, Any]:
    *turns, last = as_messages(system, asked, answered)["messages"]
    return {"prompt": turns, "completion": [last]}


def as_sharegpt(system: str, asked: str, answered: str) -> dict[str, Any]:
    turns = as_messages(system, asked, answered)["messages"]
    return {"conversations": [{"from": _SHAREGPT[t["role"]], "value": t["content"]} for t in turns]}


def as_alpaca(system: str, asked: str, answered: str) -> dict[str, Any]:
    instruction, _, more = asked.partition("\n\n")
    return {"instruction": instruction, "input": more, "output": answered} | _system(system)


def as_question(system: str, asked: str, answered: str) -> dict[str, Any]:
    return {"question": asked, "answer": answered} | _system(system)


def as_question_response(system: str, asked: str, answered: str) -> dict[str, Any]:
    return {"question": asked, "response": answered} | _system(system)


def _system(system: str) -> dict[str, Any]:
    return {"system": system} if system else {}


FORMS: dict[str, Callable[[str, str, str], dict[str, Any]]] = {
    "messages": as_messages,
    "text parts": as_parts,
    "prompt": as_prompt,
    "prompt of messages": as_prompt_messages,
    "sharegpt": as_sharegpt,
    "alpaca": as_alpaca,
    "question": as_question,
    "question with response": as_question_response,
}
"""A record of a form, from a system message (or empty text), a question and an answer."""


def jsonl(records: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def json_list(records: Sequence[Any]) -> bytes:
    return json.dumps(list(records), indent=1).encode()


def csv_of(records: Sequence[Mapping[str, Any]], delimiter: str = ",") -> bytes:
    """Lists as JSON text, as a spreadsheet or a data frame's `to_csv` would hold them."""
    names = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, delimiter=delimiter, lineterminator="\r\n")
    writer.writeheader()
    for record in records:
        writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()})
    return text.getvalue().encode()


def tsv_of(records: Sequence[Mapping[str, Any]]) -> bytes:
    return csv_of(records, "\t")


def parquet(records: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(records)), sink)
    return sink.getvalue()


KINDS: dict[str, Callable[[Sequence[Any]], bytes]] = {
    ".jsonl": jsonl,
    ".ndjson": jsonl,
    ".json": json_list,
    ".csv": csv_of,
    ".tsv": tsv_of,
    ".parquet": parquet,
}


def zstd(content: bytes) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return bytes(sink.getvalue())


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd,
}


def write(folder: Path, records: Sequence[Any], name: str = "train.jsonl") -> str:
    """A data file in the format and compression of its name; its path."""
    path = folder / name
    kind = next(kind for kind in KINDS if kind in path.suffixes)
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    path.write_bytes(COMPRESSIONS[compression](KINDS[kind](records)))
    return str(path)
