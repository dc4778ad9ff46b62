"""Completions and answers that come with the data: is each there, does it fit, can it be compared.

Findings are lines that end in what to do, if there is something to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from npd.config import RunConfig
from npd.data.prompts import PromptSet
from npd.errors import DataError
from npd.text import counted
from npd.types import EncodedPrompt

# Longer answers that mark no final one are prose: no response repeats them word for word.
_PROSE_WORDS = 12


def check_completions(prompts: Sequence[EncodedPrompt], needed_by: str, found: PromptSet) -> None:
    missing = [prompt.index for prompt in prompts if prompt.completion_ids is None]
    if missing:
        remedy = "add a `completion` column, or name yours in data.columns"
        if "messages" in found.unread:
            remedy = (
                "read `messages`, which go unused beside `prompt`, with --set data.format=messages"
            )
        more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        raise DataError(
            f"{needed_by} needs a completion for every prompt, but prompt {missing[0]}{more} has "
            f"none: {remedy}"
        )


def fit_completions(
    prompts: Sequence[EncodedPrompt], config: RunConfig
) -> tuple[list[EncodedPrompt], dict[str, int]]:
    """The prompts whose completion is within the limit, and how many were dropped for theirs.

    Raises:
        DataError: one is longer, and `data.on_long_completion` is error.
    """
    limit = _completion_limit(config)
    fitting = [p for p in prompts if num_tokens(p) <= limit]
    num_long, longest = len(prompts) - len(fitting), longest_completion(prompts)
    if num_long and config.data.on_long_completion == "error":
        raise DataError(
            f"{num_long:,} of {counted(len(prompts), 'completion')} have over {limit} tokens, "
            f"{_limit_name(config)}; the longest has {longest}, its end token counted: "
            f"{_room(longest, config)}, or data.on_long_completion=drop"
        )
    return fitting, {"long_completion": num_long} if num_long else {}


def num_tokens(prompt: EncodedPrompt) -> int:
    """Tokens of the prompt's completion, 0 where it has none."""
    return 0 if prompt.completion_ids is None else len(prompt.completion_ids)


def longest_completion(prompts: Sequence[EncodedPrompt]) -> int:
    """Tokens of the longest completion."""
    return max(map(num_tokens, prompts), default=0)


def long_completions(prompts: Sequence[EncodedPrompt], config: RunConfig) -> tuple[str, ...]:
    """A line where completions are longer than what the student would write."""
    usual, longest = config.generate.max_new_tokens, longest_completion(prompts)
    count = sum(num_tokens(prompt) > usual for prompt in prompts)
    if not count:
        return ()
    return (
        f"{count:,} of {counted(len(prompts), 'completion')} have more than "
        f"generate.max_new_tokens ({usual}), which does not cut them; the longest has {longest}",
    )


def _completion_limit(config: RunConfig) -> int:
    own = config.data.max_completion_tokens
    return min(_rows(config).values()) - config.data.max_prompt_tokens if own is None else own


def _rows(config: RunConfig) -> dict[str, int]:
    """The settings that bound a whole sample."""
    rows = {"train.row_tokens": config.train.row_tokens}
    return rows | (
        {"score.row_tokens": config.score.least_row_tokens} if config.needs_scores else {}
    )


def _limit_name(config: RunConfig) -> str:
    if config.data.max_completion_tokens is not None:
        return "data.max_completion_tokens"
    name = min(_rows(config), key=lambda name: _rows(config)[name])
    return f"which is {name} less data.max_prompt_tokens"


def _room(longest: int, config: RunConfig) -> str:
    """The settings that make room for a completion."""
    needed = config.data.max_prompt_tokens + longest
    own = config.data.max_completion_tokens
    sets = [] if own is None else [f"data.max_completion_tokens={longest}"]
    sets += [f"{name}={needed}" for name, tokens in _rows(config).items() if tokens < needed]
    return f"set {' and '.join(sets)}"


def cut_heldout(heldout: Sequence[EncodedPrompt], config: RunConfig) -> tuple[str, ...]:
    """A line where held-out completions are measured on their beginnings only."""
    limit = config.eval.max_new_tokens
    num_cut = sum(num_tokens(prompt) > limit for prompt in heldout)
    if not num_cut:
        return ()
    return (
        f"{num_cut:,} of {counted(len(heldout), 'held-out completion')} are measured on their "
        f"first {limit} tokens (eval.max_new_tokens); the longest has "
        f"{longest_completion(heldout)}",
    )


def without_prose(
    heldout: Sequence[EncodedPrompt],
) -> tuple[list[EncodedPrompt], tuple[str, ...]]:
    """The held-out prompts, without answers that exact match cannot compare, and a line on that."""
    found = [replace(p, answer=None) if _is_prose(p.answer) else p for p in heldout]
    num_prose = sum(_is_prose(p.answer) for p in heldout)
    if not num_prose:
        return found, ()
    return found, (
        f"{num_prose:,} of {counted(len(heldout), 'held-out prompt')} have prose for an answer "
        f"(over {_PROSE_WORDS} words, no #### or \\boxed{{}}), which exact match leaves out: name "
        "a column of short answers in data.columns ({answer: ...}), or mark the final answer",
    )


def _is_prose(answer: str | None) -> bool:
    if answer is None or "####" in answer or "\\boxed{" in answer:
        return False
    return len(answer.split()) > _PROSE_WORDS
