"""Each `npd` command as a person meets it: what it prints, on a terminal too, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import npd
from cli_fixture import NPD
from fake_servers import FakeVllm, make_snapshot
from npd.config import RunConfig
from npd.config.load import load_config
from npd.control.preflight import prepare
from npd.models import fingerprint
from npd.models.metadata import model_settings
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
    "export",
    "version",
)


def test_debug_shows_the_traceback(shell):
    done = shell.process("show", "nowhere", "--debug")
    assert done.code == 2
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("error: nowhere is not a run directory")
    assert "Traceback" in shell.npd("show", "nowhere", debug=True).err


def test_a_run_tells_what_came_of_it_and_show_tells_it_again(shell):
    shell.write(observe={"report": True})
    done = shell.process("run", "run.yaml")
    assert done.code == 0, done.err
    assert "warn" not in done.err.lower()
    assert "error" not in done.err
    for part in ("step 0", "KL to the teacher", "tokens/s", "samples   asked 40 = trained out",
                 "student   run/student", "report    run/report.html"):  # fmt: skip
        assert part in done.out
    (shell.layout.report_html).unlink()
    assert "report.html" not in shell.npd("show", "run").out
    shown = shell.npd("show", "run", "--report")
    assert shown.out == done.out
    assert shell.layout.report_html.exists()
    exported = shell.npd("export", "run", "final")
    assert exported.code == 0, exported.err
    assert "final" in exported.out
    usual = Path("run.yaml").stat().st_mode
    assert {path.stat().st_mode for path in Path("final").iterdir()} == {usual}
    assert Path("final/model.safetensors").exists()
    assert "already exists" in shell.npd("export", "run", "final").complaint(2)


def test_show_and_export_of_what_is_no_run(shell, tmp_path):
    for command in (["show", str(shell.student)], ["export", str(shell.student), "out"]):
        said = shell.npd(*command).complaint(2)
        assert "is not what npd run writes: give a run directory" in said


def test_a_record_with_what_npd_no_longer_has_says_so(tmp_path, tiny_model_dir, tiny_teacher_dir):
    from npd.control.run_record import load_run
    from npd.errors import ConfigError
    from npd.store.layout import RunLayout
    from tiny_run import tiny_settings

    settings = tiny_settings(tiny_model_dir, tiny_teacher_dir, tmp_path / "p.jsonl", tmp_path)
    settings["schedule"]["refresh"]["in_flight"] = "abort"
    record = {"config": settings, "origins": {}, "versions": {}, "fingerprints": {}}
    RunLayout(tmp_path).config_json.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"in this version .*in_flight: finish.*the version that"):
        load_run(RunLayout(tmp_path))


@pytest.mark.parametrize("kind", ["inline", "local"])
def test_wrong_input_that_a_worker_finds_leaves_no_run(shell, tmp_path, kind):
    """The same command goes on once its input is mended."""
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(shell.student, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    command = ["run", "run.yaml", "--set", f"student={broken}", "--set", f"runtime.kind={kind}"]
    short = ["--set", "schedule.steps=2", "--set", "eval.source=none"]
    shell.npd(*command, *short).complaint(2)
    assert not shell.layout.root.exists()
    if kind == "local":
        return
    shutil.copytree(shell.student, broken, dirs_exist_ok=True)
    done = shell.npd(*command, *short)
    assert done.code == 0, done.err
    assert {*shell.layout.root.iterdir()} <= {*shell.layout.everything}


def test_export_of_an_unfinished_run(shell):
    done = shell.npd("run", "run.yaml", "--set", "filter.low=50", "--set", "filter.high=60")
    said = done.complaint(1)
    assert "degenerate" in said
    assert "looser filter" in said
    said = shell.npd("export", "run", "out").complaint(2)
    assert "has no student yet" in said
    assert "--resume" in said


def test_config_prints_every_value_with_its_origin_and_reads_its_own_output(shell):
    done = shell.npd("config", "run.yaml", "--set", "train.lr=3e-3", "--set", "data.system='a: #b'")
    assert done.code == 0, done.err
    lines = dict(re.fullmatch(r"(.*?) *  # (.*)", line).groups() for line in done.out.splitlines())
    assert lines["train.lr: 0.003"] == "--set"
    assert lines["train.batch_size: 6"] == "run.yaml"
    assert lines["train.clip: 1.0"] == "default"
    assert shell.npd("config", "npd", "--set", "student=a", "--set", "teacher=b").out.count(
        "# preset npd"
    )
    Path("full.yaml").write_text(done.out)
    sets = ["train.lr=3e-3", "data.system='a: #b'"]
    assert load_config("full.yaml").config == load_config("run.yaml", sets).config


def test_stages_chain_from_file_to_file(shell):
    texts = []
    for command in (
        ["generate", "--out", "rollouts.arrow"],
        ["score", "--rollouts", "rollouts.arrow", "--out", "scored.arrow"],
        ["train", "--data", "scored.arrow", "--out", "trained"],
    ):
        done = shell.npd(command[0], "run.yaml", *command[1:])
        assert done.code == 0, done.err
        texts.append(done.out)
        assert "already exists" in shell.npd(command[0], "run.yaml", *command[1:]).complaint(2)
    assert texts[0] == "data: read as prompts\n20 rollouts in rollouts.arrow\n"
    assert texts[1] == "20 scored rollouts in scored.arrow\n"
    assert re.search(r"kept \d+ of 20 samples\nstep 1  loss", texts[2])
    assert texts[2].endswith("model directory trained\n")
    assert Path("trained/model.safetensors").exists()
    on = ["--set", "student=trained"]
    assert shell.npd("generate", "run.yaml", "--out", "again.arrow", *on).code == 0


@pytest.fixture
def served(shell):
    """A server of a fake model, and a copy of the student and the teacher that passes for it."""
    vocab = model_settings(shell.student).vocabulary
    weights = make_snapshot(shell.folder / "weights", 1, vocab=vocab)
    for name, model in (("student", shell.student), ("teacher", shell.teacher)):
        copied = shutil.copytree(model, shell.folder / f"served-{name}")
        shutil.copy(weights / fingerprint.FILE, copied)
    with FakeVllm(weights, is_locked=True) as server:
        yield server


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_a_stage_wants_its_device(shell, kind):
    """Each stage is in this process, whatever `runtime.kind` is."""
    device = ("--set", "runtime.device=xpu", "--set", f"runtime.kind={kind}")
    for verb in (("score", "--rollouts", "r.arrow"), ("train", "--data", "r.arrow")):
        told = shell.npd(verb[0], "run.yaml", *verb[1:], "--out", "new", *device)
        assert "no device of kind xpu that torch can use: set runtime" in told.complaint(2)


def test_a_stage_tells_what_servers_hold_and_which_samples_failed(shell, served):
    prompts = [p.prompt_ids.tolist() for p in prepare(load_config("run.yaml").config).prompts]
    served.faults.refuses = lambda ids: any(ids[: len(p)] == p for p in prompts[3:5])
    on = ["--set", f"generate.urls=[{served.url}]", "--set", "generate.engine=vllm",
          "--set", "student=served-student"]  # fmt: skip
    done = shell.npd("generate", "run.yaml", "--out", "rollouts.arrow", *on)
    assert done.code == 0, done.err
    form, proof, failed, made = done.out.splitlines()
    assert form == "data: read as prompts"
    assert proof.startswith(f"{served.url} serves snapshot v0: log-probs within")
    assert failed.startswith(f"2 of 20 samples failed: {served.url} refuses (400): ")
    assert made == "18 rollouts in rollouts.arrow"
    served.faults.refuses = lambda ids: ids[: len(prompts[0])] == prompts[0]
    on = ["--set", f"score.urls=[{served.url}]", "--set", "score.engine=vllm",
          "--set", "teacher=served-teacher"]  # fmt: skip
    scoring = ["score", "run.yaml", "--rollouts", "rollouts.arrow", *on]
    done = shell.npd(*scoring, "--out", "scored.arrow")
    assert done.code == 0, done.err
    proof, failed, made = done.out.splitlines()
    assert proof.startswith(f"{served.url} serves served-teacher: log-probs within")
    assert failed.startswith(f"1 of 18 samples failed: {served.url} refuses (400): ")
    assert made == "17 scored rollouts in scored.arrow"
    assert len(read_scored(Path("scored.arrow"))) == 17
    served.faults.refuses = lambda ids: any(ids[: len(p)] == p for p in prompts)
    said = shell.npd(*scoring, "--out", "none.arrow").complaint(1)
    assert said.startswith(f"error: no sample could be scored: {served.url} refuses (400): ")
    assert not Path("none.arrow").exists()


def test_a_stage_that_writes_nothing_says_why(shell, served):
    prompts = [p.prompt_ids.tolist() for p in prepare(load_config("run.yaml").config).prompts]
    served.faults.refuses = lambda ids: ids in prompts
    on = ["--set", f"generate.urls=[{served.url}]", "--set", "generate.engine=vllm",
          "--set", "student=served-student"]  # fmt: skip
    said = shell.npd("generate", "run.yaml", "--out", "none.arrow", *on).complaint(1)
    assert said.startswith(f"error: no sample could be generated: {served.url} refuses (400): ")
    assert not Path("none.arrow").exists()


def test_help_lists_the_verbs_and_is_what_no_arguments_give(shell):
    helped = shell.npd("--help")
    assert helped.code == 0
    assert helped.out == shell.npd().out == shell.npd("-h").out
    listed = re.findall(r"^  (\w+)  +\S.*$", helped.out.partition("Commands:")[2], re.M)
    assert tuple(listed) == VERBS
    assert not re.search(r"^  \w+ .*\.\.\.$", helped.out, re.M), "a summary is cut off"
    for verb in VERBS:
        assert shell.npd(verb, "--help").code == 0


def test_imports_and_help_stay_light():
    heavy = "['torch', 'transformers', 'pydantic', 'numpy', 'rich']"
    check = (
        "import sys, npd, npd.cli; from npd.__main__ import run; assert run(['--help']) == 0; "
        f"found = [m for m in {heavy} if m in sys.modules]; sys.exit(', '.join(found) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_of_the_current_directory_is_run(shell):
    """But for what `python -m` itself imports before npd is found."""
    for module in ("json", "logging", "typing", "threading", "typer", "numpy", "yaml", "random"):
        (shell.folder / f"{module}.py").write_text(f"raise SystemExit('{module} was run')")
    done = shell.process("config", "run.yaml")
    assert done.code == 0, done.err


def test_version(shell):
    assert json.loads(shell.npd("version").out)["npd"] == npd.__version__
    assert shell.npd("--version") == (0, f"npd {npd.__version__}\n", "")


def test_an_interrupt_before_the_run_exits_130_too(shell):
    code = (
        "import os, signal, sys, npd.config.load as s\n"
        "s.load_config = lambda *a: os.kill(os.getpid(), signal.SIGINT)\n"
        "from npd.__main__ import run; sys.exit(run(['config', 'npd']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_cut_pipe_is_no_error(shell):
    command = f"{sys.executable} -m npd config run.yaml | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("name: tiny")
    assert "Traceback" not in done.stderr


def test_on_a_terminal_log_lines_scroll_above_the_panel(shell):
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


def test_a_run_on_a_terminal_shows_a_panel_and_one_error(shell):
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


def test_the_library_runs_a_config_and_raises_what_the_command_says(shell):
    settings = tiny_settings(shell.student, shell.teacher, Path("prompts.jsonl"), Path("library"))
    result = npd.run(npd.RunConfig(**settings))
    assert result.is_done
    assert result.student == Path("library/student")
    assert result.student.is_dir()
    with pytest.raises(npd.NpdError, match="holds a run already") as caught:
        npd.run(npd.RunConfig(**settings))
    assert caught.value.exit_code == 2


def test_the_first_run_may_be_in_three_threads_at_once(shell):
    """Each gets as far as its data, which is not there: past the first import of transformers."""
    (shell.folder / "prompts.jsonl").unlink()
    script = """if True:
        import threading, yaml, npd
        settings = yaml.safe_load(open("run.yaml"))
        def run(found):
            start.wait()
            try:
                npd.run(npd.RunConfig(**settings))
            except Exception as error:
                found.append(type(error).__name__)
        start, found = threading.Barrier(3), []
        threads = [threading.Thread(target=run, args=(found,)) for _ in range(3)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        print(*found)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["DataError"] * 3, done.stderr


def test_home_is_found_in_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = RunConfig(student="~/s", teacher="~/t", run_dir="~/r", schedule={"epochs": 10})
    assert config.student == f"{tmp_path}/s"
    assert config.teacher == f"{tmp_path}/t"
    assert config.directory == tmp_path / "r"
