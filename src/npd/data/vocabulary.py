"""Whether student and teachers share their tokens: vocabularies, end tokens, templates, ids.

Reads tokenizers, and the shapes of embeddings. What a run survives is a line that ends in what to
do, if there is something to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from npd.config import RunConfig
from npd.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from npd.errors import ConfigError, ModelError
from npd.models.files import end_ids, rows_of
from npd.types import EncodedPrompt, role_of

_PROBES = (
    "The quick brown fox doesn't jump over 13 lazy dogs; it costs $1,234.56 (or 7.5%)!",
    "def f(x):\n    return {'a': [x ** 2, None]}  # TODO\n\n\n\tif x != 0:\r\n        pass",
    "Größe, naïve, façade — “quotes” … Привет, мир. 你好,世界。こんにちは 안녕하세요 مرحبا नमस्ते",
    "e\u0301 vs \u00e9, \ufb01 vs fi, ½ ² Ⅷ \u200b\u00a0 🙂👩‍👩‍👧 \\frac{a}{b} #### 72   ",
)


def check_same_vocabulary(
    teacher_path: str | Path,
    student_path: str | Path,
    *,
    trust_remote_code: bool = False,
    role: str = "teacher",
) -> None:
    """Raise ModelError unless two models' tokenizers give the same ids to the same text.

    Token for token, merge for merge, and on a few probe texts (which show different normalisers
    and pre-tokenizers). The models' own, often padded, vocabulary sizes do not matter.
    """
    teacher = load_tokenizer(teacher_path, trust_remote_code, role)
    student = load_tokenizer(student_path, trust_remote_code, "student")
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


def check_support(config: RunConfig, chat: ChatTokenizer) -> None:
    """Check that the teacher has as many ids as are to be kept of each position.

    Raises:
        ConfigError: `score.top_k` is more than the vocabulary.
    """
    if config.needs_teacher and config.score.top_k > chat.vocab_size:
        raise ConfigError(
            f"score.top_k ({config.score.top_k:,}) is more than the student's vocabulary "
            f"({chat.vocab_size:,} ids): lower it, 10 is usual"
        )


class Ends(NamedTuple):
    """The ends and templates of a run's models.

    `stop_ids`: every token that ends a response. `notes`: where teachers differ from the student.
    `samples`: how the student, and each teacher that differs, would write a short question.
    """

    stop_ids: frozenset[int]
    notes: tuple[str, ...]
    samples: dict[str, str]


def compare_ends(config: RunConfig, chat: ChatTokenizer) -> Ends:
    """The end tokens of this run, and where teachers differ from the student.

    Raises:
        ConfigError: `generate.stop_ids` names an id that the vocabulary does not have.
    """
    unknown = [i for i in config.generate.stop_ids if not 0 <= i < chat.vocab_size]
    if unknown:
        raise ConfigError(
            f"generate.stop_ids has {unknown[0]}, and the student's ids end at "
            f"{chat.vocab_size - 1}: take it out"
        )
    found, notes = set(chat.stop_ids), []
    samples = {"student": chat.sample()}
    for name, model in config.teacher_models.items() if config.needs_teacher else ():
        try:
            trust = config.trust_remote_code
            teacher = ChatTokenizer.load(
                model,
                trust_remote_code=trust,
                role=role_of(name),
                template_args=config.data.chat_template_kwargs,
            )
        except ModelError:
            continue  # without an end token of its own it adds none
        stops = {i for i in teacher.stop_ids if i < chat.vocab_size}
        if stops != chat.stop_ids:
            notes.append(_other_ends(role_of(name), teacher, chat))
        elif teacher.end_id != chat.end_id:
            notes.append(_other_closing(role_of(name), teacher, chat))
        if not teacher.writes_like(chat):
            samples[role_of(name)] = teacher.sample()
            if config.trains_by_teacher:
                notes.append(_other_template(role_of(name), teacher, chat))
        found |= stops
    shown = {role: text for role, text in samples.items() if text is not None}
    return Ends(frozenset(found) | set(config.generate.stop_ids), tuple(notes), shown)


def _other_ends(role: str, teacher: ChatTokenizer, student: ChatTokenizer) -> str:
    return (
        f"the {role} ends a response with {_tokens(teacher)}, the student with {_tokens(student)}: "
        "each of them ends a response in this run, and the generation config of the saved student "
        "names them all"
    )


def _other_closing(role: str, teacher: ChatTokenizer, student: ChatTokenizer) -> str:
    theirs, ours = (c.tokenizer.convert_ids_to_tokens(c.end_id) for c in (teacher, student))
    return (
        f"the {role} closes a turn with {theirs}, the student with {ours}: both end a response in "
        "this run; if responses have no end, set data.chat_template to the teacher's template"
    )


def _tokens(chat: ChatTokenizer) -> str:
    tokens = [chat.tokenizer.convert_ids_to_tokens(i) for i in sorted(chat.stop_ids)]
    return " or ".join(map(str, tokens))


def _other_template(role: str, teacher: ChatTokenizer, student: ChatTokenizer) -> str:
    if not student.has_template:
        return (
            f"the {role} has a chat template and the student has none, so the {role} reads bare "
            "text that it was not trained on: put the teacher's template into the student's "
            "tokenizer if the student is to chat"
        )
    has = "another chat template than the student" if teacher.has_template else "no chat template"
    return (
        f"the {role} has {has}, and prompts are written as the student's has them: if the teacher "
        "writes badly, set data.chat_template to the teacher's"
    )


def check_rows(config: RunConfig, chat: ChatTokenizer, prompts: Iterable[EncodedPrompt]) -> None:
    """Check that every model has a row for every token id that may reach it.

    Raises:
        ModelError: one has none; its role, the id and where that comes from are named.
    """
    models = {"student": config.student}
    if config.needs_teacher:
        models |= {role_of(name): model for name, model in config.teacher_models.items()}
    highest = list(_highest(chat, prompts))
    for role, model in models.items():
        rows = rows_of(Path(model)) if Path(model).is_dir() else None
        if rows is None:
            continue
        own = ("an end token in its own files", max(end_ids(Path(model)), default=0))
        for what, token in (*highest, own):
            if token >= rows:
                raise _without_row(role, model, rows, what, token, chat)
        if rows < chat.vocab_size:
            what = "a token that the student can write"
            raise _without_row(role, model, rows, what, chat.vocab_size - 1, chat)


def _highest(chat: ChatTokenizer, prompts: Iterable[EncodedPrompt]) -> Iterator[tuple[str, int]]:
    """The largest id of each kind of text, with words for where it comes from."""
    yield "an end token of the tokenizer", max(chat.stop_ids)
    for prompt in prompts:
        texts = (prompt.prompt_ids, prompt.header_ids, prompt.completion_ids)
        found = [int(ids.max()) for ids in texts if ids is not None and len(ids)]
        if found:
            yield f"prompt {prompt.index}", max(found)


def _without_row(
    role: str, model: str, rows: int, what: str, token: int, chat: ChatTokenizer
) -> ModelError:
    return ModelError(
        f"the {role} {model} has embeddings for {rows:,} token ids, and {what} has id {token}"
        f"{_name_of(token, chat)}: resize its embeddings and LM head, or use the tokenizer it was "
        "trained with"
    )


def _name_of(token: int, chat: ChatTokenizer) -> str:
    """A token as text, in brackets; nothing where the student's tokenizer has none."""
    try:
        name = chat.tokenizer.convert_ids_to_tokens(token)
    except (LookupError, ValueError, OverflowError):  # tokenizers in Python
        return ""
    return f" ({name!r})" if name is not None else ""
