"""The benchmarks run and print a figure; what it is, `make bench` judges, not a test.

A baseline that trained something else would be no baseline: the loops npd's trainer is held to take
the same steps as it does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from npd.config import LossConfig
from npd.models.loading import load_model
from npd.train.batch import build_row
from test_trainer import (
    FP32,
    SFT,
    make_rollouts,
    make_trainer,
    own,
    score,
    segment_of,
    teacher,  # noqa: F401
    weights_of,
)

BENCHMARKS = Path(__file__).parents[1]

import common  # noqa: E402
import gpu  # noqa: E402
import training  # noqa: E402


@pytest.mark.parametrize("name", ["pack", "controller", "scale", "checkpoint"])
def test_a_quick_benchmark_prints_a_figure(name, tmp_path):
    found = tmp_path / "figures.json"
    command = [sys.executable, BENCHMARKS / f"bench_{name}.py", "--quick", "--json", found]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(found.read_text())["figures"]
    assert figures
    for figure in figures:
        assert figure["ours"][0] > 0
        assert figure["what"] in done.stdout


def run_gpu(*words):
    return subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", *words], capture_output=True, text=True
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_benchmarks_end_in_one_line():
    done = run_gpu()
    assert done.returncode == 1
    assert done.stderr.startswith("no GPU that torch can use here")
    assert len(done.stderr.splitlines()) == 1


def test_what_there_is_no_time_for_is_named(tmp_path):
    quick = ("--device", "cpu", "--quick", "--out", tmp_path)
    done = run_gpu(*quick, "--minutes", "0.6", "--only", "peers", "loss")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "gpu.md").read_text()
    assert "## loss" in page
    assert "- left out for lack of time: peers" in page
    assert page in done.stdout
    (found,) = json.loads((tmp_path / "gpu.json").read_text())["benchmarks"]
    assert found["figures"]


def test_the_recorded_page_of_a_gpu_is_what_the_code_makes_of_its_record():
    home = BENCHMARKS / "results" / "gpu"
    record = json.loads((home / "gpu.json").read_text())
    assert (home / "gpu.md").read_text() == gpu.as_page(record["benchmarks"], record)


@pytest.fixture
def samples(teacher):  # noqa: F811
    return [score(teacher, own(teacher, rollout)) for rollout in make_rollouts()]


def assert_same_step(model, step, trainer, samples):
    """`step` moves `model` as a step of `trainer` moves its student."""
    trainer.train(segment_of(samples, [[0, 2], [1, 3]], lr=FP32.lr))
    step()
    moved = dict(model.named_parameters())
    for name, weight in weights_of(trainer).items():
        torch.testing.assert_close(moved[name].detach(), weight, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("full", [True, False])
def test_the_bare_loop_takes_the_trainers_step(tiny_model_dir, samples, full):
    model = load_model(tiny_model_dir).train()
    rows = [build_row(part, version=0, device="cpu") for part in (samples[:3], samples[3:])]
    step = training.bare_loop(model, rows, FP32, full=full)
    assert_same_step(model, step, make_trainer(tiny_model_dir, samples, loss=SFT), samples)


@pytest.mark.parametrize("has_teacher", [False, True])
def test_the_padded_loop_takes_the_trainers_step(
    tiny_model_dir, tiny_teacher_dir, samples, has_teacher
):
    model = load_model(tiny_model_dir, packed=False).train()
    live = load_model(tiny_teacher_dir, packed=False) if has_teacher else None
    batches = training.padded(samples, 3, "cpu")
    step = training.padded_loop(model, batches, FP32, LossConfig(), live)
    assert_same_step(model, step, make_trainer(tiny_model_dir, samples, loss=LossConfig()), samples)


def test_the_share_of_real_tokens_is_that_of_the_padded_batches(samples):
    batches = training.padded(samples, 2, "cpu")
    real = sum(int(batch.mask_BL.sum()) for batch in batches)
    places = sum(batch.mask_BL.numel() for batch in batches)
    assert training.padded_fill(samples, 2) == pytest.approx(real / places)
    assert training.padded_fill(samples, 4, shuffles=3) == pytest.approx(
        training.padded_fill(samples, 4)
    )


def test_lengths_are_log_normal_and_the_same_each_time():
    lengths = training.log_normal_lengths(1000, 512)
    assert lengths == training.log_normal_lengths(1000, 512)
    assert np.median(lengths) == pytest.approx(64, abs=1)
    assert np.std(np.log([n for n in lengths if n < 512])) == pytest.approx(1, abs=0.1)
    assert (min(lengths), max(lengths)) == (2, 512)


def test_the_needed_operations_are_six_a_weight_and_token(samples):
    config = common.llama_config(3)
    with torch.device("meta"):
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM(config)
    matrices = [p for name, p in model.named_parameters() if "proj" in name]
    head = model.lm_head.weight.numel()
    lengths = [sample.rollout.num_tokens - 1 for sample in samples]
    responses = sum(len(sample.rollout.response_ids) for sample in samples)
    needed = 6 * (sum(p.numel() for p in matrices) * sum(lengths) + head * responses)
    attention = sum(6 * 3 * 576 * n * n for n in lengths)
    assert training.step_flops(config, samples) == pytest.approx(needed + attention)


def test_a_bound_says_how_much_of_it_is_reached():
    figure = common.Figure("speed", "tokens/s", common.Spread(250, 240, 260), bound=1000.0)
    cells = dict(zip(common.COLUMNS, figure.cells(), strict=True))
    assert cells["bound"] == "1,000 tokens/s (25% reached)"
    assert common.read_figure(json.loads(json.dumps(common.figure_record(figure)))) == figure
