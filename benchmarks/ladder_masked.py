"""Rungs of the ladder that do not train on some tokens of a student's own text: which do harm?

    python benchmarks/ladder_masked.py --folder DIR [--task list] [--set NAME=VALUE ...]

Goes on from the starts of a ladder that was run in `DIR` with the same settings, and compares with
its rungs, seed by seed; what is finished stays there. The masks:

- `inside`: what stands in a part of a working after its first wrong character, where nothing is
  right any more (`after_errors.py`);
- `random`: as many tokens of the same texts, at random, the same each time one is trained on.

npd's own `loss.skip_after` needs no knowledge of a task and is a rung of the ladder (`rungs.py`,
group `skip`); these masks do, so rows are cut here, as the trainer gets them.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from after_errors import made_with, places
from ladder_bench import Bench, one_thread
from ladder_page import Cell
from ladder_setting import SETTINGS, with_values
from npd.data.chat_tokenizer import ChatTokenizer
from npd.train import batch
from npd.train.batch import Sample, TrainRow, rollout_of
from tables import head, number, points, row

Keep = Callable[[Sample], Any]
MASKS = ("inside", "random")


def keeper(mask: str, task: str, chat: ChatTokenizer) -> Keep:
    """What says of a sample's response tokens which are trained on: booleans `[L]`."""

    def inside(sample: Sample) -> list[int]:
        rollout = rollout_of(sample)
        prompt, text = chat.decode(rollout.prompt_ids), chat.decode(rollout.response_ids)
        found = (place for place, _, kind in places(task, prompt, text) if kind == "inside")
        return [place for place in found if place < len(rollout.response_ids)]

    def left_out(sample: Sample) -> Sequence[int]:
        found, rollout = inside(sample), rollout_of(sample)
        if mask == "inside":
            return found
        # The same whenever this sample is trained on.
        chance = random.Random(f"{rollout.sample_id}-{rollout.version}")
        return chance.sample(range(len(rollout.response_ids)), len(found))

    def keep(sample: Sample) -> Any:
        is_kept = np.ones(len(rollout_of(sample).response_ids), bool)
        is_kept[list(left_out(sample))] = False
        return is_kept

    return keep


@contextmanager
def masking(keep: Keep) -> Iterator[list[int]]:
    """Trainers get cut rows; gives the count of their response tokens, and of those left out."""
    plain, tokens = batch.build_row, [0, 0]

    def build_row(samples: Sequence[Sample], **options: Any) -> TrainRow:
        is_kept = np.concatenate([keep(sample) for sample in samples])
        tokens[0] += len(is_kept)
        tokens[1] += int((~is_kept).sum())
        return plain(samples, **options).only(torch.from_numpy(is_kept))

    with patch.object(batch, "build_row", build_row):
        yield tokens


def run_masked(bench: Bench, mask: str, seeds: Sequence[int], rungs: list[str]) -> list[Cell]:
    """The cells of `rungs` with a mask, from the starts of `bench`; run where they are missing."""
    home = bench.folder.parent / f"masked-{mask}"
    masked = Bench(bench.setting, home)
    shutil.copytree(bench.common, masked.common, dirs_exist_ok=True)
    for seed in seeds:
        for name in ("init", "start"):
            there = masked.folder / f"seed-{seed}" / name
            shutil.copytree(bench.folder / f"seed-{seed}" / name, there, dirs_exist_ok=True)
    keep = keeper(
        mask, bench.setting.task, ChatTokenizer.load(bench.common / "teacher" / "student")
    )
    with masking(keep) as tokens:
        for seed in seeds:
            masked.seed(seed, rungs)
    if tokens[0]:
        share = tokens[1] / tokens[0]
        print(f"{mask}: {share:.1%} of the tokens trained on now left out", file=sys.stderr)
    return [cell for cell in masked.finished() if cell["rung"] in rungs]


def page(plain: Sequence[Cell], masked: Mapping[str, Sequence[Cell]], about: Sequence[str]) -> str:
    """Each rung with each mask against itself without, paired by seed."""
    lines = head(
        "rung", "left out", "seeds", "right workings, %", "against none, points",
        "seeds above 0", "right answers against none, points", "KL against none",
        "KL on own text against none",
    )  # fmt: skip
    there = {(cell["rung"], cell["seed"]): cell for cell in plain}
    for rung in dict.fromkeys(cell["rung"] for cells in masked.values() for cell in cells):
        bare = [cell for cell in plain if cell["rung"] == rung]
        workings = points([cell["workings"] for cell in bare])
        lines.append(row(rung, "none", str(len(bare)), workings, *[""] * 5))
        for mask, cells in masked.items():
            pairs = [(there[rung, c["seed"]], c) for c in cells if c["rung"] == rung]
            by = {
                name: [after[name] - before[name] for before, after in pairs]
                for name in ("workings", "accuracy", "kl", "own_kl")
            }
            lines.append(
                row(
                    rung, mask, str(len(pairs)),
                    points([after["workings"] for _, after in pairs]),
                    points(by["workings"], signed=True),
                    f"{sum(value > 0 for value in by['workings'])} of {len(pairs)}",
                    points(by["accuracy"], signed=True),
                    number(by["kl"], 4, signed=True),
                    number(by["own_kl"], 4, signed=True),
                )
            )  # fmt: skip
    title = ["# Without some tokens of a student's own text", ""]
    made = "Made by `benchmarks/ladder_masked.py`; do not edit. What the masks are, is said there. "
    return (
        "\n".join([*title, f"{made}±: 95 % t-interval over seeds.", "", *lines, "", *about]) + "\n"
    )


def main() -> int:
    """Run what is missing, print the page, write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="of a ladder that was run")
    parser.add_argument("--task", choices=["list", "program", "sum"], default="sum")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="of a Setting")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--rungs", nargs="+", default=["rollouts", "npd", "every_epoch"])
    parser.add_argument("--out", type=Path, help="file for the page; its JSON goes beside it")
    args = parser.parse_args()
    one_thread()
    bench = Bench(with_values(SETTINGS[args.task], args.set), args.folder)
    plain = [cell for cell in bench.finished() if cell["rung"] in args.rungs]
    seeds = sorted({cell["seed"] for cell in plain})
    missing = [
        f"{name} of seed {seed}"
        for seed in seeds
        for name in args.rungs
        if not any((cell["rung"], cell["seed"]) == (name, seed) for cell in plain)
    ]
    if missing or not plain:
        what = ", ".join(missing) or f"none of {', '.join(args.rungs)}"
        sys.exit(f"--folder {args.folder}: {what}: run these rungs with ladder.py first")
    masked = {mask: run_masked(bench, mask, seeds, args.rungs) for mask in args.masks}
    commits = {cell["commit"] for cells in masked.values() for cell in cells}
    changed = f" --set {' '.join(args.set)}" * bool(args.set)
    options = f"--task {args.task} --masks {' '.join(args.masks)} --rungs {' '.join(args.rungs)}"
    about = [
        "- command, after the ladder's: `python benchmarks/ladder_masked.py --folder DIR "
        f"{options}{changed}`",
        f"- commits of the runs: {', '.join(sorted(commits))}",
        *made_with(),
    ]
    text = page(plain, masked, about)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
        record = {"cells": {"none": plain, **masked}}
        args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
