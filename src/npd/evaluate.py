"""Held-out evaluation: KL and agreement with the teacher, and exact match of answers.

Pure functions of a model and fixed records; the model's mode is restored. Does not generate, choose
prompts, or read files.

Dimensions: C positions of a head chunk, k teacher support size, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from npd.models.lm_head import Head, head_of
from npd.models.out_of_memory import Fitting
from npd.models.response_states import response_hidden
from npd.types import Scored

# The floor of the teacher's tail mass: its stored log-probs are rounded, and below this 1 - mass is
# noise. The student's tail needs no floor, because it is computed from logits.
_MIN_TAIL = 1e-8
# The remedy when not even one response fits the device.
IF_NOTHING_FITS = "give the trainer a device of its own, or set eval.source: none in a new run"

_NUMBER = re.compile(
    r"(?<!\d)(?<!\d\.)-?(?:\d+(?:,\d{3})*(?:\.\d+)?|(?<!\.)\.\d+)(?:/[1-9]\d*)?", re.ASCII
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")


class Match(NamedTuple):
    """The student's match with its teacher, as means over all response tokens.

    `kl`: tail-bucket KL(teacher || student) in nats, `sum_topk p_T (log p_T - log p_S) + (1 - M_T)
    log((1 - M_T) / (1 - M_S))`, a lower bound of the full KL and never negative. `agreement`: share
    of positions where both argmaxes agree. `ce`: the student's NLL in nats. `kl_sums`: the KL of
    each response, summed over its tokens, in the given order.
    """

    kl: float
    agreement: float
    ce: float
    num_tokens: int
    kl_sums: tuple[float, ...]


def heldout_kl(
    model: Any,
    scored: Sequence[Scored],
    row_tokens: int,
    chunk: int,
    *,
    fitting: Fitting | None = None,
) -> Match:
    """The match of `model` (packed) with the teacher on fixed responses with a top-k support.

    Documents are packed into rows of `row_tokens`; at most `chunk` positions have logits at a time.
    Both are halved while the device runs out of memory; `fitting` remembers it.

    Raises:
        RunError: one response does not fit the device.
    """
    assert scored, "nothing to evaluate on"
    if fitting is None:
        fitting = row_fitting(row_tokens)
    was_training = model.training
    model.eval()
    try:
        return fitting.run(
            lambda: _heldout_kl(model, scored, fitting.of(row_tokens), fitting.of(chunk))
        )
    finally:
        model.train(was_training)


def row_fitting(row_tokens: int) -> Fitting:
    """What remembers how many tokens of a row fit while a student is evaluated."""
    return Fitting("evaluation rows of", row_tokens, IF_NOTHING_FITS, is_alone=True)


def _heldout_kl(model: Any, scored: Sequence[Scored], row_tokens: int, chunk: int) -> Match:
    head = head_of(model)
    pairs = [(s.rollout.prompt_ids, s.rollout.response_ids) for s in scored]
    sums = torch.zeros(len(scored), 3, dtype=torch.float64)
    with torch.inference_mode():
        for row, hidden in response_hidden(model, pairs, row_tokens):
            values = _row_values(head, hidden, [scored[i] for i in row], chunk)
            lengths = [len(pairs[i][1]) for i in row]
            for i, part in zip(row, torch.split(values, lengths), strict=True):
                sums[i] = part.sum(dim=0)
    num_tokens = sum(len(response) for _, response in pairs)
    kl, agreement, ce = (sums.sum(dim=0) / num_tokens).tolist()
    return Match(kl, agreement, ce, num_tokens, tuple(sums[:, 0].tolist()))


def kl_by_teacher(match: Match, scored: Sequence[Scored]) -> tuple[tuple[str, float], ...]:
    """The KL on each teacher's responses, by teacher name; empty if there is only one teacher."""
    sums: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for kl, item in zip(match.kl_sums, scored, strict=True):
        name = item.rollout.teacher
        sums[name] = sums.get(name, 0.0) + kl
        tokens[name] = tokens.get(name, 0) + len(item.rollout.response_ids)
    return tuple((n, sums[n] / tokens[n]) for n in sorted(sums)) if len(sums) > 1 else ()


