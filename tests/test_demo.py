"""What the demo prints, and how it ends when it cannot go on: in one line and an exit code."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "demo"
DEMO = [sys.executable, str(FOLDER / "demo.py")]
# What `make install` brings beyond what the demo needs.
EXTRAS = ("trl", "ray", "datasets", "peft", "matplotlib", "tensorboard", "hypothesis", "triton")
EXTRAS += ("altair", "vl_convert")
# The tiny pair writes noise by the byte: its prompts are longer, and its answers never end.
SMALL = ["runtime.threads=1", "data.max_prompt_tokens=200", "filter.drop_truncated=false"]


@pytest.fixture
def room(tmp_path, tiny_model_dir, tiny_teacher_dir):
    """A folder in which the demo finds its two models made already: tiny ones."""
    shutil.copytree(tiny_teacher_dir, tmp_path / "models" / "smollm2-135m")
    shutil.copytree(tiny_model_dir, tmp_path / "models" / "smollm2-pruned")
    return tmp_path


def test_it_ends_in_a_table_and_needs_no_other_package(room):
    code = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(sys.argv.pop(1).split())); "
        "sys.argv.pop(0); sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, " ".join(EXTRAS), DEMO[1], *SMALL]
    done = subprocess.run(command, cwd=room, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout[done.stdout.index("\n    ") :].strip("\n").splitlines()
    assert re.split(r"\s{2,}", head.strip()) == ["teacher", "warm start", "NPD"]
    assert re.search(r"^answers with the right word( +\d+% ± \d+){3}$", lines[0])
    assert len(re.findall(r"\d+\.\d%", lines[1])) == 2
    assert len(re.findall(r"\d+\.\d{3}", lines[2])) == 2
    told = "\n".join(lines)
    assert re.search(r"NPD changed the share of right answers by [+-]\d+ points", told)
    assert re.search(r"the student was \d\.\d\d to \d\.\d\d nats a token", told)
    for name in ("student", "report"):
        assert (room / re.search(rf"^{name} +(\S+)", told, re.MULTILINE)[1]).exists()


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_prints_what_it_does_and_touches_nothing(option, tmp_path):
    kept = tmp_path / "runs" / "demo" / "kept"
    kept.parent.mkdir(parents=True)
    kept.touch()
    command = [*DEMO, "--control", option]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("The demo: ")
    assert "--control" in done.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]
    assert not (tmp_path / "models").exists()


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
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted: the next `make demo` starts" in out


def test_no_held_out_prompt_is_trained_on():
    train, heldout = (prompts_of(FOLDER / f"{name}.jsonl") for name in ("prompts", "heldout"))
    assert not heldout & train
    assert (len(train), len(heldout)) == (640, 160)


def prompts_of(file: Path) -> set[str]:
    """What is asked; each answer is a word of the sentence that comes before the question."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        assert row["answer"] in re.findall(r"\w+", row["prompt"].partition(". ")[0])
    return {row["prompt"] for row in rows}


def test_its_prompts_are_what_the_script_writes(tmp_path):
    script = shutil.copy(FOLDER / "make_prompts.py", tmp_path)
    subprocess.run([sys.executable, script], check=True)
    for name in ("prompts.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
