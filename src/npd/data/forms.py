"""Recognises the form of records by their keys: TRL's, ShareGPT's, Alpaca's, questions and answers.

Promises: the form follows from the keys that hold something, not from their order; a record that
fits two forms, or another form than the records before it, is refused, never guessed. A record of
no form is bad, with a remedy that can be typed as it is. Does not read values
(`npd.data.records`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

# Common column names of prompts, completions and conversations, to suggest a rename in the error.
_USUAL_PROMPTS = ("problem", "query", "question", "instruction", "input", "user")
_USUAL_COMPLETIONS = ("output", "response", "solution", "target", "answer")
_USUAL_CONVERSATIONS = ("conversation", "dialog", "dialogue", "chat", "turns", "chosen")
# Text columns that never hold a prompt.
_NO_PROMPT = re.compile(
    r"(.*[_-])?(id|uid|uuid|hash|idx|index|source|category|subset|split|model|lang|language|role"
    r"|chosen|rejected|completion|output|response|answer)s?",
    re.IGNORECASE,
)
_PLAIN = re.compile(r"(?!(?:true|false|null|yes|no|on|off|y|n)$)[A-Za-z_][\w-]*", re.IGNORECASE)


class BadRecordError(Exception):
    """A record without a usable prompt. `reason` is its count's name if it is dropped."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class FormError(Exception):
    """A record fits several forms, or another form than the records before it."""


@dataclass(frozen=True, slots=True)
class Form:
    """How records are laid out: `title` names it to people, `name` is its `data.format`.

    `source` is the column of npd that holds the question. `columns` maps npd's column names to the
    record's; those in `required` must be in every record.
    """

    name: str
    title: str
    source: Literal["prompt", "messages"]
    columns: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The record's column that holds the question."""
        return self.columns.get(self.source, self.source)

    @property
    def reads_input(self) -> bool:
        """Whether `input` is used: the config names it, or the records are Alpaca's."""
        return "input" in self.columns or self.columns.get("prompt") == "instruction"


FORMS = {
    form.name: form
    for form in (
        Form("messages", "conversations", "messages"),
        Form("prompt", "prompts", "prompt"),
        Form("sharegpt", "ShareGPT conversations", "messages", {"messages": "conversations"}),
        Form(
            "alpaca",
            "Alpaca instructions",
            "prompt",
            {"prompt": "instruction", "input": "input", "completion": "output"},
        ),
        Form(
            "question",
            "questions and answers",
            "prompt",
            {"prompt": "question", "completion": "answer"},
        ),
    )
}
"""The forms by `data.format`."""


