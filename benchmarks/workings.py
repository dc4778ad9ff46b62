"""What a ladder's students of sums write: right workings, and what goes wrong in the others.

    python benchmarks/workings.py --folder runs/ladder --seeds 5

The ladder judges the final number. Errors of copying may cancel in it (two numbers that exchange a
digit have the same sum), so here the greedy answers to the held-out problems are read step by step.
Needs the folder of a ladder that was run; trains nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ladder_bench import Bench, one_thread
from ladder_page import head, row
from ladder_setting import SETTINGS
from npd.chat import Chat
from npd.generate.sampling import Sampling
from npd.generate.transformers import generate_with
from npd.modeling import decoding, load_model
from npd.types import Ask, Message, Prompt
from tasks import MARK, is_right, read_problems

KINDS = ("right", "operand", "addition", "steps", "form", "final")
_STEP = re.compile(r"(\d+)\+(\d+)=(\d+)")


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


def answers(student: Path, problems: Sequence[dict[str, str]], max_new: int) -> list[str]:
    """Greedy responses, in order."""
    chat, model = Chat.load(str(student)), load_model(student)
    prompts = [Prompt(i, (Message("user", p["prompt"]),)) for i, p in enumerate(problems)]
    asks = [Ask(i, i, prompt) for i, prompt in enumerate(chat.encode_all(prompts))]
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
        written: list[Any] = list(generate_with(model, asks, sampling, with_logprobs=False))
    return [chat.decode(r.response_ids) for r in sorted(written, key=lambda r: r.sample_id)]


def main() -> int:
    """Print a table, a row for each student there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="of a ladder that was run")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    args = parser.parse_args()
    one_thread()
    setting = SETTINGS["sum"]
    bench = Bench(setting, args.folder)
    problems = read_problems(bench.heldout)
    lines = head("seed", "rung", "right number, %", *(f"{kind}, %" for kind in KINDS))
    for seed in range(args.seeds):
        for home in sorted((bench.folder / f"seed-{seed}").glob("*/student")):
            texts = answers(home, problems, setting.max_response)
            lines.append(row(str(seed), home.parent.name, *shares(problems, texts)))
    if len(lines) == 2:
        sys.exit(f"--folder {args.folder}: no student of a ladder on sums: run make ladder first")
    print("\n".join(lines))
    return 0


def shares(problems: Sequence[dict[str, str]], texts: Sequence[str]) -> list[str]:
    """Right final numbers, then each of `KINDS`, in per cent."""
    pairs = list(zip(problems, texts, strict=True))
    final = sum(is_right(text, p["answer"].removeprefix(MARK)) for p, text in pairs)
    kinds = Counter(kind_of(p["prompt"], text) for p, text in pairs)
    return [f"{100 * n / len(pairs):.1f}" for n in (final, *(kinds[kind] for kind in KINDS))]


if __name__ == "__main__":
    sys.exit(main())
