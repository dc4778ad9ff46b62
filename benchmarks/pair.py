"""The real pair that `real.py` and `peers_run.py` train: SmolLM2-135M, and half of its layers.

The teacher comes from its PyPI wheel, the student is the demo's, 15 of its 30 layers (81 M
parameters), fine-tuned once on teacher text (the start). Prompts are questions of a JSONL file,
shuffled once and dealt out: held out, the start's, and those of each seed, none twice. What is
finished stays in the folder, under a name made of the setting, the questions and the models. All
text is short: prompts of at most `Setting.max_prompt` tokens, responses of at most `max_response`.

Promises: one thread, stages in turn (`Setting.device` may be cuda); a wrong file or column is an
error of npd's in one line.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import npd
from common import ROOT, commit
from ladder_setting import ALONE, digest
from npd.config import DataConfig
from npd.config.load import load_config, nested
from npd.data.chat_tokenizer import ChatTokenizer
from npd.data.prompts import encode_prompts, load_prompts
from npd.errors import DataError
from npd.store.layout import RunLayout

sys.path.insert(0, str(ROOT / "examples" / "demo"))

from prepare import import_gguf, prune_depth, smollm2_gguf

# The demo's: left out one at a time, each time the layer whose absence moves the outputs least.
LAYERS = (0, 1, 2, 8, 9, 10, 11, 12, 21, 22, 23, 24, 27, 28, 29)
SYSTEM = "Answer in one short sentence."


@dataclass(frozen=True)
class Setting:
    """Sizes that the start and everything trained from it share."""

    num_heldout: int = 48
    warm_prompts: int = 480
    warm_lr: float = 3e-4
    warm_batch: int = 16
    max_prompt: int = 80
    max_response: int = 64
    row_tokens: int = 2048
    write_batch: int = 64
    device: str = "cpu"


@dataclass(frozen=True)
class Models:
    """Two directories, the student's not fine-tuned yet."""

    teacher: Path
    pruned: Path

    def names(self) -> list[str]:
        """What tells them from others: the directories' names, and what is in them."""
        return [
            " ".join([path.name, *(_content(file) for file in sorted(path.glob(pattern)))])
            for path in (self.teacher, self.pruned)
            for pattern in ("config.json", "*.safetensors")
        ]


def models(folder: Path) -> Models:
    """SmolLM2-135M and its pruned copy, made once in `folder`."""
    found = Models(folder / "teacher", folder / "pruned")
    if not found.teacher.exists():
        import_gguf(smollm2_gguf(), found.teacher)
    if not found.pruned.exists():
        prune_depth(found.teacher, found.pruned, LAYERS)
    return found


class Pair:
    """Teacher, start and held-out text of one setting, each made once; of prompts, its kinds know.

    `dtype`: what npd computes in, `system`: what each prompt begins with.
    """

    dtype: Any = "bfloat16"
    system: str | None = None
    is_graded = False

    def __init__(self, setting: Setting, root: Path, teacher: Path) -> None:
        self.setting, self.root, self.teacher = setting, root, teacher
        self.root.mkdir(parents=True, exist_ok=True)
        self.chat = ChatTokenizer.load(teacher, system=self.system)

    @property
    def start(self) -> Path:
        """The fine-tuned student that everything goes on from."""
        return self.root / "start" / "student"

    @property
    def heldout_scored(self) -> Path:
        """The teacher's greedy responses to the held-out prompts, with its top-k."""
        return self.root / "start" / "heldout.arrow"

    def heldout(self) -> Path:
        """The held-out prompts."""
        raise NotImplementedError

    def prompts(self, seed: int, count: int) -> Path:
        """`count` prompts of a seed's own, none of them held out."""
        raise NotImplementedError

    def start_run(self) -> tuple[str, dict[str, Any]]:
        """The preset that makes the start, and what is set on top of it."""
        raise NotImplementedError

    def grade(self, responses: Sequence[str]) -> dict[str, float]:
        """What greedy `responses` to the held-out prompts are worth, where a pair `is_graded`."""
        raise NotImplementedError

    def make_start(self) -> dict[str, Any]:
        """Fine-tune the student, once; what that measured."""
        home = self.root / "start"

        def work() -> npd.RunResult:
            preset, values = self.start_run()
            return self.run(home, preset, 0, values)

        def measure(result: npd.RunResult) -> dict[str, Any]:
            first, last = result.data.evals[0], result.data.evals[-1]
            shutil.copy(RunLayout(result.directory).heldout, self.heldout_scored)
            return {
                "rung": "start",
                "start_kl": first["kl"],
                "kl": last["kl"],
                "agreement": last["agreement"],
                "answers": last["samples"],
                "steps": len(result.data.steps),
                "response_tokens": sum(step["response_tokens"] for step in result.data.steps),
            }

        return cell(home, work, measure)

    def run(
        self, home: Path, preset: str, seed: int, values: Mapping[str, Any], view: Any = None
    ) -> npd.RunResult:
        """Run a preset with `values` on top of what all runs share; its run.yaml stays in home."""
        setting = self.setting
        common = {
            "preset": preset,
            "run_dir": home / "run",
            "seed": seed,
            "student": self.start,
            "teacher": self.teacher,
            "data.heldout": self.heldout(),
            "data.system": self.system,
            "data.max_prompt_tokens": setting.max_prompt,
            "generate.max_new_tokens": setting.max_response,
            "generate.batch_size": setting.write_batch,
            "generate.shard_size": max(64, setting.write_batch),
            "generate.dtype": self.dtype,
            "score.row_tokens": setting.row_tokens,
            "score.dtype": self.dtype,
            "filter.drop_truncated": False,
            "train.row_tokens": setting.row_tokens,
            "train.batch_size": 16,
            "train.dtype": self.dtype,
            "eval.max_new_tokens": setting.max_response,
            "eval.batch_size": setting.write_batch,
            "eval.num_samples": setting.num_heldout,
            **ALONE,
            "runtime.device": setting.device,
        }
        path = home / "run.yaml"
        tree = nested({**common, **values})
        path.write_text(json.dumps(tree, indent=1, default=str) + "\n")
        result = npd.run(load_config(path).config, view=view)
        if not result.is_done:
            sys.exit("interrupted: the same command with the same --folder goes on")
        return result