class Forms:
    """Finds the form of each record of one source.

    `format` and `columns` are the config's, `where` is their section. With `format` "auto" and no
    column for the question, the first record that has a form decides for all.
    """

    def __init__(
        self,
        format: str = "auto",
        columns: Mapping[str, str] | None = None,
        ignored: Sequence[str] = (),
        where: str = "data",
    ) -> None:
        self._columns, self._ignored, self._where = columns or {}, ignored, where
        self._is_found = False
        self._form = self._given(format)

    @property
    def form(self) -> Form | None:
        """The form so far; None before a record had one."""
        return self._form

    def of(self, record: Mapping[str, Any]) -> Form:
        """The form of a record.

        Raises:
            FormError: it fits several forms, or another one than the records before it.
            BadRecordError: it fits none.
        """
        if self._form is None or self._is_found:
            found = self._recognised(record)
            if self._form is None:
                self._form, self._is_found = self._with_columns(found), True
            elif self._form.name != found.name:
                raise FormError(self._mixed(found, self._form))
        # Question sets keep long answers in `response`, and then `answer` is the short one.
        has_response = self._form.name == "question" and "response" in record
        if has_response and "completion" not in self._columns:
            return replace(self._form, columns={**self._form.columns, "completion": "response"})
        return self._form

    def _given(self, format: str) -> Form | None:
        """The form that the config names, by its format or by the column of the question."""
        if format != "auto":
            return self._with_columns(FORMS[format])
        named = [name for name in ("prompt", "messages") if name in self._columns]
        if not named:
            return None
        form = FORMS[named[0]]
        title = f"{form.title} (`{self._columns[named[0]]}`, by {self._where}.columns)"
        return replace(self._with_columns(form), title=title)

    def _with_columns(self, form: Form) -> Form:
        merged = {**form.columns, **self._columns}
        return replace(form, columns=merged, required=self._columns)

    def _recognised(self, record: Mapping[str, Any]) -> Form:
        values = {form.name: present(record.get(form.key)) for form in FORMS.values()}
        fitting = [
            FORMS[name]
            for name, value in values.items()
            if value is not None and FORMS[name].key not in self._ignored
        ]
        if len(fitting) > 1:  # an empty column beside a full one decides nothing
            fitting = [form for form in fitting if holds(values[form.name])] or fitting
        if not fitting:
            raise BadRecordError("no_prompt", _no_prompt(record))
        if len(fitting) > 1:
            both = " and ".join(f"{form.title} (`{form.key}`)" for form in fitting[:2])
            sets = " or ".join(f"--set {self._where}.format={form.name}" for form in fitting[:2])
            raise FormError(f"the record can be read as {both}: choose, with {sets}")
        return fitting[0]

    def _mixed(self, found: Form, before: Form) -> str:
        return (
            f"the record has {found.title} (`{found.key}`), and those before have {before.title}: "
            "split the file by form (data.mix reads several), or read one form with --set "
            f"{self._where}.format={before.name}"
        )


def holds(value: Any) -> bool:
    """Whether a value is there and not empty."""
    value = present(value)
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def present(value: Any) -> Any:
    """The value, or None if it is missing; data frames write a missing value as NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def names_of(record: Mapping[str, Any]) -> str:
    """The record's columns, for a message."""
    return ", ".join(map(str, record)) or "none"


def set_columns(**columns: str) -> str:
    """The setting that maps columns, as it is typed."""
    named = ", ".join(f"{ours}: {quoted(theirs)}" for ours, theirs in columns.items())
    return f"--set 'data.columns={{{named}}}'"


def quoted(name: str) -> str:
    """A column's name in YAML."""
    # JSON's quoting is valid YAML; a plain word needs no quotes.
    return name if _PLAIN.fullmatch(name) else json.dumps(name)


def _no_prompt(record: Mapping[str, Any]) -> str:
    problem = f"there is no `prompt` and no `messages`; the columns are {names_of(record)}: "
    lists = [n for n in (*_USUAL_CONVERSATIONS, *record) if _has_turns(record.get(n))]
    if lists:
        return f"{problem}set data.columns, e.g. {set_columns(messages=lists[0])}"
    prompts = [name for name in _USUAL_PROMPTS if isinstance(record.get(name), str)]
    if not prompts and isinstance(record.get("text"), str):
        return (
            f"{problem}split each `text` into `prompt` and `completion`; if it is only a prompt, "
            f"set data.columns, e.g. {set_columns(prompt='text')}"
        )
    texts = [n for n, v in record.items() if isinstance(v, str) and not _NO_PROMPT.fullmatch(n)]
    if not prompts and not texts:
        return f"{problem}give each record a `prompt` of text, or `messages`"
    likely = [*prompts, *texts][0]
    found = [n for n in _USUAL_COMPLETIONS if isinstance(record.get(n), str) and n != likely]
    also = f", with completions {set_columns(prompt=likely, completion=found[0])}" if found else ""
    return f"{problem}set data.columns, e.g. {set_columns(prompt=likely)}{also}"


def _has_turns(value: Any) -> bool:
    """Whether a value is a conversation."""
    turns = value if isinstance(value, list) else []
    return any(isinstance(turn, dict) and not {"role", "from"}.isdisjoint(turn) for turn in turns)
