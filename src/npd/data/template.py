"""Renders conversations with a tokenizer's chat template, and finds what the template drops.

Promises: the text is exactly what the template writes; dropped content is found by searching the
text for it; the clock is fixed, so that a resumed run renders the same text. Does not tokenise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import takewhile
from typing import Any, NamedTuple

from npd.types import Message

SYSTEM_ROLES = ("system", "developer")
OUR_ARGS = (
    *("conversation", "messages", "add_generation_prompt", "continue_final_message"),
    *("chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
    *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now"),
)
"""Arguments that npd itself sets when it renders a conversation."""
# A word that no template knows, writes or changes.
_MARK = "npdmark{}x"
# Message keys whose content is spoken by the model.
_SPOKEN = (
    *("tool_calls", "function_call", "tool_plan"),
    *("reasoning_content", "reasoning", "thinking"),
)
# The arguments of a test tool call, and how they look if the template writes them as JSON.
_ARGUMENTS = '{"npdmarkx": 1}'
_WELL_WRITTEN = re.compile(r'"npdmarkx": ?1')
_OPEN_TAG = re.compile(r"<([A-Za-z_]+)>\s*$")
# The number of characters at the end of two headers that must be equal.
_SAME_END = 4


class RefusedError(Exception):
    """The template refuses a conversation; the message says why, in one line."""


class Lost(NamedTuple):
    """Content of a conversation that is missing from its rendered text.

    `what` names it; `role` is the role of its message, empty for a template argument. `by_rule`:
    the template drops it by its own rules, or it is not text, so it is only noted.
    """

    what: str
    role: str
    key: str
    by_rule: bool


class Template:
    """A tokenizer's chat template, with the time fixed at `clock`.

    `args` are its arguments in every conversation, unless the conversation has its own.
    """

    def __init__(
        self,
        tokenizer: Any,
        clock: datetime | None = None,
        args: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer, self._args = tokenizer, dict(args or {})
        self.clock = datetime.now() if clock is None else clock
        source = tokenizer.chat_template
        self._source = "\n".join(source.values()) if isinstance(source, dict) else str(source)
        self.has_clock = "strftime_now" in self._source
        """Whether the template writes the time or date."""
        self._dropped: dict[Any, frozenset[int]] = {}
        self._unused: dict[Any, bool] = {}
        self._is_probed, self._arguments = False, ""
        self._takes_parts = False
        self._takes_parts = self._wants_parts()

    def render(
        self, messages: Sequence[Message], args: Mapping[str, Any], *, generate: bool
    ) -> str:
        """The conversation as text; with `generate` it ends in the assistant header.

        Null content is replaced by empty text if the template does not accept null.

        Raises:
            RefusedError: the template refuses the conversation.
        """
        from jinja2 import TemplateError

        given = {**self._args, **args}
        if self.has_clock:
            given["strftime_now"] = self.clock.strftime
        turns = [self._turn(message) for message in messages]
        apply = self._tokenizer.apply_chat_template
        try:
            return str(apply(turns, tokenize=False, add_generation_prompt=generate, **given))
        except (
            *(TemplateError, TypeError, ValueError, LookupError, AttributeError),
            *(ArithmeticError, RecursionError),
        ) as error:
            if any(message.content is None for message in messages):
                return self.render(_filled(messages), args, generate=generate)
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise RefusedError(lines[0]) from error

    def shows(self, messages: Sequence[Message]) -> bool:
        """Whether the rendered text contains the text of the first message."""
        return 0 not in self._not_shown(messages, {}, generate=True)

    def lost(
        self,
        messages: Sequence[Message],
        args: Mapping[str, Any],
        text: str,
        *,
        generate: bool,
        first: int = 0,
    ) -> list[Lost]:
        """The content of the turns from `first` on that is missing from their rendered `text`."""
        found = [] if first else self._lost_args(messages, args, text, generate=generate)
        hidden = self._not_shown(messages, args, generate=generate)
        for i, message in enumerate(messages[first:], first):
            content = (message.content or "").strip()
            if content and i in hidden:
                found.append(Lost(f"the text of {message.role} turns", message.role, "", False))
            elif content and content not in text:
                what = f"part of the text of {message.role} turns, or changes it"
                found.append(Lost(what, message.role, "", True))
            found += self._lost_keys(messages, i, args, text, generate=generate)
        return found

    def writes_null(
        self, messages: Sequence[Message], args: Mapping[str, Any], text: str, *, generate: bool
    ) -> bool:
        """Whether the template writes the word None for a turn without content."""
        if all(message.content is not None for message in messages):
            return False
        other = self._tried(_filled(messages), args, generate=generate)
        return other is not None and text.count("None") > other.count("None")

    def completion(
        self, turns: Sequence[Message], args: Mapping[str, Any], prompt: str, whole: str
    ) -> tuple[str, bool]:
        """The text of the last of `turns` after the text `prompt`, and whether it is a suffix.

        `whole` is the text of all `turns`. Usually it begins with `prompt`. It does not if a
        finished turn begins differently from the assistant header; then the answer is put after the
        header and closed as the template closes it, and the second value is False.

        Raises:
            RefusedError: the template refuses the conversation.
        """
        if whole.startswith(prompt):
            return whole[len(prompt) :], True
        mark, answer = _MARK.format(""), turns[-1]
        marked = self.render([*turns[:-1], replace(answer, content=mark)], args, generate=False)
        before, found, after = marked.rpartition(mark)
        if not found or answer.content is None or any(answer.extra.values()):
            raise RefusedError("a finished turn does not begin with the assistant header")
        return _gap(before, prompt) + _opened(answer.content, before, prompt) + after, False

    def closing(self) -> str:
        """The text that the template writes after the last answer; empty if it is unclear."""
        mark = _MARK.format("")
        turns = (Message("user", "?"), Message("assistant", mark))
        return (self._tried(turns, {}, generate=False) or "").rpartition(mark)[2]

    def mentions(self, key: str) -> bool:
        """Whether the template's source has a name, e.g. of an argument."""
        return re.search(rf"\b{re.escape(key)}\b", self._source) is not None

    def sample(self) -> str | None:
        """A short conversation as text, for comparing templates."""
        turns = (Message("user", "?"), Message("assistant", "!"), Message("user", "."))
        return self._tried(turns, {}, generate=True)

    def _turn(self, message: Message) -> dict[str, Any]:
        content: Any = message.content
        if self._takes_parts and content is not None:
            content = [{"type": "text", "text": content}]
        extra = dict(message.extra)
        if isinstance(extra.get("tool_calls"), list):
            extra["tool_calls"] = [self._call(call) for call in extra["tool_calls"]]
        return {"role": message.role, "content": content, **extra}

    def _call(self, call: Any) -> Any:
        """A tool call with its arguments in the form that the template takes."""
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(call["function"])}
        arguments = call.get("arguments")
        if isinstance(arguments, str) and self._arguments_form() == "object":
            return {**call, "arguments": _as_object(arguments)}
        if isinstance(arguments, Mapping) and self._arguments_form() == "text":
            return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return call

    def _arguments_form(self) -> str:
        """The form of arguments that the template takes: `text`, `object`, or empty for both."""
        if not self._is_probed:
            self._is_probed = True  # the test calls below are rendered unchanged
            text, whole = self._shown_well(_ARGUMENTS), self._shown_well(json.loads(_ARGUMENTS))
            self._arguments = "" if text == whole else "text" if text > whole else "object"
        return self._arguments

    def _shown_well(self, arguments: Any) -> int:
        """How the text shows a call's arguments: 2 as JSON, 1 in another form, 0 not at all."""
        call = {"name": "npdcall", "arguments": arguments}
        calls = [{"id": "npdcall01", "type": "function", "function": call}]
        texts = [
            self._tried(
                [Message("user", "?"), Message("assistant", content, {"tool_calls": calls})],
                {},
                generate=False,
            )
            for content in (None, "")
        ]
        found = [text for text in texts if text is not None and "npdmarkx" in text]
        return max((2 if _WELL_WRITTEN.search(text) else 1 for text in found), default=0)

    def _wants_parts(self) -> bool:
        """Whether the template shows text only if it is given as a list of parts."""
        mark = _MARK.format("")
        asked = [Message("user", mark)]
        if mark in (self._tried(asked, {}, generate=True) or mark):
            return False
        self._takes_parts = True
        return mark in (self._tried(asked, {}, generate=True) or "")

    def _tried(
        self, messages: Sequence[Message], args: Mapping[str, Any], *, generate: bool
    ) -> str | None:
        try:
            return self.render(messages, args, generate=generate)
        except RefusedError:
            return None

    def _not_shown(
        self, messages: Sequence[Message], args: Mapping[str, Any], *, generate: bool
    ) -> frozenset[int]:
        """The indices of turns whose text the template skips; cached by roles and keys."""
        key = (generate, _shape(messages), *args)
        if key not in self._dropped:
            marks = [_MARK.format(i) for i in range(len(messages))]
            marked = [
                m if m.content is None else replace(m, content=mark)
                for m, mark in zip(messages, marks, strict=True)
            ]
            text = self._tried(marked, args, generate=generate)
            # A template may change the case.
            seen = None if text is None else text.casefold()
            hidden = [i for i, mark in enumerate(marks) if seen is not None and mark not in seen]
            self._dropped[key] = frozenset(hidden)
        return self._dropped[key]

    def _lost_keys(
        self,
        messages: Sequence[Message],
        at: int,
        args: Mapping[str, Any],
        text: str,
        *,
        generate: bool,
    ) -> list[Lost]:
        message = messages[at]
        found = []
        for key in (key for key, value in message.extra.items() if value):
            known = (generate, key, *_setting(messages, at), *args)
            if known not in self._unused:
                extra = {k: v for k, v in message.extra.items() if k != key}
                other = [*messages[:at], replace(message, extra=extra), *messages[at + 1 :]]
                self._unused[known] = self._tried(other, args, generate=generate) == text
            if self._unused[known]:
                by_rule = self.mentions(key) or not _is_spoken(key, message.extra[key])
                what = f"`{key}` of {message.role} turns"
                found.append(Lost(what, message.role, key, by_rule))
        return found

    def _lost_args(
        self, messages: Sequence[Message], args: Mapping[str, Any], text: str, *, generate: bool
    ) -> list[Lost]:
        found = []
        for key in args:
            # Without a switch the text may be the same although the template uses the switch.
            is_lost = not self.mentions(key)
            if key in ("tools", "documents") and not is_lost:
                known = (generate, key, _shape(messages), *args)
                if known not in self._unused:
                    fewer = {k: v for k, v in args.items() if k != key}
                    self._unused[known] = self._tried(messages, fewer, generate=generate) == text
                is_lost = self._unused[known]
            if is_lost:
                by_rule = key not in ("tools", "documents")
                found.append(Lost(f"`{key}`", "", key, by_rule))
        return found


