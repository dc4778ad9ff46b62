"""The only place where text becomes tokens and back.

Promises: a prompt is encoded the same way by every worker, with the chat template applied once and
no special token doubled; the answer-alone context (`header_ids`) is never empty; the ids that end
a response are gathered from every place that names one. Does not read data, and does not decide
which prompts are too long.

A plain text prompt becomes one user message where the tokenizer has a chat template, because chat
models are what gets distilled; without a template it is tokenised as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from npd.errors import DataError, ModelError
from npd.types import EncodedPrompt, IntArray, Message, Prompt

# What the model itself or its operator says; everything else is the user's side of the prompt.
_KEPT_ROLES = ("system", "developer", "assistant")
_MARK = "COMPLETION"
_PROBES = (
    "The quick brown fox doesn't jump over 13 lazy dogs; it costs $1,234.56 (or 7.5%)!",
    "def f(x):\n    return {'a': [x ** 2, None]}  # TODO\n\n\n\tif x != 0:\r\n        pass",
    "Größe, naïve, façade — “quotes” … Привет, мир. 你好,世界。こんにちは 안녕하세요 مرحبا नमस्ते",
    "e\u0301 vs \u00e9, \ufb01 vs fi, ½ ² Ⅷ \u200b\u00a0 🙂👩‍👩‍👧 \\frac{a}{b} #### 72   ",
)


class Chat:
    """A tokenizer with its chat template and its ways of ending a turn.

    `system` is put before every conversation that has no system message. `extra_stop_ids` are end
    tokens that only the model's own files know of. Raises ModelError for a tokenizer without any
    end token, and for a `system` that no template could place.
    """

    def __init__(
        self, tokenizer: Any, *, system: str | None = None, extra_stop_ids: Iterable[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        if system is not None and not self.has_template:
            raise ModelError(
                f"the tokenizer of {self.name} has no chat template to put data.system into: "
                "leave data.system out, or use a chat model"
            )
        eos = tokenizer.eos_token_id
        end = self._template_end_id() if self.has_template else None
        end = eos if end is None else end
        if end is None:
            raise ModelError(
                f"the tokenizer of {self.name} has no end token: set eos_token in its "
                "tokenizer_config.json"
            )
        self.end_id = int(end)
        """The token that closes a response."""
        self.stop_ids = frozenset((self.end_id, end if eos is None else int(eos), *extra_stop_ids))
        """Every token that ends a response."""
        pad = tokenizer.pad_token_id
        self.pad_id: int = self.end_id if pad is None else int(pad)
        self.vocab_size: int = 1 + max(tokenizer.get_vocab().values())
        """One more than the largest token id (`len(tokenizer)` when its ids have no gaps)."""

    @classmethod
    def load(
        cls, path: str | Path, *, system: str | None = None, trust_remote_code: bool = False
    ) -> Chat:
        """The chat of a Hugging Face model directory or name; ModelError if it has no tokenizer."""
        tokenizer = _load_tokenizer(path, trust_remote_code)
        stops = _generation_stop_ids(path) & set(tokenizer.get_vocab().values())
        return cls(tokenizer, system=system, extra_stop_ids=stops)

    @property
    def name(self) -> str:
        """Where the tokenizer came from, for messages."""
        return str(getattr(self.tokenizer, "name_or_path", "") or "this model")

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """The prompt as token ids; see `encode_all`."""
        return self.encode_all([prompt])[0]

    def encode_all(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """Prompts as token ids, in order.

        Conversations end in the template's assistant header; their answer-alone header is the same
        conversation with the text of every message emptied that is not the system's or the
        assistant's. Without a template the prompt is bos (if the tokenizer adds one) and the text,
        and the header is bos or, lacking one, the end token. A completion is closed by `end_id`.
        Raises DataError where the template refuses a conversation, ModelError where there is none.
        """
        texts = [self._text(prompt) for prompt in prompts]
        lead, bodies = self._lead(), self._tokenize(texts)
        headers = self._header_ids(prompts)
        completions = self._completion_ids(prompts, texts, bodies)
        zipped = zip(prompts, bodies, headers, completions, strict=True)
        return [
            EncodedPrompt(
                index=prompt.index,
                prompt_ids=_array([*lead, *ids] or header),
                header_ids=_array(header),
                completion_ids=None if completion is None else _array(completion),
                answer=prompt.answer,
                teacher=prompt.teacher,
            )
            for prompt, ids, header, completion in zipped
        ]

    def decode(self, ids: Sequence[int] | IntArray) -> str:
        """Text of token ids, without special tokens."""
        tidy = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode([int(token) for token in ids], **tidy))

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # Templates write bos and the like themselves; letting the tokenizer add them doubles them.
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _text(self, prompt: Prompt, *, bare: bool = False) -> str:
        """The prompt as the model reads it; `bare` leaves the user's text out."""
        if self.has_template:
            return self._render(self._conversation(prompt), prompt.index, bare=bare)
        if prompt.text is None:
            raise ModelError(
                f"the tokenizer of {self.name} has no chat template and prompt {prompt.index} is a "
                "conversation: give plain `prompt` strings, or use a chat model"
            )
        return "" if bare else prompt.text

    def _conversation(self, prompt: Prompt) -> tuple[Message, ...]:
        messages = prompt.messages
        if prompt.text is not None:
            messages = (Message("user", prompt.text),)
        led = bool(messages) and messages[0].role in ("system", "developer")
        if self.system is None or led:
            return messages
        return (Message("system", self.system), *messages)

    def _render(self, messages: Sequence[Message], index: int, *, bare: bool) -> str:
        from jinja2 import TemplateError

        if bare:
            messages = [m if m.role in _KEPT_ROLES else Message(m.role, "") for m in messages]
        try:
            return self._apply(messages, generate=True)
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise DataError(
                f"the chat template of {self.name} refuses prompt {index} (roles {roles}): "
                f"{_first_line(error)}; give it the roles and order that the template takes"
            ) from error

    def _apply(self, messages: Sequence[Message], *, generate: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        apply = self.tokenizer.apply_chat_template
        return str(apply(turns, tokenize=False, add_generation_prompt=generate))

    def _header_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        texts = [self._text(prompt, bare=True) for prompt in prompts]
        unique = list(dict.fromkeys(texts))
        ids = dict(zip(unique, self._tokenize(unique), strict=True))
        bos = self.tokenizer.bos_token_id
        fallback = [self.end_id if bos is None else int(bos)]
        return [ids[text] or fallback for text in texts]

    def _lead(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        if self.has_template or bos is None:
            return []
        ids = list(self.tokenizer("a")["input_ids"])
        return [int(bos)] if ids and ids[0] == bos else []

    def _completion_ids(
        self, prompts: Sequence[Prompt], texts: Sequence[str], bodies: Sequence[list[int]]
    ) -> list[list[int] | None]:
        having = [i for i, prompt in enumerate(prompts) if prompt.completion is not None]
        joint = self._tokenize([texts[i] + (prompts[i].completion or "") for i in having])
        found: list[list[int] | None] = [None] * len(prompts)
        for i, whole in zip(having, joint, strict=True):
            # Some tokenizers put a space before any text; what follows the prompt must not get it.
            at = len(bodies[i])
            follows = whole[:at] == bodies[i]
            own = whole[at:] if follows else self._tokenize([prompts[i].completion or ""])[0]
            found[i] = [*own, self.end_id]
        return found

    def _template_end_id(self) -> int | None:
        """The special token that the template writes after an assistant's text, if any."""
        from jinja2 import TemplateError

        turns = (Message("user", "?"), Message("assistant", _MARK))
        try:
            text = self._apply(turns, generate=False)
        except TemplateError:
            return None
        after = self._tokenize([text.rpartition(_MARK)[2]])[0]
        special = {*self.tokenizer.get_added_vocab().values(), *self.tokenizer.all_special_ids}
        return next((token for token in after if token in special), None)


def check_same_vocabulary(
    teacher_path: str | Path, student_path: str | Path, *, trust_remote_code: bool = False
) -> None:
    """Raise ModelError unless two models' tokenizers give the same ids to the same text.

    Token for token, merge for merge, and on a few probe texts (which show different normalisers
    and pre-tokenizers). The models' own, often padded, vocabulary sizes do not matter.
    """
    teacher = _load_tokenizer(teacher_path, trust_remote_code)
    student = _load_tokenizer(student_path, trust_remote_code)
    difference = (
        _vocabulary_difference(teacher.get_vocab(), student.get_vocab())
        or _merge_difference(teacher, student)
        or _probe_difference(teacher, student)
    )
    if difference:
        raise ModelError(
            f"teacher {teacher_path} and student {student_path} do not share a vocabulary: "
            f"{difference}; use two models of one family"
        )


def _vocabulary_difference(teacher: dict[str, int], student: dict[str, int]) -> str:
    ours = {index: token for token, index in student.items()}
    theirs = {index: token for token, index in teacher.items()}
    odd = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    shown = [f"id {i}: teacher {theirs.get(i)!r}, student {ours.get(i)!r}" for i in odd[:3]]
    more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
    return "; ".join(shown) + more


def _merge_difference(teacher: Any, student: Any) -> str:
    pairs = zip_longest(_merges(teacher), _merges(student))
    for rank, (theirs, ours) in enumerate(pairs):
        if theirs != ours:
            return f"merge {rank}: teacher {theirs}, student {ours}"
    return ""


def _merges(tokenizer: Any) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    return model.get("merges") or []


def _probe_difference(teacher: Any, student: Any) -> str:
    specials = " ".join(sorted(teacher.get_added_vocab()))
    for text in (*_PROBES, f"a {specials}b"):
        theirs = teacher(text, add_special_tokens=False)["input_ids"]
        ours = student(text, add_special_tokens=False)["input_ids"]
        for at, (left, right) in enumerate(zip_longest(theirs, ours)):
            if left != right:
                return f"token {at} of {text[:40]!r}: teacher id {left}, student id {right}"
    return ""


def _load_tokenizer(path: str | Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    looks_local = str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise ModelError(f"no model directory at {path}: check the path of `student` or `teacher`")
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load a tokenizer from {path}: {_first_line(error)}; give a Hugging Face model "
            "directory with tokenizer files, or a name that is downloaded already or reachable"
        ) from error


def _generation_stop_ids(path: str | Path) -> frozenset[int]:
    """The end tokens of the model's generation_config.json, if it has one."""
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(str(path)).eos_token_id
    except OSError:
        return frozenset()
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return frozenset(int(token) for token in listed)


def _array(ids: Sequence[int]) -> IntArray:
    return np.asarray(ids, dtype=np.int32)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
