"""Runs with two teachers that differ, `math` and `code`, each with prompts of its own."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_run import tiny_settings, write_prompts


class QuietView:
    """A view that remembers what was said."""

    def __init__(self):
        self.messages: list[str] = []

    def update(self, state):
        """Nothing is shown."""

    def message(self, text):
        self.messages.append(text)

    def close(self):
        """Nothing to close."""


def name_teachers(path: Path, *names: str | None) -> Path:
    """Prompts in JSONL, the teachers' names in turn; None: the record names none."""
    rows = [json.loads(line) for line in write_prompts(path).read_text().splitlines()]
    for i, row in enumerate(rows):
        name = names[i % len(names)]
        row |= {} if name is None else {"teacher": name}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def teaching_settings(
    student: Path, teachers: dict[str, object], prompts: Path, run_dir: Path, **sections
) -> dict:
    """Settings of a tiny run by teachers; that of `default` is the run's `teacher`."""
    teachers = {name: str(t) if isinstance(t, Path) else t for name, t in teachers.items()}
    default = teachers.pop("default", None)
    settings = tiny_settings(student, default, prompts, run_dir, **sections)
    return settings | {"teacher": default, "teachers": teachers}
