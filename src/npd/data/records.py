"""Turns one record of a data file into a prompt.

Columns have TRL's names: `prompt` (text or messages) or `messages`, and optionally `completion`,
`answer`, `teacher`, `system`, `tools`, `documents` and `chat_template_kwargs`; a form
(`npd.data.forms`) maps other names. Turns may also be in ShareGPT's form (`from` and `value`).
Alpaca's `input` is appended to its `instruction`. Promises: a record without a usable prompt raises
a `BadRecordError` whose remedy can be typed as it is; no text of a record is dropped silently. Does
not read files, and does not tokenise.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from difflib import get_close_matches
from typing import Any

from npd.data.forms import BadRecordError, Form, holds, names_of, present, quoted, set_columns
from npd.data.template import OUR_ARGS
from npd.types import DEFAULT_TEACHER, Message, Prompt

TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")
COLUMNS = (
    *("prompt", "messages", "completion", "answer", "teacher"),
    *("input", "system", *TEMPLATE_COLUMNS),
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
_NOT_ASKING = ("system", "developer", "assistant")
# Columns of other media, which the text of a conversation refers to.
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# A list of messages written as text, by JSON or by Python.
_WRITTEN = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")


def read_prompt(
    record: Mapping[str, Any], form: Form, *, ignored: Sequence[str] = (), place: str = ""
) -> Prompt:
    """A record of a form as a prompt; the caller sets its index.

    `ignored`: columns and message keys to leave out.

    Raises:
        BadRecordError: the record has no prompt, or something that a prompt cannot hold.
    """
    _check_columns(record, form.required)
    _check_media(record, ignored)
    values = _values(record, form, ignored)
    if values[form.source] is None:
        raise BadRecordError("no_prompt", _no_question(record, form))
    text, messages, last = _asked(values[form.source], form, ignored)
    completion = _only_completion(last, values["completion"], form, ignored)
    text = _with_input(text, values["input"] if form.reads_input else None)
    text, messages = _with_system(text, messages, values["system"])
    return Prompt(
        index=0,
        messages=messages,
        text=text,
        completion=completion,
        answer=_answer(values["answer"], form.columns.get("answer", "answer")),
        teacher=_teacher(values["teacher"]),
        template_args=_template_args(values),
        place=place,
    )


def unread_columns(record: Mapping[str, Any], form: Form, ignored: Sequence[str] = ()) -> list[str]:
    """The record's non-empty columns that `read_prompt` does not use."""
    idle = {"prompt", "messages"} - {form.source}
    if not form.reads_input:
        idle.add("input")
    read = {form.columns.get(name, name) for name in COLUMNS if name not in idle}
    read.update(ignored)
    return [name for name, value in record.items() if name not in read and holds(value)]


def joins_input(record: Mapping[str, Any], form: Form) -> bool:
    """Whether the record has an `input` that is appended to its prompt."""
    return form.reads_input and holds(record.get(form.columns.get("input", "input")))


def _values(record: Mapping[str, Any], form: Form, ignored: Sequence[str]) -> dict[str, Any]:
    """The record's values by npd's column names."""
    names = {name: form.columns.get(name, name) for name in COLUMNS}
    return {o: None if t in ignored else present(record.get(t)) for o, t in names.items()}


