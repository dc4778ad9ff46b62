"""Prompts from the records of a file or data set, conversational or plain.

Columns as TRL names them: `prompt` (text or messages) or `messages`, and if there are any
`completion`, `answer` and `teacher`; other names are mapped by `data.columns`. Promises: each bad
record is named with its place or dropped and counted, and no held-out prompt is trained on. Does
not open files (`npd.sources`), tokenise (`npd.chat`) or shuffle (the controller decides all order).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from npd.chat import Chat
from npd.config import DataConfig
from npd.errors import ConfigError, DataError
from npd.names import DEFAULT_TEACHER
from npd.sources import Unreadable, read_records
from npd.types import EncodedPrompt, Message, Prompt
from npd.wording import counted

COLUMNS = ("prompt", "messages", "completion", "answer", "teacher")
# What other data sets call their prompts, to put the likely rename into the error.
_USUAL_PROMPTS = ("question", "instruction", "problem", "query", "input", "text", "conversations")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts to train on and to hold out, and how many records were dropped for which reason."""

    train: list[Prompt]
    heldout: list[Prompt]
    dropped: dict[str, int]


class _BadRecordError(Exception):
    """One record that gives no prompt. `reason` is what it is counted under when dropped."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def load_prompts(config: DataConfig) -> PromptSet:
    """Read `data.train` and the held-out prompts.

    Prompts are numbered through, training prompts first. The held-out ones are `data.heldout`, or
    the last `data.heldout_size` of `data.train` (taken before `data.limit`); training prompts that
    ask the same as one of them are dropped as `in_heldout`.

    Raises:
        DataError: a file is missing, empty or unreadable, lacks a column, has a bad record (unless
            `data.on_bad_record` is drop), or has too few prompts.
        ConfigError: `data.train` is not set, or `data.columns` renames what npd does not know.
    """
    if config.train is None:
        raise ConfigError("data.train is not set: name a .jsonl or .parquet file, or a dataset")
    _check_columns(config.columns)
    dropped: Counter[str] = Counter()
    found = _read(config.train, config.split, config, dropped)
    if config.heldout is not None:
        train, heldout = found, _read(config.heldout, config.heldout_split, config, dropped)
    else:
        train, heldout = _split(found, config)
    asked = {_question(prompt) for prompt in heldout}
    kept = [prompt for prompt in train if _question(prompt) not in asked]
    dropped["in_heldout"] += len(train) - len(kept)
    if not kept:
        raise DataError(f"{config.train}: every training prompt is among the held-out ones too")
    kept = _numbered(kept[: config.limit], 0)
    return PromptSet(kept, _numbered(heldout, len(kept)), dict(+dropped))


def encode_prompts(
    prompts: Sequence[Prompt], chat: Chat, config: DataConfig
) -> tuple[list[EncodedPrompt], dict[str, int]]:
    """Prompts as token ids, and how many were dropped as `long_prompt`.

    Raises:
        DataError: a prompt has over `data.max_prompt_tokens` and `data.on_long_prompt` is error.
    """
    encoded = chat.encode_all(prompts)
    fitting = [e for e in encoded if len(e.prompt_ids) <= config.max_prompt_tokens]
    num_long = len(encoded) - len(fitting)
    if num_long and config.on_long_prompt == "error":
        longest = max(encoded, key=lambda e: len(e.prompt_ids))
        text = _question(next(p for p in prompts if p.index == longest.index))[-1][1]
        raise DataError(
            f"{num_long} of {counted(len(encoded), 'prompt')} have more than "
            f"data.max_prompt_tokens ({config.max_prompt_tokens}) tokens; the longest has "
            f"{len(longest.prompt_ids)}: prompt {longest.index}, {text[:60]!r}; raise "
            "data.max_prompt_tokens, or set data.on_long_prompt: drop"
        )
    return fitting, {"long_prompt": num_long} if num_long else {}


def _check_columns(columns: Mapping[str, str]) -> None:
    for name in columns:
        if name not in COLUMNS:
            near = get_close_matches(name, COLUMNS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(COLUMNS)}"
            raise ConfigError(
                f"data.columns renames {name!r}, which is no column of npd's: {hint} "
                "(it maps our name to the data's, e.g. {prompt: question})"
            )


def _split(found: list[Prompt], config: DataConfig) -> tuple[list[Prompt], list[Prompt]]:
    if len(found) <= config.heldout_size:
        raise DataError(
            f"{config.train} has {counted(len(found), 'prompt')}, too few to hold out "
            f"data.heldout_size ({config.heldout_size}) and train on the rest: lower "
            "data.heldout_size, or name other prompts in data.heldout"
        )
    at = len(found) - config.heldout_size
    return found[:at], found[at:]


def _numbered(prompts: Iterable[Prompt], start: int) -> list[Prompt]:
    return [replace(prompt, index=index) for index, prompt in enumerate(prompts, start)]


def _question(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """What a prompt asks, the same for a plain text and its one-message conversation."""
    if prompt.text is not None:
        return (("user", prompt.text),)
    return tuple((message.role, message.content) for message in prompt.messages)


def _read(source: str, split: str, config: DataConfig, dropped: Counter[str]) -> list[Prompt]:
    """All good prompts of a source; bad records raise, or go to `dropped`."""
    prompts: list[Prompt] = []
    first_error = ""
    for place, record in read_records(source, split):
        try:
            prompts.append(_prompt(_checked(record), config.columns, place))
        except _BadRecordError as error:
            first_error = first_error or f"{place}: {error}"
            if config.on_bad_record == "error":
                raise DataError(f"{first_error} (or set data.on_bad_record: drop)") from error
            dropped[error.reason] += 1
    if not prompts:
        why = f"no record of it gives a prompt: {first_error}" if first_error else "it is empty"
        raise DataError(f"{source} holds no prompts: {why}")
    return prompts


def _checked(record: Any) -> Mapping[str, Any]:
    if isinstance(record, Unreadable):
        raise _BadRecordError("unreadable", record.why)
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise _BadRecordError("unreadable", f"a record must be a JSON object, not a {kind}")
    return record


def _prompt(record: Mapping[str, Any], columns: Mapping[str, str], place: str) -> Prompt:
    """A record as a prompt (its index is given later)."""
    for ours, theirs in columns.items():
        if theirs not in record:
            near = get_close_matches(theirs, list(record), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise _BadRecordError(
                "no_column",
                f"no column {theirs!r}, which data.columns gives for {ours}; {hint}its columns "
                f"are {_names(record)}: correct data.columns",
            )
    values = {name: record.get(columns.get(name, name)) for name in COLUMNS}
    # A column that data.columns names is meant; otherwise `prompt` goes before `messages`.
    order = sorted(("prompt", "messages"), key=lambda name: name not in columns)
    source = next((name for name in order if values[name] is not None), None)
    if source is None:
        raise _BadRecordError("no_prompt", _no_prompt(record))
    text, messages, completion = _asked(values[source], source)
    if completion is None and values["completion"] is not None:
        completion = _completion(values["completion"])
    answer, teacher = values["answer"], values["teacher"]
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    return Prompt(
        index=0,
        messages=messages,
        text=text,
        completion=completion,
        answer=None if answer is None else _text(answer, "answer"),
        teacher=DEFAULT_TEACHER if teacher is None else _text(teacher, "teacher"),
        place=place,
    )


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(map(str, record)) or "none"


def _no_prompt(record: Mapping[str, Any]) -> str:
    usual = [name for name in _USUAL_PROMPTS if name in record]
    texts = [name for name, value in record.items() if isinstance(value, str | list)]
    likely = next(iter([*usual, *texts, "your column"]))
    return (
        f"no `prompt` and no `messages`; its columns are {_names(record)}: set data.columns, "
        f"e.g. --set 'data.columns={{prompt: {likely}}}'"
    )


def _asked(value: Any, column: str) -> tuple[str | None, tuple[Message, ...], str | None]:
    """Plain text, or messages and, off the end of `messages`, the completion."""
    if isinstance(value, str) and column == "prompt":
        return _text(value, column, reason="empty_prompt"), (), None
    messages = _messages(value, column)
    completion = None
    if column == "messages" and messages and messages[-1].role == "assistant":
        completion = _text(messages[-1].content, "the last message", reason="empty_completion")
        messages = messages[:-1]
    if not any(m.content.strip() for m in messages if m.role not in ("system", "assistant")):
        raise _BadRecordError("empty_prompt", f"{column} has no user message with text in it")
    if messages[-1].role == "assistant":
        raise _BadRecordError(
            "bad_messages", f"{column} ends with the assistant's turn: put that into `completion`"
        )
    return None, messages, completion


def _completion(value: Any) -> str:
    if isinstance(value, str):
        return _text(value, "completion", reason="empty_completion")
    messages = _messages(value, "completion")
    if [message.role for message in messages] != ["assistant"]:
        raise _BadRecordError("bad_messages", "completion must be text or one assistant message")
    return _text(messages[0].content, "completion", reason="empty_completion")


def _messages(value: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        forms = "text or a list" if column != "messages" else "a list"
        raise _BadRecordError(
            "not_text", f"{column} must be {forms} of messages, not {value!r:.60}"
        )
    return tuple(_message(item, column) for item in value)


def _message(item: Any, column: str) -> Message:
    if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
        raise _BadRecordError(
            "bad_messages", f"a message of {column} needs `role` and `content`: {item!r:.80}"
        )
    role, content = item["role"], item["content"]
    if not isinstance(role, str) or not isinstance(content, str):
        raise _BadRecordError(
            "not_text", f"role and content of {column} must be text: {item!r:.80}"
        )
    return Message(role, _encodable(content, column))


def _text(value: Any, column: str, *, reason: str = "empty") -> str:
    if not isinstance(value, str):
        raise _BadRecordError("not_text", f"{column} must be text, not {value!r:.60}")
    if not value.strip():
        raise _BadRecordError(reason, f"{column} is empty")
    return _encodable(value, column)


def _encodable(text: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BadRecordError("not_text", f"{column} has half a character ({error})") from error
    return text
