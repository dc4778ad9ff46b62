"""RL afterwards: pass@k against all ways to choose, the page by hand, the example's rewards and
errors, and two real steps of GRPO."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import torch

import figures
import grpo
import ladder
import policy
import rl
import rl_page
from ladder_bench import Bench
from ladder_setting import SUM, Shape, with_values
from tasks import make_tokenizer

ROOT = Path(__file__).parents[2]
TINY = [
    "num_prompts=12", "num_heldout=6", "teacher_problems=12", "teacher_epochs=1", "warm_epochs=1",
    "epochs=2", "batch=6", "teacher=[2,32,2]", "student=[1,32,2]", "max_response=12",
]  # fmt: skip
QUICK = ["steps=2", "prompts=2", "samples=2", "every=1", "problems=3", "draws=4"]


def has(library):
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"needs {library}")


# -- Measures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 4, 6])
def test_pass_at_k_is_the_share_of_all_choices_that_hold_a_right_one(draws):
    for right in range(draws + 1):
        outcomes = [True] * right + [False] * (draws - right)
        for k in range(1, draws + 1):
            share = mean(any(chosen) for chosen in combinations(outcomes, k))
            assert policy.pass_at(draws, right, k) == pytest.approx(share)


def student(seed=0):
    """A random student in memory with the tasks' tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.5, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


PROBLEMS = [{"prompt": prompt, "answer": "####1"} for prompt in ("12+34", "7", "99+11+5")]


def test_entropy_is_that_of_the_policy_at_each_written_token():
    model, tokenizer = student()
    texts, entropy = policy.answers(model, tokenizer, PROBLEMS, 8, is_greedy=True)
    found = []
    for problem, text in zip(PROBLEMS, texts, strict=True):
        alone, _ = policy.answers(model, tokenizer, [problem], 8, is_greedy=True)
        assert alone == [text]  # padding changes nothing
        asked = [{"role": "user", "content": problem["prompt"]}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        for _ in range(8):
            logp = model(torch.tensor([ids])).logits[0, -1].detach().log_softmax(-1)
            found.append(float(-(logp.exp() * logp).sum()))
            ids.append(int(logp.argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    assert entropy == pytest.approx(mean(found), rel=1e-4)


def test_draws_repeat_themselves_and_leave_the_generator_alone():
    model, tokenizer = student()
    model.train()
    state = torch.get_rng_state()
    again = [
        policy.try_often(model, tokenizer, PROBLEMS, 8, draws=4, seed=seed) for seed in (0, 0, 1)
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert again[0] == again[1] != again[2]
    assert len(again[0].right) == len(PROBLEMS)


def test_tries_are_counted_problem_by_problem():
    found = policy.Tried((4, 1, 0), 4, 0.5)
    assert found.passed(1) == pytest.approx((1 + 1 / 4) / 3)
    assert found.passed(4) == pytest.approx(2 / 3)
    assert rl.summary(found) == {"pass": {"1": pytest.approx(5 / 12), "4": 2 / 3}, "entropy": 0.5}


# -- The example --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7+5=12 #### 12", "12"),
        ("#### 1 or rather ####2\n", "2"),
        (r"thus \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1}, no: \boxed {2}", "2"),
        (r"\boxed{1} #### 2", "2"),
        (r"#### 2 \boxed{1}", "1"),
        ("#### 42\n\nDone.", "42"),
        ("####\n42\r\nDone.", "42"),
        ("####", ""),
        (r"cut off \boxed{\frac{1}{", None),
        ("12", None),
        ("", None),
    ],
)
def test_the_last_answer_of_a_text(text, answer):
    assert grpo.last_answer(text) == answer


def test_a_reward_is_for_the_last_answer_whatever_form_the_columns_have():
    texts = ["####1 ####2", "2", r"\boxed{2}", "####1"]
    assert grpo.reward(texts, ["2"] * 4) == [1.0, 0.0, 1.0, 0.0]
    turns = [[{"role": "assistant", "content": text}] for text in texts]
    assert grpo.reward(turns, ["so 1+1=2\n#### 2"] * 4, prompts=[]) == [1.0, 0.0, 1.0, 0.0]
    assert rl.reward(turns, ["####2"] * 4) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "answer", "worth"),
    [
        ("#### 1,080", "1080", 1),
        ("#### 1080", "1,080", 1),
        ("#### -1,234,567.5", "-1234567.5", 1),
        ("#### 42\n\nDone.", "42", 1),
        ("#### 42.", "42", 1),
        ("#### $42", "42", 1),
        ("#### $1,080.", "so it is\n#### 1080", 1),
        (r"\boxed{\$42}", "$42$", 1),
        ("#### 1,2", "12", 0),
        ("#### (1,080)", "(1080)", 0),
        ("#### 4.2", "42", 0),
        ("####", "####", 0),
        ("#### .", "$", 0),
    ],
)
def test_signs_around_a_number_are_not_part_of_it(monkeypatch, text, answer, worth):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert grpo.reward([text], [answer]) == [worth]


