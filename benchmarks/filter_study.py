"""What the Δ-IFD filter is worth: does it find noise that was planted, and does that help?

    make filter-study                          # to benchmarks/results/filter
    python benchmarks/filter_study.py --folder DIR --seeds 6 --trained 5
    python benchmarks/filter_study.py --trained 0 --data questions.jsonl

Detection: the ladder's students write, noise is planted into a known share of their texts
(`noise.py`), both models score them, and every rule says whom it cuts. Training: the students go on
from the noisy texts, and from the clean ones, behind each rule. With `--data`, detection again on
the answers of the demo's student (`make demo`) to questions of a file; nothing is trained there.
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
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import filter_rules as fr
from common import commit, machine, versions
from filter_data import HOT, SCORED, Made, Models, data_set, real_data, scored
from filter_page import page
from ladder import SUM, Bench, one_thread
from ladder_page import Cell
from noise import WORKING
from npd.settings import load_config
from tasks import MARK, is_right, read_problems

SETTING = replace(SUM, is_new=True)
SHARE = 0.3
_FIRST = {"noisy": SHARE, "clean": 0.0}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=6, help="of detection")
    parser.add_argument("--trained", type=int, default=5, help="seeds of training; 0: none")
    parser.add_argument("--data", type=Path, help="JSONL of questions for the demo's models")
    parser.add_argument("--column", default="question", help="of the file at --data")
    parser.add_argument("--source", default="", help="what the page calls the file at --data")
    parser.add_argument("--teacher", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--student", type=Path, default=Path("runs/demo/warm/student"))
    parser.add_argument("--real-seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, help="folder for filter.json and filter.md")
    parser.add_argument("--folder", type=Path, help="where to run; default: a temporary one")
    args = parser.parse_args()
    if min(args.seeds, args.real_seeds) < 2:
        parser.error("rules are chosen on some seeds and confirmed on others: give two at least")
    return args


def main() -> int:
    """Run what is missing, write the page."""
    args = parse_args()
    one_thread()
    with tempfile.TemporaryDirectory(prefix="npd-filter-") as directory:
        folder = args.folder or Path(directory)
        record = study(args, folder)
    text = page(record)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "filter.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.out / "filter.md").write_text(text)
    return 0


def study(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All that was measured, as plain JSON values."""
    bench = Study(SETTING, folder)
    record: dict[str, Any] = {"share": SHARE, "hot": HOT, "setting": asdict(SETTING)}
    ours = {seed: bench.data(seed, "noisy") for seed in range(args.seeds)}
    found = {"sum": {seed: made.samples for seed, made in ours.items()}}
    record["sum"] = {"what": "sum", "counts": [_counts(made) for made in ours.values()]}
    if args.data is not None:
        models = Models(args.student, args.teacher, args.data, args.column)
        real = {
            seed: real_data(models, folder / f"real-{seed}", share=SHARE, seed=seed)
            for seed in range(args.real_seeds)
        }
        found["real"] = {seed: made.samples for seed, made in real.items()}
        record["real"] = {
            "what": args.source or args.data.name,
            "counts": [_counts(made) for made in real.values()],
        }
    for name, detected in detect(found).items():
        record[name] |= detected
    if args.trained:
        bench.train(range(args.trained), record["sum"]["chosen"])
    record["cells"] = bench.arms()
    return record | {
        "command": _command(args),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }


def _command(args: argparse.Namespace) -> str:
    real = f" --data FILE --real-seeds {args.real_seeds}" * (args.data is not None)
    options = f"--seeds {args.seeds} --trained {args.trained}{real}"
    return f"python benchmarks/filter_study.py {options}"


# -- Detection ---------------------------------------------------------------------------------


Seeds: TypeAlias = Mapping[int, Sequence[fr.Labelled]]


def detect(texts: Mapping[str, Seeds]) -> dict[str, dict[str, Any]]:
    """Every rule on every kind of text and seed; the best chosen on the first half of the seeds.

    `npd`: of the bounds that npd has; `any`: of all rules; `both`: with the highest mean recall
    over the kinds of text.
    """
    families = {"npd": [*fr.grid()], "any": [*fr.grid(), *fr.others()]}
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


# -- The ladder's students ---------------------------------------------------------------------


