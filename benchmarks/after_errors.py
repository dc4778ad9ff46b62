"""What teacher and student say after a student's own error: does training there teach the right?

    python benchmarks/after_errors.py --folder DIR [--task list] [--set NAME=VALUE ...] [--out FILE]

On-policy text is worth its price where a teacher, shown a prefix with an error in it, still puts
its probability on what follows from what is *written*. Each step of a working has parts that follow
from what stands before them (`39+83=`, then `122`; of a sum's numbers any that is left). Here: how
likely teacher, start and other students find the characters of such parts, before the first error
of a text and after it, in texts that the start samples at temperature 1; and how much of a
student's KL to the teacher is where. Needs the folder of a ladder that was run; trains nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from common import commit, machine, versions
from ladder_bench import Bench, one_thread
from ladder_setting import SETTINGS, with_values
from npd.data.chat_tokenizer import ChatTokenizer
from npd.types import Message, Prompt
from own_text import sample
from tables import head, points, row
from tasks import MARK, OPERATIONS, read_problems

# Of what follows from what is before it: before an error and after one, or inside the part that is
# wrong; and all other tokens.
KINDS = ("before", "after", "inside", "other")
_NUM_TEXTS = 500
_SUM = re.compile(r"(\d+)\+(\d+)=(\d+)")
_FORMS = {
    "sum": _SUM,
    "list": re.compile(r"([srxuk])[=>:](\d{5})"),
    "program": re.compile(r"([abc])=([abc])([+-])([abc])=(\d\d[+-]\d\d)=(\d\d)"),
}
# What is known of values: `list` the last list, a program's variables by name, of a sum `total` and
# the `numbers` not yet added.
Known: TypeAlias = dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Part:
    """A place in a response, and any of what may stand there after all that is written before."""

    start: int
    end: int
    allowed: tuple[str, ...]
    is_after_error: bool


def parts(task: str, prompt: str, response: str) -> Iterator[Part]:
    """The parts that follow from what is before them, up to the first step of another form."""
    body, _, _ = response.partition(MARK)
    start, is_after = 0, False
    known = _given(task, prompt)
    for step in body.split(","):
        found = _FORMS[task].fullmatch(step)
        if found is None:
            return
        for group, allowed in _follows(task, found, known):
            first, end = (start + place for place in found.span(group))
            yield Part(first, end, tuple(allowed), is_after)
            is_after = is_after or found[group] not in allowed
        start += len(step) + 1


def _given(task: str, prompt: str) -> Known:
    """What a prompt says of values."""
    if task == "list":
        return {"list": [prompt.partition(":")[0]]}
    if task == "program":
        return {name: [value] for name, value in re.findall(r"([abc])=(\d\d)", prompt)}
    return {"numbers": prompt.split("+"), "total": []}


def _follows(task: str, step: re.Match[str], known: Known) -> Iterator[tuple[int, list[str]]]:
    """(group of the step, what may stand there) of each part that follows; `known` learns it."""
    if task == "list":
        values = OPERATIONS[step[1]]([int(digit) for digit in known["list"][0]])
        yield 2, ["".join(map(str, values))]
        known["list"] = [step[2]]
    elif task == "program":
        yield 5, [f"{known[step[2]][0]}{step[3]}{known[step[4]][0]}"]
        left, right = int(step[5][:2]), int(step[5][3:])
        result = left + right if step[5][2] == "+" else left - right
        if 0 <= result <= 99:
            yield 6, [f"{result:02}"]
        known[step[1]] = [step[6]]
    else:
        numbers, total = known["numbers"], known["total"]
        for group, allowed in ((1, total or numbers), (2, numbers)):
            if allowed:
                yield group, list(allowed)
            if allowed is numbers and step[group] in numbers:
                numbers.remove(step[group])
        yield 3, [str(int(step[1]) + int(step[2]))]
        known["total"] = [step[3]]


def places(task: str, prompt: str, response: str) -> Iterator[tuple[int, str, str]]:
    """(index, characters that may stand there, one of `KINDS`) of each part's characters.

    Up to its first wrong one a part's characters are `before` or `after` an error of other parts;
    beyond it they are `inside` one, and nothing is right there any more.
    """
    for part in parts(task, prompt, response):
        # One that is too short is wrong at the place behind it, which belongs to what follows.
        for place in range(part.start, min(part.end, part.start + len(part.allowed[0]))):
            offset = place - part.start
            so_far = response[part.start : place]
            may = {text[offset] for text in part.allowed if text[:offset] == so_far}
            kind = "after" if part.is_after_error else "before"
            yield place, "".join(sorted(may)), kind if may else "inside"


@dataclass(slots=True)
class Tally:
    """Sums over characters of one kind: how many, p of the right, is it the likeliest, KL."""

    count: int = 0
    right: float = 0.0
    likeliest: int = 0
    kl: float = 0.0


Tallies: TypeAlias = dict[str, Tally]


def tallies(
    task: str, models: dict[str, Path], writer: Path, problems: Sequence[dict[str, str]], most: int
) -> dict[str, Tallies]:
    """Of each model by `KINDS`, on one text of `writer` to each problem; `models` has a teacher."""
    import torch
    from transformers import AutoModelForCausalLM

    chat = ChatTokenizer.load(str(writer))
    asked = [Prompt(i, (Message("user", row["prompt"]),)) for i, row in enumerate(problems)]
    prompts = [prompt.prompt_ids.tolist() for prompt in chat.encode_all(asked)]
    torch.manual_seed(0)
    log_probs = {}
    with torch.inference_mode():
        ours = AutoModelForCausalLM.from_pretrained(writer).eval()
        ids, mask, begin = sample(ours, prompts, most)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
        for name, path in models.items():
            model = AutoModelForCausalLM.from_pretrained(path).eval()
            log_probs[name] = model(**inputs).logits[:, begin - 1 : -1].float().log_softmax(-1)
    written = [
        chat.decode(answer[is_written.bool()].tolist())
        for answer, is_written in zip(ids[:, begin:], mask[:, begin:], strict=True)
    ]
    found = [
        (i, place, chat.tokenizer.convert_tokens_to_ids(list(characters)), kind)
        for i, (problem, text) in enumerate(zip(problems, written, strict=True))
        for place, characters, kind in places(task, problem["prompt"], text)
        if place < len(text)
    ]
    return {
        name: _tallies(found, mask[:, begin:], log_q, log_probs["teacher"])
        for name, log_q in log_probs.items()
    }


def _tallies(
    found: Sequence[tuple[int, int, list[int], str]], is_written: Any, log_q: Any, log_p: Any
) -> Tallies:
    """`found`: (text, place, ids of the right characters, kind); what is not in it is `other`."""
    by_kind = {kind: Tally() for kind in KINDS}
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) * is_written
    for text, place, right, kind in found:
        tally, seen = by_kind[kind], log_q[text, place]
        tally.count += 1
        tally.right += float(seen[right].exp().sum())
        tally.likeliest += int(seen.argmax()) in right
        tally.kl += float(kl[text, place])
    other = by_kind["other"]
    other.count = int(is_written.sum()) - sum(tally.count for tally in by_kind.values())
    other.kl = float(kl.sum()) - sum(tally.kl for tally in by_kind.values())
    return by_kind


def shares(by_kind: Tallies) -> list[float | None]:
    """What the table says of one model: of right characters, then shares of tokens and of KL."""
    tokens = sum(tally.count for tally in by_kind.values())
    kl = sum(tally.kl for tally in by_kind.values())
    found: list[float | None] = []
    for kind in ("before", "after"):
        tally = by_kind[kind]
        of = tally.count or None
        found += [of and tally.right / of, of and tally.likeliest / of]
    found += [tally.count / tokens for tally in by_kind.values()]
    return found + [tally.kl / kl if kl else None for tally in by_kind.values()]


def made_with() -> list[str]:
    """Lines at the end of a page: the machine and the versions."""
    host, found = machine(), versions()
    return [
        f"- machine: {host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB; one thread",
        f"- versions: {', '.join(f'{name} {version}' for name, version in found.items())}",
    ]


def page(found: Mapping[str, Mapping[int, Sequence[float | None]]], about: Sequence[str]) -> str:
    """The Markdown page of each model's `shares` by seed: means over seeds, then all of them."""
    columns = (
        "before an error: p of the right, %", "likeliest, %", "after one: p of the right, %",
        "likeliest, %",
        *(f"{what}: {kind}, %" for what in ("tokens", "KL to the teacher") for kind in KINDS),
    )  # fmt: skip
    means, each = head("model", "seeds", *columns), head("model", "seed", *columns)
    for name, by_seed in found.items():
        values = [
            points([value for value in column if value is not None])
            if any(value is not None for value in column)
            else ""
            for column in zip(*by_seed.values(), strict=True)
        ]
        means.append(row(name, str(len(by_seed)), *values))
        for seed, numbers in by_seed.items():
            cells = ("" if value is None else f"{100 * value:.1f}" for value in numbers)
            each.append(row(name, str(seed), *cells))
    lines = [
        "# After a student's own errors", "",
        "Made by `benchmarks/after_errors.py`; do not edit. What each column is, is said there. "
        f"Of one text of the start to each of {_NUM_TEXTS} held-out problems, at temperature 1. "
        "±: 95 % t-interval over seeds.", "",
        *means, "", *each, "", *about,
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the page, and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="of a ladder that was run")
    parser.add_argument("--task", choices=sorted(_FORMS), default="sum")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="of a Setting")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--rungs", nargs="+", default=["start"], help="students beside the teacher")
    parser.add_argument("--out", type=Path, help="file for the page")
    args = parser.parse_args()
    one_thread()
    setting = with_values(SETTINGS[args.task], args.set)
    bench = Bench(setting, args.folder)
    problems = read_problems(bench.heldout)[:_NUM_TEXTS]
    found: dict[str, dict[int, list[float | None]]] = {}
    for seed in range(args.seeds):
        home = bench.folder / f"seed-{seed}"
        named = {name: home / name / "student" for name in dict.fromkeys(["start", *args.rungs])}
        models = {name: path for name, path in named.items() if path.exists()}
        if "start" not in models:
            continue
        models = {"teacher": bench.common / "teacher" / "student", **models}
        told = tallies(args.task, models, models["start"], problems, setting.max_response)
        for name, by_kind in told.items():
            found.setdefault(name, {})[seed] = shares(by_kind)
    if not found:
        sys.exit(f"--folder {args.folder}: no start of {args.task}: run the ladder first")
    changed = f" --set {' '.join(args.set)}" * bool(args.set)
    rungs = " ".join(name for name in found if name != "teacher")
    text = page(
        found,
        [
            "- command, after the ladder's: `python benchmarks/after_errors.py --folder DIR "
            f"--task {args.task} --seeds {args.seeds} --rungs {rungs}{changed}`",
            f"- commit: {commit()}",
            *made_with(),
        ],
    )
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