def test_math_verify_is_asked_about_answers_whose_texts_differ(monkeypatch):
    asked = []

    def verify(gold, target):
        asked.append((gold, target))
        return gold == [0.5] == target

    values = {"$0.5$": [0.5], r"$\frac{1}{2}$": [0.5]}
    stub = SimpleNamespace(parse=lambda text: values.get(text, []), verify=verify)
    monkeypatch.setitem(sys.modules, "math_verify", stub)
    texts = [r"\boxed{\frac{1}{2}}.", "#### 0.5", "#### 0.6", "no answer"]
    assert grpo.reward(texts, ["$0.5$"] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert asked == [([0.5], [0.5]), ([0.5], [])]


def test_a_prompt_becomes_the_conversation_that_npd_makes_of_it():
    asked = [{"role": "user", "content": "1+1"}]
    told = {"role": "system", "content": "Add."}
    assert grpo.conversation("1+1", None) == asked
    assert grpo.conversation("1+1", "Add.") == grpo.conversation(asked, "Add.") == [told, *asked]
    assert grpo.conversation([told, *asked], "Other.") == [told, *asked]


def test_the_student_is_found_in_a_run_and_by_itself(tmp_path):
    for folder in (tmp_path / "run" / "student", tmp_path / "model"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"")
    assert grpo.find_student(tmp_path / "run") == tmp_path / "run" / "student"
    assert grpo.find_student(tmp_path / "model") == tmp_path / "model"
    with pytest.raises(SystemExit, match=r"no student in .*: finish the run first"):
        grpo.find_student(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("", "is empty"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "1+1", "answer": 2}\n{"prompt": "1+1"}', "line 2: has no 'answer'"),
        ('{"question": "1+1", "answer": "2"}', "line 1: has no 'prompt'"),
        ("[]", "line 1: has no 'prompt'"),
        ('{"prompt": 5, "answer": 2}', "line 1: 'prompt' is neither text nor a list of messages"),
        ('\n{"prompt": {}, "answer": 2}', "line 2: 'prompt' is neither"),
        ('{"prompt": ["a"], "answer": 2}', "line 1: 'prompt' is neither"),
        ('{"prompt": [{"role": "user"}], "answer": 2}', "line 1: 'prompt' is neither"),
        ('{"prompt": "1+1", "answer": 2}\n{"prompt": "\xe9"}', "line 2: not UTF-8"),
    ],
)
def test_problems_that_cannot_be_used_are_told_in_one_line(tmp_path, text, message):
    path = tmp_path / "problems.jsonl"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(SystemExit, match=message) as raised:
        grpo.read_problems(path)
    assert "\n" not in str(raised.value)


def test_an_answer_may_be_a_number_and_other_columns_are_left(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "1+1", "answer": 0, "completion": "1+1=2"}\n\n')
    assert grpo.read_problems(path) == [{"prompt": "1+1", "answer": "0"}]


def test_only_a_newline_ends_a_record(tmp_path):
    path, row = tmp_path / "problems.jsonl", {"prompt": "1\u2028+\x851", "answer": "2"}
    path.write_text(f"{json.dumps(row, ensure_ascii=False)}\r\n" * 2, encoding="utf-8", newline="")
    assert grpo.read_problems(path) == [row] * 2


def test_an_out_that_is_a_file_is_told_in_one_line(tmp_path, monkeypatch):
    model, problems, out = tmp_path / "model", tmp_path / "problems.jsonl", tmp_path / "out"
    model.mkdir()
    for path in (model / "config.json", model / "model.safetensors", out):
        path.write_text("")
    problems.write_text('{"prompt": "1+1", "answer": 2}')
    monkeypatch.setattr(sys, "argv", [*map(str, ("grpo.py", model, problems, out)), "--prompts=1"])
    with pytest.raises(SystemExit, match=r"^\S+out is not a directory: name a new one$"):
        grpo.main()


def test_without_trl_the_example_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['trl'] = None; import grpo; from pathlib import Path;"
        "grpo.make_trainer(Path('x'), [], Path('y'))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "examples")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert "pip install 'trl>=1.16'" in done.stderr
    assert done.stderr.count("\n") == 1


# -- The page -----------------------------------------------------------------------------------


def cell(rung, seed, start, end, **values):
    tried = {"pass": {"1": start, "4": start}, "entropy": 0.1}
    found = {
        "rung": rung, "seed": seed, "curve": [[0, start], [10, end]], "before": tried,
        "after": {"pass": {"1": end, "4": end}, "entropy": 0.05}, "reward": [start] * 19 + [end],
        "entropy": [0.1] * 20, "no_signal": [0.5] * 20, "cpu_seconds": 60.0, "commit": "c0ffee",
    }  # fmt: skip
    return found | values


