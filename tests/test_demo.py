"""How the demo ends when it cannot go on: like the command line, in one line and an exit code."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = [sys.executable, str(Path(__file__).parents[1] / "examples" / "demo" / "demo.py")]
SMALL = ["runtime.kind=inline", "runtime.threads=1", "schedule.overlap=false"]


@pytest.fixture
def room(tmp_path, tiny_model_dir, tiny_teacher_dir):
    """A folder in which the demo finds its two models made already: tiny ones."""
    shutil.copytree(tiny_teacher_dir, tmp_path / "models" / "smollm2-135m")
    shutil.copytree(tiny_model_dir, tmp_path / "models" / "smollm2-pruned")
    return tmp_path


def test_wrong_input_is_one_line(room):
    done = subprocess.run([*DEMO, "train.lrr=1"], cwd=room, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --set train.lrr=1: unknown key train.lrr")
    assert len(done.stderr.splitlines()) == 1
    shown = subprocess.run(
        [*DEMO, "train.lrr=1", "--debug"], cwd=room, capture_output=True, text=True
    )
    assert "Traceback" in shown.stderr
    assert shown.stderr.splitlines()[-1] == done.stderr.strip()


def test_an_interrupt_ends_it_with_130(room):
    process = subprocess.Popen(
        [*DEMO, *SMALL], cwd=room, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "step 1" in line or "run started" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted: the next `make demo` starts" in out
