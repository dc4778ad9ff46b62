"""A device out of memory: less is done at a time, with the same numbers, and it is remembered."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npd.config import LossConfig, ScoreConfig
from npd.errors import RunError
from npd.evaluate import heldout_kl
from npd.generate.in_process import generate_with
from npd.models.loading import load_model
from npd.models.out_of_memory import Fitting, is_out_of_memory
from npd.score import build_scorer
from npd.train.batch import build_row
from test_generate import make_requests, make_sampling
from test_trainer import (
    FP32,
    make_rollouts,
    make_trainer,
    own,
    score,
    segment_of,
    teacher,  # noqa: F401
    weights_of,
)

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"
    ),
    MemoryError(),
]
LENGTHS = ((3, 5), (1, 1), (7, 12), (2, 9), (4, 4), (6, 7), (2, 3), (9, 5))


@pytest.fixture
def small_device():
    """Make a module fail where more than so many tokens come in; returns how often it did."""
    hooks = []

    def limit(module, most, error=FULL[0]):
        failed = []

        def is_full(_, given):
            if given[0].numel() > most:
                failed.append(given[0].numel())
                raise error

        hooks.append(module.register_forward_pre_hook(is_full))
        return failed

    yield limit
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:20] or "MemoryError")
def test_what_libraries_say(error):
    assert is_out_of_memory(error)
    fitting, sizes = Fitting("rows", 100, "buy more"), []

    def attempt():
        sizes.append(fitting.of(100))
        if sizes[-1] > 30:
            raise error
        return "done"

    assert [fitting.run(attempt), fitting.run(attempt)] == ["done", "done"]
    assert sizes == [100, 50, 25, 25]


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), ValueError("out of memory"), RunError("not finite")]
)
def test_other_errors_are_not_tried_again(error):
    assert not is_out_of_memory(error)
    attempts = []

    def attempt():
        attempts.append(1)
        raise error

    with pytest.raises(type(error), match=str(error)):
        Fitting("rows", 100, "").run(attempt)
    assert len(attempts) == 1


def test_what_never_fits_ends_in_one_line(monkeypatch):
    def attempt():
        raise FULL[0]

    with pytest.raises(RunError) as caught:
        Fitting("train.row_tokens", 4, "buy more").run(attempt, doing="step 3: ")
    assert str(caught.value) == (
        "step 3: the device is out of memory with train.row_tokens 1: buy more"
    )
    # Others would wait in a collective for a rank that begins again.
    monkeypatch.setattr("npd.models.out_of_memory._is_in_group", lambda: True)
    with pytest.raises(RunError, match="out of memory with a sample of 60 tokens: buy more"):
        Fitting("rows", 100, "buy more", is_alone=True).run(attempt, least=60)
    with pytest.raises(RunError, match="rows 100: buy more"):
        Fitting("rows", 100, "buy more").run(attempt)
    alone = Fitting("rows", 2, "buy more", is_alone=True)
    with pytest.raises(RunError, match="rows 1: buy more"):
        alone.run(attempt)


def test_a_failed_attempt_is_forgotten_before_the_next_begins():
    """Its tensors live in the traceback's frames; kept, they would fill the device again."""
    alive = []

    class Tensor:
        def __del__(self):
            alive.remove(self.name)

        def __init__(self, name):
            self.name = name
            alive.append(name)

    fitting, seen = Fitting("rows", 8, ""), []

    def attempt():
        seen.append(list(alive))
        held = Tensor(fitting.divisor)
        if fitting.divisor < 4:
            raise torch.OutOfMemoryError("out of memory")
        return held.name

    assert fitting.run(attempt) == 4
    assert seen == [[], [], []]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8), st.data())