class Study(Bench):
    """The ladder's bench, its rungs behind noisy data."""

    def data(self, seed: int, name: str) -> Made:
        """The start student's texts for prompts it has not seen, `noisy` or `clean`, scored."""
        self.seed(seed, [])
        home = self.folder / f"seed-{seed}"
        rows = read_problems(home / "new.jsonl")
        write = partial(self._run_yaml, home, seed, {"data.train": home / "new.jsonl"})
        found = data_set(home, name, rows, write, WORKING, share=_FIRST[name], seed=seed)
        path = home / f"{name}.jsonl"
        config = load_config(self._run_yaml(home, seed, {"data.train": path}, SCORED)).config
        answers = {row["prompt"]: row["answer"].removeprefix(MARK) for row in rows}
        return scored(path, found, config, lambda i, text: is_right(text, answers[found[i].prompt]))

    def train(self, seeds: Sequence[int], chosen: Mapping[str, Any]) -> None:
        """Train the starts on the noisy texts and the clean ones, behind each rule."""
        arms = {seed: self._arms(seed, chosen) for seed in seeds}
        for name in arms[seeds[0]]:
            for seed in seeds:
                self._arm(seed, name, *arms[seed][name])

    def arms(self) -> list[Cell]:
        """Every training that is finished, seed by seed."""
        homes = sorted(self.folder.glob("seed-*"), key=lambda home: int(home.name[5:]))
        files = [file for home in homes for file in sorted(home.glob("arm-*/cell.json"))]
        return [json.loads(file.read_text()) for file in files]

    def _arms(self, seed: int, chosen: Mapping[str, Any]) -> dict[str, tuple[Path, dict[str, Any]]]:
        """Name -> the data set and what is set of the filter."""
        home = self.folder / f"seed-{seed}"
        keep = {"filter.keep": 1.0 - SHARE}
        letter = {f"filter.{name}": value for name, value in fr.LETTER.items()}
        noisy, clean = home / "noisy.jsonl", home / "clean.jsonl"
        none = {"filter.name": "none"}
        sure = fr.Rule("", statistic="student NLL", top=SHARE)
        best, clean_best = (self._best(seed, chosen, data) for data in ("noisy", "clean"))
        return {
            "none": (noisy, none),
            "oracle": (self._kept(seed, "oracle", None), none),
            "default": (noisy, {}),
            "best both": best["both"],
            "letter": (noisy, letter),
            "random": (noisy, {"filter.name": "random", **keep}),
            "clean none": (clean, none),
            "clean best both": clean_best["both"],
            "clean default": (clean, {}),
            "clean letter": (clean, letter),
            "teacher_nll": (noisy, {"filter.name": "teacher_nll", **keep}),
            "best npd": best["npd"],
            "quantile": (noisy, {"filter.bounds": "quantile"}),
            "ppl": (noisy, {"filter.ratio": "ppl"}),
            "student_nll": (self._kept(seed, "student_nll", sure), none),
        }

    def _best(
        self, seed: int, chosen: Mapping[str, Any], data: str
    ) -> dict[str, tuple[Path, dict[str, Any]]]:
        """The rules that were chosen; those that npd does not have as a data set cut before."""
        found = {}
        for name, values in chosen.items():
            rule = fr.Rule(**values)
            path = self.folder / f"seed-{seed}" / f"{data}.jsonl"
            config = {f"filter.{key}": value for key, value in rule.config.items()}
            if rule.statistic:
                path, config = self._kept(seed, name, rule, data), {"filter.name": "none"}
            found[f"best {name}"] = (path, config)
        return found

    def _kept(self, seed: int, name: str, rule: fr.Rule | None, data: str = "noisy") -> Path:
        """The data set without what a rule cuts, or without the planted noise."""
        home, made = self.folder / f"seed-{seed}", self.data(seed, data)
        cut = rule.cut(made.samples, seed) if rule else [bool(s.kind) for s in made.samples]
        left = {s.stats.prompt_index for s, is_cut in zip(made.samples, cut, strict=True) if is_cut}
        lines = made.path.read_text().splitlines(keepends=True)
        path = home / f"{data}-{name}.jsonl"
        path.write_text("".join(line for i, line in enumerate(lines) if i not in left))
        return path

    def _arm(self, seed: int, name: str, data: Path, values: Mapping[str, Any]) -> Cell:
        home, epochs = self.folder / f"seed-{seed}", self.setting.epochs
        own = self._own(home) | {
            "data.train": data,
            "train.lr": self.setting.lr,
            "train.min_lr": self.setting.lr / 10,
            "train.warmup": 0.05,
            "schedule.epochs": epochs,
            "schedule.reuse": epochs,
        }
        folder = home / f"arm-{name.replace(' ', '-')}"
        return self._cell(folder, name, seed, "npd", own | SCORED | values)

    def _own(self, home: Path) -> dict[str, Any]:
        student, teacher = home / "start" / "student", self.common / "teacher" / "student"
        return {"student": student, "teacher": teacher}

    def _run_yaml(self, home: Path, seed: int, *values: Mapping[str, Any]) -> Path:
        merged = self._own(home)
        for some in values:
            merged |= some
        return self._write_config(home, seed, "npd", merged)


if __name__ == "__main__":
    sys.exit(main())
