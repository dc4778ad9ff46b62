"""Reads prompts from the records of one or several sources, and splits off the held-out ones.

Promises: a bad record is an error with its location, or is dropped and counted; no held-out prompt
is trained on. Does not open files (`npd.data.sources`), recognise forms (`npd.data.forms`), read
records (`npd.data.records`), tokenise (`npd.data.chat_tokenizer`) or shuffle (the controller
decides all order).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from npd.config import DataConfig
from npd.data.chat_tokenizer import ChatTokenizer
from npd.data.formats import Unreadable
from npd.data.forms import FORMS, BadRecordError, FormError, Forms
from npd.data.mixture import apportioned, drawn_order, mixed_size
from npd.data.records import COLUMNS, joins_input, read_prompt, unread_columns
from npd.data.sources import data_files, read_records
from npd.errors import ConfigError, DataError
from npd.text import counted
from npd.types import EncodedPrompt, Prompt

# The default of `data.heldout_size`: 64 prompts, or a tenth of a small file.
_DEFAULT_HELDOUT, _HELDOUT_SHARE = 64, 10


@dataclass(frozen=True, slots=True)
class SourceCount:
    """What a run takes of one source of training prompts; `name` is empty if it is the only one."""

    name: str
    form: str
    num_train: int
    num_heldout: int
    num_read: int


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Training prompts, held-out prompts, and the number of dropped records by reason.

    `unread`: unused columns that are not empty, with the number of records. `joined`: the number of
    prompts with Alpaca's `input` appended. `sources`: the sources of training prompts;
    `heldout_form`: the form of `data.heldout`, empty without it.
    """

    train: list[Prompt]
    heldout: list[Prompt]
    dropped: dict[str, int]
    unread: dict[str, int] = field(default_factory=dict)
    joined: int = 0
    sources: tuple[SourceCount, ...] = ()
    heldout_form: str = ""


@dataclass(slots=True)
class _Tally:
    """Counts of dropped records, unused columns and joined inputs."""

    dropped: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    joined: int = 0


@dataclass(frozen=True, slots=True)
class _Source:
    """One source of prompts: its settings, and `where` they are in the config."""

    train: str
    split: str
    format: str
    columns: Mapping[str, str]
    name: str = ""
    where: str = "data"
    weight: float | None = None


@dataclass(slots=True)
class _Part:
    """The prompts of a source: all of them, in which order they are drawn, and the form."""

    source: _Source
    prompts: list[Prompt]
    form: str
    order: list[int] = field(default_factory=list)
    num_heldout: int = 0

    @property
    def heldout(self) -> list[Prompt]:
        return self.drawn(range(self.num_heldout))

    def drawn(self, places: Iterable[int]) -> list[Prompt]:
        """The prompts at places of the order in which they are drawn, in the order of the data."""
        return [self.prompts[i] for i in sorted(self.order[place] for place in places)]


def load_prompts(config: DataConfig, seed: int = 0) -> PromptSet:
    """Read the training prompts and the held-out prompts.

    Prompts are numbered consecutively, training prompts first. The held-out prompts are
    `data.heldout`, or `data.heldout_size` prompts drawn by `seed` (before `data.limit`), of several
    sources in proportion. Training prompts equal to a held-out one are dropped as `in_heldout`.
    Several sources give prompts in proportion to their weights, drawn by `seed`.

    Raises:
        DataError: a file is missing, empty or unreadable, lacks a column, has a bad record (unless
            `data.on_bad_record` is drop), records of several forms, or too few prompts.
        ConfigError: no source is set, or columns are mapped that npd does not have.
    """
    sources = _sources(config)
    given = _Source(config.heldout or "", config.heldout_split, config.format, config.columns)
    for source in (*sources, given):
        _check_columns(source)
    tally = _Tally()
    parts = [_read(source, config, tally) for source in sources]
    for part in parts:
        part.order = drawn_order(len(part.prompts), seed, part.source.name)
    heldout_form = ""
    if config.heldout is not None:
        read = _read(given, config, tally)
        heldout, heldout_form = read.prompts, read.form
    else:
        _hold_out(parts, config)
        heldout = [prompt for part in parts for prompt in part.heldout]
    chosen = _train_prompts(parts, heldout, config, tally)
    train = _numbered((prompt for prompts in chosen for prompt in prompts), 0)
    counts = (
        SourceCount(p.source.name, p.form, len(prompts), p.num_heldout, len(p.prompts))
        for p, prompts in zip(parts, chosen, strict=True)
    )
    return PromptSet(
        train,
        _numbered(heldout[: config.heldout_limit], len(train)),
        dict(+tally.dropped),
        dict(tally.unread),
        tally.joined,
        tuple(counts),
        heldout_form,
    )


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


def _sources(config: DataConfig) -> list[_Source]:
    if config.train is not None:
        return [_Source(config.train, config.split, config.format, config.columns)]
    if not config.mix:
        raise ConfigError(
            "data.train is not set: name a file (.jsonl, .csv, .parquet, ...) or a dataset, or "
            "several in data.mix"
        )
    return [
        _Source(
            each.train,
            each.split or config.split,
            each.format or config.format,
            config.columns if each.columns is None else each.columns,
            name,
            f"data.mix.{name}",
            each.weight,
        )
        for name, each in config.mix.items()
    ]


