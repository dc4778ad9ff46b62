"""What is done on a GPU is what is done on a CPU: kernels, scores, text, steps, whole runs.

Skipped where there is none. Best run in one process (`-p no:xdist`): processes share a GPU badly.
The paths for GPUs are also in test_triton_passes.py (the kernels are compiled, and interpreted),
test_batch.py (nothing waits for the device) and test_packed_models.py (attention).
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._inductor import config as inductor

import npd
from npd.config import GenerateConfig, LoraConfig, LossConfig, ScoreConfig, TrainConfig
from npd.generate.in_process import TransformersGenerator
from npd.models.device import on_device
from npd.models.kernels.products import add_wide_product, has_wide_products, wide_product
from npd.models.loading import load_model
from npd.models.packed_attention import _on_device
from npd.score import build_scorer
from npd.train.batch import build_row
from npd.train.fsdp import gather
from npd.train.objective import Objective
from npd.train.trainer import Trainer
from run_process import WINDOWED, check_all_steps
from test_generate import VOCAB, make_requests, responses
from test_score import SHAPES, random_rollouts
from test_trainer import make_rollouts, own, refs_of, score, segment_of
from test_trainer import teacher as teacher
from tiny_run import tiny_config, write_prompts

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # torch warns of its own insides while it compiles
    pytest.mark.timeout(1200),
]


@pytest.fixture(autouse=True)
def _no_pool_of_compilers():
    """Torch would keep its processes for good."""
    with inductor.patch(compile_threads=1):
        yield
    torch.compiler.reset()


# More than a warp's worth of documents, of one token and of many.
LENGTHS = [(1 + 5 * i % 23, 1 + 7 * i % 31) for i in range(40)]


def test_kernels_are_the_chunked_loss():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "triton_cases.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "FUSED_DEVICE": "cuda"},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_products_are_not_rounded(dtype):
    left, right = (torch.randn(100, 100, device="cuda", dtype=dtype) for _ in range(2))
    if not has_wide_products(left):
        pytest.skip(f"torch {torch.__version__} has no float32 products of {dtype} here")
    total = torch.randn(100, 100, device="cuda")
    expected = left.double() @ right.double()
    torch.testing.assert_close(wide_product(left, right), expected.float())
    expected += total.double()
    add_wide_product(total, left, right)
    torch.testing.assert_close(total, expected.float())


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-4), ("bfloat16", 0.15)])
def test_scores(tiny_model_dir, tiny_teacher_dir, dtype, atol):
    def scored(device, dtype):
        scorer = build_scorer(
            ScoreConfig(top_k=6, row_tokens=64, dtype=dtype),
            teacher=tiny_teacher_dir,
            vocab_size=VOCAB,
            needs_ifd=True,
            needs_student_pass=True,
            support="topk",
            device=device,
            trust_remote_code=False,
            seed=0,
        )
        scorer.load_student(tiny_model_dir, 0)
        return scorer.score(random_rollouts(SHAPES, with_logprobs=False))

    for got, expected in zip(scored("cuda", dtype), scored("cpu", "float32"), strict=True):
        np.testing.assert_allclose(got.teacher_logprobs, expected.teacher_logprobs, atol=atol)
        np.testing.assert_allclose(got.topk_logprobs, expected.topk_logprobs, atol=atol)
        for name in ("nll_teacher_alone", "nll_student_alone", "nll_student"):
            assert getattr(got, name) == pytest.approx(getattr(expected, name), abs=atol), name
        if dtype == "float32":
            np.testing.assert_array_equal(got.topk_ids, expected.topk_ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text(tiny_model_dir, temperature):
    def written(device):
        config = GenerateConfig(
            max_new_tokens=12, dtype="float32", batch_size=4, temperature=temperature
        )
        generator = TransformersGenerator(
            config, stop_ids=range(30), pad_id=0, vocab_size=VOCAB, device=device
        )
        generator.load(tiny_model_dir, 3)
        return generator.generate(make_requests())

    got, expected = written("cuda"), written("cpu")
    assert responses(got) == responses(expected)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def trained(directory, samples, device, loss, **changes):
    """Reports of four steps of two rows, and the weights after them on the CPU."""
    by_id = {ref.sample_id: s for ref, s in zip(refs_of(samples), samples, strict=True)}
    config = TrainConfig(**{"dtype": "float32", "row_tokens": 1024, **changes})
    trainer = Trainer(
        config, loss, student=directory, read=lambda ref: by_id[ref.sample_id], device=device
    )
    half = len(samples) // 2
    rows = [list(range(half)), list(range(half, len(samples)))]
    report = trainer.train(segment_of(samples, rows, steps=4))
    weights = {name: gather(p.detach()).cpu() for name, p in trainer.model.named_parameters()}
    return report, weights


@pytest.mark.parametrize("target", ["topk", "tail"])
@pytest.mark.parametrize(
    ("changes", "rel"),
    [
        ({}, 1e-4),
        ({"activation_checkpointing": True}, 1e-4),
        ({"compile": True}, 1e-4),
        ({"dtype": "bfloat16"}, 0.03),
        ({"dtype": "bfloat16", "compile": True}, 0.03),
        ({"dtype": "bfloat16", "lora": LoraConfig(rank=4)}, 0.03),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_steps(tiny_model_dir, teacher, target, changes, rel):
    samples = [score(teacher, rollout) for rollout in make_rollouts(lengths=LENGTHS)]
    loss = LossConfig(target=target)
    plain = {name: value for name, value in changes.items() if name == "lora"}
    report, weights = trained(tiny_model_dir, samples, "cuda", loss, **changes)
    expected, others = trained(tiny_model_dir, samples, "cpu", loss, **plain)
    for got, want in zip(report.steps, expected.steps, strict=True):
        assert got.loss == pytest.approx(want.loss, rel=rel)
        assert got.kd == pytest.approx(want.kd, rel=3 * rel, abs=3 * rel)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=3 * rel)
    if rel < 0.01:
        for name, other in others.items():
            torch.testing.assert_close(weights[name], other, atol=2e-4, rtol=1e-3)
    assert 0 < report.peak_memory_mib < 4096


@pytest.mark.parametrize("kind", ["inline", "local"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run(tmp_path, tiny_model_dir, tiny_teacher_dir, kind, dtype):
    prompts = write_prompts(tmp_path / "prompts.jsonl")

    def run(device, kind, dtype):
        config = tiny_config(
            *(tiny_model_dir, tiny_teacher_dir, prompts, tmp_path / f"{device}-{dtype}"),
            runtime={"kind": kind, "device": device, "threads": 1},
            **{room: {"dtype": dtype} for room in ("generate", "score", "train")},
        )
        result = npd.run(config)
        assert result.is_done
        return result.data

    got, expected = run("cuda", kind, dtype), run("cpu", "inline", "float32")
    assert len(got.steps) == len(expected.steps)
    # Text drawn in bfloat16 is other text: only where both begin, and that both get better.
    assert got.evals[0]["kl"] == pytest.approx(expected.evals[0]["kl"], rel=0.05)
    assert got.evals[-1]["kl"] < got.evals[0]["kl"]
    if dtype == "float32" and kind == "inline":  # processes overlap, so begin with other samples
        assert got.steps[0]["loss"] == pytest.approx(expected.steps[0]["loss"], rel=1e-3)


def test_a_killed_run_goes_on(make_run):
    run = make_run(runtime={"kind": "local", "device": "cuda", "threads": 1}, schedule=WINDOWED)
    process = run.start()
    assert run.wait_for(20, process)
    process.kill()
    process.wait()
    run.finish()
    check_all_steps(run)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_micro_batch_does_not_wait_for_the_device(tiny_model_dir, teacher, dtype):
    samples = [score(teacher, own(teacher, rollout)) for rollout in make_rollouts(lengths=LENGTHS)]
    model = load_model(tiny_model_dir, device="cuda").train()
    objective = Objective(model, LossConfig(), is_autocast=dtype == "bfloat16")

    def step():
        row = build_row(samples, version=0, device="cpu").pinned().to("cuda")
        loss, _ = objective(row, 100)
        loss.backward()

    step()  # kernels are compiled and gradients made
    _on_device.cache_clear()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        on_device(torch.arange(10**6), "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
