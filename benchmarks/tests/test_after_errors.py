"""What should stand after an error, by hand and by properties, and the command on a tiny ladder."""

from __future__ import annotations

import random
import sys

import pytest
from test_ladder import TINY

import after_errors
import tasks
from after_errors import places
from ladder_bench import Bench
from ladder_setting import SETTINGS, with_values


def expected(task, prompt, response):
    """Characters before and after the first error, each run of them a word; and how many inside.

    Where one of several may stand, the one that does, or the first.
    """
    found = dict.fromkeys(after_errors.KINDS, "")
    last = -1
    for place, characters, kind in places(task, prompt, response):
        assert bool(characters) == (kind != "inside")
        written = response[place]
        character = written if written in characters else (characters or "_")[0]
        found[kind] += " " * (place > last + 1 and bool(found[kind])) + character
        last = place
    return found["before"], found["after"], len(found["inside"])


@pytest.mark.parametrize(
    ("task", "prompt", "response", "before", "after", "inside"),
    [
        ("sum", "16+55+12", "16+55=71,71+12=83####83", "16 55 71 71 12 83", "", 0),
        # 16 and 55 are 71: its second digit is wrong, and 72 and 12 are 84 all the same.
        ("sum", "16+55+12", "16+55=72,72+12=84####84", "16 55 71", "72 12 84", 0),
        # After a wrong first digit nothing of that part is asked any more.
        ("sum", "16+55+12", "16+55=81,81+12=94####94", "16 55 7", "81 12 93", 1),
        ("sum", "16+55+12", "16+55=71,71+12####83", "16 55 71", "", 0),
        # Digits exchanged while copying: 15 is none of the numbers, 56 none of those left.
        ("sum", "16+55+12", "15+56=71,71+12=83####83", "12", "55 71 71 12 83", 0),
        # A sum that is too short is right as far as it goes, and what follows is read by itself.
        ("sum", "99+55+12", "99+55=1,1+12=13####13", "99 55 1", "1 12 13", 0),
        ("list", "31245:sr", "s=12345,r>54321####54321", "12345 54321", "", 0),
        ("list", "31245:sr", "s=12354,r>45321####45321", "1234", "45321", 1),
        ("list", "31245:sr", "s=1234,r>45321####45321", "", "", 0),
        ("program", "a=03;b=04;c=a+b;a=c-b?a", "c=b+a=04+03=07,a=c-b=07-04=03####03",
         "04+03 07 07-04 03", "", 0),
        # A wrong copy, then what follows from what is written: 05 + 03, and c is 08 from there on.
        ("program", "a=03;b=04;c=a+b;a=c-b?a", "c=b+a=05+03=08,a=c-b=08-04=04####04",
         "04", "08 08-04 04", 3),
    ],
)  # fmt: skip
def test_what_should_stand_is_what_follows_from_what_is_written(
    task, prompt, response, before, after, inside
):
    assert expected(task, prompt, response) == (before, after, inside)


@pytest.mark.parametrize("task", ["sum", "list", "program"])
def test_a_right_text_is_as_expected_everywhere(task):
    rng = random.Random(0)
    for _ in range(100):
        problem = tasks.make(task, rng, 3, is_varied=True)
        found = list(places(task, problem.prompt, problem.response))
        assert len(found) >= 2 * (2 if task == "sum" else 3)
        for place, characters, kind in found:
            assert problem.response[place] in characters
            assert kind == "before"


def test_the_command_says_it_of_each_student(tmp_path, monkeypatch, capsys):
    setting = with_values(SETTINGS["list"], TINY)
    Bench(setting, tmp_path).seed(0, ["sft"])
    monkeypatch.setattr(after_errors, "one_thread", lambda: None)
    command = ["after_errors.py", "--folder", tmp_path, "--task", "list", "--set", *TINY]
    out = tmp_path / "out" / "page.md"
    options = ["--rungs", "start", "sft", "none", "--out", out]
    monkeypatch.setattr(sys, "argv", [str(word) for word in [*command, *options]])
    assert after_errors.main() == 0
    assert out.read_text() in capsys.readouterr().out
    rows = [line.split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")]
    means, each = rows[2:5], rows[7:]
    assert [cells[0] for cells in means] == ["| teacher", "| start", "| sft"]
    # One seed: its row is the mean; the same tokens for all.
    assert [cells[2:] for cells in each] == [cells[2:] for cells in means]
    assert len({tuple(cells[6:10]) for cells in each}) == 1
    assert sum(map(float, each[0][6:10])) == pytest.approx(100, abs=0.3)
    # The teacher is no distance from itself.
    assert [cells[10] == "" for cells in each] == [True, False, False]
    assert "--task list --seeds 5 --rungs start sft --set num_prompts" in out.read_text()
    monkeypatch.setattr(sys, "argv", ["after_errors.py", "--folder", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="no start of sum: run the ladder first"):
        after_errors.main()
