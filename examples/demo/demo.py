"""The demo: SmolLM2-135M teaches a copy of itself that lost half of its layers.

Run by `make demo`. Imports the teacher from its PyPI wheel, prunes it to a student, fine-tunes the
student on teacher text (`warm.yaml`), distils it on its own text (`npd.yaml`), and prints the gain
on questions never trained on. With `--control` a second copy of the warm student gets as many
steps of more teacher text instead (`control.yaml`). Each start keeps the two models and repeats
everything else. `--help` prints this and does nothing.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

from prepare import import_gguf, prune_depth, smollm2_gguf

import npd
from npd.__main__ import outcome
from npd.config.load import load_config
from npd.data.chat_tokenizer import ChatTokenizer
from npd.evaluate import exact_match, is_match
from npd.store.layout import RunLayout
from npd.store.shards import read_scored
from npd.text import counted

HERE = Path(__file__).parent
MODELS, RUNS = Path("models"), Path("runs/demo")
FLAGS = ("--debug", "--control")
# Half of the 30 layers, found by leaving out, one at a time, the layer whose absence moves the
# model's outputs least (KL 2.7 to the full model; 13 layers spread evenly have 10).
LAYERS = (0, 1, 2, 8, 9, 10, 11, 12, 21, 22, 23, 24, 27, 28, 29)


def main() -> None:
    """Make the models, run the stages, print what came of them."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    started = time.monotonic()
    shutil.rmtree(RUNS, ignore_errors=True)
    say("1/3 models: SmolLM2-135M is the teacher, half of its layers are the student")
    teacher, pruned = prepare_models()
    say("2/3 warm start: the student learns from answers that the teacher wrote")
    warm = stage("warm", pruned, teacher)
    say("3/3 near-policy distillation: the student answers, the teacher corrects it word by word")
    near = stage("npd", warm.student, teacher)
    columns = {
        "teacher": {"exact_match": exact_match_of_teacher(near, teacher)},
        "warm start": near.data.evals[0],
        "NPD": near.data.evals[-1],
    }
    if "--control" in sys.argv:
        say("control: as many steps on more answers of the teacher, from the same warm start")
        columns["more SFT"] = stage("control", warm.student, teacher).data.evals[-1]
    print("\n" + "\n".join([*table(columns), "", *story(near, time.monotonic() - started)]))


def prepare_models() -> tuple[Path, Path]:
    """Teacher and pruned student as Hugging Face directories, made once."""
    teacher, pruned = MODELS / "smollm2-135m", MODELS / "smollm2-pruned"
    if not teacher.exists():
        import_gguf(smollm2_gguf(), teacher)
    if not pruned.exists():
        prune_depth(teacher, pruned, LAYERS)
    return teacher, pruned


def stage(name: str, student: Path, teacher: Path) -> npd.RunResult:
    """One run of the demo, configured by the YAML file of that name."""
    values = {
        "student": student,
        "teacher": teacher,
        "data.train": HERE / "prompts.jsonl",
        "run_dir": RUNS / name,
    }
    if name != "warm":  # which is not evaluated: the next stage does that first
        values["data.heldout"] = HERE / "heldout.jsonl"
    overrides = [f"{key}={value}" for key, value in values.items()]
    overrides += (argument for argument in sys.argv[1:] if argument not in FLAGS)
    result = npd.run(load_config(HERE / f"{name}.yaml", overrides))
    if not result.is_done:
        say(f"interrupted: the next `make demo` starts {RUNS} anew")
        raise KeyboardInterrupt
    return result


def heldout() -> list[dict[str, str]]:
    """The questions that are never trained on, with their answers."""
    return [json.loads(line) for line in (HERE / "heldout.jsonl").read_text().splitlines()]


def exact_match_of_teacher(result: npd.RunResult, teacher: Path) -> float:
    """Share of the held-out questions that the teacher itself answers right."""
    chat = ChatTokenizer.load(teacher)
    written = read_scored(RunLayout(result.directory).heldout)
    texts = [chat.decode(scored.rollout.response_ids) for scored in written]
    answers = [row["answer"] for row in heldout()]
    return exact_match(list(zip(texts, answers, strict=True)))


def table(columns: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each measure, a column for each model."""
    yield " " * 34 + "".join(f"{name:>14}" for name in columns)
    for label, name, form in (
        ("answers with the right word", "exact_match", share),
        ("same next token as the teacher", "agreement", "{:.1%}".format),
        ("KL to the teacher, nats a token", "kl", "{:.3f}".format),
    ):
        cells = (form(found[name]) if name in found else "" for found in columns.values())
        yield f"{label:34}" + "".join(f"{cell:>14}" for cell in cells)


def story(near: npd.RunResult, seconds: float) -> Iterator[str]:
    """What was measured, what NPD brought, how near it stayed, and where everything lies."""
    before, after = (near.data.evals[i]["exact_match"] for i in (0, -1))
    spread = sqrt(error(before) ** 2 + error(after) ** 2)
    yield f"{len(heldout())} questions, none of them trained on; ± is one standard error."
    yield (
        f"NPD changed the share of right answers by {100 * (after - before):+.0f} points "
        f"(± {100 * spread:.0f}) in {len(near.data.steps)} steps on the student's own answers."
    )
    if drifts := drift_at_refreshes(near):
        yield (
            f"At each refresh the student was {min(drifts):.2f} to {max(drifts):.2f} nats a token "
            "from the snapshot that wrote its text (near-policy: below 0.10)."
        )
    yield from examples(near)
    yield ""
    yield f"time      {seconds / 60:.1f} min on {counted(num_cores(), 'core')}"
    yield f"student   {near.student}   (from_pretrained loads it)"
    yield f"report    {near.report}   (open it in a browser)"
    yield f"next      {sys.executable} {sys.argv[0]} --control   (NPD against more fine-tuning)"
    yield "          npd run run.yaml   (your models and prompts: docs/usage.md)"


def examples(near: npd.RunResult) -> Iterator[str]:
    """The first held-out question that NPD turned, or else the first one, with both answers."""
    found = list(zip(heldout(), near.data.heldout_texts, strict=False))
    turned = [
        (row, text)
        for row, text in found
        if is_match(text.response, row["answer"]) and not is_match(text.before or "", row["answer"])
    ]
    for row, text in (turned or found)[:1]:
        yield ""
        yield f"{'turned' if turned else 'e.g.':10}{row['prompt']}"
        yield f"          warm start: {text.before}"
        yield f"          NPD:        {text.response}"


def drift_at_refreshes(near: npd.RunResult) -> list[float]:
    """KL(student || snapshot) of the last step before each refresh, in nats per token."""
    refreshed = {step for _, step in near.data.snapshots}
    steps = (step for step in near.data.steps if step["step"] in refreshed)
    return [step["drift"] for step in steps if step["drift"] is not None]


def share(value: float) -> str:
    """A share of the held-out questions with its standard error: `62% ± 4`."""
    return f"{value:.0%} ± {100 * error(value):.0f}"


def error(value: float) -> float:
    """The standard error of a share of the held-out questions."""
    return sqrt(value * (1 - value) / len(heldout()))


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(text: str) -> None:
    """A line of the demo itself."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(outcome(main, debug="--debug" in sys.argv))
