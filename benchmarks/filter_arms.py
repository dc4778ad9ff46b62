"""The ladder's students on texts of their own with noise planted, trained behind each filter.

Every arm is a run of npd with the preset `npd` on a data set. Filters that npd has run inside it;
what others cut is left out of the data set before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import filter_rules as fr
from filter_data import SCORED, Made, data_set, scored
from ladder_bench import Bench
from ladder_page import Cell
from ladder_setting import SUM, digest
from noise import WORKING
from npd.config.load import load_config
from tasks import MARK, is_right, read_problems

SETTING = replace(SUM, is_new=True)
SHARE = 0.3
"""Of the responses that get noise."""
_SHARES = {"noisy": SHARE, "clean": 0.0}


@dataclass(frozen=True)
class Arm:
    """What a student goes on from: a data set and what is set of a run; `rule`: the chosen one that
    stands behind both."""

    data: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    rule: fr.Rule | None = None


class Arms(Bench):
    """The ladder's bench, its rungs behind noisy data."""

    def data(self, seed: int, name: str) -> Made:
        """The start student's texts for prompts it has not seen, `noisy` or `clean`, scored."""
        self.seed(seed, [])
        home = self.folder / f"seed-{seed}"
        rows = read_problems(home / "train.jsonl")
        write = partial(self._run_yaml, home, seed, {"data.train": home / "train.jsonl"})
        found = data_set(home, name, rows, write, WORKING, share=_SHARES[name], seed=seed)
        path = home / f"{name}.jsonl"
        config = load_config(self._run_yaml(home, seed, {"data.train": path}, SCORED)).config
        answers = {row["prompt"]: row["answer"].removeprefix(MARK) for row in rows}
        return scored(path, found, config, lambda i, text: is_right(text, answers[found[i].prompt]))

    def train(self, seeds: Sequence[int], chosen: Mapping[str, Any]) -> None:
        """Train the starts on the noisy texts and the clean ones, behind each rule."""
        arms = {seed: self._arms(seed, chosen) for seed in seeds}
        for name in arms[seeds[0]]:
            for seed in seeds:
                self._train(seed, name, arms[seed][name])

    def arms(self, chosen: Mapping[str, Any]) -> list[Cell]:
        """Every training that is finished, seed by seed; behind a chosen rule, behind this one."""
        homes = sorted(self.folder.glob("seed-*"), key=lambda home: int(home.name[5:]))
        files = [file for home in homes for file in sorted(home.glob("arm-*/cell.json"))]
        cells = [json.loads(file.read_text()) for file in files]
        labels = (None, chosen["both"]["label"])
        return [cell for cell in cells if "rule" in cell and cell["rule"] in labels]

    def _arms(self, seed: int, chosen: Mapping[str, Any]) -> dict[str, Arm]:
        """By name."""
        home = self.folder / f"seed-{seed}"
        keep = {"filter.keep": 1.0 - SHARE}
        letter = {f"filter.{name}": value for name, value in fr.LETTER.items()}
        noisy, clean = home / "noisy.jsonl", home / "clean.jsonl"
        none = {"filter.name": "none"}
        longer = round(self.setting.epochs / (1.0 - SHARE))
        steps = {"schedule.epochs": longer, "schedule.reuse": longer}
        best, clean_best = (
            self._behind(seed, fr.Rule(**chosen["both"]), data) for data in ("noisy", "clean")
        )
        return {
            "none": Arm(noisy, none),
            "oracle": Arm(self._kept(seed, "oracle", None), none),
            "default": Arm(noisy),
            "best both": best,
            "best both, long": replace(best, values={**best.values, **steps}),
            "letter": Arm(noisy, letter),
            "random": Arm(noisy, {"filter.name": "random", **keep}),
            "clean none": Arm(clean, none),
            "clean best both": clean_best,
            "clean default": Arm(clean),
            "clean letter": Arm(clean, letter),
            "teacher_nll": Arm(noisy, {"filter.name": "teacher_nll", **keep}),
            "quantile": Arm(noisy, {"filter.bounds": "quantile"}),
            "ppl": Arm(noisy, {"filter.ratio": "ppl"}),
            "outlier": Arm(noisy, {"filter.name": "outlier"}),
            "clean outlier": Arm(clean, {"filter.name": "outlier"}),
        }

    def _behind(self, seed: int, rule: fr.Rule, data: str) -> Arm:
        """A rule of npd's set in the run; another's data set cut before."""
        if rule.statistic:
            kept = self._kept(seed, f"both-{_key(rule)}", rule, data)
            return Arm(kept, {"filter.name": "none"}, rule)
        values = {f"filter.{key}": value for key, value in rule.config.items()}
        return Arm(self.folder / f"seed-{seed}" / f"{data}.jsonl", values, rule)

    def _kept(self, seed: int, name: str, rule: fr.Rule | None, data: str = "noisy") -> Path:
        """The data set without what a rule cuts, or without the planted noise."""
        home, made = self.folder / f"seed-{seed}", self.data(seed, data)
        cut = rule.cut(made.samples, seed) if rule else [bool(s.kind) for s in made.samples]
        left = {s.stats.prompt_index for s, is_cut in zip(made.samples, cut, strict=True) if is_cut}
        lines = made.path.read_text().splitlines(keepends=True)
        path = home / f"{data}-{name}.jsonl"
        path.write_text("".join(line for i, line in enumerate(lines) if i not in left))
        return path

    def _train(self, seed: int, name: str, arm: Arm) -> None:
        home, epochs = self.folder / f"seed-{seed}", self.setting.epochs
        own = self._own(home) | {
            "data.train": arm.data,
            "train.lr": self.setting.lr,
            "train.min_lr": self.setting.lr / 10,
            "train.warmup": 0.05,
            "schedule.epochs": epochs,
            "schedule.reuse": epochs,
        }
        folder = home / arm_folder(name, arm.rule)
        cell = self._cell(folder, name, seed, "npd", {**own, **SCORED, **arm.values})
        cell["rule"] = arm.rule.label if arm.rule else None
        (folder / "cell.json").write_text(json.dumps(cell, indent=1) + "\n")

    def _own(self, home: Path) -> dict[str, Any]:
        student, teacher = home / "start" / "student", self.common / "teacher" / "student"
        return {"student": student, "teacher": teacher}

    def _run_yaml(self, home: Path, seed: int, *values: Mapping[str, Any]) -> Path:
        merged = self._own(home)
        for some in values:
            merged |= some
        return self._write_config(home, seed, "npd", merged)


def arm_folder(name: str, rule: fr.Rule | None) -> str:
    """Where a training is kept: those behind different rules apart."""
    plain = name.replace(",", "").replace(" ", "-")
    return f"arm-{plain}" + (f"-{_key(rule)}" if rule else "")


def _key(rule: fr.Rule) -> str:
    return digest(asdict(rule))
