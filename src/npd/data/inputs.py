"""The inputs of a run: its prompts as token ids, checked for what the run needs of them.

Promises: the same records, tokenizer and clock give the same inputs, which `data_fingerprint`
shows. Notes say what is odd about the data and let the run go on. Loads no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from difflib import get_close_matches

from npd.config import DataConfig, RunConfig
from npd.data.chat_tokenizer import ChatTokenizer
from npd.data.completions import (
    check_completions,
    cut_heldout,
    fit_completions,
    long_completions,
    longest_completion,
    without_prose,
)
from npd.data.prompts import PromptSet, encode_prompts, load_prompts
from npd.data.vocabulary import check_rows
from npd.errors import DataError
from npd.text import counted
from npd.types import DEFAULT_TEACHER, EncodedPrompt, role_of


@dataclass(frozen=True, slots=True)
class RunInputs:
    """The prompts of a run as token ids, and how many records were dropped for which reason."""

    prompts: list[EncodedPrompt]
    heldout: list[EncodedPrompt]
    dropped: dict[str, int]
    notes: tuple[str, ...] = ()
    """Warnings for the person watching."""
    remarks: tuple[str, ...] = ()
    """What is worth knowing of the data, and no reason to worry."""
    stop_ids: frozenset[int] = frozenset()
    """Every token that ends a response: of the student, its teachers and the config."""
    clock: datetime | None = None
    """The time that chat templates wrote into prompts."""
    raw: str = ""
    """A checksum of the records, before they were rendered."""
    template: str = ""
    """The text of `data.chat_template`; empty without it."""

    @property
    def data_fingerprint(self) -> str:
        """A checksum of all prompts, completions and answers: the data must not change in a run."""
        digest = hashlib.sha256((self.raw + self.template).encode())
        for prompt in (*self.prompts, *self.heldout):
            completion = prompt.completion_ids
            for ids in (prompt.prompt_ids, prompt.header_ids, completion):
                digest.update(b"-" if ids is None else len(ids).to_bytes(8, "big") + ids.tobytes())
            digest.update(repr((prompt.answer, prompt.teacher)).encode())
        return digest.hexdigest()


def for_workers(config: RunConfig, prepared: RunInputs) -> RunConfig:
    """The config with what the data and all models said: end tokens, and the longest completion.

    It has the text of `data.chat_template`, since a worker's machine may lack the file.
    """
    stops = tuple(sorted(prepared.stop_ids))
    data: dict[str, object] = {}
    if config.generate.source == "dataset":
        data["max_completion_tokens"] = max(1, longest_completion(prepared.prompts))
    if prepared.template:
        data["chat_template"] = prepared.template
    return config.model_copy(
        update={
            "generate": config.generate.model_copy(update={"stop_ids": stops}),
            "data": config.data.model_copy(update=data),
        }
    )


def read_data(config: RunConfig, chat: ChatTokenizer) -> RunInputs:
    """The prompts as the student's `chat` has them, checked for what the run needs of them.

    Raises:
        DataError: the data cannot be used.
        ModelError: a model has no row for a token id in it.
    """
    found = load_prompts(data_section(config), config.seed)
    read = found.train if config.trains_by_teacher else []
    read = [*read, *found.heldout] if config.evaluates_teacher else read
    teachers = check_names([(prompt.place, prompt.teacher) for prompt in read], config)
    prompts, dropped = _train_prompts(found, chat, config)
    heldout, dropped_heldout = _heldout_prompts(found, chat, config)
    heldout, prose = without_prose(heldout)
    if not prompts:
        raise DataError(
            "no training prompt is left after dropping: see data.on_long_prompt and "
            f"data.max_prompt_tokens ({config.data.max_prompt_tokens})"
        )
    check_rows(config, chat, [*prompts, *heldout])
    counts = [found.dropped, dropped, dropped_heldout]
    reasons = sorted({reason for count in counts for reason in count})
    total = {reason: sum(count.get(reason, 0) for count in counts) for reason in reasons}
    return RunInputs(
        _numbered(prompts, 0),
        _numbered(heldout, len(prompts)),
        total,
        notes=(
            *idle_notes(teachers, config),
            *length_notes(config, len(prompts)),
            *chat.notices,
            *prose,
        ),
        remarks=(
            *_remarks(found, chat),
            *long_completions(prompts, config),
            *cut_heldout(heldout, config),
        ),
        clock=chat.clock,
        raw=_checksum(found),
        template=chat.given_template,
    )


def data_section(config: RunConfig) -> DataConfig:
    """The data section; nothing is held out where nothing is evaluated."""
    if config.eval.source != "none":
        return config.data
    return config.data.model_copy(update={"heldout": None, "heldout_size": 0})


def _train_prompts(
    found: PromptSet, chat: ChatTokenizer, config: RunConfig
) -> tuple[list[EncodedPrompt], dict[str, int]]:
    is_trained_on = config.generate.source == "dataset"
    prompts, dropped = encode_prompts(
        found.train,
        chat,
        config.data,
        needs_alone=config.needs_ifd,
        needs_completions=is_trained_on,
    )
    if not is_trained_on:
        return prompts, dropped
    check_completions(prompts, "generate.source dataset", found)
    prompts, too_long = fit_completions(prompts, config)
    return prompts, dropped | too_long


def _heldout_prompts(
    found: PromptSet, chat: ChatTokenizer, config: RunConfig
) -> tuple[list[EncodedPrompt], dict[str, int]]:
    is_measured_on = config.eval.source == "completion"
    heldout, dropped = encode_prompts(
        found.heldout, chat, config.data, needs_alone=False, needs_completions=is_measured_on
    )
    if is_measured_on:
        check_completions(heldout, "eval.source completion", found)
    return heldout, dropped


def _numbered(prompts: Sequence[EncodedPrompt], first: int) -> list[EncodedPrompt]:
    """The prompts under the indices a run knows them by, without gaps where some were dropped."""
    return [replace(prompt, index=i) for i, prompt in enumerate(prompts, first)]


def _remarks(found: PromptSet, chat: ChatTokenizer) -> Iterator[str]:
    yield from _sources(found)
    if found.joined:
        yield f"`input` is put below the prompt, after an empty line, in {found.joined:,} records"
    if found.unread:
        names = ", ".join(name or "(without a name)" for name in found.unread)
        yield f"columns not used: {names} (data.columns maps names)"
    if chat.clock is not None:
        yield (
            f"the chat template writes the date; all prompts have {chat.clock:%d %b %Y %H:%M}, "
            "when the run is resumed too"
        )


def _sources(found: PromptSet) -> Iterator[str]:
    """The form of the records of each source, and of several what the run takes."""
    for source in found.sources:
        if not source.name:
            yield f"data: read as {source.form}"
            continue
        rest = source.num_read - source.num_train - source.num_heldout
        counts = f"{counted(source.num_train, 'prompt')}, {source.num_heldout:,} held out"
        more = f", {rest:,} not used" if rest else ""
        yield f"data: {source.name} read as {source.form}: {counts}{more}"
    if found.heldout_form and {source.form for source in found.sources} != {found.heldout_form}:
        yield f"data: held-out prompts read as {found.heldout_form}"


def _checksum(found: PromptSet) -> str:
    """Of what the records say, wherever they lie."""
    digest = hashlib.sha256()
    for prompt in (*found.train, *found.heldout):
        digest.update(repr(replace(prompt, place="")).encode())
    return digest.hexdigest()


def check_names(named: Sequence[tuple[str, str]], config: RunConfig) -> set[str]:
    """The teachers in use, of (place of a record, name that it gives) each.

    Raises:
        DataError: a name is none of the run's teachers.
    """
    known = config.teacher_models
    unknown = [(place, name) for place, name in named if name not in known]
    if not unknown:
        return {name for _, name in named}
    place, name = unknown[0]
    more = sum(other == name for _, other in unknown[1:])
    where = f"{place} (and {more} more)" if more else place
    names = ", ".join(config.teachers)
    if name == DEFAULT_TEACHER:
        raise DataError(
            f"{where} names no teacher, and the run has none for such prompts: set `teacher`, or "
            f"name one of {names} in the record's `teacher`"
        )
    if not config.teachers:
        raise DataError(
            f"{where} names the teacher {name!r}, and the run has none by name: set "
            f"`teachers: {{{name}: DIR}}`, or take the data's `teacher` column out"
        )
    near = get_close_matches(name, config.teachers, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise DataError(
        f"{where} names the teacher {name!r}{hint}, and those of the run are {names}: correct the "
        "record, or add it to `teachers`"
    )


def idle_notes(used: set[str], config: RunConfig) -> tuple[str, ...]:
    """A line for each teacher that has nothing to do, where a run has several."""
    if not config.needs_teacher or not config.teachers:
        return ()
    idle = [name for name in config.teacher_models if name not in used]
    return tuple(
        f"{role_of(name)}: no prompt names it, so it is not loaded: take it out of the config, or "
        "correct the data's `teacher`"
        for name in idle
    )


def length_notes(config: RunConfig, num_prompts: int) -> Iterator[str]:
    """A line for each interval of steps that this run is too short for."""
    steps, batch = config.schedule.steps, config.train.batch_size
    samples = num_prompts * config.generate.samples_per_prompt
    is_short = config.schedule.window == "all" and samples < batch
    requests = config.num_requests(num_prompts)
    if steps is None and requests is not None:
        steps = -(-requests * config.schedule.reuse // min(batch, samples if is_short else batch))
    intervals = {
        "eval.every_steps": None if config.eval.source == "none" else config.eval.every_steps,
        "schedule.refresh.every_steps": config.schedule.refresh.every_steps,
    }
    for key, every in intervals.items():
        if steps is not None and every is not None and every >= steps:
            yield (
                f"{key} ({every:,}) is as long as the run, which has about "
                f"{counted(steps, 'step')}: it never comes"
            )
    if is_short:
        yield (
            f"train.batch_size ({batch:,}) is more than the {counted(samples, 'sample')} there are "
            "at a time: steps are smaller"
        )
