"""Converts text to tokens and back; nothing else in npd does.

Promises: every worker encodes a prompt the same way; the chat template is applied once, and no
special token is doubled; the answer-alone context (`header_ids`) is never empty; the stop ids come
from the tokenizer, the template and the model's files. Does not read data, and does not decide
which prompts are too long.

A plain text prompt becomes one user message if the tokenizer has a chat template, because students
are mostly chat models; without a template it is tokenised unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from npd.config import RunConfig
from npd.data.template import OUR_ARGS, SYSTEM_ROLES, Lost, RefusedError, Template, folded
from npd.data.template_safety import check_template, read_template
from npd.errors import ConfigError, DataError, ModelError
from npd.models.files import code_refusal, end_ids, explained, is_code_refused, rows_of
from npd.text import counted, shown
from npd.types import EncodedPrompt, IntArray, Message, Prompt

# Roles whose text is kept in the answer-alone context; other text is the user's.
_KEPT_ROLES = ("system", "developer", "assistant")


class ChatTokenizer:
    """A tokenizer with its chat template and its end tokens.

    `system` is the system message of every conversation without one. With `system_as` "user", all
    system messages, the data's included, are put before the user's text. `extra_stop_ids`: end
    tokens that only the model's files name. `rows`: the number of ids with embeddings. `clock`: the
    time for templates that write it (default: now). `template_args`: arguments of the template for
    every conversation. Raises ModelError for a tokenizer without an end token, and for a `system`
    that the template does not write.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        system: str | None = None,
        system_as: Literal["system", "user"] = "system",
        extra_stop_ids: Iterable[int] = (),
        rows: int | None = None,
        clock: datetime | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.system, self._folds_system = system, system_as == "user"
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.template = Template(tokenizer, clock, template_args) if self.has_template else None
        self.given_template = ""
        """The text of the template that the config gave; empty if it is the model's own."""
        self._noticed: Counter[str] = Counter()
        self._check_system()
        eos = tokenizer.eos_token_id
        closing = self.template.closing() if self.template is not None else ""
        end = self._special_id(closing)
        self._is_closed = end is not None
        # Text that a template without end tokens writes between turns is not part of an answer.
        self._unclosed = "" if self._is_closed else closing
        end = eos if end is None else end
        if end is None:
            raise ModelError(
                f"the tokenizer of {self.name} has no end token: set eos_token in its "
                "tokenizer_config.json"
            )
        self.end_id = int(end)
        """The token that closes a response."""
        self._end = str(tokenizer.convert_ids_to_tokens(self.end_id))
        self.stop_ids = frozenset((self.end_id, end if eos is None else int(eos), *extra_stop_ids))
        """Every token that ends a response."""
        pad = tokenizer.pad_token_id
        highest = max(tokenizer.get_vocab().values())
        self.vocab_size: int = 1 + highest if rows is None else min(1 + highest, rows)
        """One more than the largest token id that has an embedding row."""
        # A pad token added to a tokenizer often has no row; padding is never read.
        is_usable = pad is not None and int(pad) < self.vocab_size
        self.pad_id: int = int(pad) if is_usable else self.end_id
        self._lead = [] if self.has_template else self._leading_ids()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        system: str | None = None,
        system_as: Literal["system", "user"] = "system",
        extra_stop_ids: Iterable[int] = (),
        clock: datetime | None = None,
        trust_remote_code: bool = False,
        role: str = "model",
        chat_template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> ChatTokenizer:
        """The tokenizer of a Hugging Face model directory or name; ModelError if it has none.

        `chat_template`: a file, or the text of a template, that replaces the tokenizer's.

        Raises:
            ConfigError: `chat_template` cannot be used.
        """
        tokenizer = load_tokenizer(path, trust_remote_code, role)
        if chat_template is not None:
            tokenizer.chat_template = read_template(chat_template)
        check_template(tokenizer, role, path)
        stops = _named_stop_ids(path) & set(tokenizer.get_vocab().values())
        chat = cls(
            tokenizer,
            system=system,
            system_as=system_as,
            extra_stop_ids=(*stops, *extra_stop_ids),
            rows=rows_of(Path(path)) if Path(path).is_dir() else None,
            clock=clock,
            template_args=template_args,
        )
        if chat_template is not None:
            chat.given_template = str(tokenizer.chat_template)
            chat._check_given()
        return chat

    @classmethod
    def of_student(cls, config: RunConfig, *, clock: datetime | None = None) -> ChatTokenizer:
        """The tokenizer of a run's student, with what its config says of text and end tokens.

        Raises:
            ModelError: the student has no tokenizer, or the config does not fit it.
            ConfigError: `data.chat_template` or `data.chat_template_kwargs` cannot be used.
        """
        chat = cls.load(
            config.student,
            system=config.data.system,
            system_as=config.data.system_as,
            extra_stop_ids=config.generate.stop_ids,
            clock=clock,
            trust_remote_code=config.trust_remote_code,
            role="student",
            chat_template=config.data.chat_template,
            template_args=config.data.chat_template_kwargs,
        )
        chat._check_args(config.data.chat_template_kwargs)
        return chat

    @property
    def name(self) -> str:
        """The tokenizer's directory or name, for messages."""
        return str(getattr(self.tokenizer, "name_or_path", "") or "this model")

    @property
    def clock(self) -> datetime | None:
        """The time that the template writes; None if it writes none."""
        has_clock = self.template is not None and self.template.has_clock
        return self.template.clock if self.template is not None and has_clock else None

    @property
    def notices(self) -> tuple[str, ...]:
        """What the template has dropped by its own rules or changed so far, with counts."""
        found = [
            f"the chat template {what} ({counted(count, 'prompt')})"
            for what, count in sorted(self._noticed.items())
        ]
        mark = self._unclosed.strip()
        if self.given_template and mark:
            found.append(
                f"data.chat_template ends a turn with {shown(mark, 40)}, which is no special token "
                f"of {self.name}: responses end with {self._end} instead, and the model reads the "
                "marks as text; give a template of the model's family"
            )
        return tuple(found)

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """The prompt as token ids; see `encode_all`."""
        return self.encode_all([prompt])[0]

    def encode_all(
        self,
        prompts: Sequence[Prompt],
        *,
        needs_alone: bool = True,
        needs_completions: bool = True,
        on_refused: Callable[[DataError], None] | None = None,
    ) -> list[EncodedPrompt]:
        """Prompts as token ids, in order.

        With a chat template: a prompt ends in the assistant header. Its `header_ids` are the same
        conversation with every message emptied except those of the system and the assistant. A
        completion is the template's text after the prompt, up to its end token.

        Without a template: a prompt is the tokenizer's leading tokens (usually bos) and the text.
        Its `header_ids` are the leading tokens, else bos, else the end token. A completion is its
        text and `end_id`. The same `header_ids` are used if the template refuses the emptied
        conversation and `needs_alone` is False.

        The error of a prompt that cannot be rendered goes to `on_refused`, or is raised.

        Raises:
            DataError: the template refuses a conversation, or drops text of it.
            ModelError: a conversation needs a template and there is none.
        """
        forms: list[_Form] = []
        for prompt in prompts:
            try:
                forms.append(self._form(prompt, needs_alone, needs_completions))
            except DataError as error:
                if on_refused is None:
                    raise
                on_refused(error)
        bodies = self._tokenize([form.text for form in forms])
        headers = self._header_ids([form.alone for form in forms])
        completions = self._completion_ids(forms, bodies)
        zipped = zip(forms, bodies, headers, completions, strict=True)
        return [
            EncodedPrompt(
                index=form.prompt.index,
                prompt_ids=_array(self._led(ids) or header),
                header_ids=_array(header),
                completion_ids=None if completion is None else _array(completion),
                answer=form.prompt.answer,
                teacher=form.prompt.teacher,
            )
            for form, ids, header, completion in zipped
        ]

    def writes_like(self, other: ChatTokenizer) -> bool:
        """Whether both templates render a short conversation the same, or neither has one."""
        if self.template is None or other.template is None:
            return self.template is other.template
        return self.template.sample() == other.template.sample()

    def sample(self) -> str | None:
        """How a short question is written; None if the template refuses it."""
        question = Message("user", "What is 2 + 2?")
        if self.template is None:
            return question.content
        turns = [question] if self.system is None else [Message("system", self.system), question]
        try:
            turns = folded(turns) if self._folds_system else turns
            return self.template.render(turns, {}, generate=True)
        except RefusedError:
            return None

    def save_template(self, directory: Path) -> None:
        """Write the template that the config gave beside a saved model; its own is copied there."""
        if self.given_template:
            path = directory / "chat_template.jinja"
            path.write_text(self.given_template, encoding="utf-8")

    def check_alone(self, needed_by: str) -> None:
        """Check that the template accepts a prompt without the user's text.

        Raises:
            ModelError: the template refuses it.
        """
        if self.template is not None:
            try:
                self.template.render([Message("user", "")], {}, generate=True)
            except RefusedError as error:
                raise ModelError(self._refuses_alone(error, needed_by)) from error

    def decode(self, ids: Sequence[int] | IntArray) -> str:
        """Text of token ids, without special tokens."""
        tidy = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode([int(token) for token in ids], **tidy))

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # Templates write bos themselves; `add_special_tokens` would double it.
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _check_given(self) -> None:
        """Check that the template of the config writes a question."""
        assert self.template is not None
        question = [Message("user", "What is 2 + 2?")]
        try:
            self.template.render(question, {}, generate=True)
        except RefusedError as error:
            raise ConfigError(
                f"data.chat_template cannot write a question: {error}; correct it there"
            ) from error
        if not self.template.shows(question):
            raise ConfigError(
                "data.chat_template does not write what the user says: correct it there"
            )

    def _check_args(self, args: Mapping[str, Any]) -> None:
        """Check that the template uses every argument of `data.chat_template_kwargs`."""
        for name in args:
            if name in (*OUR_ARGS, "tools", "documents"):
                raise ConfigError(
                    f"data.chat_template_kwargs cannot set {name}, which npd or the records set: "
                    "leave it out"
                )
            if self.template is None or not self.template.mentions(name):
                raise ConfigError(
                    f"data.chat_template_kwargs sets {name}, which the chat template of "
                    f"{self.name} does not use: correct the name, or leave it out"
                )

    def _check_system(self) -> None:
        if self.system is None:
            return
        remedy = "leave data.system out, or set data.system_as: user (in front of the user's text)"
        if self.template is None:
            raise ModelError(
                f"the tokenizer of {self.name} has no chat template for data.system: leave "
                "data.system out, or use a chat model"
            )
        if self._folds_system:
            return
        turns = (Message("system", self.system), Message("user", "?"))
        try:
            self.template.render(turns, {}, generate=True)
        except RefusedError as error:
            raise ModelError(
                f"the chat template of {self.name} refuses data.system: {error}; {remedy}"
            ) from error
        if not self.template.shows(turns):
            raise ModelError(
                f"the chat template of {self.name} drops system messages, so data.system would "
                f"have no effect: {remedy}"
            )

    def _form(self, prompt: Prompt, needs_alone: bool, needs_completions: bool) -> _Form:
        """The prompt as text: whole, answer-alone, and its completion."""
        if self.template is None:
            return self._plain_form(prompt, needs_completions)
        turns = self._conversation(prompt)
        text = self._rendered(prompt, turns)
        alone = self._alone(prompt, needs_alone)
        if self._is_closed and any(self._end in (turn.content or "") for turn in turns):
            self._noticed[
                f"is applied to text that already contains its end token {self._end}, as if the "
                "text had been rendered before"
            ] += 1
        if prompt.completion is None or not needs_completions:
            return _Form(prompt, text, alone)
        turns = [*turns, self._answer(prompt.completion, prompt)]
        whole = self._rendered(prompt, turns, is_answered=True)
        try:
            completion, follows = self.template.completion(turns, prompt.template_args, text, whole)
        except RefusedError as error:
            raise self._refused(prompt, turns, error) from error
        if not follows:
            self._noticed[
                "begins a finished turn differently from the assistant header, so completions are "
                "put after the header"
            ] += 1
        return _Form(prompt, text, alone, completion.removesuffix(self._unclosed))

    def _plain_form(self, prompt: Prompt, needs_completions: bool) -> _Form:
        completion = prompt.completion if needs_completions else None
        if prompt.text is None or prompt.template_args or isinstance(completion, Message):
            raise ModelError(
                f"the tokenizer of {self.name} has no chat template, but {_named(prompt)} is a "
                "conversation or has tools: give plain `prompt` strings, or use a chat model"
            )
        if completion is not None:
            completion = self._without_end(completion, prompt)
        return _Form(prompt, prompt.text, "", completion)

    def _conversation(self, prompt: Prompt, *, bare: bool = False) -> list[Message]:
        """The prompt as messages; `bare` empties all text but the system's and assistant's."""
        messages = list(prompt.messages)
        if prompt.text is not None:
            messages = [Message("user", prompt.text)]
        if self.system is not None and messages[:1] and messages[0].role not in SYSTEM_ROLES:
            messages.insert(0, Message("system", self.system))
        if bare:
            messages = [m if m.role in _KEPT_ROLES else replace(m, content="") for m in messages]
        return folded(messages) if self._folds_system else messages

    def _rendered(
        self, prompt: Prompt, turns: Sequence[Message], *, is_answered: bool = False
    ) -> str:
        """The conversation as text, checked for dropped content.

        With `is_answered`, only the last turn is checked.
        """
        assert self.template is not None
        args, generate = prompt.template_args, not is_answered
        try:
            text = self.template.render(turns, args, generate=generate)
        except RefusedError as error:
            raise self._refused(prompt, turns, error) from error
        if self.template.writes_null(turns, args, text, generate=generate):
            raise DataError(
                f"the chat template of {self.name} writes the word None for a message of "
                f"{_named(prompt)} whose content is null: give the message a text, or an empty one"
            )
        first = len(turns) - 1 if is_answered else 0
        lost = self.template.lost(turns, args, text, generate=generate, first=first)
        for each in lost:
            if not each.by_rule:
                raise self._loses(prompt, each)
        self._noticed.update({f"drops {each.what}" for each in lost})
        return text

    def _alone(self, prompt: Prompt, is_needed: bool) -> str:
        """The conversation without the user's text; empty if it is refused and not needed."""
        assert self.template is not None
        turns = self._conversation(prompt, bare=True)
        args = {k: value for k, value in prompt.template_args.items() if k != "documents"}
        try:
            return self.template.render(turns, args, generate=True)
        except RefusedError as error:
            if is_needed:
                raise ModelError(self._refuses_alone(error, _named(prompt))) from error
            return ""

    def _refuses_alone(self, error: RefusedError, where: str) -> str:
        return (
            f"the chat template of {self.name} refuses the answer-alone context of Δ-IFD, the "
            f"prompt without the user's text ({where}): {error}; set filter.name: none (or "
            "outlier), which needs no Δ-IFD, or change the template to accept empty text"
        )

    def _refused(self, prompt: Prompt, turns: Sequence[Message], error: RefusedError) -> DataError:
        roles = ", ".join(message.role for message in turns)
        remedy = "use the roles and the order that the template accepts"
        if not self._folds_system and any(m.role in SYSTEM_ROLES for m in turns):
            remedy += ", or set data.system_as: user if it is the system message"
        return DataError(
            f"the chat template of {self.name} refuses {_named(prompt, f'roles {roles}')}: "
            f"{error}; {remedy}"
        )

    def _loses(self, prompt: Prompt, lost: Lost) -> DataError:
        if lost.key:
            remedy = f"set data.leave_out: [{lost.key}] to ignore it"
        elif lost.role in SYSTEM_ROLES and not self._folds_system:
            remedy = "set data.system_as: user, which puts it in front of the user's text"
        else:
            remedy = "remove such turns from the data"
        return DataError(
            f"the chat template of {self.name} drops {lost.what} ({_named(prompt)}): {remedy}, or "
            "use a model whose template writes it"
        )

    def _answer(self, completion: str | Message, prompt: Prompt) -> Message:
        answer = Message("assistant", completion) if isinstance(completion, str) else completion
        if answer.content is None:
            return answer
        return replace(answer, content=self._without_end(answer.content, prompt))

    def _without_end(self, text: str, prompt: Prompt) -> str:
        """The text without trailing end tokens, since one is added later."""
        ends = [self.tokenizer.convert_ids_to_tokens(i) for i in self.stop_ids]
        while end := next((end for end in ends if text.rstrip().endswith(end)), ""):
            text = text.rstrip().removesuffix(end)
        if inside := [end for end in ends if end in text]:
            raise DataError(
                f"the completion of {_named(prompt)} has the end token {inside[0]} within its "
                "text, where the response would end: remove it"
            )
        return text

    def _header_ids(self, texts: Sequence[str]) -> list[list[int]]:
        unique = list(dict.fromkeys(texts))
        ids = dict(zip(unique, self._tokenize(unique), strict=True))
        bos = self.tokenizer.bos_token_id
        fallback = self._lead or [self.end_id if bos is None else int(bos)]
        return [ids[text] or fallback for text in texts]

    def _leading_ids(self) -> list[int]:
        """The ids that the tokenizer itself puts before a text."""
        bare = self._tokenize(["a"])[0]
        whole = list(self.tokenizer("a")["input_ids"])
        starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[: next(starts, 0)]

    def _led(self, ids: list[int]) -> list[int]:
        """The ids with the leading ids before them, once."""
        has_lead = ids[: len(self._lead)] == self._lead
        return ids if has_lead else [*self._lead, *ids]

    def _completion_ids(
        self, forms: Sequence[_Form], bodies: Sequence[list[int]]
    ) -> list[list[int] | None]:
        having = [i for i, form in enumerate(forms) if form.completion is not None]
        joint = self._tokenize([forms[i].text + (forms[i].completion or "") for i in having])
        found: list[list[int] | None] = [None] * len(forms)
        for i, whole in zip(having, joint, strict=True):
            # Some tokenizers put a space before any text; a completion after a prompt has none.
            at = len(bodies[i])
            follows = whole[:at] == bodies[i]
            own = whole[at:] if follows else self._tokenize([forms[i].completion or ""])[0]
            found[i] = self._ended(own)
        return found

    def _ended(self, ids: list[int]) -> list[int]:
        """The ids up to the last end token, or with an end token added if there is none."""
        if not self._is_closed or self.end_id not in ids:
            return [*ids, self.end_id]
        return ids[: len(ids) - ids[::-1].index(self.end_id)]

    def _special_id(self, text: str) -> int | None:
        """The first special token of a text, or None."""
        special = {*self.tokenizer.get_added_vocab().values(), *self.tokenizer.all_special_ids}
        ids = self._tokenize([text])[0] if text else []
        return next((token for token in ids if token in special), None)