def record():
    gains = {"sft": (0.02, 0.04), "npd": (0.05, 0.09), "no_filter": (0.05, 0.05)}
    cells = [cell(rung, seed, 0.5, 0.5 + added)
             for rung, values in gains.items() for seed, added in enumerate(values)]  # fmt: skip
    return {
        "setting": {"task": "sum", "num_heldout": 1000}, "rl": asdict(rl.Rl()), "cells": cells,
        "ladder": [{"rung": rung, "seed": seed, "asked": 200, "rejected": {"a": 1, "b": 3}}
                   for rung in gains for seed in (0, 1)],
        "seen": [{"teacher": 184, "start": 13, "rungs": 6},
                 {"teacher": 222, "start": 5, "rungs": 6}],
        "ladder_cpu_seconds": 120.0, "command": "make rl", "versions": {"trl": "1.16.0"},
        "machine": {"cpu": "C", "cores": 2, "memory_gib": 4, "load": [1, 1, 1]},
    }  # fmt: skip


def test_the_page_pairs_gains_by_seed():
    text = rl_page.page(record())
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    # NPD minus SFT: 3 and 5 points; 12.71 x 1.414 / sqrt(2) either side of the mean.
    assert "+4.0 ± 12.7 | +3.0, +5.0 | +0.78" in rows["| gain from NPD minus gain from SFT"]
    assert "+4.0 ± 12.7 | +3.0, +5.0 |" in rows["| gain in pass@1, NPD's minus SFT's"]
    assert "| +0.0 ± 0.0 | +0.0, +0.0 |" in rows["| before RL, NPD minus SFT"]
    assert "before RL +0.000 ± 0.000 nats a token and +0.0 ± 0.0 points of pass@4" in text
    assert "| +0.0, +4.0 | +1.88" in rows["| what the filter adds to the gain"]
    assert "- CPU time: 6.0 min of GRPO and its evaluations, 2.0 min of the ladder's" in text
    assert "| NPD without filter | 2 | 50.0 ± 0.0 | 55.0 ± 0.0 | +5.0 ± 0.0 | 2 of 2 |" in text
    assert "| 2 of 2 | +4.36 | 2.0 ± 0.0 | 60 |" in text
    assert "| SFT | after | 53.0 ± 12.7 | 53.0 ± 12.7 | 0.050 ± 0.000 |" in text
    assert (
        "(of the 1,920, by chance, 184 to 222 are also in the teacher's training set, 5 to 13 in "
        "that of the ladder's start and 6 in that of the rungs), 8 samples"
    ) in text


@pytest.mark.parametrize("name", ["rl", "rl-known"])
def test_a_recorded_page_is_what_its_record_makes(name):
    folder = ROOT / "benchmarks" / "results" / name
    assert (
        rl_page.page(json.loads((folder / "rl.json").read_text())) == (folder / "rl.md").read_text()
    )


def test_problems_that_were_trained_on_before_are_counted_by_content():
    setting = with_values(SUM, ["levels=[2,2]", "num_prompts=3000", "teacher_problems=100"])
    settings = with_values(rl.Rl(), ["steps=50", "prompts=20"])
    found = rl.seen(setting, settings, 0)
    # Of the 4,095 sums of two numbers nine in ten may be trained on: the start has most of them.
    assert 700 < found["start"] < 900
    assert found["rungs"] == found["start"]
    assert 0 < found["teacher"] < 60
    assert rl.seen(replace(setting, is_new=True), settings, 0)["rungs"] != found["start"]


def test_curves_are_means_of_ten_steps_at_their_middle():
    assert rl_page.smooth([1.0] * 10 + [2.0, 4.0]) == [(5.5, 1.0), (11.5, 3.0)]
    assert rl_page.accuracy_curve(cell("npd", 0, 0.5, 0.75)) == [(0, 50.0), (10, 75.0)]


@has("matplotlib")
def test_a_figure_is_the_same_file_twice_and_shows_every_series(tmp_path):
    one, two = (rl_page.draw(tmp_path / name, record()).read_bytes() for name in ("1.svg", "2.svg"))
    assert one == two
    text = one.decode()
    for word in ("SFT", "NPD without filter", "held-out accuracy, %", "GRPO step"):
        assert word in text
    assert "<dc:date>" not in text
    assert all(colour.lower() in text for colour in figures.COLOURS[:3])


# -- The command line ---------------------------------------------------------------------------


