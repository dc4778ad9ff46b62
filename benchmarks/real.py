"""The ladder on the real pair: SmolLM2-135M teaches its own pruned half, a few minutes a rung.

    make real DATA=gsm8k_train.jsonl
    python benchmarks/real.py --data FILE [--seeds N] [--rungs NAME ...] [--folder DIR] [--out DIR]

All rungs go on from one student (`pair.py`), each seed with prompts of its own that the start has
not seen. Rungs up to NPD write a response to each prompt twice, at the first and at half of the
epochs, and train on each as often, so that they differ in who writes, the loss, the filter and the
refresh only. Then NPD with another loss (`tail`, λ = 1), and with `loss.skip_after`; the last two
write anew in each epoch, and before each step. What is finished stays in `--folder` and is not run
again.

Measured afterwards, on prompts that nobody trained on: held-out KL and agreement (npd's, on the
teacher's greedy responses), ROUGE-L of the student's greedy responses against those, and the KL on
text that the student writes itself at temperature 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import judging
import npd
import pair
import pair_out
from ladder_bench import one_thread
from ladder_page import by_rung
from ladder_setting import digest
from npd.__main__ import outcome
from npd.errors import InputError
from npd.types import Outcome
from real_page import page


@dataclass(frozen=True)
class Setting:
    """Sizes of every rung."""

    num_prompts: int = 48
    epochs: int = 4
    batch: int = 8
    lr: float = 5e-5


@dataclass(frozen=True)
class Rung:
    """A preset and what is set on top of it."""

    label: str
    preset: str
    values: Mapping[str, Any]


def rungs(epochs: int, batch: int) -> dict[str, Rung]:
    """The ladder, by name; up to NPD each response is trained on in half of the epochs."""
    half = epochs // 2
    twice = {"schedule.epochs": epochs, "schedule.reuse": half, "schedule.refresh": "never"}
    fresh = twice | {"schedule.refresh": {"at_epochs": [half]}}
    plain = {"filter.name": "none"}
    once = {"schedule.epochs": epochs, "schedule.reuse": 1}
    often = once | {"schedule.refresh": {"at_epochs": list(range(1, epochs))}}
    tail, alone = {"loss.target": "tail"}, {"loss.kd_weight": 1.0}
    skip = {"loss.skip_after": 0.01}
    strict = once | {"schedule.window": batch, "generate.shard_size": batch}
    return {
        "sft": Rung("SFT on teacher text", "seqkd", twice),
        "offline": Rung(
            "offline top-k KD", "offline_kd", twice | {"generate.source": "teacher"}
        ),
        "rollouts": Rung("+ packed student rollouts", "npd", twice | plain),
        "filter": Rung("+ Δ-IFD", "npd", twice),
        "npd": Rung("+ one refresh (NPD)", "npd", fresh),
        "tail": Rung("NPD, target: tail", "npd", fresh | tail),
        "tail-lambda=1": Rung("NPD, target: tail, λ = 1", "npd", fresh | tail | alone),
        "npd-skip": Rung("NPD, skipping after unlikely tokens", "npd", fresh | skip),
        "every_epoch": Rung("refresh every epoch", "npd", often),
        "on_policy": Rung("strict on-policy (λ = 1, no filter)", "on_policy", strict),
    }  # fmt: skip


def parse_args() -> argparse.Namespace:
    """The command line."""
    names = list(rungs(4, 1))
    parser = pair_out.make_parser(__doc__)
    parser.add_argument("--rungs", nargs="+", choices=names, default=names)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="of a Setting")
    return parser.parse_args()


def bench(args: argparse.Namespace) -> int:
    """Run what is missing, seed by seed, and write the page."""
    one_thread()
    setting = pair_out.changed(Setting(), args.set)
    if setting.epochs % 2:
        raise InputError(f"epochs={setting.epochs}: give an even number, text is written twice")
    known = rungs(setting.epochs, setting.batch)
    with pair_out.place(args) as folder:
        made = pair_out.open_pair(args, folder)
        if made.setting.device != "cpu":
            raise InputError("device: its page is of CPU time; leave it cpu")
        start = made.make_start()
        answers = [answer for _, answer in start["answers"]]
        start |= {
            "rouge_l": judging.mean_rouge(made, answers),
            **pair_out.own_text(made, made.root / "start"),
        }
        home = made.root / f"real-{digest(asdict(setting))}"
        for seed in range(args.seeds):
            for name in args.rungs:
                _cell(made, setting, seed, name, known[name], home / f"{name}-{seed}")
        found = [
            cell | pair_out.own_text(made, home / f"{cell['rung']}-{cell['seed']}")
            for cell in pair_out.finished(home)
        ]
    cells = [cell for name in known for cell in found if cell["rung"] == name]
    about = pair_out.about("real.py", args, cells, {"rungs": list(by_rung(cells))})
    about["setting"] = {**asdict(made.setting), **asdict(setting)}
    labels = {name: rung.label for name, rung in known.items()}
    record = {"start": start, "cells": cells, **about}
    pair_out.publish(args.out, "real", page(start, cells, labels, about), record)
    return 0


def _cell(
    made: pair.Pair, setting: Setting, seed: int, name: str, rung: Rung, home: Path
) -> dict[str, Any]:
    values = {
        "data.train": made.prompts(seed, setting.num_prompts),
        "train.lr": setting.lr,
        "train.min_lr": setting.lr / 10,
        "train.warmup": 0.05,
        "train.batch_size": setting.batch,
        "eval.source": "none",
        "eval.num_samples": 0,
        **rung.values,
    }
    return pair.cell(
        home,
        lambda: made.run(home, rung.preset, seed, values),
        lambda result: measured(made, result, name, seed),
    )


def measured(made: pair.Pair, result: npd.RunResult, name: str, seed: int) -> dict[str, Any]:
    """The figures of a finished run; means over all its steps."""
    data, steps = result.data, result.data.steps
    drifts = [step["drift"] for step in steps if step["drift"] is not None]
    masses = [step["teacher_mass"] for step in steps if step["teacher_mass"] is not None]
    rejected = {why: n for (what, why), n in data.reasons.items() if what is Outcome.REJECTED}
    assert result.student is not None
    return {
        "rung": name,
        "seed": seed,
        **judging.on_teacher_text(made, result.student),
        "steps": len(steps),
        "samples": sum(step["num_samples"] for step in steps),
        "response_tokens": sum(step["response_tokens"] for step in steps),
        "total_tokens": sum(step["total_tokens"] for step in steps),
        "asked": data.conservation["asked"],
        "rejected": rejected,
        "teacher_mass": mean(masses) if masses else None,
        "drift": mean(drifts) if drifts else None,
        "drift_end": drifts[-1] if drifts else None,
    }


def main() -> int:
    """The benchmark; a wrong input ends it in one line."""
    args = parse_args()
    return outcome(lambda: bench(args))


if __name__ == "__main__":
    sys.exit(main())
