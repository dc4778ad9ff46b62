"""Reads prompts from the records of a file or data set, and splits off the held-out ones.

Promises: a bad record is an error with its location, or is dropped and counted; no held-out prompt
is trained on. Does not open files (`npd.data.sources`), read records (`npd.data.records`), tokenise
(`npd.data.chat_tokenizer`) or shuffle (the controller decides all order).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from hashlib import sha256
from typing import Any

from npd.config import DataConfig
from npd.data.chat_tokenizer import ChatTokenizer
from npd.data.records import COLUMNS, BadRecordError, joins_input, read_prompt, unread_columns
from npd.data.sources import Unreadable, read_records
from npd.errors import ConfigError, DataError
from npd.text import counted
from npd.types import EncodedPrompt, Prompt

# The default of `data.heldout_size`: 64 prompts, or a tenth of a small file.
_DEFAULT_HELDOUT, _HELDOUT_SHARE = 64, 10


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Training prompts, held-out prompts, and the number of dropped records by reason.

    `unread`: unused columns that are not empty, with the number of records. `joined`: the number of
    prompts with Alpaca's `input` appended.
    """

    train: list[Prompt]
    heldout: list[Prompt]
    dropped: dict[str, int]
    unread: dict[str, int] = field(default_factory=dict)
    joined: int = 0


@dataclass(slots=True)
class _Tally:
    """Counts of dropped records, unused columns and joined inputs."""

    dropped: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    joined: int = 0


def load_prompts(config: DataConfig, seed: int = 0) -> PromptSet:
    """Read `data.train` and the held-out prompts.

    Prompts are numbered consecutively, training prompts first. The held-out prompts are
    `data.heldout`, or `data.heldout_size` prompts of `data.train` drawn by `seed` (before
    `data.limit`). Training prompts equal to a held-out one are dropped as `in_heldout`.

    Raises:
        DataError: a file is missing, empty or unreadable, lacks a column, has a bad record (unless
            `data.on_bad_record` is drop), or has too few prompts.
        ConfigError: `data.train` is not set, or `data.columns` has an unknown name.
    """
    if config.train is None:
        raise ConfigError("data.train is not set: name a .jsonl or .parquet file, or a dataset")
    _check_columns(config.columns)
    tally = _Tally()
    found = _read(config.train, config.split, config, tally)
    if config.heldout is not None:
        train, heldout = found, _read(config.heldout, config.heldout_split, config, tally)
    else:
        train, heldout = _split(found, config, seed)
    asked = {_question(prompt) for prompt in heldout}
    kept = [prompt for prompt in train if _question(prompt) not in asked]
    tally.dropped["in_heldout"] += len(train) - len(kept)
    if not kept:
        raise DataError(
            f"{config.train}: every training prompt is also held out: add other training prompts"
        )
    kept = _numbered(kept[: config.limit], 0)
    heldout = _numbered(heldout[: config.heldout_limit], len(kept))
    return PromptSet(kept, heldout, dict(+tally.dropped), dict(tally.unread), tally.joined)


def encode_prompts(
    prompts: Sequence[Prompt],
    chat: ChatTokenizer,
    config: DataConfig,
    *,
    needs_alone: bool = True,
    needs_completions: bool = True,
) -> tuple[list[EncodedPrompt], dict[str, int]]:
    """Prompts as token ids, and how many were dropped as `long_prompt` or `bad_template`.

    Raises:
        DataError: a prompt exceeds `data.max_prompt_tokens` and `data.on_long_prompt` is error, or
            the chat template refuses a prompt and `data.on_bad_record` is error.
    """
    refused: list[DataError] = []
    encoded = chat.encode_all(
        prompts,
        needs_alone=needs_alone,
        needs_completions=needs_completions,
        on_refused=refused.append,
    )
    if refused and config.on_bad_record == "error":
        raise DataError(f"{refused[0]} (or set data.on_bad_record: drop)") from refused[0]
    if refused and not encoded:
        raise DataError(f"every prompt was dropped: {refused[0]}") from refused[0]
    dropped = {"bad_template": len(refused)} if refused else {}
    fitting = [e for e in encoded if len(e.prompt_ids) <= config.max_prompt_tokens]
    num_long = len(encoded) - len(fitting)
    if num_long and config.on_long_prompt == "error":
        longest = max(encoded, key=lambda e: len(e.prompt_ids))
        text = _question(next(p for p in prompts if p.index == longest.index))[-1][1] or ""
        raise DataError(
            f"{num_long} of {counted(len(encoded), 'prompt')} have more than "
            f"data.max_prompt_tokens ({config.max_prompt_tokens}) tokens; the longest has "
            f"{len(longest.prompt_ids)}: prompt {longest.index}, {text[:60]!r}; raise "
            "data.max_prompt_tokens, or set data.on_long_prompt: drop"
        )
    return fitting, dropped | ({"long_prompt": num_long} if num_long else {})


