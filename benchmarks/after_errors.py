"""What teacher and student say after a student's own error: does training there teach the right?

    python benchmarks/after_errors.py --folder DIR [--task list] [--set NAME=VALUE ...] [--seeds N]

On-policy text is worth its price where a teacher, shown a prefix with an error in it, still puts
its probability on what follows from what is *written*. Each step of a working has a part that
follows from what stands before it (`39+83=` then `122`). Here: how likely teacher, start and other
students find the characters of such parts, before the first error of a text and after it, in texts
that the start samples at temperature 1. Needs the folder of a ladder that was run; trains nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladder_bench import Bench, one_thread
from ladder_setting import SETTINGS, with_values
from npd.chat import Chat
from npd.types import Message, Prompt
from own_text import sample
from tables import head, row
from tasks import MARK, OPERATIONS, read_problems

_NUM_TEXTS = 500
_LIST = re.compile(r"([srxuk])[=>:](\d{5})")
_SUM = re.compile(r"(\d+)\+(\d+)=(\d+)")
_LINE = re.compile(r"([abc])=([abc])([+-])([abc])=(\d\d[+-]\d\d)=(\d\d)")


@dataclass(frozen=True, slots=True)
class Part:
    """A place in a response, what should stand there after all that is written before it."""

    start: int
    expected: str
    is_after_error: bool


def parts(task: str, prompt: str, response: str) -> Iterator[Part]:
    """The parts that follow from what is before them, up to the first step of another form."""
    body, _, _ = response.partition(MARK)
    start, is_after = 0, False
    known = _given(task, prompt)
    for step in body.split(","):
        for place, expected, written in _follows(task, step, known):
            yield Part(start + place, expected, is_after)
            is_after = is_after or written != expected
        if not _note(task, step, known):
            return
        start += len(step) + 1


def _given(task: str, prompt: str) -> dict[str, str]:
    """What a prompt says of values: a list's under `list`, a program's under their names."""
    if task == "list":
        return {"list": prompt.partition(":")[0]}
    return dict(re.findall(r"([abc])=(\d\d)", prompt)) if task == "program" else {}


def _follows(task: str, step: str, known: dict[str, str]) -> Iterator[tuple[int, str, str]]:
    """(place in the step, what should stand there, what does) of each part that follows."""
    if task == "list" and (found := _LIST.fullmatch(step)):
        values = OPERATIONS[found[1]]([int(digit) for digit in known["list"]])
        yield found.start(2), "".join(map(str, values)), found[2]
    elif task == "program" and (found := _LINE.fullmatch(step)):
        yield found.start(5), f"{known[found[2]]}{found[3]}{known[found[4]]}", found[5]
        left, right = int(found[5][:2]), int(found[5][3:])
        result = left + right if found[5][2] == "+" else left - right
        if 0 <= result <= 99:
            yield found.start(6), f"{result:02}", found[6]
    elif task in ("sum", "mend") and (found := _SUM.fullmatch(step)):
        yield found.start(3), str(int(found[1]) + int(found[2])), found[3]


def _note(task: str, step: str, known: dict[str, str]) -> bool:
    """Put what a step says of values to those known; False if it has another form."""
    form = {"list": _LIST, "program": _LINE}.get(task, _SUM)
    found = form.fullmatch(step)
    if found is not None and task in ("list", "program"):
        known["list" if task == "list" else found[1]] = found[found.re.groups]
    return found is not None


def places(task: str, prompt: str, response: str) -> Iterator[tuple[int, str, bool]]:
    """(index, character that should stand there, is after an error) of each part's characters, up
    to its first wrong one, which is the last that has all before it as it should be.
    """
    for part in parts(task, prompt, response):
        for offset, character in enumerate(part.expected):
            place = part.start + offset
            yield place, character, part.is_after_error
            if response[place : place + 1] != character:
                break


def likelihoods(
    task: str, models: dict[str, Path], writer: Path, problems: Sequence[dict[str, str]], most: int
) -> dict[str, dict[bool, tuple[float, float, int]]]:
    """Of each model: mean probability of the right character, share where it is the likeliest, and
    how many there are; by whether an error came before.
    """
    import torch
    from transformers import AutoModelForCausalLM

    chat = Chat.load(str(writer))
    asked = [Prompt(i, (Message("user", row["prompt"]),)) for i, row in enumerate(problems)]
    prompts = [prompt.prompt_ids.tolist() for prompt in chat.encode_all(asked)]
    torch.manual_seed(0)
    with torch.inference_mode():
        ours = AutoModelForCausalLM.from_pretrained(writer).eval()
        ids, mask, begin = sample(ours, prompts, most)
        found = {}
        for name, path in models.items():
            model = AutoModelForCausalLM.from_pretrained(path).eval()
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
            logits = model(**inputs).logits[:, begin - 1 : -1].float()
            found[name] = _tally(task, chat, problems, (ids, mask, begin), logits.softmax(-1))
    return found


def _tally(
    task: str, chat: Chat, problems: Sequence[dict[str, str]], texts: Any, probs: Any
) -> dict[bool, tuple[float, float, int]]:
    ids, mask, begin = texts
    rows: dict[bool, list[tuple[float, bool]]] = {False: [], True: []}
    for problem, answer, is_written, prob in zip(
        problems, ids[:, begin:], mask[:, begin:].bool(), probs, strict=True
    ):
        text = chat.decode(answer[is_written].tolist())
        for place, character, is_after in places(task, problem["prompt"], text):
            right = chat.tokenizer.convert_tokens_to_ids(character)
            rows[is_after].append((float(prob[place, right]), int(prob[place].argmax()) == right))
    return {
        is_after: (
            sum(p for p, _ in seen) / max(1, len(seen)),
            sum(is_top for _, is_top in seen) / max(1, len(seen)),
            len(seen),
        )
        for is_after, seen in rows.items()
    }


def main() -> int:
    """Print a table, a row for each model and seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="of a ladder that was run")
    parser.add_argument("--task", choices=sorted(SETTINGS), default="sum")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="of a Setting")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--rungs", nargs="+", default=["start"], help="students beside the teacher")
    args = parser.parse_args()
    one_thread()
    setting = with_values(SETTINGS[args.task], args.set)
    bench = Bench(setting, args.folder)
    problems = read_problems(bench.heldout)[:_NUM_TEXTS]
    lines = head(
        "seed", "model", "before an error: p of the right, %", "likeliest, %", "characters",
        "after one: p of the right, %", "likeliest, %", "characters",
    )  # fmt: skip
    for seed in range(args.seeds):
        home = bench.folder / f"seed-{seed}"
        if not (home / "start" / "student").exists():
            continue
        models = {"teacher": bench.common / "teacher" / "student"}
        models |= {name: home / name / "student" for name in args.rungs}
        told = likelihoods(
            args.task, models, home / "start" / "student", problems, setting.max_response
        )
        for name, by_place in told.items():
            cells = [
                f"{100 * p:.1f} {100 * top:.1f} {n:,}".split() for p, top, n in by_place.values()
            ]
            lines.append(row(str(seed), name, *cells[0], *cells[1]))
    if len(lines) == 2:
        sys.exit(f"--folder {args.folder}: no start of {args.task}: run the ladder first")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
