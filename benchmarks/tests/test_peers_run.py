"""Times to a KL, the page of made-up cells, and tiny real runs of all sides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_ladder import TINY as LADDER_TINY
from test_real import about, call, complaint, room  # noqa: F401

from npd.observe.live import LiveState, WorkerState

BENCHMARKS = Path(__file__).parents[1]

import peers_page as pp  # noqa: E402
import peers_run  # noqa: E402


def curve(*points):
    return [{"seconds": at, "kl": kl, "own_kl": 2 * kl, "samples": at} for at, kl in points]


def test_the_target_is_the_lowest_kl_after_the_start():
    assert pp.target_of(curve((0, 1.0), (10, 0.8), (20, 0.9)), "kl") == (0.8, 10)
    assert pp.target_of(curve((0, 1.0), (10, 0.8), (20, 0.9)), "own_kl") == (1.6, 10)
    assert pp.target_of(curve((0, 1.0), (10, 1.1)), "kl") is None
    assert pp.target_of(curve((0, 1.0)), "kl") is None


def test_the_time_to_a_kl_is_that_of_the_first_evaluation_there():
    mine = curve((0, 0.5), (10, 1.2), (20, 0.8), (30, 0.6))
    assert pp.reached_at(mine, "kl", 0.9) == 20
    assert pp.reached_at(mine, "kl", 0.8) == 20
    assert pp.reached_at(mine, "kl", 0.5) is None
    assert pp.reached_at(mine, "own_kl", 1.3) == 30


def made_up(side, seed, points, *, rate):
    named = {"generate": 10.0, "score": 15.0, "train": 60.0, "publish": 5.0}
    seconds = named if side == "npd" else {"generate": 40.0, "teacher": 20.0}
    return {
        "side": side, "seed": seed, "curve": curve(*points), "kl": points[-1][1], "own_kl": 2.0,
        "seconds": {"step": 90.0, **seconds}, "trainer_seconds": 60.0 if side == "npd" else 90.0,
        "tokens": 100 * rate, "response_tokens": 50 * rate, "samples": rate, "steps": 4,
        "fresh": rate // 3 if side == "npd" else rate, "load": [1.0, 3.0],
    }  # fmt: skip


def page_of(cells):
    found = about() | {"tried": [("gkd", "bfloat16", 8, 1.1)], "second": {"score.top_k": 32}}
    found["tuned"] = [("gkd", 480, 1e-4, "float32", 150, 1.25, 0.5)]
    found["setting"] |= {
        "peer_dtype": "bfloat16", "peer_lr": 2e-4, "npd_lr": 5e-5, "second_lr": 1e-4
    }  # fmt: skip
    return pp.page({"kl": 1.0, "start_kl": 2.0, "own_kl": 3.0}, cells, found)


def test_the_page_shows_ratios_targets_and_misses():
    cells = [
        made_up("npd", 0, [(0, 1.0), (50, 0.6), (90, 0.5)], rate=300),
        made_up("distillation", 0, [(0, 1.0), (90, 0.9)], rate=60),
        made_up("gkd", 0, [(0, 1.0), (90, 0.4)], rate=150),
    ]
    text = page_of(cells)
    trl, gkd = "TRL `DistillationTrainer`", "TRL `GKDTrainer`"
    # 500 tokens/s of npd's trainer against 66.7.
    assert f"{trl} | 1. trainer tokens/s (TRL: of whole steps) | 7.5 | >= 8.1 | MISSED |" in text
    # Without generation and teacher TRL has 30 of its 90 seconds, so 200 tokens/s.
    assert f"{trl} | 1. tokens/s without generation and the teacher's layers | 2.5 |  |  |" in text
    assert f"| {trl} | 1 | 66.67 | 200 |" in text
    assert f"{trl} | 2. samples trained on, an hour | 5 | >= 3 | met |" in text
    assert f"{gkd} | 2. fresh samples, an hour | 0.667 |  |  |" in text
    # npd's first evaluation below 0.9 is at 50 of 90 seconds; KL on own text is twice as high.
    for what in ("held-out KL, share | 0.556 (KL 0.9000", "KL on own text, share | 0.556 (KL 1.80"):
        assert f"{trl} | 3. CPU time to the peer's lowest {what}" in text
    assert "| none (seed 0: npd never at 0.4000) | <= 1/3 | MISSED |" in text
    assert "TRL `GKDTrainer` (480) float32 0.0001: 1.250, 0.500 (150)" in text
    assert "gkd bfloat16 batch 8: 1.1" in text
    # What is left of 90 s after generate and teacher is the rest.
    assert f"| {trl} | student, heads, loss, optimiser | 33 | 500 |" in text


def test_a_peer_that_never_improves_sets_no_target_and_the_weights_are_named():
    text = page_of(
        [
            made_up("npd", 0, [(0, 1.0), (90, 0.5)], rate=300),
            made_up("gkd", 0, [(0, 1.0), (90, 1.1)], rate=60),
        ]
    )
    target = "no target: the peer is never below its start"
    assert f"| 3. CPU time to the peer's lowest held-out KL, share |  | <= 1/3 | {target} |" in text
    assert "TRL: bfloat16 weights and optimiser state, the fastest of those tried" in text
    assert "learning rate 0.0002; npd: float32 weights, 5e-05. Speeds are comparable" in text
    assert "second setting" not in text
    both = page_of(
        [
            made_up("npd_tail", 0, [(0, 1.0), (90, 0.5)], rate=300),
            made_up("gkd", 0, [(0, 1.0), (90, 1.1)], rate=60),
        ]
    )
    assert "5e-05, and 0.0001 with the second setting, which was made after the preset" in both
    assert "- npd's second setting: score.top_k=32" in both


@pytest.mark.parametrize(
    ("peer", "result"),
    [((0.8, 0.8), "met"), ((0.8, 0.1), "MISSED"), ((0.9, 0.6), "met on average, not by every")],
)
def test_met_is_by_every_seed_for_time_too(peer, result):
    cells = [
        made_up("npd", seed, [(0, 1.0), (20, 0.7), (38, 0.5), (80, 0.2)], rate=300)
        for seed in (0, 1)
    ]
    cells += [made_up("gkd", seed, [(0, 1.0), (90, kl)], rate=60) for seed, kl in enumerate(peer)]
    line = next(text for text in page_of(cells).splitlines() if "| 3. CPU time" in text)
    assert f"| <= 1/3 | {result}" in line


def test_the_view_keeps_cpu_time_by_call():
    view = peers_run.CpuView()

    def update(**doing):
        workers = tuple(WorkerState(name, what, 0.0) for name, what in doing.items())
        view.update(LiveState(elapsed=0.0, step=0, workers=workers))

    def burn():
        sum(i * i for i in range(200_000))

    update(trainer="evaluate")
    update(trainer="idle")
    update(trainer="idle", generator="generate")
    burn()
    update(trainer="idle", generator="idle")
    update(trainer="evaluate", generator="idle")
    update(trainer="idle", generator="idle")
    assert [doing for doing, _ in view.calls] == ["evaluate", "generate", "evaluate"]
    first, second = view.before_evaluations()
    assert first == 0
    assert second == view.seconds()["generate"] > 0


@pytest.mark.slow
def test_tiny_runs_of_all_sides(room):  # noqa: F811
    pytest.importorskip("trl")
    settings = ["num_prompts=6", "npd_epochs=2", "npd_reuse=1", "npd_batch=4", "eval_steps=1"]
    settings += ["peer_batch=2", "peer_most_steps=2", "every=0"]
    done = call("peers_run.py", room, "--set", *settings, "--out", room / "out")
    assert done.returncode == 0, done.stderr
    record = json.loads((room / "out" / "peers.json").read_text())
    cells = {cell["side"]: cell for cell in record["cells"]}
    assert set(cells) == {"npd", "npd_tail", "distillation", "gkd"}
    for cell in cells.values():
        first, last = cell["curve"][0], cell["curve"][-1]
        assert (first["kl"], first["own_kl"]) == (record["start"]["kl"], record["start"]["own_kl"])
        assert (last["kl"], last["own_kl"]) == (cell["kl"], cell["own_kl"])
        assert 0 < abs(last["kl"] - first["kl"]) < 0.5
    for name in ("distillation", "gkd"):
        cell = cells[name]
        assert (cell["steps"], cell["samples"], cell["fresh"]) == (2, 4, 4)
        assert len(cell["curve"]) == 3
        assert cell["own_kl"] >= 0
        assert 4 <= cell["response_tokens"] <= 4 * 6
        assert cell["seconds"]["step"] > cell["seconds"]["generate"] > 0
        assert cell["seconds"]["teacher"] > 0
    # The same prompts: the tokens that a sample has beside its response.
    prompts = {n: (c["tokens"] - c["response_tokens"]) / c["samples"] for n, c in cells.items()}
    assert prompts["gkd"] == pytest.approx(prompts["npd"], abs=3)
    assert prompts["distillation"] == pytest.approx(prompts["npd"], abs=3)
    for name in ("npd", "npd_tail"):
        own = cells[name]
        assert own["fresh"] == 12
        # What was looked at is the student that the run itself evaluated, step by step.
        looks = [point["kl"] for point in own["curve"]]
        assert looks == pytest.approx(own["run_kl"], rel=0.01)
        assert len(set(looks)) == len(looks)
        assert own["curve"][-1]["seconds"] <= own["seconds"]["step"]
    assert str(room) not in (room / "out" / "peers.json").read_text()


@pytest.mark.slow
def test_tiny_runs_on_a_pair_of_the_ladder(tmp_path):
    pytest.importorskip("trl")
    sizes = ["num_prompts=6", "npd_epochs=2", "npd_reuse=1", "npd_batch=3", "eval_steps=1"]
    sizes += ["peer_batch=3", "peer_most_steps=2", "every=0"]
    command = [sys.executable, BENCHMARKS / "peers_run.py", "--task", "sum", "--seeds", "1"]
    command += ["--folder", tmp_path / "runs", "--out", tmp_path / "out", "--set", *sizes]
    command += ["--sides", "npd", "distillation", "gkd", "--set-task", *LADDER_TINY]
    command += ["--set-pair", "num_heldout=4", "max_response=40"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "peers.json").read_text())
    cells = {cell["side"]: cell for cell in record["cells"]}
    assert set(cells) == {"npd", "distillation", "gkd"}
    for cell in cells.values():
        # Models that learned nothing have no step right.
        assert [point["wrong"] for point in cell["curve"]] == [1.0] * len(cell["curve"])
        assert cell["curve"][0]["kl"] == record["start"]["kl"] > 0
        assert len({point["kl"] for point in cell["curve"]}) == len(cell["curve"]) > 1
        # Sums have no system prompt: nothing before a question but its mark.
        assert (cell["tokens"] - cell["response_tokens"]) / cell["samples"] < 20
    page = (tmp_path / "out" / "peers.md").read_text()
    assert page.startswith("# Whole runs against TRL, on the ladder's pair (task sum)")
    assert "share of wrong workings, at the end" in page
    assert "`python benchmarks/peers_run.py --task sum --seeds 1 --sides npd" in page
    assert "- learning rates tried before on sums, one run each" in page


def test_without_data_and_task_it_says_what_to_name(room, monkeypatch, capsys):  # noqa: F811
    pytest.importorskip("trl")
    monkeypatch.setattr(peers_run, "one_thread", lambda: None)
    monkeypatch.setattr(sys, "argv", ["bench", "--folder", str(room)])
    assert peers_run.main() != 0
    said = capsys.readouterr().err
    assert said == (
        "error: --data: name a JSONL file with a question a line, or a task by --task\n"
    )


def test_a_missing_file_is_one_line(complaint):  # noqa: F811
    pytest.importorskip("trl")
    assert "missing.jsonl: no such file" in complaint(peers_run.main, data="missing.jsonl")