def folded(messages: Sequence[Message]) -> list[Message]:
    """The conversation with each system text moved to the start of the user's next message."""
    out: list[Message] = []
    pending: list[str] = []
    for message in messages:
        if message.role in SYSTEM_ROLES and not message.extra:
            pending.append(message.content or "")
        elif message.role == "user" and pending:
            out.append(replace(message, content=_joined(pending, message.content)))
            pending = []
        else:
            out.append(message)
    return [*out, Message("user", _joined(pending, None))] if pending else out


def _filled(messages: Sequence[Message]) -> list[Message]:
    """The conversation with empty text in place of null content."""
    return [m if m.content is not None else replace(m, content="") for m in messages]


def _shape(messages: Sequence[Message]) -> tuple[Any, ...]:
    """The roles, nulls and keys of a conversation: what a template's control flow depends on."""
    return tuple((m.role, m.content is None, *m.extra) for m in messages)


def _setting(messages: Sequence[Message], at: int) -> tuple[Any, ...]:
    """What decides whether a template drops a key of a turn: the turn's shape and its position.

    The whole conversation is not part of it: long conversations all differ, so each turn of each
    would be rendered again.
    """
    is_asked = any(message.role == "user" for message in messages[at + 1 :])
    return at == 0, at == len(messages) - 1, is_asked, *_shape(messages[at : at + 1])


