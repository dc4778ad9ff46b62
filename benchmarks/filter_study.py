"""What the Δ-IFD filter is worth: does it find noise that was planted, and does that help?

    make filter-study DATA=questions.jsonl     # to benchmarks/results/filter
    python benchmarks/filter_study.py --folder DIR --seeds 5 --trained 5
    python benchmarks/filter_study.py --trained 0 --data questions.jsonl

Detection: the ladder's students write, noise is planted into a known share of their texts
(`noise.py`), both models score them, and every rule says whom it cuts. Training: the students go on
from the noisy texts, and from the clean ones, behind each rule. With `--data`, detection again on
the answers of a student of 81 M weights (`topics.yaml`) to questions of a file, without training.
Rules are chosen on the first half of the seeds and confirmed on the others.

Promises: one thread, stages in turn; what is finished stays in `--folder` and is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import filter_rules as fr
from common import commit, machine, versions
from filter_arms import SETTING, SHARE, Arms
from filter_data import HOT, Made, Models, check, real_data
from filter_page import page
from ladder_bench import one_thread
from ladder_page import Cell
from npd.__main__ import outcome

Seeds: TypeAlias = Mapping[int, Sequence[fr.Labelled]]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="of detection")
    parser.add_argument("--trained", type=int, default=5, help="seeds of training; 0: none")
    parser.add_argument("--data", type=Path, help="JSONL of questions for the pair of topics.yaml")
    parser.add_argument("--column", default="question", help="of the file at --data")
    parser.add_argument("--source", default="", help="what the page calls the file at --data")
    parser.add_argument("--teacher", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--student", type=Path, default=Path("runs/topics/student"))
    parser.add_argument("--real-seeds", type=int, default=3, help="of the answers to --data")
    parser.add_argument("--out", type=Path, help="folder for filter.json and filter.md")
    parser.add_argument("--folder", type=Path, help="where to run; default: a temporary one")
    args = parser.parse_args()
    if min(args.seeds, args.real_seeds) < 2:
        parser.error("rules are chosen on some seeds and confirmed on others: give two at least")
    if args.trained < 0:
        parser.error("--trained: give the number of seeds to train, or 0")
    return args


def main() -> int:
    """The study; a wrong input ends it in one line."""
    args = parse_args()
    return outcome(lambda: bench(args))


def bench(args: argparse.Namespace) -> None:
    """Run what is missing, write the page."""
    models = None
    if args.data is not None:
        models = Models(args.student, args.teacher, args.data, args.column)
        check(models, args.real_seeds)
    one_thread()
    with tempfile.TemporaryDirectory(prefix="npd-filter-") as directory:
        kept = _compact(study(args, args.folder or Path(directory), models))
    text = page(json.loads(kept))  # of what is kept, so that the page can be made of it again
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "filter.json").write_text(kept + "\n")
        (args.out / "filter.md").write_text(text)


def study(args: argparse.Namespace, folder: Path, models: Models | None) -> dict[str, Any]:
    """All that was measured, as plain JSON values."""
    arms = Arms(SETTING, folder)
    record: dict[str, Any] = {"share": SHARE, "hot": HOT, "setting": asdict(SETTING)}
    ours = {seed: arms.data(seed, "noisy") for seed in range(args.seeds)}
    found = {"sum": {seed: made.samples for seed, made in ours.items()}}
    record["sum"] = {"what": "sum", "counts": [_counts(made) for made in ours.values()]}
    if models is not None:
        real = {
            seed: real_data(models, folder / f"real-{seed}", share=SHARE, seed=seed)
            for seed in range(args.real_seeds)
        }
        found["real"] = {seed: made.samples for seed, made in real.items()}
        record["real"] = {
            "what": args.source or models.questions.name,
            "counts": [_counts(made) for made in real.values()],
        }
    for name, detected in detect(found).items():
        record[name] |= detected
    if args.trained:
        arms.train(range(args.trained), record["sum"]["chosen"])
    record["cells"] = arms.arms(record["sum"]["chosen"])
    return record | {
        "command": _command(args, record["cells"]),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }


def _compact(record: Mapping[str, Any]) -> str:
    """The record as JSON, figures to four digits."""
    short = json.loads(json.dumps(record), parse_float=lambda text: round(float(text), 4))
    return json.dumps(short, indent=1)


def _command(args: argparse.Namespace, cells: Sequence[Cell]) -> str:
    """What makes all of this, the trainings that were there before too."""
    trained = max([args.trained, *(cell["seed"] + 1 for cell in cells)])
    real = f" --data FILE --real-seeds {args.real_seeds}" * (args.data is not None)
    options = f"--seeds {args.seeds} --trained {trained}{real}"
    return f"python benchmarks/filter_study.py {options}"


# -- Detection ---------------------------------------------------------------------------------


def detect(texts: Mapping[str, Seeds]) -> dict[str, dict[str, Any]]:
    """Every rule on every kind of text and seed; the best chosen on the first half of the seeds.

    `npd`: of the bounds that npd has; `any`: of all rules; `both`: with the highest mean recall
    over the kinds of text.
    """
    families = {"npd": [*fr.grid()]}
    families["any"] = [*families["npd"], *fr.others()]
    halves = {name: _halves(seeds) for name, seeds in texts.items()}
    figures = {
        name: {rule: [fr.summary(rule, half) for half in halves[name]] for rule in families["any"]}
        for name in texts
    }
    worst = [(rule, _over([figures[name][rule][0] for name in texts])) for rule in families["any"]]
    both = fr.choose(worst)
    found = {}
    for name, seeds in texts.items():
        chosen = {
            family: fr.choose([(rule, figures[name][rule][0]) for rule in rules])
            for family, rules in families.items()
        }
        chosen["both"] = both
        found[name] = _detected(seeds, chosen) | {
            "chosen_on": list(halves[name][0]),
            "sweep": {
                rule.label: dict(zip(("chosen_on", "others"), pair, strict=True))
                for rule, pair in figures[name].items()
            },
        }
    return found


def _halves(seeds: Seeds) -> tuple[Seeds, Seeds]:
    first = dict(islice(seeds.items(), (len(seeds) + 1) // 2))
    return first, {seed: samples for seed, samples in seeds.items() if seed not in first}


def _over(figures: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of several kinds of text: the mean of the recalls, the most of the good samples cut."""
    return mean(recall for recall, _ in figures), max(good_cut for _, good_cut in figures)


