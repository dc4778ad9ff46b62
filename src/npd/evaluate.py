"""Held-out quality: how far the student is from the teacher, and whether its answers are right.

Promises: pure functions of a model and fixed records; the model is left in the mode it came in.
Does not generate, choose prompts, or read files.

Dimensions: C positions of a head chunk, k teacher support size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npd.head import Head, head_of
from npd.modeling import response_hidden
from npd.types import Scored

# The least mass a tail bucket counts as having: below it float32 cannot tell 1 - mass from 0.
_MIN_TAIL = 1e-7

_NUMBER = re.compile(
    r"(?<!\d)(?<!\d\.)-?(?:\d+(?:,\d{3})*(?:\.\d+)?|(?<!\.)\.\d+)(?:/[1-9]\d*)?", re.ASCII
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")


def heldout_kl(
    model: Any, scored: Sequence[Scored], row_tokens: int, chunk: int
) -> tuple[float, float, float, int]:
    """How well `model` (packed) matches the teacher on fixed responses with a top-k support.

    Returns (kl, agreement, ce, num_tokens), means over all response tokens: tail-bucket
    KL(teacher || student) in nats, `sum_topk p_T (log p_T - log p_S) + (1 - M_T) log((1 - M_T) /
    (1 - M_S))`, a lower bound of the full KL and never negative; the share of positions where both
    argmaxes agree; the student's NLL in nats. Documents are packed into rows of `row_tokens`, and
    at most `chunk` positions have logits at once.
    """
    assert scored, "nothing to evaluate on"
    head, was_training = head_of(model), model.training
    pairs = [(s.rollout.prompt_ids, s.rollout.response_ids) for s in scored]
    total = torch.zeros(3, dtype=torch.float64)
    model.eval()
    with torch.inference_mode():
        for row, hidden in response_hidden(model, pairs, row_tokens):
            total += _row_sums(head, hidden, [scored[i] for i in row], chunk)
    model.train(was_training)
    num_tokens = sum(len(response) for _, response in pairs)
    kl, agreement, ce = (total / num_tokens).tolist()
    return kl, agreement, ce, num_tokens


def heldout_kls(
    model: Any, scored: Sequence[Scored], row_tokens: int, chunk: int
) -> dict[str, tuple[float, float, float, int]]:
    """What `heldout_kl` says of each teacher's responses alone, by the teacher's name."""
    groups: dict[str, list[Scored]] = {}
    for item in scored:
        groups.setdefault(item.rollout.teacher, []).append(item)
    return {name: heldout_kl(model, groups[name], row_tokens, chunk) for name in sorted(groups)}


def over_tokens(
    parts: Sequence[tuple[float, float, float, int]],
) -> tuple[float, float, float, int]:
    """Means over the tokens of all parts together, of (kl, agreement, ce, num_tokens) each."""
    if len(parts) == 1:
        return parts[0]  # as it is: a mean of one would round it
    num_tokens = sum(part[-1] for part in parts)
    kl, agreement, ce = (sum(p[i] * p[-1] for p in parts) / num_tokens for i in range(3))
    return kl, agreement, ce, num_tokens


def _row_sums(head: Head, hidden: Tensor, scored: Sequence[Scored], chunk: int) -> Tensor:
    device = hidden.device
    ids = torch.from_numpy(np.concatenate([s.topk_ids for s in scored])).long().to(device)
    logprobs = np.concatenate([s.topk_logprobs for s in scored]).astype(np.float32)
    teacher = torch.from_numpy(logprobs).to(device)
    labels = np.concatenate([s.rollout.response_ids for s in scored])
    targets = torch.from_numpy(labels).long().to(device)
    total = torch.zeros(3, dtype=torch.float64)
    for part in head.slices(len(hidden), chunk):
        total += _chunk_sums(head.logits(hidden[part]), ids[part], teacher[part], targets[part])
    return total


def _chunk_sums(logits: Tensor, ids: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Sums of KL, agreement and NLL over a chunk: logits [C, V], ids and teacher [C, k]."""
    norm = logits.logsumexp(dim=1, keepdim=True)
    student = logits.gather(1, ids) - norm
    p = teacher.exp()
    kl = (p * (teacher - student)).sum(dim=1)
    tail_t, tail_s = _tail(p), _tail(student.exp())
    kl += tail_t * (tail_t.log() - tail_s.log())
    agree = logits.argmax(dim=1) == ids[:, 0]
    nll = norm[:, 0] - logits.gather(1, targets[:, None])[:, 0]
    return torch.stack([kl.double().sum(), agree.double().sum(), nll.double().sum()]).cpu()


def _tail(probabilities: Tensor) -> Tensor:
    return (1.0 - probabilities.sum(dim=1)).clamp(min=_MIN_TAIL)


def exact_match(pairs: Sequence[tuple[str, str]]) -> float:
    """Share of (response, answer) pairs in which the response's final answer is the answer."""
    assert pairs, "nothing to evaluate on"
    return sum(is_match(response, answer) for response, answer in pairs) / len(pairs)


def is_match(response: str, answer: str) -> bool:
    r"""Whether `response` gives `answer` as its final answer.

    The final answer is what follows the last `####` on its line, else the last `\boxed{}`. With
    neither, a numeric answer is compared with the last number of the response, and any other must
    occur in it as whole words. Numbers are compared by value: `1,234.50` is `1234.5`, `1/2` is
    `0.5`. An empty answer is never given.
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
    """What the text itself marks as its final answer, if it does."""
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
