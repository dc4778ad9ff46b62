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

from npd.errors import DataError

BENCHMARKS = Path(__file__).parents[1]

import pair  # noqa: E402
import pair_out  # noqa: E402
import real  # noqa: E402
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


def arguments_for(room, *arguments, data="questions.jsonl"):
    found = ["--data", room / data, "--models", room / "models", "--folder", room / "runs"]
    return list(map(str, [*found, "--seeds", "1", "--set-pair", *TINY, *arguments]))


def call(program, room, *arguments):
    command = [sys.executable, BENCHMARKS / program, *arguments_for(room, *arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))


@pytest.fixture
def complaint(room, monkeypatch, capsys):
    """What `main` of a benchmark says of its arguments, in this process, before it trains."""

    def complain(main, *arguments, data="questions.jsonl"):
        monkeypatch.setitem(main.__globals__, "one_thread", lambda: None)
        monkeypatch.setattr(sys, "argv", ["bench", *arguments_for(room, *arguments, data=data)])
        assert main() != 0
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.startswith("error: ")
        assert not list((room / "runs").glob("*/start"))
        return said

    return complain


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
    rung = "0.8000 ± 0.2484 | 1.6000 ± 0.4969 | 50.0 ± 0.0 | 35.0 ± 12.4 |  |  | 3.0 ± 0.0 | 1,000"
    assert f"| SFT | 3 | {rung} |" in text
    assert "| as pruned | 1 | 2.0000 |" in text
    assert "load average 1.0 to 2.0" in text
    one = real_page.page(start, cells[:1], LABELS, about())
    assert "| SFT | 1 | 0.9000 | 1.8000 | 50.0 |" in one
    assert "→" not in one


def test_identical_runs_are_called_so():
    start = {"kl": 1.0, "start_kl": 2.0, "agreement": 0.4, "rouge_l": 0.2, "load": [0.0, 0.0]}
    cells = [made_up(rung, 0, 0.9, 0.3) | {"rejected": {}} for rung in ("sft", "npd")]
    text = real_page.page(start, cells, LABELS, about())
    assert "| SFT → NPD | identical runs: nothing was rejected (seeds: 1) |" in text
    assert "+0.0000" not in text
    assert "KL on own text (top 64 and the rest: a lower bound)" in text


def test_a_spread_is_shown_with_as_many_figures_as_it_has():
    assert pair_out.spread([], 2) == ""
    assert pair_out.spread([1234.0]) == "1,234"
    assert pair_out.spread([1.0, 2.0, 3.0], 2, signed=True) == "+2.00 ± 2.48"


# -- Runs ----------------------------------------------------------------------------------------


def test_a_missing_file_is_one_line(complaint):
    assert "missing.jsonl: no such file" in complaint(real.main, data="missing.jsonl")


def test_a_missing_column_is_one_line_that_names_it(room, complaint):
    write_questions(room / "other.jsonl", column="problem")
    said = complaint(real.main, data="other.jsonl")
    assert "question" in said
    assert "problem" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "prompts=100"), "no such setting: prompts (there are num_prompts"),
        (("--set", "epochs=abc"), "epochs=abc: epochs is a whole number, such as 4"),
        (("--set", "lr"), "lr: lr is a number, such as 5e-05"),
        (("--set", "epochs=3"), "epochs=3: give an even number"),
        (("--set-pair", "max_prompt=1.5"), "max_prompt=1.5: max_prompt is a whole number"),
        (("--set-pair", "device=cuda"), "device: its page is of CPU time; leave it cpu"),
        (("--seeds", "0"), "--seeds 0: give at least 1"),
    ],
)
def test_wrong_settings_are_one_line(complaint, arguments, said):
    assert f"error: {said}" in complaint(real.main, *arguments)


def opened(room, data="questions.jsonl", *, column="question", models="models"):
    found = pair.Models(room / models / "teacher", room / models / "pruned")
    setting = pair_out.changed(pair.Setting(), TINY)
    return pair.RealPair(setting, room / "runs", room / data, column, found)


def test_other_questions_and_models_have_another_folder(room):
    write_questions(room / "more.jsonl", count=17)
    write_questions(room / "same.jsonl")
    both = ({"question": f"what is {i}?", "other": f"where is {i}?"} for i in range(16))
    (room / "both.jsonl").write_text("".join(json.dumps(item) + "\n" for item in both))
    shutil.copytree(room / "models", room / "others")
    weights = next((room / "others" / "pruned").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b" ")
    first = opened(room).root
    assert opened(room, "same.jsonl").root == first
    others = [
        opened(room, "more.jsonl").root,
        opened(room, "both.jsonl").root,
        opened(room, "both.jsonl", column="other").root,
        opened(room, models="others").root,
    ]
    assert len({first, *others}) == 5


def test_too_few_questions_is_an_error_that_says_so(room):
    with pytest.raises(DataError, match="the data has 16 questions"):
        opened(room).prompts(0, 100)


def about_of(*arguments):
    args = pair_out.make_parser("").parse_args(["--data", "some/text.jsonl", *arguments])
    args.set = []
    cells = [{"seed": 0, "commit": "abc"}, {"seed": 1, "commit": "abc"}]
    return pair_out.about("real.py", args, cells, {"rungs": ["sft", "npd"]})


def test_the_data_are_named_after_their_file_unless_a_name_is_given():
    plain, named = about_of(), about_of("--data-name", "GSM8K, MIT")
    command = "python benchmarks/real.py --data FILE --seeds 2"
    assert plain["data"] == "text.jsonl"
    assert plain["command"] == f"{command} --rungs sft npd"
    assert named["data"] == "GSM8K, MIT"
    assert named["command"] == f"{command} --data-name 'GSM8K, MIT' --rungs sft npd"


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
    # The start and ten rungs, and each on its own text.
    assert first.stderr.count("cpu_seconds") == 22
    record = json.loads((room / "out" / "real.json").read_text())
    assert [cell["rung"] for cell in record["cells"]] == [
        "sft", "offline", "rollouts", "filter", "npd", "tail", "tail-lambda=1",
        "npd-skip", "every_epoch", "on_policy",
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