def _detected(seeds: Seeds, chosen: Mapping[str, fr.Rule]) -> dict[str, Any]:
    rules = [*fr.NAMED, *chosen.values()]
    return {
        "num_seeds": len(seeds),
        "chosen": {name: asdict(rule) for name, rule in chosen.items()},
        "rules": _measured(rules, seeds),
        "unplanted": _measured(rules, {s: fr.unplanted(found) for s, found in seeds.items()}),
        "same_share": _measured(fr.controls(SHARE), seeds),
        "auc": {name: _auc(name, seeds) for name in fr.STATISTICS},
    }


def _measured(rules: Sequence[fr.Rule], seeds: Seeds) -> dict[str, list[dict[str, float | None]]]:
    return {
        rule.label: [fr.measure(found, rule.cut(found, seed)) for seed, found in seeds.items()]
        for rule in rules
    }


def _auc(name: str, seeds: Seeds) -> list[dict[str, float]]:
    found = []
    for samples in seeds.values():
        values = fr.STATISTICS[name](samples)
        found.append({kind or "all": fr.auc(samples, values, kind) for kind in ("", *fr.KINDS)})
    return found


def _counts(made: Made) -> dict[str, Any]:
    good = [sample.is_good for sample in made.samples if not sample.kind]
    return {
        "responses": made.num_kinds,
        "prefiltered": [[kind, why, count] for (kind, why), count in made.prefiltered.items()],
        "scored": len(made.samples),
        "clean_right": sum(good) / len(good),
    }


if __name__ == "__main__":
    sys.exit(main())
