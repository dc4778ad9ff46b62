"""The files and runs of a ladder: teacher, starts and rungs, each made once and kept.

Promises: a run that is finished is not run again; its run.yaml is one that `npd run` takes too.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import npd
from common import commit
from ladder_cell import line, measured, right_shares, tidy
from ladder_page import Cell
from ladder_setting import ALONE, Setting, Shape, digest
from npd.config.load import load_config, nested
from own_text import own_text
from rungs import rungs
from steps import answers, right_workings
from tasks import make_tokenizer, problems, read_problems, write_problems

# Seeds of new prompts: apart from those of the students and the teacher.
NEW = 1_000_000
# Held-out problems that a student answers by sampling.
_OWN_TEXTS = 500


def one_thread() -> None:
    """Torch on one thread, and no bars of progress."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


class Bench:
    """The files and runs of one setting, each made once."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self._commit = setting, commit()
        self._rungs = rungs(setting.epochs, setting.batch)
        drawn = {"texts": _texts(setting)}
        shared = {
            name: value
            for name, value in asdict(setting).items()
            if name.startswith("teacher")
            or name in ("task", "levels", "is_varied", "num_heldout", "slips")
        }
        self.common = folder / f"{setting.task}-teacher-{digest(shared | drawn)}"
        self.folder = folder / f"{setting.task}-{digest(asdict(setting) | drawn)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.common.mkdir(parents=True, exist_ok=True)
        self.heldout = self.write_problems(
            self.common / "heldout.jsonl", "heldout", 0, setting.num_heldout
        )

    def teacher_cell(self) -> Cell:
        """The teacher, trained on problems that no student's seed draws in this order."""
        setting = self.setting
        prompts = self.write_problems(
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
        start = self.start_values(home, seed)
        cells = [self._cell(home / "start", "start", seed, "sft", start)]
        draw = NEW + seed if self.setting.is_new else seed
        prompts = self.write_problems(home / "train.jsonl", "train", draw, self.setting.num_prompts)
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

    def start_values(self, home: Path, seed: int) -> dict[str, Any]:
        """What the run that makes the start of a seed is told; its files go to `home`."""
        setting = self.setting
        return {
            "student": self._model(home / "init", setting.student, seed),
            "teacher": self.common / "teacher" / "student",
            "data.train": self.write_problems(
                home / "start.jsonl", "train", seed, setting.start_prompts or setting.num_prompts
            ),
            "train.lr": setting.warm_lr,
            "train.min_lr": setting.warm_lr / 10,
            "train.warmup": 0.1,
            "schedule.epochs": setting.warm_epochs,
            "schedule.reuse": setting.warm_epochs,
        }

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
            tidy(home)
            cell |= own_text(
                home / "student",
                self.common / "teacher" / "student",
                self._held_out()[:_OWN_TEXTS],
                self.setting.max_response,
            )
            self._write_cell(home, cell)
            print(line(cell), file=sys.stderr, flush=True)
        cell = json.loads(done.read_text())
        student = home / "student"
        if "workings" not in cell and student.exists():
            texts = answers(student, self._held_out(), self.setting.max_response)
            cell["workings"] = right_workings(self.setting.task, self._held_out(), texts)
            self._write_cell(home, cell)
        return cell

    def _write_cell(self, home: Path, cell: Cell) -> None:
        (home / "cell.json").write_text(json.dumps(cell, indent=1) + "\n")

    def _held_out(self) -> list[dict[str, str]]:
        return read_problems(self.heldout)

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
            **ALONE,
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

    def write_problems(
        self, path: Path, split: Any, seed: int, count: int, slips: float = 0.0
    ) -> Path:
        """A file of the first `count` problems that a seed draws of a split."""
        setting = self.setting
        found = problems(
            setting.task, split, seed, setting.levels, is_varied=setting.is_varied, slips=slips
        )
        return write_problems(path, found, count)


def _texts(setting: Setting) -> list[str]:
    """The first texts of seed 0: what was run on others, by an earlier version, is run again."""
    found = problems(
        setting.task, "train", 0, setting.levels, is_varied=setting.is_varied, slips=setting.slips
    )
    return [problem.response for problem in islice(found, 20)]