def refusal(module, words, monkeypatch):
    """The line that a benchmark exits with before it makes anything."""
    monkeypatch.setattr(module, "Bench", None)
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words.split()])
    with pytest.raises(SystemExit) as raised:
        module.main()
    assert isinstance(raised.value.code, str)  # which Python prints, and exits with 1
    assert "\n" not in raised.value.code
    return raised.value.code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rl steps=abc", "steps=abc: not a value for steps, which is a whole number above 0"),
        ("--rl steps=1.5", "steps=1.5: not a value for steps"),
        ("--rl steps=true", "steps=true: not a value for steps"),
        ("--rl steps=0", "steps=0: not a value for steps"),
        ("--rl steps", "steps: not a value for steps"),
        ("--rl lr=[1]", "lr=[1]: not a value for lr, which is a number, 0 or more"),
        ("--rl step=1", "step=1: no such name; there are steps, prompts, samples, lr"),
        ("--rl samples=1", "samples=1: a group has at least 2"),
        ("--starts bogus sft", "--starts: no such rung: bogus"),
        ("--seeds 0", "--seeds 0: at least 1"),
    ],
)
def test_a_wrong_word_ends_rl_in_one_line_before_any_training(words, message, monkeypatch):
    assert refusal(rl, words, monkeypatch).startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--set x=1", "x=1: no such name; there are task, levels"),
        ("--set is_new=1", "is_new=1: not a value for is_new, which is true or false"),
        ("--set task=sum", "task=sum: not a value for task, which is a text in double quotes"),
        ("--set levels=[3]", "levels=[3]: not a value for levels, which is two whole numbers"),
        ("--set teacher=[1]", "teacher=[1]: not a value for teacher, which is layers, width"),
        ("--set student=3", "student=3: not a value for student"),
        ("--set start_prompts=0", "start_prompts=0: not a value for start_prompts"),
    ],
)
@pytest.mark.parametrize("module", [rl, ladder])
def test_a_wrong_setting_ends_both_benchmarks_in_one_line(module, words, message, monkeypatch):
    assert refusal(module, words, monkeypatch).startswith(message)


def test_values_are_read_by_their_kind():
    words = [
        "is_new=true",
        "levels=[2,4]",
        "student=[1,32]",
        "start_prompts=null",
        "lr=1",
        'task="list"',
    ]
    found = with_values(SUM, words)
    assert found == replace(
        SUM, is_new=True, levels=(2, 4), student=Shape(1, 32), lr=1, task="list"
    )
    assert found.start_prompts is None
    assert with_values(SUM, ["start_prompts=3"]).start_prompts == 3


# -- Two real steps -----------------------------------------------------------------------------


def tiny_bench(tmp_path):
    bench = Bench(with_values(replace(SUM, is_new=True), TINY), tmp_path)
    folder = bench.folder / "seed-0" / "npd"
    folder.mkdir(parents=True)
    bench._model(folder / "student", Shape(1, 32, 2), 0)
    return bench


@has("trl")
@pytest.mark.filterwarnings("default")  # TRL's and its libraries' own
def test_two_steps_of_grpo_leave_a_whole_cell(tmp_path, capfd):
    bench, settings = tiny_bench(tmp_path), with_values(rl.Rl(), QUICK)
    found = rl.run(bench, settings, 0, "npd")
    assert [step for step, _ in found["curve"]] == [0, 1, 2]
    assert len(found["reward"]) == len(found["entropy"]) == len(found["no_signal"]) == 2
    assert found["before"]["pass"].keys() == {"1", "4"}
    assert found["before"]["entropy"] > 1
    assert all(0 <= value <= 1 for value in found["reward"])
    assert capfd.readouterr().err.count("seed 0 npd") == 1
    assert rl.run(bench, settings, 0, "npd") == found
    assert "seed 0" not in capfd.readouterr().err  # not run again


@has("trl")
@pytest.mark.slow
def test_the_example_trains_a_student_from_end_to_end(tmp_path):
    bench = tiny_bench(tmp_path / "bench")
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(f"{json.dumps(problem)}\n" for problem in PROBLEMS))
    command = [sys.executable, ROOT / "examples" / "grpo.py", bench.folder / "seed-0" / "npd"]
    command += [problems, tmp_path / "out", "--steps", "2", "--prompts", "2", "--samples", "2"]
    command += ["--max-tokens", "8", "--lr", "1e-3"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert f"in the last: {tmp_path / 'out'}" in done.stdout
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 32
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    again = subprocess.run(command, capture_output=True, text=True, env=env)
    assert again.returncode == 1
    assert again.stderr == f"{tmp_path / 'out'} is not empty: name a new directory\n"
    command[command.index("--prompts") + 1] = "4"
    few = subprocess.run(command, capture_output=True, text=True, env=env)
    assert few.stderr == f"{problems} has 3 problems: a step takes --prompts 4\n"
