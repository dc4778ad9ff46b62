"""The paper's ladder in miniature: real training of a teacher and a smaller student, many seeds.

    make ladder                           # 5 seeds, to benchmarks/results/ladder
    python benchmarks/ladder.py --quick   # one task, 2 seeds; exits with 1 off the order
    python benchmarks/ladder.py --seeds 2 --rungs filters sweeps --folder DIR

Each seed draws its prompts, fine-tunes a student of its own on them until that brings nothing more
(the start), and goes on from there by every rung: same start, same prompts, as many epochs
(`--set is_new=true`: other prompts than the start's, the same for every rung). Rungs
are presets of npd with a few values set, run by `npd.run`; the run.yaml of each is kept. Teacher
and held-out problems are the same for all seeds. What is finished stays in `--folder`, is not run
again, and is on the page too.

Promises: one thread, stages in turn, so that a run repeats itself on the same machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import npd
from common import commit, machine, versions
from ladder_figure import draw
from ladder_page import Cell, check, page
from npd.chat import Chat
from npd.filters import delta_ifd
from npd.settings import load_config, nested
from npd.store.layout import RunLayout
from npd.store.shards import read_rollouts
from npd.types import Outcome
from own_text import own_text
from rungs import GROUPS, rungs
from tasks import MARK, TASKS, is_right, make_tokenizer, problems, read_problems, write_problems


@dataclass(frozen=True)
class Shape:
    """A Llama: layers, width, and heads of 16 numbers each or more."""

    layers: int
    width: int
    heads: int = 4


@dataclass(frozen=True)
class Setting:
    """What is trained on what. `levels`: least and most steps of a problem's working. `is_new`: the
    rungs train on prompts drawn anew (a few may be the start's), as many as it has. `slips`: share
    of steps in the teacher's own texts that go wrong and are mended (task `mend`). `start_prompts`:
    how many prompts the start is trained on, the rungs' first among them; None: the rungs' alone.
    """

    task: str
    levels: tuple[int, int]
    is_varied: bool
    num_prompts: int
    num_heldout: int
    teacher: Shape
    teacher_problems: int
    teacher_epochs: int
    student: Shape
    warm_epochs: int
    epochs: int
    lr: float
    warm_lr: float = 3e-3
    teacher_lr: float = 2e-3
    batch: int = 64
    max_response: int = 64
    is_new: bool = False
    slips: float = 0.0
    start_prompts: int | None = None


# 1,536 prompts are few enough that fine-tuning on them ends far below the teacher, and enough that
# every seed's student learns to add at all (with 1,024 some do not, and then no rung helps).
SUM = Setting(
    task="sum", levels=(3, 4), is_varied=True, num_prompts=1536, num_heldout=1000,
    teacher=Shape(3, 128), teacher_problems=48_000, teacher_epochs=2, student=Shape(2, 64),
    warm_epochs=40, epochs=8, lr=1e-3,
)  # fmt: skip
# Of the others nobody has looked for such sizes yet.
SETTINGS = {
    "sum": SUM,
    "mend": replace(SUM, task="mend", slips=0.05, num_prompts=2048, warm_epochs=30),
    "list": replace(SUM, task="list", levels=(2, 4)),
    "program": replace(SUM, task="program", levels=(2, 4)),
}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", choices=sorted(TASKS), default="sum")
    parser.add_argument("--seeds", type=int, help="how many; default 5, with --quick 2")
    parser.add_argument(
        "--rungs", nargs="+", metavar="NAME", help=f"names, or groups: {', '.join(GROUPS)}"
    )
    parser.add_argument("--quick", action="store_true", help="short, and the order is checked")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="of a Setting")
    parser.add_argument("--out", type=Path, help="folder for ladder.json and ladder.md")
    parser.add_argument("--folder", type=Path, help="where to run; default: a temporary one")
    args = parser.parse_args()
    args.seeds = args.seeds or (2 if args.quick else 5)
    named = args.rungs or ["quick" if args.quick else "ladder"]
    args.rungs = [rung for name in named for rung in GROUPS.get(name, (name,))]
    return args


def main() -> int:
    """Run what is missing, write the page; 1 when a quick ladder is off the order."""
    args = parse_args()
    one_thread()
    short = {"teacher_problems": _QUICK_TEACHER} if args.quick else {}
    setting = with_values(replace(SETTINGS[args.task], **short), args.set)
    unknown = set(args.rungs) - set(rungs(setting.epochs, setting.batch))
    if unknown:
        sys.exit(f"no such rung: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="npd-ladder-") as directory:
        bench = Bench(setting, args.folder or Path(directory))
        for seed in range(args.seeds):
            bench.seed(seed, args.rungs)
        teacher, cells = bench.teacher_cell(), bench.finished()
    judged = [cell for cell in cells if cell["seed"] < args.seeds]
    problems_found = check(judged) if args.quick else []
    about = {
        "command": _command(args, cells),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }
    labels = {name: rung.label for name, rung in rungs(setting.epochs, setting.batch).items()}
    text = page(asdict(setting), teacher, cells, labels, about, problems_found)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        record = {"setting": asdict(setting), "teacher": teacher, "cells": cells, **about}
        (args.out / "ladder.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.out / "ladder.md").write_text(text)
        draw(args.out / "ladder.svg", cells, labels)
    return 1 if problems_found else 0


def _command(args: argparse.Namespace, cells: Sequence[Cell]) -> str:
    """What makes all of these cells, and those that some seeds lack."""
    present = [name for name in dict.fromkeys(cell["rung"] for cell in cells) if name != "start"]
    seeds = 1 + max(cell["seed"] for cell in cells)
    changed = f" --set {' '.join(args.set)}" * bool(args.set)
    what = f"--task {args.task} --seeds {seeds} --rungs {' '.join(present)}"
    return f"python benchmarks/ladder.py {what}{changed}"


def one_thread() -> None:
    """Torch on one thread, and no bars of progress."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


def with_values(setting: Any, items: Sequence[str]) -> Any:
    """A frozen record with some fields set, each as `name=value` (JSON; a Shape as its numbers).

    Exits with one line where a name is none of the record's, or a value not of the field's kind.
    """
    kinds, values = {field.name: str(field.type) for field in fields(setting)}, {}
    for item in items:
        name, _, value = item.partition("=")
        if name not in kinds:
            sys.exit(f"{item}: no such name; there are {', '.join(kinds)}")
        try:
            values[name] = _value(kinds[name], json.loads(value))
        except (TypeError, ValueError):
            sys.exit(f"{item}: not a value for {name}, which is {_KINDS[kinds[name]]}")
    return replace(setting, **values)


_KINDS = {
    "str": "a text in double quotes",
    "bool": "true or false",
    "int": "a whole number above 0",
    "int | None": "a whole number above 0, or null",
    "float": "a number, 0 or more",
    "tuple[int, int]": "two whole numbers above 0, as [3,4]",
    "Shape": "layers, width and perhaps heads, as [3,128,4]",
}


def _value(kind: str, found: Any) -> Any:
    """What was read from JSON as a value of that kind; ValueError or TypeError if it is none."""
    if kind in ("Shape", "tuple[int, int]"):
        numbers = tuple(_value("int", number) for number in found)
        if kind == "Shape":
            return Shape(*numbers)
        is_one = len(numbers) == 2
        found = numbers
    elif kind in ("str", "bool"):
        is_one = type(found).__name__ == kind
    elif kind == "float":
        is_one = type(found) in (int, float) and found >= 0
    else:
        is_one = (type(found) is int and found > 0) or (kind == "int | None" and found is None)
    if not is_one:
        raise ValueError(found)
    return found


# A third fewer of the teacher's problems, so that all of a short ladder takes under ten minutes.
_QUICK_TEACHER = 32_000
# Seeds of new prompts: apart from those of the students and the teacher.
NEW = 1_000_000


# Held-out problems that a student answers by sampling.
_OWN_TEXTS = 500
# Where Δ-IFD's distribution is read off.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Bench:
    """The files and runs of one setting, each made once."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self._commit = setting, commit()
        self._rungs = rungs(setting.epochs, setting.batch)
        shared = {
            name: value
            for name, value in asdict(setting).items()
            if name.startswith("teacher")
            or name in ("task", "levels", "is_varied", "num_heldout", "slips")
        }
        self.common = folder / f"{setting.task}-teacher-{digest(shared)}"
        self.folder = folder / f"{setting.task}-{digest(asdict(setting))}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.common.mkdir(parents=True, exist_ok=True)
        self.heldout = self._problems(
            self.common / "heldout.jsonl", "heldout", 0, setting.num_heldout
        )

    def teacher_cell(self) -> Cell:
        """The teacher, trained on problems that no student's seed draws in this order."""
        setting = self.setting
        prompts = self._problems(
            self.common / "train.jsonl", "train", -1, setting.teacher_problems, setting.slips
        )
        epochs = setting.teacher_epochs
        values = {
            "student": self._model(self.common / "init", setting.teacher, 1234),
            "data.train": prompts,
            "train.lr": setting.teacher_lr,
            "train.min_lr": setting.teacher_lr / 20,
            "train.warmup": 0.05,
            "schedule.epochs": epochs,
            "schedule.reuse": epochs,
        }
        return self._cell(self.common / "teacher", "teacher", -1, "sft", values)

    def seed(self, seed: int, names: list[str]) -> list[Cell]:
        """The start of a seed and its rungs."""
        self.teacher_cell()
        home = self.folder / f"seed-{seed}"
        home.mkdir(exist_ok=True)
        cells = [self._start(home, seed)]
        draw = NEW + seed if self.setting.is_new else seed
        prompts = self._problems(home / "train.jsonl", "train", draw, self.setting.num_prompts)
        for name in names:
            rung = self._rungs[name]
            values = {
                "student": home / "start" / "student",
                "teacher": self.common / "teacher" / "student",
                "data.train": prompts,
                "train.lr": self.setting.lr,
                "train.min_lr": self.setting.lr / 10,
                "train.warmup": 0.05,
                **rung.values,
            }
            cells.append(self._cell(home / name, name, seed, rung.preset, values))
        return cells

    def finished(self) -> list[Cell]:
        """Every run that there is of this setting, seed by seed in the order of the table."""
        homes = sorted(self.folder.glob("seed-*"), key=lambda home: int(home.name[5:]))
        files = [home / name / "cell.json" for name in ("start", *self._rungs) for home in homes]
        return [json.loads(file.read_text()) for file in files if file.exists()]

    def _start(self, home: Path, seed: int) -> Cell:
        setting = self.setting
        values = {
            "student": self._model(home / "init", setting.student, seed),
            "teacher": self.common / "teacher" / "student",
            "data.train": self._problems(
                home / "start.jsonl", "train", seed, setting.start_prompts or setting.num_prompts
            ),
            "train.lr": setting.warm_lr,
            "train.min_lr": setting.warm_lr / 10,
            "train.warmup": 0.1,
            "schedule.epochs": setting.warm_epochs,
            "schedule.reuse": setting.warm_epochs,
        }
        return self._cell(home / "start", "start", seed, "sft", values)

    def _cell(
        self, home: Path, name: str, seed: int, preset: str, values: Mapping[str, Any]
    ) -> Cell:
        """What a run measured; run now unless it has been."""
        done = home / "cell.json"
        if not done.exists():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            started = time.process_time()
            config = load_config(self._write_config(home, seed, preset, values)).config
            result = npd.run(config)
            cell = measured(result, name, seed, self.heldout)
            cell["right"] = right_shares(result, config)
            cell |= {"cpu_seconds": time.process_time() - started, "commit": self._commit}
            _tidy(home)
            cell |= own_text(
                home / "student",
                self.common / "teacher" / "student",
                read_problems(self.heldout)[:_OWN_TEXTS],
                self.setting.max_response,
            )
            done.write_text(json.dumps(cell, indent=1) + "\n")
            print(_line(cell), file=sys.stderr, flush=True)
        return json.loads(done.read_text())

    def _write_config(self, home: Path, seed: int, preset: str, values: Mapping[str, Any]) -> Path:
        """The run.yaml of a run, which `npd run` takes too."""
        batch, longest = self.setting.batch, self.setting.max_response
        common = {
            "preset": preset,
            "run_dir": home / "run",
            "seed": max(seed, 0),
            "data.heldout": self.heldout,
            "data.max_prompt_tokens": 64,
            "generate.max_new_tokens": longest,
            "generate.batch_size": 256,
            "generate.shard_size": batch if preset == "on_policy" else 256,
            "generate.dtype": "float32",
            "score.row_tokens": 8192,
            "score.head_chunk": 4096,
            "score.dtype": "float32",
            "loss.chunk": 4096,
            "train.batch_size": batch,
            "train.row_tokens": 8192,
            "train.dtype": "float32",
            "schedule.segment_steps": 16,
            "eval.source": "completion",
            "eval.max_new_tokens": longest,
            "eval.batch_size": 256,
            "eval.num_samples": self.setting.num_heldout,
            "checkpoint.every_steps": None,
            "observe.report": False,
            "observe.trace": False,
            "runtime.kind": "inline",
            "runtime.device": "cpu",
            "runtime.threads": 1,
        }
        if preset == "on_policy":
            common["schedule.segment_steps"] = 1
        path = home / "run.yaml"
        path.write_text(json.dumps(nested({**common, **values}), indent=1, default=str) + "\n")
        return path

    def _model(self, path: Path, shape: Shape, seed: int) -> Path:
        """A random model of that shape with the tasks' tokenizer."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = make_tokenizer()
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    def _problems(self, path: Path, split: Any, seed: int, count: int, slips: float = 0.0) -> Path:
        setting = self.setting
        found = problems(
            setting.task, split, seed, setting.levels, is_varied=setting.is_varied, slips=slips
        )
        return write_problems(path, found, count)


def measured(result: npd.RunResult, name: str, seed: int, heldout: Path) -> dict[str, Any]:
    """The figures of a finished run; means over all its steps, or over its last tenth."""
    assert result.is_done, "interrupted: start the ladder again, it goes on"
    data = result.data
    first, last, steps = data.evals[0], data.evals[-1], data.steps
    answers = {row["prompt"]: row["answer"].removeprefix(MARK) for row in read_problems(heldout)}
    tail = steps[-max(1, len(steps) // 10) :]
    drifts = [step["drift"] for step in steps if step["drift"] is not None]
    deltas = sorted(delta for s in data.samples if (delta := delta_ifd(s.stats)) == delta)
    rejected = {why: n for (what, why), n in data.reasons.items() if what is Outcome.REJECTED}
    return {
        "rung": name,
        "seed": seed,
        "start_accuracy": _accuracy(first["samples"], answers),
        "accuracy": _accuracy(last["samples"], answers),
        "start_kl": first["kl"],
        "kl": last["kl"],
        "agreement": last["agreement"],
        "steps": len(steps),
        "response_tokens": sum(step["response_tokens"] for step in steps),
        "total_tokens": sum(step["total_tokens"] for step in steps),
        "asked": data.conservation["asked"],
        "rejected": rejected,
        "drift": sum(drifts) / len(drifts) if drifts else None,
        "drift_end": _mean(tail, "drift"),
        "entropy": _mean(tail, "entropy"),
        "ce": _mean(tail, "ce"),
        "kd": _mean(tail, "kd"),
        "delta_quantiles": [deltas[int(q * (len(deltas) - 1))] for q in QUANTILES if deltas],
        "stage_seconds": {stage: rate.busy_seconds for stage, rate in data.throughput.items()},
    }


def right_shares(result: npd.RunResult, config: npd.RunConfig) -> dict[str, float]:
    """Share of right answers among the samples that were kept, and among those left out, by reason.

    What a filter should keep need not be right; but one that leaves out what is shows itself here.
    """
    chat, layout = Chat.load(config.student), RunLayout(result.directory)
    answers = [row["answer"].removeprefix(MARK) for row in read_problems(Path(config.data.train))]
    why = {
        sample.stats.sample_id: sample.reason if sample.outcome is Outcome.REJECTED else "kept"
        for sample in result.data.samples
    }
    found: dict[str, list[bool]] = {}
    for path in sorted(layout.root.glob("rollouts/*.arrow")):
        for rollout in read_rollouts(path):
            if rollout.sample_id not in why:  # of very many, a run gives account of every k-th
                continue
            is_so = is_right(chat.decode(rollout.response_ids), answers[rollout.prompt_index])
            found.setdefault(why[rollout.sample_id], []).append(is_so)
    return {reason: sum(values) / len(values) for reason, values in sorted(found.items())}


def _line(cell: Cell) -> str:
    """A run in one line, for whoever watches."""
    kl = f"KL {cell['kl']:.4f}" if cell["kl"] is not None else ""
    accuracy = f"{cell['start_accuracy']:.3f} -> {cell['accuracy']:.3f}"
    return f"seed {cell['seed']} {cell['rung']:12} {accuracy} {kl} {cell['cpu_seconds']:.0f} s"


def _accuracy(samples: Sequence[tuple[str, str]], answers: Mapping[str, str]) -> float:
    """Share of (prompt, greedy response) that end in the right answer."""
    assert len(samples) == len(answers)
    return sum(is_right(response, answers[prompt]) for prompt, response in samples) / len(answers)


def _mean(steps: Any, name: str) -> float | None:
    values = [step[name] for step in steps if step[name] is not None]
    return sum(values) / len(values) if values else None


def _tidy(home: Path) -> None:
    """Keep the student, the metrics and the config of a run, not its shards and checkpoints."""
    layout = RunLayout(home / "run")
    shutil.move(layout.student, home / "student")
    shutil.move(layout.metrics_jsonl, home / "metrics.jsonl")
    shutil.rmtree(layout.root)


def digest(values: Mapping[str, Any]) -> str:
    """What tells apart the folders of settings."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


if __name__ == "__main__":
    sys.exit(main())
