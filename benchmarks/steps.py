"""Whether a student's working is right, not its last number alone.

A ladder judges final answers. Errors of copying may cancel in a sum (two numbers that exchange a
digit have the same total), so greedy answers are also read step by step. Trains nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npd.data.chat_tokenizer import ChatTokenizer
from npd.generate.in_process import generate_with
from npd.generate.sampling import Sampling
from npd.models.loading import decoding, load_model
from npd.types import Message, Prompt, SampleRequest
from tasks import MARK

KINDS = ("right", "operand", "addition", "steps", "form", "final")
_STEP = re.compile(r"(\d+)\+(\d+)=(\d+)")
_CROSSED = re.compile(r"\d+\+\d+=\d+x")
_SIGNS = re.compile("[>:]")
_ADDED = re.compile(r"([abc])\+([abc])=(\d+)\+(\d+)")


def kind_of(prompt: str, response: str) -> str:
    """What is wrong first in a sum's working, one of `KINDS`; `right` if nothing is.

    `operand`: one that is not at hand (the prompt's numbers and each step's sum, once each).
    """
    body, mark, final = response.partition(MARK)
    at_hand = Counter(re.findall(r"\d+", prompt))
    steps = body.split(",")
    if not mark or len(steps) != at_hand.total() - 1:
        return "steps"
    for step in steps:
        found = _STEP.fullmatch(step)
        if found is None:
            return "form"
        left, right, result = found.groups()
        at_hand.subtract((left, right))
        if min(at_hand.values()) < 0:
            return "operand"
        if int(left) + int(right) != int(result):
            return "addition"
        at_hand[result] += 1
    return "right" if final == result else "final"


def right_workings(task: str, problems: Sequence[dict[str, str]], texts: Sequence[str]) -> float:
    """The share of `texts` with every step right, once what is crossed out is left away."""
    pairs = zip(problems, texts, strict=True)
    if task in ("sum", "mend"):
        right = [kind_of(row["prompt"], _CROSSED.sub("", text)) == "right" for row, text in pairs]
    else:
        right = [_plain(row["completion"]) == _plain(text) for row, text in pairs]
    return sum(right) / len(right)


def _plain(working: str) -> str:
    """The working of a list or program, of which there is one: free are the sign before a list, and
    which operand of a program's sum comes first.
    """
    return _SIGNS.sub("=", _ADDED.sub(_in_order, working))


def _in_order(found: re.Match[str]) -> str:
    left, right, first, second = found.groups()
    (left, first), (right, second) = sorted([(left, first), (right, second)])
    return f"{left}+{right}={first}+{second}"


def answers(student: Path, problems: Sequence[dict[str, str]], max_new: int) -> list[str]:
    """Greedy responses, in order."""
    chat, model = ChatTokenizer.load(str(student)), load_model(student)
    prompts = [Prompt(i, (Message("user", p["prompt"]),)) for i, p in enumerate(problems)]
    requests = [SampleRequest(i, i, prompt) for i, prompt in enumerate(chat.encode_all(prompts))]
    sampling = Sampling(
        max_new_tokens=max_new,
        stop_ids=chat.stop_ids,
        pad_id=chat.pad_id,
        temperature=0.0,
        top_p=1.0,
        batch_size=256,
        vocab_size=chat.vocab_size,
    )
    with decoding(model):
        written: list[Any] = list(generate_with(model, requests, sampling, with_logprobs=False))
    return [chat.decode(r.response_ids) for r in sorted(written, key=lambda r: r.sample_id)]