def _check_columns(record: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    for ours, theirs in columns.items():
        if theirs not in record:
            near = get_close_matches(theirs, list(record), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise BadRecordError(
                "no_column",
                f"there is no column {theirs!r}, which data.columns gives for {ours}; {hint}the "
                f"columns are {names_of(record)}: correct data.columns",
            )


def _check_media(record: Mapping[str, Any], ignored: Sequence[str]) -> None:
    for name in _MEDIA:
        if name not in ignored and holds(record.get(name)):
            raise BadRecordError(
                "not_text",
                f"`{name}` holds something, and only text is read: take such records out, or "
                f"ignore the column with --set 'data.leave_out=[{name}]'",
            )


def _no_question(record: Mapping[str, Any], form: Form) -> str:
    if form.key in record:
        return f"`{form.key}` is null, and holds the prompt: give it a value, or drop the record"
    return (
        f"there is no `{form.key}`, as {form.title} have; the columns are {names_of(record)}: "
        "correct data.format, or name the column in data.columns"
    )


def _asked(
    value: Any, form: Form, ignored: Sequence[str]
) -> tuple[str | None, tuple[Message, ...], Message | None]:
    """The prompt as plain text or messages, and the completion if `messages` ends with one."""
    column = form.key
    if isinstance(value, str) and form.source == "prompt":
        return _prompt_text(value, column), (), None
    messages = _conversation(value, form, ignored)
    last = None
    if form.source == "messages" and messages and messages[-1].role == "assistant":
        last = messages[-1]
        _check_answer(last, "the last message")
        messages = messages[:-1]
    theirs = [m.content or "" for m in messages if m.role not in _NOT_ASKING]
    if not any(content.strip() for content in theirs):
        raise BadRecordError("empty_prompt", f"{column} has no user message with text")
    if messages[-1].role == "assistant":
        raise BadRecordError("bad_messages", _answered(form))
    return None, messages, last


def _prompt_text(text: str, column: str) -> str:
    if _WRITTEN.match(text):
        raise BadRecordError(
            "bad_messages",
            f"{column} is text that holds a list of messages: write the list itself, or, if the "
            f"text is JSON, set {set_columns(messages=column)}",
        )
    return _text(text, column, reason="empty_prompt")


def _conversation(value: Any, form: Form, ignored: Sequence[str]) -> tuple[Message, ...]:
    """The messages of the column of the question; CSV files hold a list as JSON text."""
    if isinstance(value, str) and form.source == "messages" and value.lstrip()[:1] == "[":
        value = _parsed(value, form.key, "bad_messages")
    return _messages(value, form.key, ignored, is_text_allowed=form.source == "prompt")


def _answered(form: Form) -> str:
    if form.source == "messages":
        return f"{form.key} ends with two assistant turns: keep one of them"
    return (
        f"{form.key} ends with an assistant turn: move it to `completion`, or use the whole column "
        f"as messages: {set_columns(messages=form.key)}"
    )


def _check_answer(message: Message, what: str) -> None:
    """Check that an answer holds text, or something else such as a tool call."""
    if message.content is None or any(map(holds, message.extra.values())):
        return
    if not message.content.strip():
        raise BadRecordError("empty_completion", f"{what} is empty: remove it, or write the answer")


def _only_completion(
    last: Message | None, column: Any, form: Form, ignored: Sequence[str]
) -> str | Message | None:
    """The completion, from the last message or the column; a str if it is only text."""
    name = form.columns.get("completion", "completion")
    if last is not None and column is not None:
        raise BadRecordError(
            "two_completions",
            f"`{form.key}` ends with an answer and `{name}` holds another: leave one of them out, "
            f"e.g. --set 'data.leave_out=[{quoted(name)}]'",
        )
    if last is not None:
        return last if last.extra else last.content
    return None if column is None else _completion(column, name, ignored)


def _completion(value: Any, name: str, ignored: Sequence[str]) -> str | Message | None:
    if isinstance(value, str):
        return _text(value, name, reason="empty_completion")
    messages = _messages(value, name, ignored)
    if [message.role for message in messages] != ["assistant"]:
        raise BadRecordError("bad_messages", f"{name} must be text or one assistant message")
    _check_answer(messages[0], name)
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
            f"with --set 'data.leave_out=[{quoted(name)}]'",
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
        if name in OUR_ARGS or name in found:
            raise BadRecordError("bad_tools", f"chat_template_kwargs cannot set {name!r}")
    for name, value in found.items():
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise BadRecordError(
                "bad_tools", f"{name} must be a list of objects, not {value!r:.60}"
            )
    args = {name: value for name, value in {**found, **own}.items() if value not in (None, [])}
    _encodable(json.dumps(args, ensure_ascii=False, default=repr), "tools")
    return args


def _parsed(value: Any, column: str, reason: str = "bad_tools") -> Any:
    """The value of a column that data sets often store as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise BadRecordError(reason, f"{column} is text but not JSON: {error}") from error


def _messages(
    value: Any, column: str, ignored: Sequence[str], *, is_text_allowed: bool = True
) -> tuple[Message, ...]:
    if not isinstance(value, list):
        forms = "text or a list" if is_text_allowed else "a list"
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
    if content is None and not any(map(holds, extra.values())):
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
    value = present(value)
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
