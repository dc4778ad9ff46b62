"""A pair of the ladder, for `peers_run.py`: where text written anew lowers the KL on held-out text.

Teacher and start are trained as `ladder.py` does (seed 0), in float32; the teacher is kept in the
same folder. The prompts of each seed are drawn anew, and nobody is shown their answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pair
from ladder_bench import NEW, Bench
from ladder_setting import Setting
from steps import right_workings
from tasks import read_problems

# As the ladder's runs have it.
SETTING = pair.Setting(num_heldout=500, row_tokens=8192, write_batch=256)


class TaskPair(pair.Pair):
    """A teacher and a student of a task of the ladder."""

    dtype = "float32"
    is_graded = True

    def __init__(self, task: Setting, setting: pair.Setting, folder: Path) -> None:
        """`setting` counts for what a `task` has no name for, and the held-out prompts."""
        self._bench = Bench(task, folder)
        self._bench.teacher_cell()
        teacher = self._bench.common / "teacher" / "student"
        name = f"pair-{self._bench.folder.name}-{setting.num_heldout}"
        super().__init__(setting, folder / name, teacher)
        everything = self._bench.heldout.read_text().splitlines(keepends=True)
        self.heldout().write_text("".join(everything[: setting.num_heldout]))

    def heldout(self) -> Path:
        """The first of the problems that the ladder holds out."""
        return self.root / "heldout.jsonl"

    def prompts(self, seed: int, count: int) -> Path:
        """Other problems than the start's, of a seed's own; a few may be in both."""
        path = self.root / f"prompts-{count}-{seed}.jsonl"
        return self._bench.write_problems(path, "train", NEW + seed, count)

    def start_run(self) -> tuple[str, dict[str, Any]]:
        """The ladder's start."""
        return "sft", self._bench.start_values(self.root, 0) | {
            "train.batch_size": self._task.batch
        }

    def grade(self, responses: Sequence[str]) -> dict[str, float]:
        """The share of responses with a step that is not right."""
        rows = read_problems(self.heldout())
        return {"wrong": 1 - right_workings(self._task.task, rows, responses)}

    @property
    def _task(self) -> Setting:
        return self._bench.setting
