"""Going on with a run: the command that does it, what is shown first, and a run that is done."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
from contextlib import closing

import pytest
import yaml

from cli_fixture import NPD
from npd.config.load import dump_config, load_config
from npd.config.sources import resume_command
from npd.store.ledger import Ledger
from run_process import Run
from tiny_run import tiny_settings


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
def test_the_command_means_the_same_run(shell, sets):
    said = shlex.split(command_of("run.yaml", *sets))
    assert said[:3] == ["npd", "run", "run.yaml"]
    assert said[-1] == "--resume"
    assert set(said[3:-1:2]) <= {"--set"}
    again = load_config(said[2], said[4:-1:2])
    assert again.config == load_config("run.yaml", sets).config


def test_the_command_of_a_preset_of_python_and_of_secrets(shell):
    sets = ["student=a", "teacher=b", "generate.engine=vllm", "generate.launch.venv=v"]
    assert command_of("npd", *sets).startswith("npd run npd --set student=a --set teacher=b ")
    assert resume_command({"name": "x"}, {}) == "npd.run(config, resume=True)"
    launch = "generate.launch.env={HF_TOKEN: hush, LOUD: aloud}"
    said = command_of("npd", *sets, launch)
    assert "hush" not in said
    assert "HF_TOKEN=..." in said
    assert "LOUD=aloud" in said


def test_a_file_over_a_preset_is_named_by_the_file(shell):
    settings = tiny_settings(shell.student, shell.teacher, "prompts.jsonl", "run")
    (shell.folder / "my run.yaml").write_text(yaml.safe_dump({"preset": "npd", **settings}))
    assert command_of("my run.yaml") == "npd run 'my run.yaml' --resume"


def interrupted(shell) -> tuple[int, str, int]:
    """A run that got a SIGINT after a step: exit code, output, the step it was saved at."""
    process = subprocess.Popen(
        [*NPD, "run", "run.yaml", "--set", "schedule.epochs=400"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = shell.layout.metrics_jsonl
    for _ in process.stderr:  # a line at the start, then one a refresh, an evaluation, ...
        if metrics.exists() and b"grad_norm" in metrics.read_bytes():
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert "Traceback" not in err
    return process.returncode, out, int(re.search(r"not finished: after step (\d+)", out)[1])


def test_an_interrupted_run_says_how_to_go_on_and_shows_where_it_does(shell):
    code, out, step = interrupted(shell)
    assert code == 130
    with Ledger.reader(shell.layout.ledger_db) as ledger:
        assert ledger.conservation().holds
        assert ledger.last_checkpoint().step == step
    command = "npd run run.yaml --set schedule.epochs=400 --resume"
    assert f"resume with {command}\n" in out
    assert f"resume with {command}\n" in shell.npd("show", "run").out
    assert f"({command})" in shell.npd("export", "run", "out").complaint(2)
    assert f"({command})" in shell.npd(*shlex.split(command)[1:-1]).complaint(2)
    assert f"({command})" in shell.npd("run", "run.yaml").complaint(2), (
        "started with another config"
    )
    resumed = subprocess.Popen([*NPD, *shlex.split(command)[1:]], stderr=subprocess.PIPE, text=True)
    assert resumed.stderr.readline() == "data: read as prompts\n"
    first = resumed.stderr.readline()
    resumed.send_signal(signal.SIGINT)
    resumed.communicate(timeout=600)
    assert first.startswith(f"step {step}/~")


def empty(ledger):
    ledger.write_bytes(b"")
    beside(ledger)


def beside(ledger):
    for end in ("-wal", "-shm"):
        ledger.with_name(f"{ledger.name}{end}").unlink(missing_ok=True)


def gone(ledger):
    ledger.unlink()
    beside(ledger)


def gone_for_long(ledger):
    """As a run of npd before there was a mark leaves it, or one that was cleaned up by hand."""
    gone(ledger)
    ledger.with_suffix(".mark").unlink()


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tiny_model_dir, tiny_teacher_dir):
    """A run directory of a run that was killed with its ledger open, some steps in."""
    folder = tmp_path_factory.mktemp("killed")
    with Run(folder, tiny_model_dir, tiny_teacher_dir) as run:
        process = run.start()
        assert run.wait_for(12, process)
    return run


@pytest.mark.parametrize("lose", [gone, gone_for_long, empty, beside])
def test_a_run_does_not_start_over_where_its_ledger_is_lost(killed, shell, lose):
    shutil.copytree(killed.layout.root, shell.layout.root)
    lose(shell.layout.ledger_db)
    before = {p: p.read_bytes() for p in files(shell)}
    again = ["run", str(killed.config), "--set", "run_dir=run"]
    said = shell.npd(*again, "--resume").complaint(2)
    assert "run/ledger.db is missing or empty, beside run/" in said
    assert "bring ledger.db back together with its ledger.db-wal" in said
    assert {p: p.read_bytes() for p in files(shell)} == before


def test_nor_where_its_ledger_is_an_older_one(killed, shell):
    shutil.copytree(killed.layout.root, shell.layout.root)
    shell.layout.ledger_db.with_suffix(".mark").write_text("9999\n")
    said = shell.npd("run", str(killed.config), "--set", "run_dir=run", "--resume").complaint(2)
    assert re.search(r"ledger.db ends at event \d+ of 9999 or more", said)


def test_a_cut_ledger_is_damaged(killed, shell):
    shutil.copytree(killed.layout.root, shell.layout.root)
    with closing(sqlite3.connect(shell.layout.ledger_db)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    beside(shell.layout.ledger_db)
    os.truncate(shell.layout.ledger_db, 20_000)
    said = shell.npd("run", str(killed.config), "--set", "run_dir=run", "--resume").complaint(1)
    assert "ledger.db is damaged" in said


def test_a_run_that_was_killed_before_its_first_event_starts(killed, shell):
    shell.layout.create()
    shutil.copy(killed.layout.config_json, shell.layout.root)
    done = shell.npd("run", str(killed.config), "--set", "run_dir=run", "--resume")
    assert done.code == 0, done.err
    assert shell.layout.student.is_dir()


def test_a_finished_run_is_left_as_it_is(shell):
    done = shell.npd("run", "run.yaml")
    assert done.code == 0, done.err
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files(shell)}
    again = shell.npd("run", "run.yaml", "--resume")
    assert again.code == 0
    first, *rest = again.out.splitlines(keepends=True)
    assert first == "run is already finished: nothing was trained\n"
    assert "".join(rest) == done.out
    assert "student   run/student" in again.out
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files(shell)} == before


def test_a_student_that_is_gone_is_exported_again(shell):
    assert shell.npd("run", "run.yaml").code == 0
    weights = (shell.layout.student / "model.safetensors").read_bytes()
    shutil.rmtree(shell.layout.student)
    again = shell.npd("run", "run.yaml", "--resume")
    assert again.code == 0, again.err
    assert "already finished" not in again.out
    assert (shell.layout.student / "model.safetensors").read_bytes() == weights


def test_a_damaged_student_is_told_by_export_and_mended_by_resuming(shell):
    assert shell.npd("run", "run.yaml").code == 0
    file = shell.layout.student / "model.safetensors"
    weights = file.read_bytes()
    for damage in (weights[:-1] + bytes([weights[-1] ^ 1]), weights[:-9]):
        file.write_bytes(damage)
        said = shell.npd("export", "run", "out").complaint(1)
        assert "run/student is damaged" in said
        assert "(npd run run.yaml --resume)" in said
        assert shell.npd("run", "run.yaml", "--resume").code == 0
        assert file.read_bytes() == weights
    assert shell.npd("export", "run", "out").code == 0


def test_a_report_that_was_not_written_or_is_of_a_part_is_written(shell):
    shell.write(observe={"report": True})
    assert shell.npd("run", "run.yaml").code == 0
    report = shell.layout.report_html
    page = report.read_bytes()
    report.unlink()
    done = shell.npd("run", "run.yaml", "--resume")
    assert done.out.startswith("run is already finished: nothing was trained\n")
    assert "report    run/report.html" in done.out
    assert report.read_bytes() == page
    report.write_bytes(b"of an earlier interruption")
    os.utime(report, (0, 0))
    assert shell.npd("run", "run.yaml", "--resume").code == 0
    assert report.read_bytes() == page


def test_a_run_that_gave_up_has_not_finished(shell):
    sets = ["--set", "filter.low=50", "--set", "filter.high=60", "--set", "filter.min_nll=0"]
    shell.npd("run", "run.yaml", *sets).complaint(1)
    assert "nothing was trained" in shell.npd("run", "run.yaml", *sets, "--resume").complaint(1)


def files(shell) -> list:
    """Every file of the run but SQLite's scratch files, which any reader makes."""
    found = shell.layout.root.rglob("*")
    return [p for p in found if p.is_file() and not p.name.endswith(("-wal", "-shm"))]
