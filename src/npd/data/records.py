"""Turns one record of a data file into a prompt.

Columns have TRL's names: `prompt` (text or messages) or `messages`, and optionally `completion`,
`answer`, `teacher`, `system`, `tools`, `documents` and `chat_template_kwargs`; `data.columns` maps
other names. Turns may also be in ShareGPT's form (`from` and `value`). Alpaca's `input` is appended
to its `instruction`. Promises: a record without a usable prompt raises a `BadRecordError` whose
remedy can be typed as it is; no text of a record is dropped silently. Does not read files and does
not tokenise.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from difflib import get_close_matches
from typing import Any

from npd.types import DEFAULT_TEACHER, Message, Prompt

TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")
COLUMNS = (
    *("prompt", "messages", "completion", "answer", "teacher"),
    *("input", "system", *TEMPLATE_COLUMNS),
)
# Common column names of prompts and completions, to suggest a rename in the error.
_USUAL_PROMPTS = ("question", "instruction", "problem", "query", "input", "user")
_USUAL_COMPLETIONS = ("output", "response", "solution", "target", "answer")
_USUAL_CONVERSATIONS = (
    *("conversations", "conversation", "dialog", "dialogue", "chat", "turns", "chosen"),
)
# Text columns that never hold a prompt.
_NO_PROMPT = re.compile(
    r"(.*[_-])?(id|uid|uuid|hash|idx|index|source|category|subset|split|model|lang|language|role"
    r"|chosen|rejected|completion|output|response|answer)s?",
    re.IGNORECASE,
)
# ShareGPT's names for the speaker -> role.
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
# The same for messages with `content`, in any case; a role of tools is left to the template.
_ROLES = {
    **{name: role for name, role in _SHAREGPT_ROLES.items() if role != "tool"},
    **{name: name for name in ("tool", "developer")},
}
# Arguments that npd itself sets when it renders a conversation.
_OUR_ARGS = (
    *("conversation", "messages", "add_generation_prompt", "continue_final_message"),
    *("chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
    *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now"),
)
_INSTRUCTION = "instruction"
_NOT_ASKING = ("system", "developer", "assistant")
_PLAIN = re.compile(r"(?!(?:true|false|null|yes|no|on|off|y|n)$)[A-Za-z_][\w-]*", re.IGNORECASE)


class BadRecordError(Exception):
    """A record without a usable prompt. `reason` is its count's name if it is dropped."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_prompt(
    record: Mapping[str, Any],
    columns: Mapping[str, str] | None = None,
    *,
    ignored: Sequence[str] = (),
    place: str = "",
) -> Prompt:
    """A record as a prompt; the caller sets its index.

    `columns` maps npd's names to the record's. `ignored`: columns and message keys to leave out.

    Raises:
        BadRecordError: the record has no prompt, or something that a prompt cannot hold.
    """
    columns = columns or {}
    _check_columns(record, columns)
    values = _values(record, columns, ignored)
    source = _source(values, columns)
    if source is None:
        raise BadRecordError("no_prompt", _no_prompt(record))
    name = columns.get(source, source)
    text, messages, last = _asked(values[source], source, name, ignored)
    completion = _only_completion(last, values["completion"], ignored)
    text = _with_input(text, values["input"] if _reads_input(columns) else None)
    text, messages = _with_system(text, messages, values["system"])
    return Prompt(
        index=0,
        messages=messages,
        text=text,
        completion=completion,
        answer=_answer(values["answer"], columns.get("answer", "answer")),
        teacher=_teacher(values["teacher"]),
        template_args=_template_args(values),
        place=place,
    )


def unread_columns(
    record: Mapping[str, Any], columns: Mapping[str, str], ignored: Sequence[str] = ()
) -> list[str]:
    """The record's non-empty columns that `read_prompt` does not use."""
    source = _source(_values(record, columns, ignored), columns)
    idle = {"prompt", "messages"} - {source}
    if not _reads_input(columns):
        idle.add("input")
    read = {columns.get(name, name) for name in COLUMNS if name not in idle}
    read.update(ignored)
    return [name for name, value in record.items() if name not in read and _holds(value)]


