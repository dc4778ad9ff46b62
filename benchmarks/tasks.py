"""Problems with checkable answers and working in which errors add up: generated, seeded, graded.

Three tasks: `sum` (add two-digit numbers, one at a time), `list` (a list through a chain of
operations), `program` (assignments executed line by line, values of two digits). `level` is the
number of steps of the working. A problem is held out or not by a hash of its content, so no seed
can train on one that another evaluates. `is_varied` texts choose freely among equally right
workings, so that a teacher has more to tell than one text shows; without it a problem has one text.
In `mend`, a sum, a share of the steps is a slip that is crossed out and done again
(`39+83=121x39+83=122`): who learns from such texts knows what to do after an error, as large models
do.

Also here: the character tokenizer of these texts. Light to import; does not train or decode.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

Split: TypeAlias = Literal["train", "heldout"]

MARK = "####"
"""What comes before the final answer; one token."""
CHARACTERS = "0123456789+-*=,;:>abcdsrxuk?"
_HELDOUT_SHARE = 0.1
_CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|a|>{{ m['content'] }}<|end|>"
    "{% else %}<|q|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt, one right response to it, and the answer that a right one ends in.

    `key` is the problem's content whatever its wording: problems of one key are the same problem.

    >>> make("sum", random.Random(0), 2, is_varied=False)
    Problem(prompt='59+63', response='59+63=122####122', answer='122', key='59+63')
    """

    prompt: str
    response: str
    answer: str
    key: str


def make(
    task: str, rng: random.Random, level: int, *, is_varied: bool, slips: float = 0.0
) -> Problem:
    """A problem of `task` drawn from `rng`, with `level` numbers, operations or lines.

    `slips`: of `mend`, the share of steps that go wrong at first.
    """
    if task == "mend":
        return _sum(rng, level, is_varied, slips)
    return TASKS[task](rng, level, is_varied)


def problems(
    task: str,
    split: Split,
    seed: int,
    levels: tuple[int, int],
    *,
    is_varied: bool,
    slips: float = 0.0,
) -> Iterator[Problem]:
    """Problems of one split without end (as long as there are new ones), no content twice.

    Their levels are drawn evenly from the inclusive range `levels`.
    """
    rng = random.Random(f"{task}:{split}:{seed}")
    seen: set[str] = set()
    while True:
        problem = make(task, rng, rng.randint(*levels), is_varied=is_varied, slips=slips)
        if problem.key not in seen and is_heldout(task, problem) == (split == "heldout"):
            seen.add(problem.key)
            yield problem


def is_heldout(task: str, problem: Problem) -> bool:
    """Whether no one trains on it: a tenth of all contents, the same in every run."""
    digest = hashlib.sha256(f"{task}:{problem.key}".encode()).digest()
    return int.from_bytes(digest[:6]) < _HELDOUT_SHARE * 2**48


def is_right(response: str, answer: str) -> bool:
    """Whether what follows the last mark is exactly `answer`; without a mark it is not."""
    _, mark, given = response.rpartition(MARK)
    return bool(mark) and given.strip() == answer


def write_problems(path: Path, found: Iterator[Problem], count: int) -> Path:
    """The next `count` problems as JSONL that npd reads: prompt, completion, answer."""
    with path.open("w") as file:
        for problem in islice(found, count):
            row = {
                "prompt": problem.prompt,
                "completion": problem.response,
                "answer": f"{MARK}{problem.answer}",
            }
            file.write(json.dumps(row) + "\n")
    return path


