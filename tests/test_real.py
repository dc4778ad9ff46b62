"""ROUGE-L by hand and by its properties, the page of made-up cells, and a whole tiny ladder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import pair_out  # noqa: E402
import real_page  # noqa: E402
import rouge  # noqa: E402

TINY = ["num_heldout=2", "warm_prompts=4", "warm_batch=4", "max_prompt=200", "max_response=6"]
LABELS = {"sft": "SFT", "npd": "NPD"}


def write_questions(path, column="question", count=16):
    lines = (json.dumps({column: f"what is number {i}?"}) + "\n" for i in range(count))
    path.write_text("".join(lines))
    return path


@pytest.fixture
def room(tmp_path, tiny_model_dir, tiny_teacher_dir):
    """A folder with questions and the two models, tiny ones."""
    shutil.copytree(tiny_teacher_dir, tmp_path / "models" / "teacher")
    shutil.copytree(tiny_model_dir, tmp_path / "models" / "pruned")
    write_questions(tmp_path / "questions.jsonl")
    return tmp_path


def call(program, room, *arguments, data="questions.jsonl"):
    command = [sys.executable, BENCHMARKS / program, "--data", room / data]
    command += ["--models", room / "models", "--folder", room / "runs", "--seeds", "1"]
    command += ["--set-pair", *TINY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))


# -- ROUGE-L -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        # Lin (2004): "police kill the gunman" has "police the gunman" in common with the
        # reference, 3 of 4 words on both sides; "the gunman kill police" only two.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        # Precision 3/3, recall 3/6.
        ("He has 5", "So he now has about 5.", 2 / 3),
        ("5 + 3 = 8", "5 plus 3 is 8", 6 / 8),
        ("one", "two", 0.0),
        ("", "two", 0.0),
        ("", "...", 1.0),
    ],
)
def test_rouge_l_by_hand(text, reference, expected):
    assert rouge.rouge_l(text, reference) == pytest.approx(expected)


LETTERS = st.text("abc", max_size=7)


def is_subsequence(part, whole):
    rest = iter(whole)
    return all(item in rest for item in part)


@given(LETTERS, LETTERS)
def test_the_common_length_is_that_of_the_longest_common_subsequence(a, b):
    every = (part for n in range(len(a), -1, -1) for part in combinations(a, n))
    assert rouge.common_length(a, b) == len(next(p for p in every if is_subsequence(p, b)))


@given(LETTERS.map(" ".join), LETTERS.map(" ".join))
def test_rouge_l_is_symmetric_and_1_only_for_the_same_words(a, b):
    found = rouge.rouge_l(a, b)
    assert found == rouge.rouge_l(b, a)
    assert 0 <= found <= 1
    assert (found == 1) == (rouge.words(a) == rouge.words(b))


# -- The page ------------------------------------------------------------------------------------


def made_up(rung, seed, kl, rouge_l):
    return {
        "rung": rung, "seed": seed, "kl": kl, "agreement": 0.5, "rouge_l": rouge_l, "drift": None,
        "own_kl": 2 * kl,
        "rejected": {"delta_low": 3}, "asked": 100, "response_tokens": 1000, "cpu_seconds": 60.0,
        "load": [1.0, 2.0],
    }  # fmt: skip


def about():
    host = {"cpu": "cpu", "cores": 2, "memory_gib": 8, "load": [1, 1, 1]}
    return {
        "setting": {"warm_prompts": 4, "num_heldout": 2}, "machine": host, "versions": {"npd": "0"},
        "command": "python", "commits": ["abc"], "data": "made up",
    }  # fmt: skip


def test_the_page_pairs_by_seed_and_says_how_sure_it_is():
    start = {"kl": 1.0, "start_kl": 2.0, "agreement": 0.4, "rouge_l": 0.2, "load": [0.0, 0.0]}
    cells = [
        made_up("sft", 0, 0.9, 0.30), made_up("sft", 1, 0.8, 0.40), made_up("sft", 2, 0.7, 0.35),
        made_up("npd", 0, 0.6, 0.40), made_up("npd", 1, 0.4, 0.40), made_up("npd", 2, 0.2, 0.50),
    ]  # fmt: skip
    text = real_page.page(start, cells, LABELS, about())
    # Differences -0.3, -0.4, -0.5: 4.303 x 0.1 / sqrt(3) from a table of t.
    step = "-0.4000 ± 0.2484 | 3 of 3 | -0.8000 ± 0.4969 | 3 of 3 | +8.3 ± 19.0 | 2 of 3 |"
    assert f"| SFT → NPD | {step}" in text
    rung = "0.8000 ± 0.2484 | 1.6000 ± 0.4969 | 50.0 ± 0.0 | 35.0 ± 12.4 |  | 3.0 ± 0.0 | 1,000 |"
    assert f"| SFT | 3 | {rung}" in text
    assert "| as pruned | 1 | 2.0000 |" in text
    assert "load average 1.0 to 2.0" in text
    one = real_page.page(start, cells[:1], LABELS, about())
    assert "| SFT | 1 | 0.9000 | 1.8000 | 50.0 |" in one
    assert "→" not in one


def test_a_spread_is_shown_with_as_many_figures_as_it_has():
    assert pair_out.spread([], 2) == ""
    assert pair_out.spread([1234.0]) == "1,234"
    assert pair_out.spread([1.0, 2.0, 3.0], 2, signed=True) == "+2.00 ± 2.48"


# -- Runs ----------------------------------------------------------------------------------------


def test_a_missing_file_is_one_line(room):
    done = call("real.py", room, data="missing.jsonl")
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --data")
    assert "missing.jsonl: no such file" in done.stderr


def test_a_missing_column_is_one_line_that_names_it(room):
    write_questions(room / "other.jsonl", column="problem")
    done = call("real.py", room, data="other.jsonl")
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "question" in done.stderr
    assert "problem" in done.stderr


def test_too_few_questions_and_unknown_settings_are_one_line(room):
    few = call("real.py", room, "--set", "num_prompts=100")
    assert few.stderr.splitlines()[-1].startswith("error: the data has 16 questions")
    unknown = call("real.py", room, "--set", "prompts=100")
    assert unknown.stderr.startswith("error: no such setting: prompts (there are num_prompts")


@pytest.mark.slow
def test_a_tiny_ladder_runs_once_and_is_kept(room):
    def run():
        done = call(
            "real.py", room, "--set", "num_prompts=4", "epochs=2", "batch=2",
            "--out", room / "out",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done

    first = run()
    assert (
        first.stderr.count("cpu_seconds") == 12
    )  # the start and five rungs, and each on its own text
    record = json.loads((room / "out" / "real.json").read_text())
    assert [cell["rung"] for cell in record["cells"]] == [
        "sft", "offline", "rollouts", "filter", "npd",
    ]  # fmt: skip
    for cell in record["cells"]:
        assert cell["kl"] >= 0
        assert cell["own_kl"] >= 0
        assert 0 <= cell["rouge_l"] <= 1
        assert len(cell["answers"]) == 2
        assert cell["asked"] == 8
    assert str(room) not in (room / "out" / "real.json").read_text()
    assert "| SFT on teacher text → + one refresh (NPD) |" in (room / "out" / "real.md").read_text()
    again = run()
    assert "cpu_seconds" not in again.stderr