def _as_object(arguments: str) -> Any:
    """The arguments parsed from JSON text; the text itself if it is not a JSON object."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _joined(texts: Sequence[str], content: str | None) -> str:
    return "\n\n".join(text for text in (*texts, content) if text)


def _is_spoken(key: str, value: Any) -> bool:
    """Whether a key holds text of the conversation, rather than a name, a number or a flag."""
    return key in _SPOKEN or _has_words(value)


def _has_words(value: Any) -> bool:
    if isinstance(value, str):
        return len(value.split()) > 1
    if isinstance(value, Mapping):
        return any(map(_has_words, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_words, value))


def _gap(before: str, prompt: str) -> str:
    """The whitespace that the template writes between the header (the end of `prompt`) and the
    answer."""
    bare = before.rstrip()
    if not _ends_alike(before, prompt) and _ends_alike(bare, prompt):
        return before[len(bare) :]
    return ""


def _ends_alike(left: str, right: str) -> bool:
    return left[-_SAME_END:] == right[-_SAME_END:] != ""


def _opened(content: str, before: str, prompt: str) -> str:
    """The answer, closing a block (`<think>`) that the header opens and finished turns lack."""
    pairs = zip(before, prompt, strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    tag = _OPEN_TAG.search(prompt[common:])
    if tag is None:
        return content
    opening, close = f"<{tag[1]}>", f"</{tag[1]}>"
    text = content.lstrip()
    if text.startswith(opening):
        return text.removeprefix(opening).removeprefix("\n")
    if close in text:
        return content
    return f"\n{close}\n\n{content}"