def _check_columns(columns: Mapping[str, str]) -> None:
    for name in columns:
        if name not in COLUMNS:
            near = get_close_matches(name, COLUMNS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COLUMNS)}"
            raise ConfigError(
                f"data.columns has the key {name!r}, which is not a column of npd: {hint} "
                "(it maps npd's name to the data's, e.g. {prompt: question})"
            )


def _split(found: list[Prompt], config: DataConfig, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts, each in the order of the data."""
    size = config.heldout_size
    if size is None:
        size = min(_DEFAULT_HELDOUT, max(1, len(found) // _HELDOUT_SHARE))
    if len(found) <= size:
        raise DataError(
            f"{config.train} has {counted(len(found), 'prompt')}, too few to hold out "
            f"data.heldout_size ({size}) and train on the rest: lower data.heldout_size, or set "
            "data.heldout to other prompts"
        )
    # Ordered by hash, because a hash is the same in every version of Python.
    order = sorted(range(len(found)), key=lambda i: sha256(f"{seed} {i}".encode()).digest())
    drawn = set(order[:size])
    train = [prompt for i, prompt in enumerate(found) if i not in drawn]
    return train, [found[i] for i in sorted(drawn)]


def _numbered(prompts: Iterable[Prompt], start: int) -> list[Prompt]:
    return [replace(prompt, index=index) for index, prompt in enumerate(prompts, start)]


def _question(prompt: Prompt) -> tuple[tuple[str, str | None, str], ...]:
    """A prompt's content, equal for plain text and the same text as a one-message conversation."""
    if prompt.text is not None:
        return (("user", prompt.text, ""),)
    return tuple(
        (m.role, m.content, json.dumps(m.extra, default=repr) if m.extra else "")
        for m in prompt.messages
    )


def _read(source: str, split: str, config: DataConfig, tally: _Tally) -> list[Prompt]:
    """The prompts of a source; a bad record raises, or is dropped and counted."""
    prompts: list[Prompt] = []
    first_error = ""
    for place, record in read_records(source, split):
        try:
            read = _checked(record)
            prompts.append(read_prompt(read, config.columns, ignored=config.leave_out, place=place))
            tally.unread.update(unread_columns(read, config.columns, config.leave_out))
            tally.joined += joins_input(read, config.columns)
        except BadRecordError as error:
            first_error = first_error or f"{place}: {error}"
            if config.on_bad_record == "error":
                raise DataError(f"{first_error} (or set data.on_bad_record: drop)") from error
            tally.dropped[error.reason] += 1
    if not prompts:
        why = f"every record is bad: {first_error}" if first_error else "it is empty"
        raise DataError(f"{source} has no prompts: {why}")
    return prompts


_KINDS = {list: "list", str: "string", int: "number", float: "number", bool: "boolean"}


def _checked(record: Any) -> Mapping[str, Any]:
    if isinstance(record, Unreadable):
        raise BadRecordError("unreadable", record.why)
    if not isinstance(record, dict):
        kind = _KINDS.get(type(record), "value")
        raise BadRecordError("unreadable", f"a record must be a JSON object, not a {kind}")
    return record