def _row_values(head: Head, hidden: Tensor, scored: Sequence[Scored], chunk: int) -> Tensor:
    device = hidden.device
    ids = torch.from_numpy(np.concatenate([s.topk_ids for s in scored])).long().to(device)
    logprobs = np.concatenate([s.topk_logprobs for s in scored]).astype(np.float32)
    teacher = torch.from_numpy(logprobs).to(device)
    labels = np.concatenate([s.rollout.response_ids for s in scored])
    targets = torch.from_numpy(labels).long().to(device)
    return torch.cat(
        [
            _chunk_values(head.logits(hidden[part]), ids[part], teacher[part], targets[part])
            for part in head.slices(len(hidden), chunk)
        ]
    )


def _chunk_values(logits: Tensor, ids: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """KL, agreement and NLL by position [C, 3], from logits [C, V] (overwritten), ids and teacher
    log-probs [C, k]."""
    norm = logits.logsumexp(dim=1, keepdim=True)
    student = logits.gather(1, ids) - norm
    agree = logits.argmax(dim=1) == ids[:, 0]
    nll = norm[:, 0] - logits.gather(1, targets[:, None])[:, 0]
    kl = (teacher.exp() * (teacher - student)).sum(dim=1)
    log_tail = _log_tail(teacher)
    # -inf if the support is the whole vocabulary; then neither model has a tail.
    outside = logits.scatter_(1, ids, -math.inf).logsumexp(dim=1) - norm[:, 0]
    kl += torch.where(outside > -math.inf, log_tail.exp() * (log_tail - outside), 0.0)
    return torch.stack([kl.double(), agree.double(), nll.double()], dim=1).cpu()


def _log_tail(teacher: Tensor) -> Tensor:
    """Log of the teacher's mass outside its support, from log-probs [C, k]; see `_MIN_TAIL`."""
    return (-torch.expm1(teacher.logsumexp(dim=1))).clamp(min=_MIN_TAIL).log()


def exact_match(pairs: Sequence[tuple[str, str]]) -> float:
    """Share of (response, answer) pairs in which the response's final answer is the answer."""
    assert pairs, "nothing to evaluate on"
    return sum(is_match(response, answer) for response, answer in pairs) / len(pairs)


def is_match(response: str, answer: str) -> bool:
    r"""Whether `response` gives `answer` as its final answer.

    The final answer is the rest of the line after the last `####`, else the last `\boxed{}`. With
    neither, a numeric answer is compared with the last number of the response, and any other answer
    must occur in the response as whole words. Numbers are compared by value: `1,234.50` is
    `1234.5`, `1/2` is `0.5`. An empty answer never matches.
    """
    stated = _stated(answer)
    gold = _plain(answer if stated is None else stated)
    given = _stated(response)
    number = _whole_number(gold)
    if number is not None:
        found = _NUMBER.findall(response if given is None else given)
        return bool(found) and _value(found[-1 if given is None else 0]) == number
    if given is not None:
        return bool(gold) and _plain(given) == gold
    return (
        bool(gold) and re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", _plain(response)) is not None
    )


def _stated(text: str) -> str | None:
    """The final answer that the text marks, or None."""
    if "####" in text:
        after = text.rpartition("####")[2].strip()
        return after.partition("\n")[0]
    boxed = _BOXED.findall(text)
    return boxed[-1] if boxed else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .$%")


def _whole_number(text: str) -> Fraction | None:
    return _value(text) if _NUMBER.fullmatch(text) else None


def _value(number: str) -> Fraction:
    top, _, bottom = number.replace(",", "").partition("/")
    return Fraction(top) / Fraction(bottom or "1")
