"""The ladder's statistics against values from a table, its verdict, and a whole tiny ladder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ladder_cell
import ladder_page as lp
import tables
import tasks
from ladder_bench import Bench
from ladder_setting import SETTINGS, with_values
from npd.store.layout import RunLayout
from npd.store.shards import write_rollouts
from npd.types import Outcome
from store_samples import make_rollout
from tasks import MARK, make_tokenizer

LADDER = Path(lp.__file__).with_name("ladder.py")
TINY = [
    "num_prompts=12", "num_heldout=6", "teacher_problems=12", "teacher_epochs=1", "warm_epochs=1",
    "epochs=2", "batch=6", "teacher=[2,32,2]", "student=[1,32,2]", "max_response=40",
]  # fmt: skip


def cells(kl=None, **accuracies):
    return [
        {"rung": rung, "seed": seed, "accuracy": accuracy, "kl": (kl or {}).get(rung, 1.0)}
        for rung, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


def test_the_interval_is_student_s():
    # 2.776 x 1.5811 / sqrt(5), from a table of t with 4 degrees of freedom.
    assert tables.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3.0, 1.963), abs=1e-3)
    assert tables.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.484), abs=1e-3)
    middle, half = tables.interval([7.0])
    assert middle == 7.0
    assert half != half


def test_differences_are_paired_by_seed():
    rows = lp.by_rung(cells(sft=[0.1, 0.5, 0.9], npd=[0.2, 0.6]))
    assert lp.differences(rows["npd"], rows["sft"]) == pytest.approx([0.1, 0.1])


def test_a_ladder_off_the_order_is_told():
    kl = {"sft": 1.0, "offline": 0.4, "npd": 0.4}
    assert lp.check(cells(kl, sft=[0.1, 0.2], offline=[0.2, 0.3], npd=[0.25, 0.3])) == []
    same = lp.check(cells(sft=[0.5, 0.5], offline=[0.5, 0.5], npd=[0.5, 0.5]))
    assert [line.partition(":")[0] for line in same] == [
        "offline minus sft", "npd minus sft", "offline", "npd",
    ]  # fmt: skip
    worse = lp.check(cells(kl, sft=[0.5, 0.5], offline=[0.6, 0.6], npd=[0.5, 0.6]))
    assert worse == ["npd minus offline: -5.0 points, at least -3.0 expected"]


@pytest.mark.slow
def test_a_tiny_ladder_runs_once_and_is_kept(tmp_path):
    def run():
        command = [sys.executable, LADDER, "--seeds", "1", "--folder", tmp_path]
        command += ["--rungs", "sft", "npd", "letter", "--out", tmp_path / "out", "--set", *TINY]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        assert done.returncode == 0, done.stderr
        return done

    first = run()
    assert first.stderr.count("seed ") == 5  # a teacher, the start and three rungs
    record = json.loads((tmp_path / "out" / "ladder.json").read_text())
    assert [cell["rung"] for cell in record["cells"]] == ["start", "sft", "npd", "letter"]
    for cell in record["cells"]:
        # What a filter leaves out counts as used up: fewer steps.
        assert cell["steps"] <= {"start": 2}.get(cell["rung"], 4)
        assert cell["steps"] == 4 or cell["rung"] != "sft"
        assert all(0 <= share <= 1 for share in [cell["accuracy"], *cell["right"].values()])
        assert cell["rung"] not in ("start", "sft") or cell["right"] == {"kept": 1.0}
    text = (tmp_path / "out" / "ladder.md").read_text()
    for row in ("| SFT → + one refresh (NPD) |", "| NPD, but for |", "| start | 1 |"):
        assert row in text
    again = run()
    assert "seed " not in again.stderr
    assert again.stdout.count("\n") == first.stdout.count("\n")


def test_runs_on_an_earlier_version_s_texts_are_not_taken_for_this_one_s(tmp_path, monkeypatch):
    setting = with_values(SETTINGS["program"], TINY)
    first, again = Bench(setting, tmp_path), Bench(setting, tmp_path)
    assert (first.folder, first.common) == (again.folder, again.common)
    plain = tasks.TASKS["program"]
    monkeypatch.setitem(
        tasks.TASKS, "program", lambda *drawn: replace(plain(*drawn), response="other####1")
    )
    other = Bench(setting, tmp_path)
    assert other.folder != first.folder
    assert other.common != first.common


def test_a_run_that_accounts_for_every_third_sample_is_judged_by_those(tmp_path):
    tokenizer = make_tokenizer()
    (tmp_path / "run" / "rollouts").mkdir(parents=True)
    tokenizer.save_pretrained(tmp_path / "student")
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i}+1", "answer": f"{MARK}{i + 1}"} for i in range(12)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def rollout(i):  # of those accounted for 0 and 6 are right, of the others all
        text = MARK + str(i + 1 if i % 6 == 0 or i % 3 else 0)
        ids = tokenizer.encode(text, add_special_tokens=False)
        response = {"response_ids": np.array(ids, np.int32), "logprobs": None}
        return replace(make_rollout(i), prompt_index=i, **response)

    layout = RunLayout(tmp_path / "run")
    for shard in range(2):
        rollouts = [rollout(i) for i in range(6 * shard, 6 * shard + 6)]
        write_rollouts(layout.rollouts(shard), rollouts)
    kept = (Outcome.TRAINED_OUT, "")
    verdicts = {0: kept, 3: kept, 6: (Outcome.REJECTED, "low"), 9: kept}
    samples = [
        SimpleNamespace(stats=SimpleNamespace(sample_id=i), outcome=outcome, reason=reason)
        for i, (outcome, reason) in verdicts.items()
    ]
    result = SimpleNamespace(directory=layout.root, data=SimpleNamespace(samples=samples))
    config = SimpleNamespace(student=tmp_path / "student", data=SimpleNamespace(train=prompts))
    assert ladder_cell.right_shares(result, config) == {"kept": pytest.approx(1 / 3), "low": 1.0}


def test_the_figure_has_a_row_for_each_rung_and_is_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    from ladder_figure import draw

    found = cells(start=[0.1, 0.2], sft=[0.2, 0.4], npd=[0.3, 0.3], letter=[0.0, 0.0])
    for name in ("one.svg", "two.svg"):
        draw(tmp_path / name, found, {"sft": "SFT", "npd": "+ one refresh (NPD)"})
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    assert text.index(">start<") < text.index(">SFT<") < text.index(">+ one refresh (NPD)<")
    assert "letter" not in text
    draw(tmp_path / "none.svg", cells(npd=[0.1]), {})
    assert not (tmp_path / "none.svg").exists()