class RealPair(Pair):
    """SmolLM2-135M and half of its layers, on questions of a file."""

    system = SYSTEM

    def __init__(
        self, setting: Setting, folder: Path, data: Path, column: str, models: Models
    ) -> None:
        """`column` of `data`, a JSONL file, holds the questions."""
        self._pruned = models.pruned
        made_from = {"data": _content(data), "column": column, "models": models.names()}
        # What came later counts where it is not as it was before.
        later = {"write_batch", "device"} & {
            name for name, value in asdict(Setting()).items() if getattr(setting, name) == value
        }
        told = {name: value for name, value in asdict(setting).items() if name not in later}
        super().__init__(setting, folder / f"pair-{digest(told | made_from)}", models.teacher)
        self._questions = self._fitting(data, column)

    def heldout(self) -> Path:
        """The held-out prompts."""
        return self._write(self.root / "heldout.jsonl", 0, self.setting.num_heldout)

    def prompts(self, seed: int, count: int) -> Path:
        """`count` prompts that nothing else, and no other seed, has."""
        first = self.setting.num_heldout + self.setting.warm_prompts + seed * count
        return self._write(self.root / f"prompts-{count}-{seed}.jsonl", first, count)

    def start_run(self) -> tuple[str, dict[str, Any]]:
        """Fine-tuning of the pruned student on teacher text."""
        setting = self.setting
        return "seqkd", {
            "student": self._pruned,
            "data.train": self._write(
                self.root / "warm.jsonl", setting.num_heldout, setting.warm_prompts
            ),
            "train.lr": setting.warm_lr,
            "train.min_lr": setting.warm_lr / 10,
            "train.warmup": 0.1,
            "train.batch_size": setting.warm_batch,
            "schedule.epochs": 1,
            "schedule.reuse": 1,
        }

    def _fitting(self, data: Path, column: str) -> list[str]:
        """The questions short enough, shuffled."""
        config = DataConfig(
            train=str(data),
            heldout_size=0,
            columns={"prompt": column},
            system=SYSTEM,
            max_prompt_tokens=self.setting.max_prompt,
            on_long_prompt="drop",
        )
        found = load_prompts(config).train
        kept, _ = encode_prompts(found, self.chat, config)
        texts = {prompt.index: prompt.text for prompt in found}
        questions = list(dict.fromkeys(texts[prompt.index] for prompt in kept))
        random.Random(0).shuffle(questions)
        return [question for question in questions if question]

    def _write(self, path: Path, first: int, count: int) -> Path:
        chosen = self._questions[first : first + count]
        if len(chosen) < count:
            raise DataError(
                f"the data has {len(self._questions)} questions of at most "
                f"{self.setting.max_prompt} tokens, {first + count} are needed: give more data, "
                "or fewer seeds"
            )
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in chosen))
        return path


def cell(
    home: Path,
    work: Callable[[], Any],
    measure: Callable[[Any], dict[str, Any]],
) -> dict[str, Any]:
    """What `work` measured; done now unless it has been. Of a run the student alone is kept."""
    done = home / "cell.json"
    if not done.exists():
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        at, load, started = _commit(), os.getloadavg()[0], time.process_time()
        found = measure(work())
        found["cpu_seconds"] = time.process_time() - started
        found |= {"commit": at, "load": [load, os.getloadavg()[0]]}
        layout = RunLayout(home / "run")
        if layout.student.exists():
            shutil.move(layout.student, home / "student")
        shutil.rmtree(layout.root, ignore_errors=True)
        done.write_text(json.dumps(found, indent=1) + "\n")
        print(line(found), file=sys.stderr, flush=True)
    return dict(json.loads(done.read_text()))


@cache
def _commit() -> str:
    """What this process runs, whatever is committed meanwhile."""
    return commit()


def line(found: Mapping[str, Any]) -> str:
    """A finished cell in one line, for whoever watches."""
    names = ("rung", "side", "seed", "start_kl", "kl", "own_kl", "rouge_l", "cpu_seconds")
    parts = (f"{name} {_short(found[name])}" for name in names if found.get(name) is not None)
    return "  ".join(parts)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _content(path: Path) -> str:
    """A name for what is in a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
