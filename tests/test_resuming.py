"""Going on with a run: the command that does it, what is shown first, and a run that is done."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess

import pytest
import yaml

from desk import NPD, Desk
from npd.resuming import resume_command
from npd.settings import dump_config, load_config
from tiny_run import tiny_settings


@pytest.fixture
def desk(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Desk(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys)
    made.write()
    return made


def command_of(*arguments: str) -> str:
    """The command that resumes a run started by `npd run` with these arguments."""
    source, *sets = arguments
    settings = load_config(source, sets)
    return resume_command(dump_config(settings.config), settings.origins)


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["train.lr=1e-05", "train.min_lr=1e-06"],
        ["name=a run", "data.system='it''s: #1'", "schedule.refresh.at_epochs=[2]"],
        [
            "schedule.steps=7",
            "schedule.refresh=never",
            "train.lora={rank: 4, targets: [q_proj, v_proj]}",
            "data.limit=null",
        ],
    ],
)
def test_the_command_means_the_same_run(desk, sets):
    said = shlex.split(command_of("run.yaml", *sets))
    assert said[:3] == ["npd", "run", "run.yaml"]
    assert said[-1] == "--resume"
    assert set(said[3:-1:2]) <= {"--set"}
    again = load_config(said[2], said[4:-1:2])
    assert again.config == load_config("run.yaml", sets).config


def test_the_command_of_a_preset_of_python_and_of_secrets(desk):
    sets = ["student=a", "teacher=b", "generate.engine=vllm", "generate.launch.venv=v"]
    assert command_of("npd", *sets).startswith("npd run npd --set student=a --set teacher=b ")
    assert resume_command({"name": "x"}, {}) == "npd.run(config, resume=True)"
    launch = "generate.launch.env={HF_TOKEN: hush, LOUD: aloud}"
    said = command_of("npd", *sets, launch)
    assert "hush" not in said
    assert "HF_TOKEN=..." in said
    assert "LOUD=aloud" in said


def test_a_file_over_a_preset_is_named_by_the_file(desk):
    settings = tiny_settings(desk.student, desk.teacher, "prompts.jsonl", "run")
    (desk.folder / "my run.yaml").write_text(yaml.safe_dump({"preset": "npd", **settings}))
    assert command_of("my run.yaml") == "npd run 'my run.yaml' --resume"


def interrupted(desk) -> tuple[int, str, int]:
    """A run that got a SIGINT after a step: exit code, output, the step it was saved at."""
    process = subprocess.Popen(
        [*NPD, "run", "run.yaml", "--set", "schedule.epochs=400"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = desk.layout.metrics_jsonl
    for _ in process.stderr:  # a line at the start, then one a refresh, an evaluation, ...
        if metrics.exists() and b"grad_norm" in metrics.read_bytes():
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    return process.returncode, out, int(re.search(r"not finished: after step (\d+)", out)[1])


def test_an_interrupted_run_says_how_to_go_on_and_shows_where_it_does(desk):
    code, out, step = interrupted(desk)
    assert code == 130
    command = "npd run run.yaml --set schedule.epochs=400 --resume"
    assert f"go on with {command}\n" in out
    assert f"go on with {command}\n" in desk.npd("show", "run").out
    assert f"({command})" in desk.npd("export", "run", "out").complaint(2)
    assert f"({command})" in desk.npd(*shlex.split(command)[1:-1]).complaint(2)
    resumed = subprocess.Popen([*NPD, *shlex.split(command)[1:]], stderr=subprocess.PIPE, text=True)
    first = resumed.stderr.readline()
    resumed.send_signal(signal.SIGINT)
    resumed.communicate(timeout=120)
    assert first.startswith(f"step {step} · ")


def test_a_finished_run_is_left_as_it_is(desk):
    done = desk.npd("run", "run.yaml")
    assert done.code == 0, done.err
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files(desk)}
    again = desk.npd("run", "run.yaml", "--resume")
    assert again.code == 0
    first, *rest = again.out.splitlines(keepends=True)
    assert first == "run has finished already: nothing was done\n"
    assert "".join(rest) == done.out
    assert "student   run/student" in again.out
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files(desk)} == before


def test_a_student_that_is_gone_is_exported_again(desk):
    assert desk.npd("run", "run.yaml").code == 0
    weights = (desk.layout.student / "model.safetensors").read_bytes()
    shutil.rmtree(desk.layout.student)
    again = desk.npd("run", "run.yaml", "--resume")
    assert again.code == 0, again.err
    assert "finished already" not in again.out
    assert (desk.layout.student / "model.safetensors").read_bytes() == weights


def test_a_run_that_gave_up_has_not_finished(desk):
    sets = ["--set", "filter.low=50", "--set", "filter.high=60", "--set", "filter.min_nll=0"]
    desk.npd("run", "run.yaml", *sets).complaint(1)
    assert "nothing was trained" in desk.npd("run", "run.yaml", *sets, "--resume").complaint(1)


def files(desk) -> list:
    """Every file of the run but SQLite's scratch files, which any reader makes."""
    found = desk.layout.root.rglob("*")
    return [p for p in found if p.is_file() and not p.name.endswith(("-wal", "-shm"))]