def test_parts_of_a_row_are_the_row(lengths, data):
    rollouts = [
        replace(r, logprobs=np.linspace(-3, -1, len(r.response_ids), dtype=np.float32))
        for r in make_rollouts(lengths=lengths)
    ]
    row = build_row(rollouts, version=0, device="cpu")
    whole = row.packed.input_ids.shape[1]
    most = data.draw(st.integers(1, whole + 2))
    parts = row.parts(most)
    for name in ("input_ids", "position_ids"):
        found = torch.cat([getattr(part.packed, name) for part in parts], 1)
        assert torch.equal(found, getattr(row.packed, name))
    assert torch.equal(torch.cat([p.labels_N for p in parts]), row.labels_N)
    assert torch.equal(torch.cat([p.behavior_N for p in parts]), row.behavior_N)
    sizes = [np.diff(part.packed.cu_seqlens).tolist() for part in parts]
    assert [*chain(*sizes)] == np.diff(row.packed.cu_seqlens).tolist()
    assert all(sum(size) <= most or len(size) == 1 for size in sizes)
    # As few as cutting in order allows: two parts in a row never fit into one.
    assert all(sum(a) + b[0] > most for a, b in pairwise(sizes))
    starts = np.cumsum([0, *(sum(size) for size in sizes)])
    placed = [part.positions_N + int(start) for part, start in zip(parts, starts, strict=False)]
    assert torch.equal(torch.cat(placed), row.positions_N)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_in_parts_is_the_step(tiny_model_dir, teacher, small_device, caplog, where):  # noqa: F811
    samples = [score(teacher, own(teacher, r)) for r in make_rollouts(lengths=LENGTHS)]
    rows, loss = [[0], [1, 2, 3, 4, 5, 6, 7]], LossConfig(target="tail")
    whole = make_trainer(tiny_model_dir, samples, loss=loss)
    expected = whole.train(segment_of(samples, rows, steps=3)).steps
    trainer = make_trainer(tiny_model_dir, samples, loss=loss)
    embedding = trainer.model.get_input_embeddings()
    if where == "forward":
        failed = small_device(embedding, 30)
    else:  # when gradients of the later layers are there already
        failed = []

        def is_full(_, __, grads):
            if grads[0].shape[1] > 30:
                failed.append(grads[0].shape[1])
                raise FULL[2]

        trainer.model.model.layers[0].mlp.register_full_backward_hook(is_full)
    with caplog.at_level(logging.WARNING):
        found = trainer.train(segment_of(samples, rows, steps=3)).steps
    assert len(failed) == 3, "256 tokens, 128, 64, and 32 are what fits, in this step and later"
    for a, b in zip(expected, found, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
        for name in ("kd", "ce", "drift", "entropy", "agreement", "teacher_mass"):
            assert getattr(b, name) == pytest.approx(getattr(a, name), rel=1e-4, abs=1e-6), name
        assert (b.num_rows, b.total_tokens) == (a.num_rows, a.total_tokens)
    for name, weights in weights_of(whole).items():
        torch.testing.assert_close(weights_of(trainer)[name], weights, rtol=1e-3, atol=1e-5)
    said = [record.message for record in caplog.records]
    assert said[-1] == "step 0: out of memory with train.row_tokens 64: going on with 32"


@pytest.mark.parametrize("where", ["loss", "everywhere"])
def test_a_sample_that_does_not_fit_gets_smaller_chunks(
    tiny_model_dir, teacher, caplog, where  # noqa: F811
):  # fmt: skip
    """First rows down to single samples, then the loss's chunks: the numbers are the step's."""
    samples = [score(teacher, own(teacher, r)) for r in make_rollouts(lengths=LENGTHS)]
    rows, loss = [[0], [1, 2, 3, 4, 5, 6, 7]], LossConfig(target="tail", chunk=256)
    expected = make_trainer(tiny_model_dir, samples, loss=loss)
    steps = expected.train(segment_of(samples, rows, steps=3)).steps
    trainer = make_trainer(tiny_model_dir, samples, loss=loss)
    tried = []

    def is_full(module, given):
        parts = np.diff(given[0].packed.cu_seqlens)
        tried.append((sum(parts), module.chunk))
        if where == "everywhere" or (module.chunk or 256) > 5:
            raise FULL[0]

    hook = trainer._objective.register_forward_pre_hook(is_full)
    with caplog.at_level(logging.WARNING):
        if where == "everywhere":
            segment = segment_of(samples, rows, steps=3)
            with pytest.raises(
                RunError, match=r"with a sample of 18 tokens and loss\.chunk 1: set"
            ):
                trainer.train(segment)
            return
        found = trainer.train(segment_of(samples, rows, steps=3)).steps
    said = [record.message.removeprefix("step 0: out of memory with ") for record in caplog.records]
    assert said == [
        *(f"train.row_tokens {256 // n}: going on with {128 // n}" for n in (1, 2, 4, 8)),
        "loss.chunk 256: going on with 16",  # at once below the longest sample, of 18 tokens
        "loss.chunk 16: going on with 8",
        "loss.chunk 8: going on with 4",
    ]
    assert {chunk for _, chunk in tried[-3:]} == {4}, "it is remembered"
    for a, b in zip(steps, found, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
    for name, weights in weights_of(expected).items():
        torch.testing.assert_close(weights_of(trainer)[name], weights, rtol=1e-3, atol=1e-5)
    hook.remove()


def test_the_whole_logits_have_no_chunks(tiny_model_dir, small_device):
    rollouts = make_rollouts()
    loss = LossConfig(impl="reference", kd_weight=0.0)
    trainer = make_trainer(tiny_model_dir, rollouts, FP32, loss=loss)
    small_device(trainer.model.get_input_embeddings(), 0)
    with pytest.raises(RunError, match=r"with a sample of \d+ tokens: set train"):
        trainer.train(segment_of(rollouts, [[0, 1], [2, 3]]))


def test_moments_that_do_not_fit_are_named(tiny_model_dir, monkeypatch):
    rollouts = make_rollouts()
    trainer = make_trainer(tiny_model_dir, rollouts, FP32)

    def is_full():
        raise FULL[0]

    monkeypatch.setattr(trainer.optimizer, "step", is_full)
    with pytest.raises(RunError, match=r"step 0: the device has no memory left for AdamW's mom"):
        trainer.train(segment_of(rollouts, [[0, 1], [2, 3]]))
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_scorer_reads_in_smaller_rows(tiny_model_dir, tiny_teacher_dir, small_device):
    def make():
        scorer = build_scorer(
            ScoreConfig(top_k=6, row_tokens=256, head_chunk=64, dtype="float32"),
            teacher=tiny_teacher_dir, vocab_size=300, needs_ifd=True, needs_student_pass=False,
            support="topk", device="cpu", trust_remote_code=False, seed=0,
        )  # fmt: skip
        scorer.load_student(tiny_model_dir, 0)
        return scorer

    rollouts = make_rollouts(lengths=LENGTHS)
    expected = make().score(rollouts)
    scorer = make()
    failed = small_device(scorer._teacher._model.get_input_embeddings(), 33)
    found = scorer.score(rollouts)
    assert len(failed) == 3
    for a, b in zip(expected, found, strict=True):
        assert np.array_equal(a.topk_ids, b.topk_ids)
        assert np.allclose(a.topk_logprobs, b.topk_logprobs, atol=1e-5)
        assert b.nll_teacher == pytest.approx(a.nll_teacher, abs=1e-5)
    scorer.score(rollouts)
    assert len(failed) == 3, "it knows what fits"


def test_a_generator_decodes_smaller_batches(tiny_model_dir, small_device):
    model = load_model(tiny_model_dir, packed=False)
    requests, sampling = make_requests(), make_sampling(batch_size=8)
    expected = generate_with(model, requests, sampling)
    fitting = Fitting("generate.batch_size", 8, "buy more")
    failed = []

    def is_full(_, given):
        if given[0].shape[0] > 3:
            failed.append(given[0].shape[0])
            raise FULL[1]

    hook = model.get_input_embeddings().register_forward_pre_hook(is_full)
    for _ in range(2):
        found = generate_with(model, requests, sampling, fitting=fitting)
        assert [r.response_ids.tolist() for r in found] == [
            r.response_ids.tolist() for r in expected
        ]
    assert fitting.of(8) == 2
    assert len(failed) == 2
    hook.remove()


def test_an_evaluation_reads_in_smaller_rows(tiny_model_dir, teacher, small_device):  # noqa: F811
    model = load_model(tiny_model_dir)
    scored = [score(teacher, own(teacher, r)) for r in make_rollouts(lengths=LENGTHS)]
    model.train()
    expected = heldout_kl(model, scored, 256, 64)
    failed = small_device(model.get_input_embeddings(), 33)
    found = heldout_kl(model, scored, 256, 64)
    assert len(failed) == 3
    assert found.kl == pytest.approx(expected.kl, abs=1e-6)
    assert found.num_tokens == expected.num_tokens
    assert model.training
