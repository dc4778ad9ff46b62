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
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from common import commit, machine, versions
from ladder_bench import Bench, one_thread
from ladder_figure import draw
from ladder_page import Cell, check, page
from ladder_setting import SETTINGS, with_values
from rungs import GROUPS, rungs
from tasks import TASKS

# A third fewer of the teacher's problems, so that all of a short ladder takes under ten minutes.
_QUICK_TEACHER = 32_000


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
    args.seeds = (2 if args.quick else 5) if args.seeds is None else args.seeds
    if args.seeds < 1:
        parser.error("--seeds: at least 1")
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


if __name__ == "__main__":
    sys.exit(main())