class _Form(NamedTuple):
    """A prompt as text: whole, without the user's text (`alone`), and its completion."""

    prompt: Prompt
    text: str
    alone: str
    completion: str | None = None


def _named(prompt: Prompt, more: str = "") -> str:
    """A prompt's number, with its origin in brackets."""
    known = "; ".join(part for part in (prompt.place, more) if part)
    return f"prompt {prompt.index}{f' ({known})' if known else ''}"


def load_tokenizer(path: str | Path, trust_remote_code: bool, role: str) -> Any:
    """The tokenizer of a model directory or name; ModelError if it cannot be loaded."""
    from transformers import AutoTokenizer

    looks_local = str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise ModelError(f"no model directory at {path}: check the path of `student` or `teacher`")
    remedy = (
        "give a Hugging Face model directory with tokenizer files, or a name that is already "
        "downloaded or reachable"
    )
    with explained(f"cannot load the tokenizer of the {role} {path}", remedy):
        try:
            return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        except ValueError as error:
            if is_code_refused(error):
                raise code_refusal(role, str(path), "tokenizer_config.json") from error
            raise


def _named_stop_ids(path: str | Path) -> frozenset[int]:
    """The end tokens of the model's generation_config.json, else of its config.json."""
    if Path(path).is_dir():
        return end_ids(Path(path))
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(str(path)).eos_token_id
    except OSError:
        return frozenset()
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return frozenset(int(token) for token in listed)


def _array(ids: Sequence[int]) -> IntArray:
    return np.asarray(ids, dtype=np.int32)
