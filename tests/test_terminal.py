"""What reaches a terminal cannot act on it, and a stream that takes nothing ends nothing."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from cli_fixture import NPD, Shell
from npd.__main__ import outcome
from npd.observe.live import LiveState, RichView, WorkerState, make_view
from npd.observe.report.page import text as html_text
from npd.terminal import Stream, lenient_streams, printable, safe_text, say_json

EVIL = "\x1b[2J\x1b]0;title\x07 \r\x9b31m \u202egnp.exe\u2066 \x00 \x7f [red]x[/red] \ud800 :smile:"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("plain, ünïcode, 数, 🙂\tand\n", "plain, ünïcode, 数, 🙂\tand\n"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\rb\x08\x00", "a\\rb\\x08\\x00"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),
        ("\u202e\u2066\u200f\u061c", "\\u202e\\u2066\\u200f\\u061c"),
        ("\u2028\ufeff\ud800", "\\u2028\\ufeff\\ud800"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_what_acts_on_a_terminal_is_written_out(text, written):
    assert printable(text) == written
    assert printable(written) == written


def test_json_is_json_still(capsys):
    found = {"n": 1, "says": [f'api_key="abc-canary" {EVIL}', {"token_count": 5}]}
    say_json(found)
    printed = capsys.readouterr().out
    assert "canary" not in printed
    assert json.loads(printed) == {
        "n": 1,
        "says": [safe_text(str(found["says"][0])), {"token_count": 5}],
    }


class Terminal(io.StringIO):
    """A terminal; `is_gone` once nobody is there any more."""

    is_gone = False
    encoding = "utf-8"

    def isatty(self):
        return True

    def write(self, text):
        if self.is_gone:
            raise OSError(5, "Input/output error")
        return super().write(text)

    def flush(self):
        if self.is_gone:
            raise OSError(5, "Input/output error")


def test_the_panel_takes_text_as_text():
    terminal = Terminal()
    view = make_view(terminal)
    view.message(EVIL)
    view.update(LiveState(0.0, 0, title=EVIL, workers=(WorkerState("w", "generate", 0.0),)))
    view.close()
    shown = terminal.getvalue()
    assert "[red]x[/red]" in shown
    assert ":smile:" in shown
    for evil in (
        "\x1b[2J",
        "\x1b]0;",
        "\x07",
        "\x9b",
        "\u202e",
        "\u2066",
        "\x00",
        "\x7f",
        "\ud800",
    ):
        assert evil not in shown


def test_a_panel_whose_terminal_goes_ends_nothing():
    terminal = Terminal()
    view = RichView(terminal)
    terminal.is_gone = True
    view.message("unseen")
    view.update(LiveState(0.0, 0))
    view.close()


def test_the_report_shows_what_turns_text_around():
    assert html_text("a\u202eb\x1b\x9b") == "a\\u202eb␛\\x9b"


def test_lines_and_errors_of_the_command_line(capsys):
    from npd.errors import RunError
    from npd.terminal import say

    def work():
        say(EVIL)
        raise RunError(EVIL)

    assert outcome(work) == 1
    found = capsys.readouterr()
    assert found.out == safe_text(EVIL) + "\n"
    assert found.err.startswith("error: \\x1b[2J")
    for text in (found.out, found.err):
        assert printable(text) == text


def test_a_stream_takes_what_it_can():
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = Stream(ascii_only)
    assert stream.write("≠ é") == len("\\u2260 \\xe9")
    stream.flush()
    assert ascii_only.buffer.getvalue() == b"\\u2260 \\xe9"
    full = Terminal()
    full.is_gone = True
    stream = Stream(full)
    stream.write("x")
    stream.flush()
    assert stream.error.errno == 5


def test_streams_are_given_back():
    before = sys.stdout, sys.stderr
    with lenient_streams() as out:
        assert sys.stdout is out
    assert (sys.stdout, sys.stderr) == before


# Real processes, with streams that really fail.


@pytest.fixture
def shell(tmp_path, monkeypatch, tiny_model_dir, tiny_teacher_dir, capsys):
    monkeypatch.chdir(tmp_path)
    made = Shell(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys)
    made.write(schedule={"epochs": None, "steps": 2, "refresh": "never"})
    return made


def read_one_line(command):
    """The exit code of a command whose outputs are read by `head -1`, and that line."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        line = process.stdout.readline()
        process.stdout.close()
        return process.wait(600), line


def without_streams(command):
    """The exit code of a command whose standard streams are closed (`>&- 2>&-`)."""
    closing = f"exec {' '.join(command)} <&- >&- 2>&-"
    return subprocess.run(["sh", "-c", closing], timeout=600, check=False).returncode


def on_full_disk(command):
    with open("/dev/full", "w") as full:
        return subprocess.run(command, stdout=full, stderr=full, timeout=600).returncode


@pytest.mark.parametrize("streams", [lambda c: read_one_line(c)[0], without_streams, on_full_disk])
def test_a_run_that_nobody_hears_finishes(shell, streams):
    shell.write(observe={"report": True})
    assert streams([*NPD, "run", "run.yaml"]) == 0
    assert shell.layout.student.is_dir()
    assert shell.layout.report_html.exists()


def test_short_commands_end_quietly(shell):
    config = [*NPD, "config", "run.yaml"]
    code, line = read_one_line(config)
    assert code == 0
    assert line.startswith("name: tiny")
    assert read_one_line([*NPD, "--help"])[0] == 0
    with open("/dev/full", "w") as full:
        done = subprocess.run(config, stdout=full, stderr=subprocess.PIPE, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write to standard output (No space left")
    assert len(done.stderr.splitlines()) == 1
    assert without_streams(config) == 0


LATER = """
import os, sys
from npd.__main__ import outcome
def work():
    with open(sys.argv[1], "w") as file:
        os.write(2, b"stray")
        file.write("kept")
sys.exit(outcome(work))
"""


def test_files_opened_later_are_not_taken_for_closed_streams(tmp_path):
    script, path = tmp_path / "later.py", tmp_path / "file"
    script.write_text(LATER)
    assert without_streams([sys.executable, str(script), str(path)]) == 0
    assert path.read_text() == "kept"