def joins_input(record: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    """Whether the record has an `input` that is appended to its prompt."""
    return _reads_input(columns) and _holds(record.get(columns.get("input", "input")))


def _reads_input(columns: Mapping[str, str]) -> bool:
    """Whether `input` is used: the config names it, or the prompts are Alpaca's."""
    return "input" in columns or columns.get("prompt") == _INSTRUCTION


def _values(
    record: Mapping[str, Any], columns: Mapping[str, str], ignored: Sequence[str]
) -> dict[str, Any]:
    """The record's values by npd's column names."""
    names = {name: columns.get(name, name) for name in COLUMNS}
    return {o: None if t in ignored else _present(record.get(t)) for o, t in names.items()}


def _holds(value: Any) -> bool:
    value = _present(value)
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def _present(value: Any) -> Any:
    """The value, or None if it is missing; data frames write a missing value as NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _check_columns(record: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    for ours, theirs in columns.items():
        if theirs not in record:
            near = get_close_matches(theirs, list(record), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise BadRecordError(
                "no_column",
                f"there is no column {theirs!r}, which data.columns gives for {ours}; {hint}the "
                f"columns are {_names(record)}: correct data.columns",
            )


def _source(values: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """`prompt` or `messages`: the one that data.columns names, else `prompt` if both are there."""
    order = sorted(("prompt", "messages"), key=lambda name: name not in columns)
    return next((name for name in order if values[name] is not None), None)


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(map(str, record)) or "none"


def _no_prompt(record: Mapping[str, Any]) -> str:
    problem = f"there is no `prompt` and no `messages`; the columns are {_names(record)}: "
    lists = [n for n in (*_USUAL_CONVERSATIONS, *record) if _has_turns(record.get(n))]
    if lists:
        return f"{problem}{_set_columns(messages=lists[0])}"
    prompts = [name for name in _USUAL_PROMPTS if isinstance(record.get(name), str)]
    if not prompts and isinstance(record.get("text"), str):
        return (
            f"{problem}split each `text` into `prompt` and `completion`; if it is only a prompt, "
            f"{_set_columns(prompt='text')}"
        )
    texts = [n for n, v in record.items() if isinstance(v, str) and not _NO_PROMPT.fullmatch(n)]
    if not prompts and not texts:
        return f"{problem}give each record a `prompt` of text, or `messages`"
    likely = [*prompts, *texts][0]
    found = [n for n in _USUAL_COMPLETIONS if isinstance(record.get(n), str) and n != likely]
    also = f", with completions {_set(prompt=likely, completion=found[0])}" if found else ""
    return f"{problem}{_set_columns(prompt=likely)}{also}"


def _has_turns(value: Any) -> bool:
    """Whether a value is a conversation."""
    turns = value if isinstance(value, list) else []
    return any(isinstance(turn, dict) and not {"role", "from"}.isdisjoint(turn) for turn in turns)


def _set_columns(**columns: str) -> str:
    return f"set data.columns, e.g. {_set(**columns)}"


def _set(**columns: str) -> str:
    named = ", ".join(f"{ours}: {_quoted(theirs)}" for ours, theirs in columns.items())
    return f"--set 'data.columns={{{named}}}'"


def _quoted(name: str) -> str:
    # JSON's quoting is valid YAML; a plain word needs no quotes.
    return name if _PLAIN.fullmatch(name) else json.dumps(name)


def _asked(
    value: Any, column: str, name: str, ignored: Sequence[str]
) -> tuple[str | None, tuple[Message, ...], Message | None]:
    """The prompt as plain text or messages, and the completion if `messages` ends with one.

    `name` is the column's name in the record.
    """
    if isinstance(value, str) and column == "prompt":
        return _text(value, column, reason="empty_prompt"), (), None
    messages = _messages(value, column, ignored)
    last = None
    if column == "messages" and messages and messages[-1].role == "assistant":
        last = messages[-1]
        _check_answer(last, "the last message")
        messages = messages[:-1]
    theirs = [m.content or "" for m in messages if m.role not in _NOT_ASKING]
    if not any(content.strip() for content in theirs):
        raise BadRecordError("empty_prompt", f"{column} has no user message with text")
    if messages[-1].role == "assistant":
        raise BadRecordError("bad_messages", _answered(column, name))
    return None, messages, last


def _answered(column: str, name: str) -> str:
    if column == "messages":
        return "messages ends with two assistant turns: keep one of them"
    return (
        f"{column} ends with an assistant turn: move it to `completion`, or use the whole column "
        f"as messages: {_set(messages=name)}"
    )


def _check_answer(message: Message, what: str) -> None:
    """Check that an answer holds text, or something else such as a tool call."""
    if message.content is None or any(map(_holds, message.extra.values())):
        return
    if not message.content.strip():
        raise BadRecordError("empty_completion", f"{what} is empty: remove it, or write the answer")


def _only_completion(
    last: Message | None, column: Any, ignored: Sequence[str]
) -> str | Message | None:
    """The completion, from the last message or the column; a str if it is only text."""
    if last is not None and column is not None:
        raise BadRecordError(
            "two_completions",
            "`messages` ends with an answer and `completion` holds another: leave one of them out, "
            "e.g. --set 'data.leave_out=[completion]'",
        )
    if last is not None:
        return last if last.extra else last.content
    return None if column is None else _completion(column, ignored)


def _completion(value: Any, ignored: Sequence[str]) -> str | Message | None:
    if isinstance(value, str):
        return _text(value, "completion", reason="empty_completion")
    messages = _messages(value, "completion", ignored)
    if [message.role for message in messages] != ["assistant"]:
        raise BadRecordError("bad_messages", "completion must be text or one assistant message")
    _check_answer(messages[0], "completion")
    return messages[0] if messages[0].extra else messages[0].content


def _with_input(text: str | None, added: Any) -> str | None:
    """The prompt with Alpaca's `input` appended."""
    if added is None or added == "":
        return text
    if text is None:
        raise BadRecordError(
            "bad_messages", "`input` can be appended to a `prompt` of text, not to messages"
        )
    return f"{text}\n\n{_text(added, 'input')}"


def _with_system(
    text: str | None, messages: tuple[Message, ...], system: Any
) -> tuple[str | None, tuple[Message, ...]]:
    """The prompt with the column `system` as its first message."""
    if system is None or system == "":
        return text, messages
    first = Message("system", _text(system, "system"))
    if text is not None:
        return None, (first, Message("user", text))
    if messages[0].role in ("system", "developer"):
        if messages[0].content == first.content:
            return text, messages
        raise BadRecordError(
            "bad_messages", "`system` and the first message are different system messages"
        )
    return text, (first, *messages)


def _answer(value: Any, name: str) -> str | None:
    """The short answer as text; `name` is the column's name in the record."""
    if isinstance(value, float) and math.isinf(value):
        raise BadRecordError("not_text", "answer must be text or a finite number, not infinity")
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise BadRecordError(
            "not_text",
            f"answer must be text or a number, not {value!r:.40}: correct it, or ignore the column "
            f"with --set 'data.leave_out=[{_quoted(name)}]'",
        )
    return None if value is None else _text(value, "answer")


def _teacher(value: Any) -> str:
    return DEFAULT_TEACHER if value is None else _text(value, "teacher")


def _template_args(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the chat template besides the messages."""
    parsed = {name: _parsed(values[name], name) for name in TEMPLATE_COLUMNS}
    found = {name: value for name, value in parsed.items() if value is not None}
    own = found.pop("chat_template_kwargs", {})
    if not isinstance(own, dict):
        raise BadRecordError(
            "bad_tools", f"chat_template_kwargs must be an object, not {own!r:.60}"
        )
    for name in own:
        if name in _OUR_ARGS or name in found:
            raise BadRecordError("bad_tools", f"chat_template_kwargs cannot set {name!r}")
    for name, value in found.items():
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise BadRecordError(
                "bad_tools", f"{name} must be a list of objects, not {value!r:.60}"
            )
    args = {name: value for name, value in {**found, **own}.items() if value not in (None, [])}
    _encodable(json.dumps(args, ensure_ascii=False, default=repr), "tools")
    return args


def _parsed(value: Any, column: str) -> Any:
    """The value of a column that data sets often store as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise BadRecordError("bad_tools", f"{column} is text but not JSON: {error}") from error


def _messages(value: Any, column: str, ignored: Sequence[str]) -> tuple[Message, ...]:
    if not isinstance(value, list):
        forms = "text or a list" if column != "messages" else "a list"
        raise BadRecordError("not_text", f"{column} must be {forms} of messages, not {value!r:.60}")
    return tuple(_message(item, column, ignored) for item in value)


def _message(item: Any, column: str, ignored: Sequence[str]) -> Message:
    item = _as_openai(item, column)
    role, content = item["role"], _content(item.get("content"), column)
    if not isinstance(role, str) or not role.strip():
        raise BadRecordError("not_text", f"the role of a message of {column} must be text")
    extra = {
        key: value
        for key, value in item.items()
        if key not in ("role", "content", *ignored) and value is not None
    }
    if content is None and not any(map(_holds, extra.values())):
        raise BadRecordError(
            "not_text",
            f"content of {column} must be text, or null with tool_calls, not {item!r:.80}",
        )
    _encodable(json.dumps([role, extra], ensure_ascii=False, default=repr), column)
    return Message(_ROLES.get(role.strip().casefold(), role), content, extra)


def _as_openai(item: Any, column: str) -> Mapping[str, Any]:
    """A turn with `role` and `content`; a ShareGPT turn is converted."""
    if isinstance(item, dict) and "role" in item and len(item) > 1:
        return item
    if not isinstance(item, dict) or not {"from", "value"} <= item.keys():
        raise BadRecordError(
            "bad_messages", f"a message of {column} needs `role` and `content`, not {item!r:.80}"
        )
    name = item["from"]
    role = _SHAREGPT_ROLES.get(name.strip().casefold()) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(_SHAREGPT_ROLES)
        raise BadRecordError(
            "bad_messages",
            f"a message of {column} is from {item['from']!r:.40}, but `from` must be one of "
            f"{known}: correct it, or use `role` and `content`",
        )
    rest = {key: value for key, value in item.items() if key not in ("from", "value")}
    return {"role": role, "content": item["value"], **rest}


def _content(value: Any, column: str) -> str | None:
    """The text of a message; a list of text parts is joined."""
    value = _present(value)
    if isinstance(value, list):
        value = "".join(_part(part, column) for part in value)
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadRecordError("not_text", f"content of {column} must be text, not {value!r:.60}")
    return _encodable(value, column)


def _part(part: Any, column: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text":
        text = part.get("text")
        rest = [key for key, value in part.items() if value is not None]
        if isinstance(text, str) and set(rest) <= {"type", "text"}:
            return text
    raise BadRecordError(
        "not_text",
        f"a part of {column} is not plain text ({part!r:.60}): use only parts like "
        '{"type": "text", "text": ...}',
    )


def _text(value: Any, column: str, *, reason: str = "empty") -> str:
    if not isinstance(value, str):
        raise BadRecordError("not_text", f"{column} must be text, not {value!r:.60}")
    if not value.strip():
        raise BadRecordError(reason, f"{column} is empty")
    return _encodable(value, column)


def _encodable(text: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError("not_text", f"{column} is not valid Unicode ({error})") from error
    return text
