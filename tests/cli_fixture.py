"""A folder to type `npd` commands in, for tests of the command line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from npd.__main__ import run as npd_main
from npd.store.layout import RunLayout
from tiny_run import tiny_settings, write_prompts

NPD = [sys.executable, "-m", "npd"]


class Outcome(NamedTuple):
    """What a command left: exit code and both outputs."""

    code: int
    out: str
    err: str

    def complaint(self, code: int) -> str:
        """The one `error: ` line, of a command that ended with `code` and no traceback."""
        (error,) = self.complaints(code)
        return error

    def complaints(self, code: int) -> list[str]:
        """The `error: ` lines, which are the last, of a command that ended with `code`."""
        assert self.code == code, self.err
        assert "Traceback" not in self.err
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert errors, self.err
        assert self.err.splitlines()[-len(errors) :] == errors
        return errors


@dataclass
class Shell:
    """A folder to work in, with prompts, a config file and the models it names."""

    folder: Path
    student: Path
    teacher: Path
    capsys: pytest.CaptureFixture

    @property
    def layout(self) -> RunLayout:
        return RunLayout(self.folder / "run")

    def write(self, **sections) -> None:
        """Write run.yaml: the tiny settings with `sections` over them."""
        prompts = self.folder / "prompts.jsonl"
        if not prompts.exists():
            write_prompts(prompts)
        settings = tiny_settings(self.student, self.teacher, "prompts.jsonl", "run", **sections)
        (self.folder / "run.yaml").write_text(yaml.safe_dump(settings))

    def npd(self, *arguments: str, debug: bool = False) -> Outcome:
        """The command in this process; its exit code is what `npd` would end with."""
        self.capsys.readouterr()
        code = npd_main(list(arguments), debug=debug)
        return Outcome(code, *self.capsys.readouterr())

    def process(self, *arguments: str, **options) -> Outcome:
        """The command as its own process."""
        command = [*NPD, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
        return Outcome(done.returncode, done.stdout, done.stderr)