def _check_columns(source: _Source) -> None:
    key, columns = f"{source.where}.columns", source.columns
    for name in columns:
        if name not in COLUMNS:
            near = get_close_matches(name, COLUMNS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COLUMNS)}"
            raise ConfigError(
                f"{key} has the key {name!r}, which is not a column of npd: {hint} "
                "(it maps npd's name to the data's, e.g. {prompt: question})"
            )
    if {"prompt", "messages"} <= columns.keys():
        raise ConfigError(f"{key} names both prompt and messages: name the one to read")
    form = FORMS.get(source.format)
    other = {"prompt": "messages", "messages": "prompt"}[form.source] if form else ""
    if other in columns:
        raise ConfigError(
            f"{key} names {other}, which {source.where}.format {source.format} does not have: "
            "leave one of the two out"
        )


def _hold_out(parts: Sequence[_Part], config: DataConfig) -> None:
    """Set how many prompts of each source are held out."""
    sizes = [len(part.prompts) for part in parts]
    total = mixed_size(sizes, _weights(parts))
    size = config.heldout_size
    if size is None:
        size = min(_DEFAULT_HELDOUT, max(1, total // _HELDOUT_SHARE))
    shares = apportioned(size, _weights(parts) or sizes)
    for part, count, share in zip(parts, sizes, shares, strict=True):
        if count <= share:
            of = "" if len(parts) == 1 else f", its part of {size},"
            raise DataError(
                f"{part.source.train} has {counted(count, 'prompt')}, too few to hold out "
                f"data.heldout_size ({share}){of} and train on the rest: lower data.heldout_size, "
                "or set data.heldout to other prompts"
            )
        part.num_heldout = share


def _weights(parts: Sequence[_Part]) -> list[float] | None:
    """The weights of the sources; None if every prompt is used."""
    weights = [part.source.weight for part in parts]
    return None if None in weights else [weight for weight in weights if weight is not None]


def _train_prompts(
    parts: Sequence[_Part], heldout: Sequence[Prompt], config: DataConfig, tally: _Tally
) -> list[list[Prompt]]:
    """The training prompts of each source, without those that ask the same as a held-out one."""
    asked = {_question(prompt) for prompt in heldout}
    usable = []
    for part in parts:
        rest = range(part.num_heldout, len(part.prompts))
        kept = [i for i in rest if _question(part.prompts[part.order[i]]) not in asked]
        tally.dropped["in_heldout"] += len(rest) - len(kept)
        usable.append(kept)
        if not kept:
            raise DataError(
                f"{part.source.train}: every training prompt is also held out: add other training "
                "prompts"
            )
    if len(parts) == 1:
        return [parts[0].drawn(usable[0])[: config.limit]]
    sizes = [len(kept) for kept in usable]
    total = mixed_size(sizes, _weights(parts))
    total = total if config.limit is None else min(total, config.limit)
    taken = apportioned(total, _weights(parts) or sizes)
    return [
        part.drawn(kept[:count]) for part, kept, count in zip(parts, usable, taken, strict=True)
    ]


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


def _read(source: _Source, config: DataConfig, tally: _Tally) -> _Part:
    """The prompts of a source; a bad record raises, or is dropped and counted."""
    forms = Forms(source.format, source.columns, config.leave_out, source.where)
    prompts: list[Prompt] = []
    first_error = ""
    for place, record in read_records(source.train, source.split):
        try:
            read = _checked(record)
            form = forms.of(read)
            prompts.append(read_prompt(read, form, ignored=config.leave_out, place=place))
            tally.unread.update(unread_columns(read, form, config.leave_out))
            tally.joined += joins_input(read, form)
        except FormError as error:
            raise DataError(f"{place}: {error}") from error
        except BadRecordError as error:
            first_error = first_error or f"{place}: {error}"
            if config.on_bad_record == "error":
                raise DataError(f"{first_error} (or set data.on_bad_record: drop)") from error
            tally.dropped[error.reason] += 1
    if not prompts:
        why = f"every record is bad: {first_error}" if first_error else "it is empty"
        raise DataError(f"{source.train} has no prompts: {why}")
    assert forms.form is not None
    files = data_files(source.train) or ()
    more = f", from {len(files):,} files" if len(files) > 1 else ""
    return _Part(source, prompts, f"{forms.form.title}{more}")


_KINDS = {list: "list", str: "string", int: "number", float: "number", bool: "boolean"}


def _checked(record: Any) -> Mapping[str, Any]:
    if isinstance(record, Unreadable):
        raise BadRecordError("unreadable", record.why)
    if not isinstance(record, dict):
        kind = _KINDS.get(type(record), "value")
        raise BadRecordError("unreadable", f"a record must be a JSON object, not a {kind}")
    return record
