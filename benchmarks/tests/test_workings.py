"""Right workings of sums, the first thing wrong in others, and the command on a tiny ladder."""

from __future__ import annotations

import json
import random
import re
import sys

import pytest
from test_ladder import TINY

import steps
import tasks
import workings
from ladder_bench import Bench
from ladder_setting import SETTINGS, with_values


@pytest.mark.parametrize("task", sorted(tasks.TASKS))
def test_the_task_s_own_workings_are_right(task):
    def texts(*, is_varied):
        rng, slips = random.Random(0), 0.2 * is_varied
        drawn = (tasks.make(task, rng, 3, is_varied=is_varied, slips=slips) for _ in range(200))
        return [{"prompt": found.prompt, "completion": found.response} for found in drawn]

    rows = texts(is_varied=True)
    own = [row["completion"] for row in rows]
    assert steps.right_workings(task, rows, own) == 1.0
    # One wrong digit in the first step, before an answer that stays right.
    changed = [
        re.sub(r"\d(?=[,#])", lambda digit: str(9 - int(digit[0])), text, count=1) for text in own
    ]
    assert changed != own
    assert steps.right_workings(task, rows, changed) == 0.0


@pytest.mark.parametrize(
    ("task", "prompt", "expected", "written", "is_right"),
    [
        ("list", "31245:s", "s=12345####12345", "s>12345####12345", True),
        ("program", "a=03;b=04;c=01;c=a+b?c", "c=a+b=03+04=07####07", "c=b+a=04+03=07####07", True),
        (
            "program",
            "a=03;b=04;c=01;c=a+b?c",
            "c=a+b=03+04=07####07",
            "c=b+a=03+04=07####07",
            False,
        ),
        (
            "program",
            "a=03;b=04;c=01;c=b-a?c",
            "c=b-a=04-03=01####01",
            "c=a-b=03-04=01####01",
            False,
        ),
        ("mend", "16+55", "16+55=71####71", "16+55=72x16+55=71####71", True),
        ("mend", "16+55", "16+55=71####71", "16+55=72x16+55=72####72", False),
    ],
)
def test_what_may_be_written_another_way(task, prompt, expected, written, is_right):
    rows = [{"prompt": prompt, "completion": expected}]
    assert steps.right_workings(task, rows, [written]) == is_right


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        ("16+55=71,71+12=83####83", "right"),
        # The digits of 15 and 56 are those of 16 and 55, and so is the sum.
        ("15+56=71,71+12=83####83", "operand"),
        ("16+16=32,32+12=44####44", "operand"),
        ("16+55=72,72+12=84####84", "addition"),
        ("16+55=71####71", "steps"),
        ("16+55=71,71+12=83", "steps"),
        ("16+55=71,71+12####83", "form"),
        ("16+55=71,71+12=83####84", "final"),
        ("", "steps"),
    ],
)
def test_the_first_thing_wrong_is_named(response, kind):
    assert steps.kind_of("16+55+12", response) == kind


def test_a_right_number_is_not_a_right_working():
    problems = [{"prompt": "16+55+12", "answer": "####83"}] * 2
    texts = ["16+55=71,71+12=83####83", "15+56=71,71+12=83####83"]
    number, right, operand, *others = workings.shares(problems, texts)
    assert (number, right, operand) == ("100.0", "50.0", "50.0")
    assert set(others) == {"0.0"}


def test_a_run_that_was_kept_without_it_gets_its_share_of_right_workings(tiny):
    bench = Bench(workings.SETTINGS["sum"], tiny)
    home = bench.folder / "seed-0" / "npd"
    (home / "cell.json").write_text(json.dumps({"rung": "npd", "accuracy": 0.5}))
    cell = bench._cell(home, "npd", 0, "npd", {})
    problems = tasks.read_problems(bench.heldout)
    texts = steps.answers(home / "student", problems, bench.setting.max_response)
    share = steps.right_workings("sum", problems, texts)
    assert cell == {"rung": "npd", "accuracy": 0.5, "workings": share}
    assert json.loads((home / "cell.json").read_text()) == cell


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with one student of random weights, in place of a ladder's."""
    setting = with_values(SETTINGS["sum"], TINY)
    monkeypatch.setitem(workings.SETTINGS, "sum", setting)
    bench = Bench(setting, tmp_path)
    home = bench.folder / "seed-0" / "npd"
    home.mkdir(parents=True)
    bench._model(home / "student", setting.student, 0)
    return tmp_path


def test_the_command_has_a_row_for_each_student(tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["workings.py", "--folder", str(tiny), "--seeds", "1"])
    assert workings.main() == 0
    *_, line = capsys.readouterr().out.splitlines()
    seed, rung, _, *kinds = [cell.strip() for cell in line.strip("|").split("|")]
    assert (seed, rung) == ("0", "npd")
    assert sum(map(float, kinds)) == pytest.approx(100, abs=0.5)


def test_an_empty_folder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["workings.py", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match="run make ladder first"):
        workings.main()
