"""Each `npd` command as a person meets it: what it prints, on a terminal too, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import npd
from desk import NPD, Desk
from fake_servers import FakeVllm, make_snapshot
from npd import probe
from npd.config import RunConfig
from npd.control.preparation import prepare
from npd.servers.models import model_settings
from npd.settings import load_config
from npd.store.ledger import Ledger
from npd.store.shards import read_scored
from tiny_run import tiny_settings

VERBS = (
    "run",
    "show",
    "config",
    "doctor",
    "generate",
    "score",
    "train",
    "prepare",
    "export",
    "version",
)


@pytest.fixture
def desk(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Desk(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys)
    made.write()
    return made


def test_debug_shows_the_traceback(desk):
    done = desk.process("show", "nowhere", "--debug")
    assert done.code == 2
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("error: nowhere is not a run directory")
    assert "Traceback" in desk.npd("show", "nowhere", debug=True).err


def test_a_run_tells_what_came_of_it_and_show_tells_it_again(desk):
    done = desk.process("run", "run.yaml")
    assert done.code == 0, done.err
    assert "warn" not in done.err.lower()
    assert "error" not in done.err
    for part in ("step 0", "KL to the teacher", "tokens/s", "samples   asked 40 = trained out",
                 "student   run/student", "report    run/report.html"):  # fmt: skip
        assert part in done.out
    (desk.layout.report_html).unlink()
    assert "report.html" not in desk.npd("show", "run").out
    shown = desk.npd("show", "run", "--report")
    assert shown.out == done.out
    assert desk.layout.report_html.exists()
    exported = desk.npd("export", "run", "final")
    assert exported.code == 0, exported.err
    assert "final" in exported.out
    assert Path("final/model.safetensors").exists()
    assert "exists already" in desk.npd("export", "run", "final").complaint(2)


def test_show_and_export_of_what_is_no_run(desk, tmp_path):
    for command in (["show", str(desk.student)], ["export", str(desk.student), "out"]):
        said = desk.npd(*command).complaint(2)
        assert "is not what npd run writes: give a run directory" in said


def test_export_of_an_unfinished_run(desk):
    done = desk.npd("run", "run.yaml", "--set", "filter.low=50", "--set", "filter.high=60")
    said = done.complaint(1)
    assert "degenerate" in said
    assert "looser filter" in said
    said = desk.npd("export", "run", "out").complaint(2)
    assert "has no student yet" in said
    assert "--resume" in said


def test_config_prints_every_value_with_its_origin_and_reads_its_own_output(desk):
    done = desk.npd("config", "run.yaml", "--set", "train.lr=3e-3", "--set", "data.system='a: #b'")
    assert done.code == 0, done.err
    lines = dict(re.fullmatch(r"(.*?) *  # (.*)", line).groups() for line in done.out.splitlines())
    assert lines["train.lr: 0.003"] == "--set"
    assert lines["train.batch_size: 6"] == "run.yaml"
    assert lines["train.clip: 1.0"] == "default"
    assert desk.npd("config", "npd", "--set", "student=a", "--set", "teacher=b").out.count(
        "# preset npd"
    )
    Path("full.yaml").write_text(done.out)
    sets = ["train.lr=3e-3", "data.system='a: #b'"]
    assert load_config("full.yaml").config == load_config("run.yaml", sets).config


def test_stages_chain_from_file_to_file(desk):
    texts = []
    for command in (
        ["generate", "--out", "rollouts.arrow"],
        ["score", "--rollouts", "rollouts.arrow", "--out", "scored.arrow"],
        ["train", "--data", "scored.arrow", "--out", "trained"],
    ):
        done = desk.npd(command[0], "run.yaml", *command[1:])
        assert done.code == 0, done.err
        texts.append(done.out)
        assert "exists already" in desk.npd(command[0], "run.yaml", *command[1:]).complaint(2)
    assert texts[0] == "20 rollouts in rollouts.arrow\n"
    assert texts[1] == "20 scored rollouts in scored.arrow\n"
    assert re.search(r"kept \d+ of 20 samples\nstep 1  loss", texts[2])
    assert texts[2].endswith("model directory trained\n")
    assert Path("trained/model.safetensors").exists()
    on = ["--set", "student=trained"]
    assert desk.npd("generate", "run.yaml", "--out", "again.arrow", *on).code == 0


@pytest.fixture
def served(desk):
    """A server of a fake model, and a copy of the student and the teacher that passes for it."""
    vocab = model_settings(desk.student).vocabulary
    weights = make_snapshot(desk.folder / "weights", 1, vocab=vocab)
    for name, model in (("student", desk.student), ("teacher", desk.teacher)):
        copied = shutil.copytree(model, desk.folder / f"served-{name}")
        shutil.copy(weights / probe.FILE, copied)
    with FakeVllm(weights, is_locked=True) as server:
        yield server


def test_a_stage_tells_what_servers_hold_and_which_samples_failed(desk, served):
    prompts = [p.prompt_ids.tolist() for p in prepare(load_config("run.yaml").config).prompts]
    served.faults.refuses = lambda ids: any(ids[: len(p)] == p for p in prompts[3:5])
    on = ["--set", f"generate.urls=[{served.url}]", "--set", "generate.engine=vllm",
          "--set", "student=served-student"]  # fmt: skip
    done = desk.npd("generate", "run.yaml", "--out", "rollouts.arrow", *on)
    assert done.code == 0, done.err
    proof, failed, made = done.out.splitlines()
    assert proof.startswith(f"{served.url} holds snapshot v0: log-probs within")
    assert failed.startswith(f"2 of 20 samples failed: {served.url} refuses (400): ")
    assert made == "18 rollouts in rollouts.arrow"
    served.faults.refuses = lambda ids: ids[: len(prompts[0])] == prompts[0]
    on = ["--set", f"score.urls=[{served.url}]", "--set", "score.engine=vllm",
          "--set", "teacher=served-teacher"]  # fmt: skip
    scoring = ["score", "run.yaml", "--rollouts", "rollouts.arrow", *on]
    done = desk.npd(*scoring, "--out", "scored.arrow")
    assert done.code == 0, done.err
    proof, failed, made = done.out.splitlines()
    assert proof.startswith(f"{served.url} holds served-teacher: log-probs within")
    assert failed.startswith(f"1 of 18 samples failed: {served.url} refuses (400): ")
    assert made == "17 scored rollouts in scored.arrow"
    assert len(read_scored(Path("scored.arrow"))) == 17
    served.faults.refuses = lambda ids: any(ids[: len(p)] == p for p in prompts)
    said = desk.npd(*scoring, "--out", "none.arrow").complaint(1)
    assert said.startswith(f"error: no sample could be scored: {served.url} refuses (400): ")
    assert not Path("none.arrow").exists()


def test_a_stage_that_writes_nothing_says_why(desk, served):
    prompts = [p.prompt_ids.tolist() for p in prepare(load_config("run.yaml").config).prompts]
    served.faults.refuses = lambda ids: ids in prompts
    on = ["--set", f"generate.urls=[{served.url}]", "--set", "generate.engine=vllm",
          "--set", "student=served-student"]  # fmt: skip
    said = desk.npd("generate", "run.yaml", "--out", "none.arrow", *on).complaint(1)
    assert said.startswith(f"error: no sample could be written: {served.url} refuses (400): ")
    assert not Path("none.arrow").exists()


def test_prepare_prunes(desk):
    done = desk.npd("prepare", "--prune", str(desk.teacher), "--layers", "2", "--out", "small")
    assert (done.code, done.out) == (0, "model directory small\n")


def test_help_lists_the_verbs_and_is_what_no_arguments_give(desk):
    helped = desk.npd("--help")
    assert helped.code == 0
    assert helped.out == desk.npd().out == desk.npd("-h").out
    listed = re.findall(r"^  (\w+)  +\S.*$", helped.out.partition("Commands:")[2], re.M)
    assert tuple(listed) == VERBS
    assert not re.search(r"^  \w+ .*\.\.\.$", helped.out, re.M), "a summary is cut off"
    for verb in VERBS:
        assert desk.npd(verb, "--help").code == 0


def test_imports_and_help_stay_light():
    heavy = "['torch', 'transformers', 'pydantic', 'numpy', 'rich']"
    check = (
        "import sys, npd, npd.cli; from npd.__main__ import run; assert run(['--help']) == 0; "
        f"found = [m for m in {heavy} if m in sys.modules]; sys.exit(', '.join(found) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version(desk):
    assert json.loads(desk.npd("version").out)["npd"] == npd.__version__


def wait_until(is_so, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_interrupt_drains_saves_and_exits_130(desk):
    desk.write(schedule={"epochs": 400, "reuse": 2, "refresh": {"at_epochs": [2]}})
    process = subprocess.Popen(
        [*NPD, "run", "run.yaml"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = desk.layout.metrics_jsonl
    wait_until(lambda: metrics.exists() and b"grad_norm" in metrics.read_bytes())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert re.search(r"not finished: after step \d+; go on with npd run run.yaml --resume\n", out)
    with Ledger.reader(desk.layout.ledger_db) as ledger:
        assert ledger.conservation().holds
        assert ledger.last_checkpoint() is not None


def test_an_interrupt_before_the_run_exits_130_too(desk):
    code = (
        "import os, signal, sys, npd.settings as s\n"
        "s.load_config = lambda *a: os.kill(os.getpid(), signal.SIGINT)\n"
        "from npd.__main__ import run; sys.exit(run(['config', 'npd']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_cut_pipe_is_no_error(desk):
    command = f"{sys.executable} -m npd config run.yaml | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("name: tiny")
    assert "Traceback" not in done.stderr


def test_on_a_terminal_log_lines_scroll_above_the_panel(desk):
    """Panel and log share the terminal: no line of the log is written into the panel."""
    program = (
        "import logging, sys, threading, time\n"
        "from npd.__main__ import run\n"
        "from npd.observe.live import make_view, LiveState\n"
        "run(['--help'])\n"
        "view = make_view()\n"
        "view.update(LiveState(elapsed=1.0, step=3, title='tiny'))\n"
        "for i in range(3):\n"
        "    time.sleep(0.3)\n"
        "    logging.getLogger('npd.test').warning('line %d [of] many', i)\n"
        "view.message('a message')\n"
        "view.close()\n"
        "logging.getLogger('npd.test').warning('after')\n"
    )
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.DEVNULL,
        stderr=follower,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
    )
    os.close(follower)
    screen = screen_of(read_all(leader))
    assert process.wait(60) == 0
    assert screen[:4] == ["line 0 [of] many", "line 1 [of] many", "line 2 [of] many", "a message"]
    assert screen[4].startswith("╭─ tiny ─")
    assert screen[-2].startswith("╰─")
    assert screen[-1] == "after"
    assert sum(line.startswith("╭") for line in screen) == 1, "the panel was torn"


def test_a_run_on_a_terminal_shows_a_panel_and_one_error(desk):
    leader, follower = pty.openpty()
    command = [*NPD, "run", "run.yaml", "--set", "train.lr=1e30", "--set", "train.clip=1e30"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=follower, env={**os.environ, "TERM": "xterm"}
    )
    os.close(follower)
    screen = screen_of(read_all(leader))
    assert process.wait(60) == 1
    assert sum(line.startswith("╭─ tiny") for line in screen) == 1
    start = next(i for i, line in enumerate(screen) if line.startswith("error: "))
    assert screen[start - 1].startswith("╰")
    assert "Lower train.lr" in "".join(screen[start:])


def read_all(terminal: int) -> str:
    """Everything written to a terminal until its last writer is gone."""
    data = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            part = b""
        if not part:
            os.close(terminal)
            return data.decode()
        data += part


def screen_of(text: str) -> list[str]:
    """What a terminal shows in the end: knows new lines, returns, cursor up and erase line."""
    lines, row, column = [""], 0, 0
    for code, part in re.findall(r"(\x1b\[[0-9;?]*[a-zA-Z])|(\r|\n|[^\x1b\r\n]+)", text):
        if code.endswith("A"):
            row -= int(code[2:-1] or 1)
        elif code == "\x1b[2K":
            lines[row] = ""
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


def test_the_library_runs_a_config_and_raises_what_the_command_says(desk):
    settings = tiny_settings(desk.student, desk.teacher, Path("prompts.jsonl"), Path("library"))
    result = npd.run(npd.RunConfig(**settings))
    assert result.is_done
    assert result.student == Path("library/student")
    assert result.student.is_dir()
    with pytest.raises(npd.NpdError, match="holds a run already") as caught:
        npd.run(npd.RunConfig(**settings))
    assert caught.value.exit_code == 2


def test_home_is_found_in_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = RunConfig(student="~/s", teacher="~/t", run_dir="~/r", schedule={"epochs": 10})
    assert config.student == f"{tmp_path}/s"
    assert config.teacher == f"{tmp_path}/t"
    assert config.directory == tmp_path / "r"
