"""From a distilled student to reinforcement learning: TRL's GRPO, with answers that can be checked.

    python examples/grpo.py runs/npd problems.jsonl rl-student          # needs: pip install trl
    python examples/grpo.py my-student problems.jsonl rl-student --steps 300 --lr 1e-6

RUN is a finished run of npd, what `npd export` wrote, or any model directory. Each line of
PROBLEMS has a `prompt` (text or messages) and an `answer`. A response earns 1 if its last answer,
on the line after `####` or in `\\boxed{}`, equals that one, else 0. Equal is the same text
(ignoring a full stop, dollar signs and the commas in 1,080) or, with math-verify installed, the
same mathematics. An `answer` may be a whole solution that ends in that form (GSM8K's).

Prompts have the same form as in npd: a text becomes a user's message if there is a chat template.
Pass the run's `data.system` as `--system`. Everything else is TRL's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MARK = "####"
_MESSAGE = ("role", "content")
_BOX = re.compile(r"\\boxed\s*\{")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")


def last_answer(text: str) -> str | None:
    """The line that follows the last mark, or what the last box holds, whichever comes later.

    >>> last_answer("7+5=12 #### 12"), last_answer("so \\\\boxed{x^{2}}."), last_answer("12")
    ('12', 'x^{2}', None)
    """
    mark, boxes = text.rfind(MARK), [found.end() for found in _BOX.finditer(text)]
    if not boxes or mark > boxes[-1]:
        return text[mark + len(MARK) :].strip().partition("\n")[0].strip() if mark >= 0 else None
    depth = 1
    for place in range(boxes[-1], len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[boxes[-1] : place].strip()
    return None  # cut off inside of the box


def plain(answer: str) -> str:
    """An answer without the full stop after it, dollar signs around it and commas of thousands.

    >>> plain("$1,080."), plain("(1,080)"), plain("2.50")
    ('1080', '(1,080)', '2.50')
    """
    bare = answer.strip().rstrip(".").removeprefix("\\$").strip("$ ")
    return bare.replace(",", "") if _THOUSANDS.fullmatch(bare) else bare


def is_same(given: str, wanted: str) -> bool:
    """Whether two answers are the same text, or the same mathematics if math-verify can tell."""
    given, wanted = plain(given), plain(wanted)
    if not given or given == wanted:
        return bool(given)
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    return bool(verify(parse(f"${wanted}$"), parse(f"${given}$")))


def reward(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for each completion (a text, or its messages) that ends in its answer, else 0."""
    texts = [done if isinstance(done, str) else done[-1]["content"] for done in completions]
    found = []
    for text, right in zip(texts, answer, strict=True):
        given, wanted = last_answer(text), last_answer(right)
        is_right = given is not None and is_same(given, right.strip() if wanted is None else wanted)
        found.append(float(is_right))
    return found


def find_student(run: Path) -> Path:
    """The model directory in a finished run, or `run` itself if it is one."""
    for folder in (run / "student", run):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors*")):
            return folder
    sys.exit(f"no student in {run}: finish the run first (--resume), or give a model directory")


def read_problems(path: Path) -> list[dict[str, Any]]:
    """The prompts and answers of a JSONL file."""
    if not path.is_file():
        sys.exit(f"no such file: {path}")
    rows = []
    with path.open("rb") as lines:  # whose lines end at a newline and nowhere else
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_problem(line, f"{path}, line {number}"))
    return rows or sys.exit(f"{path} is empty")


def _problem(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        sys.exit(f"{place}: not UTF-8 ({error})")
    except ValueError as error:
        sys.exit(f"{place}: not JSON ({error})")
    for column in ("prompt", "answer"):
        if not isinstance(row, dict) or row.get(column) in (None, "", []):
            sys.exit(f"{place}: has no {column!r}; each line needs both columns")
    if not is_prompt(row["prompt"]):
        sys.exit(f"{place}: 'prompt' is neither text nor a list of messages (role and content)")
    return {"prompt": row["prompt"], "answer": str(row["answer"])}


def is_prompt(value: Any) -> bool:
    """Whether it is a text, or messages that each have a role and a content."""
    if not isinstance(value, list):
        return isinstance(value, str)
    return all(
        isinstance(message, dict) and all(isinstance(message.get(k), str) for k in _MESSAGE)
        for message in value
    )


def conversation(prompt: Any, system: str | None) -> list[dict[str, str]]:
    """A prompt as messages, as npd makes them of it."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def make_trainer(
    student: Path,
    problems: Sequence[dict[str, Any]],
    out: Path,
    *,
    system: str | None = None,
    rewards: Callable[..., list[float]] = reward,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> Any:
    """TRL's trainer, ready to `train()`. `options` are of its GRPOConfig."""
    try:
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        sys.exit(f"this needs TRL ({error}): pip install 'trl>=1.16'")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student, padding_side="left")
    # A small learning rate is lost on weights in bfloat16.
    model = AutoModelForCausalLM.from_pretrained(student, dtype="float32")
    if tokenizer.chat_template:
        problems = [row | {"prompt": conversation(row["prompt"], system)} for row in problems]
    has_gpu = torch.cuda.is_available()
    # TRL's defaults are a GPU's: without one, no bfloat16, nothing recomputed, nothing pinned.
    defaults = {
        "use_cpu": not has_gpu, "bf16": has_gpu, "gradient_checkpointing": has_gpu,
        "dataloader_pin_memory": has_gpu, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none",
    }  # fmt: skip
    return GRPOTrainer(
        model,
        rewards,
        GRPOConfig(output_dir=str(out), **defaults | options),
        train_dataset=Dataset.from_list(list(problems)),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def main() -> None:
    """Train a student by GRPO and write it to a directory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("problems", type=Path, metavar="PROBLEMS")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write, must be new")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=32, help="of a step")
    parser.add_argument("--samples", type=int, default=8, help="responses to each prompt")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a response")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--system", help="system message, as data.system was")
    args = parser.parse_args()
    problems, student = read_problems(args.problems), find_student(args.run)
    if len(problems) < args.prompts:
        sys.exit(
            f"{args.problems} has {len(problems)} problems: a step takes --prompts {args.prompts}"
        )
    if args.out.exists() and not args.out.is_dir():
        sys.exit(f"{args.out} is not a directory: name a new one")
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"{args.out} is not empty: name a new directory")
    trainer = make_trainer(
        student,
        problems,
        args.out,
        system=args.system,
        max_steps=args.steps,
        learning_rate=args.lr,
        num_generations=args.samples,
        max_completion_length=args.max_tokens,
        # Written together, trained on one prompt's at a time.
        per_device_train_batch_size=args.samples,
        gradient_accumulation_steps=args.prompts,
    )
    trainer.train()
    trainer.save_model(str(args.out))
    found = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    few = max(1, len(found) // 10)
    first, last = sum(found[:few]) / few, sum(found[-few:]) / few
    print(f"reward {first:.3f} in the first tenth of steps, {last:.3f} in the last: {args.out}")


if __name__ == "__main__":
    main()