def read_problems(path: Path) -> list[dict[str, str]]:
    """The records of a file of problems."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- The tasks ---------------------------------------------------------------------------------


def _sum(rng: random.Random, level: int, is_varied: bool, slips: float = 0.0) -> Problem:
    """Numbers from 10 to 99, added one by one: in any order where `is_varied`."""
    numbers = [rng.randint(10, 99) for _ in range(level)]
    order = rng.sample(numbers, level) if is_varied else numbers
    steps, total = [], order[0]
    for number in order[1:]:
        step = f"{total}+{number}="
        if slips and rng.random() < slips:
            steps.append(f"{step}{_slip(rng, total + number)}x{step}{total + number}")
        else:
            steps.append(f"{step}{total + number}")
        total += number
    key = "+".join(map(str, sorted(numbers)))
    return _problem("+".join(map(str, numbers)), steps, str(total), key)


def _slip(rng: random.Random, result: int) -> int:
    """A wrong result of as many digits: one of them is another."""
    digits = list(str(result))
    place = rng.randrange(len(digits))
    others = [digit for digit in "123456789" if digit != digits[place]]
    digits[place] = rng.choice(others)
    return int("".join(digits))


def _list(rng: random.Random, level: int, is_varied: bool) -> Problem:
    """Five digits through operations: sort, reverse, exchange the ends, one up, first to the end.

    Each step writes the whole list; where `is_varied`, after any of three signs.
    """
    values = [rng.randint(0, 9) for _ in range(5)]
    chosen = [rng.choice(sorted(OPERATIONS)) for _ in range(level)]
    prompt = f"{_digits(values)}:{''.join(chosen)}"
    steps = []
    for name in chosen:
        values = OPERATIONS[name](values)
        sign = rng.choice("=>:") if is_varied else "="
        steps.append(f"{name}{sign}{_digits(values)}")
    return _problem(prompt, steps, _digits(values), prompt)


OPERATIONS: dict[str, Callable[[list[int]], list[int]]] = {
    "s": sorted,
    "r": lambda values: values[::-1],
    "x": lambda values: [values[-1], *values[1:-1], values[0]],
    "u": lambda values: [(value + 1) % 10 for value in values],
    "k": lambda values: [*values[1:], values[0]],
}


def _program(rng: random.Random, level: int, is_varied: bool) -> Problem:
    """Three variables, `level` assignments of a sum or difference of two of them, one is asked for.

    Values are of two digits, 00 to 99, and no line leaves that range. A step repeats its line, then
    with values: `a=b+c=34+07=41`; values alone are too much at once for models of these sizes.
    Where `is_varied`, the operands of a sum may be written in either order.
    """
    values = {name: rng.randint(0, 99) for name in "abc"}
    lines = [f"{name}={value:02}" for name, value in values.items()]
    steps, target = [], "a"
    for _ in range(level):
        target, (left, sign, right) = rng.choice("abc"), _within(rng, values)
        lines.append(f"{target}={left}{sign}{right}")
        if is_varied and sign == "+" and rng.random() < 0.5:
            left, right = right, left
        first, second = values[left], values[right]
        values[target] = first + second if sign == "+" else first - second
        copied, shown = f"{left}{sign}{right}", f"{first:02}{sign}{second:02}"
        steps.append(f"{target}={copied}={shown}={values[target]:02}")
    prompt = f"{';'.join(lines)}?{target}"
    return _problem(prompt, steps, f"{values[target]:02}", prompt)


def _within(rng: random.Random, values: dict[str, int]) -> tuple[str, str, str]:
    """Two variables and the sign between them, with a result of 0 to 99; none minus itself."""
    while True:
        left, sign, right = rng.choice("abc"), rng.choice("+-"), rng.choice("abc")
        second = values[right] if sign == "+" else -values[right]
        if 0 <= values[left] + second <= 99 and (sign == "+" or left != right):
            return left, sign, right


def _problem(prompt: str, steps: list[str], answer: str, key: str) -> Problem:
    return Problem(prompt, f"{','.join(steps)}{MARK}{answer}", answer, key)


def _digits(values: list[int]) -> str:
    return "".join(map(str, values))


TASKS: dict[str, Callable[[random.Random, int, bool], Problem]] = {
    "sum": _sum,
    "mend": _sum,
    "list": _list,
    "program": _program,
}


# -- Their tokenizer ---------------------------------------------------------------------------


def make_tokenizer() -> Any:
    """A token for each character and for the mark, as a fast tokenizer with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|q|>", "<|a|>", "<|end|>", "<|unknown|>"]
    names = [*special, MARK, *CHARACTERS]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<|unknown|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(f"{MARK}|."), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", unk_token="<|unknown|>"
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
