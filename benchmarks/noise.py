"""Noise planted into responses: four kinds, a known share, seeded; the labels stay beside the text.

Pure: texts in, texts and labels out. Promises that the same seed plants the same noise, that each
planted response differs from the clean one, and that kinds come in equal parts (to one response).
Does not sample: the `hot` texts are given.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Split: TypeAlias = Callable[[str], list[str]]

KINDS = ("truncated", "shuffled", "off_topic", "hot")
"""Cut at a random token and ended as if it were whole; its parts in another order; the response to
another prompt; sampled at a high temperature."""


@dataclass(frozen=True, slots=True)
class Response:
    """A prompt's response in the data set. `kind`: of the noise, empty for a clean one."""

    prompt: str
    text: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Texts:
    """How responses come apart: into `tokens`, where one may be cut, and into `parts`, which are
    put in another order and `join`ed."""

    tokens: Split
    parts: Split
    join: Callable[[list[str]], str]

    def truncated(self, text: str, rng: random.Random) -> str:
        """The first tokens of a response, one at least, the last one never."""
        tokens = self.tokens(text)
        return "".join(tokens[: rng.randint(1, len(tokens) - 1)]) if len(tokens) > 1 else text

    def shuffled(self, text: str, rng: random.Random) -> str:
        """The parts of a response in another order; the same where there is none."""
        parts = self.parts(text)
        if len(set(parts)) < 2:
            return text
        while (found := rng.sample(parts, len(parts))) == parts:
            pass
        return self.join(found)


def sum_parts(text: str) -> list[str]:
    """The steps of a working, the answer one of them.

    >>> sum_parts("39+83=122,122+38=160####160")
    ['39+83=122', '122+38=160', '####160']
    """
    return [part for part in re.split(r",|(####[^,]*)", text) if part]


WORKING = Texts(
    tokens=lambda text: re.findall(r"####|.", text),
    parts=sum_parts,
    join=lambda parts: ",".join(parts).replace(",####", "####"),
)
"""Of the ladder's `sum` task: tokens are characters and the mark, parts are steps."""
PROSE = Texts(tokens=lambda text: re.findall(r"\s*\S+", text), parts=str.split, join=" ".join)
"""Of plain text: tokens and parts are words."""


def plant(
    clean: Sequence[tuple[str, str]],
    hot: Mapping[str, str],
    texts: Texts,
    *,
    share: float,
    seed: int,
) -> list[Response]:
    """The (prompt, response) pairs of `clean` with noise in `share` of them, order kept.

    `hot` has another response to each prompt. A kind that cannot change a response (there is one
    part only) is planted into another.

    Raises:
        ValueError: a kind can change none of the responses that are left.
    """
    rng = random.Random(f"noise:{seed}")
    left = rng.sample(range(len(clean)), len(clean))
    found: dict[int, Response] = {}
    for number in range(round(share * len(clean))):
        kind = KINDS[number % len(KINDS)]
        for index in left:
            prompt, text = clean[index]
            noisy = {
                "truncated": lambda text=text: texts.truncated(text, rng),
                "shuffled": lambda text=text: texts.shuffled(text, rng),
                "off_topic": lambda: clean[rng.randrange(len(clean))][1],
                "hot": lambda prompt=prompt: hot.get(prompt, ""),
            }[kind]()
            if noisy.strip() and noisy != text:
                found[index] = Response(prompt, noisy, kind)
                break
        else:
            raise ValueError(f"{kind} changes none of the responses that are left")
        left.remove(index)
    return [found.get(index, Response(*pair)) for index, pair in enumerate(clean)]
