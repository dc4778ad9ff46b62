"""train.compile: the same numbers, names and files, and few compilations whatever the rows."""

from __future__ import annotations

import gc
import os
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from cli_fixture import Shell
from npd.config import LoraConfig, LossConfig, ScoreConfig
from npd.errors import ConfigError, ModelError
from npd.models.kernels import compile as compiling
from npd.models.kernels.compile import check_compilers, compile_layers
from npd.models.loading import decoding, load_model
from npd.score import build_scorer, in_process
from npd.types import Row, Segment, Step
from rank_bench import gradients_of, on_ranks
from test_ranks import (
    check_alike,
    check_same,
    factory_of,
    one_rank,  # noqa: F401
    samples,  # noqa: F401
    segment_on,
)
from test_trainer import (
    FP32,
    make_rollouts,
    make_trainer,
    own,
    refs_of,
    score,
    teacher,  # noqa: F401
    weights_of,
)
from tiny_model import save_hybrid, save_model

LOSS = LossConfig(target="tail")
# torch warns of its own insides while it compiles.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1200)]

# Norm; projections and positions; output projection; MLP. Attention between them is not compiled.
GRAPHS = 4


@pytest.fixture
def compiler():
    """For tests that compile: skips them where nothing can (not with NPD_REQUIRE_COMPILER=1)."""
    try:
        check_compilers("cpu")
        return
    except ConfigError as error:
        reason = str(error)
    assert os.environ.get("NPD_REQUIRE_COMPILER") != "1", reason
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _afresh():
    """Each test compiles for itself, and leaves nothing compiled."""
    torch.compiler.reset()
    counters.clear()
    # With more, torch keeps a pool of threads for good.
    with inductor.patch(compile_threads=1):
        yield
    torch.compiler.reset()


def num_graphs():
    return counters["stats"].get("unique_graphs", 0)


def with_compile(config, **changes):
    return config.model_copy(update={"compile": True, **changes})


def steps_and_gradients(trainer, samples):  # noqa: F811
    """The reports of four steps, and the gradients of the first."""
    kept = {}

    def keep(*_):
        if not kept:
            kept.update(gradients_of(trainer))

    trainer.optimizer.register_step_pre_hook(keep)
    return trainer.train(segment_on(1, samples)).steps, kept


def floats(trainer):
    return {name: p.detach().float().numpy() for name, p in trainer.model.named_parameters()}


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "changes",
    [{}, {"activation_checkpointing": True}, {"lora": LoraConfig(rank=4, alpha=8)}],
    ids=["plain", "recomputed", "lora"],
)
def test_compiled_layers_take_the_same_steps(changes, samples, tmp_path):  # noqa: F811
    # More layers than torch would compile one by one.
    directory = save_model(tmp_path / "student", seed=0, layers=10)
    config = FP32.model_copy(update=changes)
    eager = make_trainer(directory, samples, config, LOSS)
    compiled = make_trainer(directory, samples, with_compile(config), LOSS)
    assert list(weights_of(eager)) == list(weights_of(compiled))
    runs = [steps_and_gradients(trainer, samples) for trainer in (eager, compiled)]
    check_alike(runs[0][0], runs[1][0], rel=1e-4)
    assert 0 < num_graphs() <= 2 * GRAPHS, "one compilation for all layers"
    for name, gradient in runs[0][1].items():
        off = np.linalg.norm(runs[1][1][name] - gradient)
        assert off <= 1e-4 * np.linalg.norm(gradient) + 1e-7, name
    for trainer, name in ((eager, "eager"), (compiled, "compiled")):
        trainer.save_checkpoint(tmp_path / name)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("eager", "compiled")]
    assert files[0].keys() == files[1].keys()


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("family", ["Lfm2", "Qwen3_5Text", "FalconH1"])
def test_mixers_of_compiled_layers_keep_documents_apart(family, samples, tmp_path):  # noqa: F811
    """They run uncompiled, as attention does; one compilation still serves all rows."""
    directory = save_hybrid(tmp_path / "student", family)
    config = FP32.model_copy(update={"activation_checkpointing": True})
    eager = make_trainer(directory, samples, config, LOSS)
    compiled = make_trainer(directory, samples, with_compile(config), LOSS)
    expected, found = (steps_and_gradients(x, samples) for x in (eager, compiled))
    check_alike(expected[0], found[0], rel=1e-4)
    first = num_graphs()
    assert first > 0
    compiled.train(segment_on(1, samples, first=5))
    assert num_graphs() == first


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_rows_of_any_length_and_number_of_documents_compile_once(teacher, tiny_model_dir):  # noqa: F811
    rng = np.random.default_rng(0)
    lengths = [tuple(rng.integers(1, 30, 2)) for _ in range(60)]
    scored = [score(teacher, own(teacher, r)) for r in make_rollouts(lengths=lengths)]
    refs = refs_of(scored)
    trainer = make_trainer(tiny_model_dir, scored, with_compile(FP32), LOSS)

    def train(index, count):
        chosen = tuple(refs[i] for i in rng.choice(len(refs), count, replace=False))
        trainer.train(Segment(index, 0, (Step(index, 1e-3, ((Row(chosen),),)),)))

    train(1, 3)
    first = num_graphs()
    assert first == GRAPHS
    for index in range(2, 22):
        train(index, 1 + index % 7)
    assert num_graphs() == first


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_bfloat16_is_rounded_no_worse(samples, tiny_model_dir):  # noqa: F811
    runs = {}
    for name, config in (
        ("exact", FP32),
        ("eager", FP32.model_copy(update={"dtype": "bfloat16"})),
        ("compiled", with_compile(FP32, dtype="bfloat16")),
    ):
        steps = make_trainer(tiny_model_dir, samples, config, LOSS).train(segment_on(1, samples))
        runs[name] = np.array([(step.loss, step.grad_norm) for step in steps.steps])
    errors = {n: np.abs(runs[n] / runs["exact"] - 1).max() for n in ("eager", "compiled")}
    assert errors["compiled"] < 2 * errors["eager"] + 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("recomputes", [False, True])
def test_layers_compile_as_fsdp_casts_their_weights(recomputes, samples, one_rank, tiny_model_dir):  # noqa: F811
    config = FP32.model_copy(update={"dtype": "bfloat16", "activation_checkpointing": recomputes})
    eager, compiled = (
        make_trainer(tiny_model_dir, samples, c, LOSS, dist=one_rank(c))
        for c in (config, with_compile(config))
    )
    assert num_graphs() == 0, "the check at the start compiles nothing"
    (expected, grads), (found, others) = (
        steps_and_gradients(trainer, samples) for trainer in (eager, compiled)
    )
    assert 0 < num_graphs() <= 3 * GRAPHS
    # Each is a few parts in a thousand from float32.
    assert [s.loss for s in found] == pytest.approx([s.loss for s in expected], rel=5e-3)
    for name, grad in grads.items():
        apart = np.linalg.norm(others[name] - grad)
        assert apart < 0.05 * np.linalg.norm(grad), name


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_ranks_take_the_steps_of_one(samples, tmp_path, tiny_model_dir):  # noqa: F811
    alone = make_trainer(tiny_model_dir, samples, FP32, LOSS)
    expected = alone.train(segment_on(1, samples))

    async def story(group):
        calls = [("train", segment_on(2, samples)), ("graphs",), ("weights",)]
        return [(await group.call(*call)).value for call in calls]

    made = factory_of(2, tiny_model_dir, samples, with_compile(FP32, activation_checkpointing=True))
    reports, graphs, found = on_ranks(tmp_path, made, story)
    check_alike(expected.steps, reports[0].steps, rel=1e-4)
    check_same(floats(alone), found, atol=1e-4)
    assert all(0 < count <= 3 * GRAPHS for count in graphs)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_run_that_goes_on_repeats_one_that_was_not_stopped(samples, tmp_path, tiny_model_dir):  # noqa: F811
    config = with_compile(FP32)
    straight = make_trainer(tiny_model_dir, samples, config, LOSS)
    straight.train(segment_on(1, samples))
    straight.save_checkpoint(tmp_path / "c")
    expected = straight.train(segment_on(1, samples, first=5))
    torch.compiler.reset()
    resumed = make_trainer(tiny_model_dir, samples, config, LOSS)
    resumed.load_checkpoint(tmp_path / "c")
    # Another row comes first here: compiled for any length, the numbers are the same bit for bit.
    found = resumed.train(segment_on(1, samples, first=5))
    assert [(s.loss, s.grad_norm) for s in found.steps] == [
        (s.loss, s.grad_norm) for s in expected.steps
    ]
    assert all(torch.equal(weights_of(straight)[n], w) for n, w in weights_of(resumed).items())


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_evaluating_and_decoding_compile_nothing(samples, tiny_model_dir):  # noqa: F811
    trainer = make_trainer(tiny_model_dir, samples, with_compile(FP32), LOSS)
    ids = torch.arange(3, 20)[None]
    with trainer.full_model() as model, decoding(model), torch.no_grad():
        found = model(input_ids=ids).logits
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert num_graphs() == 0
    expected = load_model(tiny_model_dir, packed=False)(input_ids=ids).logits
    torch.testing.assert_close(found, expected)
    trainer.train(segment_on(1, samples))
    assert num_graphs() > 0


def scorer_of(teacher_dir, student_dir, **settings):
    scorer = build_scorer(
        ScoreConfig(**{"top_k": 6, "row_tokens": 64, "dtype": "float32", **settings}),
        teacher=teacher_dir, vocab_size=300, needs_ifd=True, needs_student_pass=True,
        support="topk", device="cpu", trust_remote_code=False, seed=0,
    )  # fmt: skip
    scorer.load_student(student_dir, 0)
    return scorer


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_scorers_give_the_same_scores(tiny_model_dir, tiny_teacher_dir):
    """Few compilations, whatever the rows; those of a snapshot serve the next, which is let go."""
    rng = np.random.default_rng(0)
    rollouts = make_rollouts(lengths=[tuple(rng.integers(1, 30, 2)) for _ in range(40)])
    same_prompt = [replace(r, sample_id=90 + i, prompt_ids=rollouts[0].prompt_ids,
                           header_ids=rollouts[0].header_ids)
                   for i, r in enumerate(rollouts[1:9])]  # fmt: skip
    plain = scorer_of(tiny_teacher_dir, tiny_model_dir, compile=False)
    expected = plain.score(rollouts)
    assert num_graphs() == 0
    scorer = scorer_of(tiny_teacher_dir, tiny_model_dir, compile=True)
    for kernel, want in zip(scorer.score(rollouts), expected, strict=True):
        assert kernel.topk_ids.tolist() == want.topk_ids.tolist()
        np.testing.assert_allclose(kernel.topk_logprobs, want.topk_logprobs, atol=1e-4)
        for name in ("nll_teacher", "nll_teacher_alone", "nll_student", "nll_student_alone"):
            assert getattr(kernel, name) == pytest.approx(getattr(want, name), abs=1e-4)
    first = num_graphs()
    assert 0 < first <= 3 * GRAPHS, "teacher and student have other sizes"
    scorer.score(same_prompt)
    for count in range(1, 9):
        scorer.score(rollouts[:count])
    let_go = weakref.ref(scorer._student._model)
    for version in range(1, 4):
        scorer.load_student(tiny_model_dir, version)
        scorer.score(rollouts[:5])
    gc.collect()
    assert let_go() is None
    assert num_graphs() == first


def test_auto_compiles_where_a_gpu_has_a_compiler(tiny_model_dir, monkeypatch):
    model, auto = load_model(tiny_model_dir), ScoreConfig()
    assert not in_process._is_compiled(model, auto, "cpu")
    assert in_process._is_compiled(model, ScoreConfig(compile=True), "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(compiling, "check_compilers", lambda device: None)
    compiling.builds_kernels.cache_clear()
    assert in_process._is_compiled(model, auto, "cuda:1")
    assert not in_process._is_compiled(model, ScoreConfig(compile=False), "cuda")
    model._no_split_modules = None
    assert not in_process._is_compiled(model, auto, "cuda"), "it names no layers"
    compiling.builds_kernels.cache_clear()


@pytest.mark.usefixtures("compiler")
def test_a_model_without_named_layers_is_refused(tiny_model_dir):
    model = load_model(tiny_model_dir)
    model._no_split_modules = None
    with pytest.raises(ModelError, match="does not name its layers"):
        compile_layers(model, "cpu")


@pytest.mark.parametrize(
    ("device", "variable", "words"),
    [("cpu", "CXX", r"a C\+\+ compiler"), ("cuda", "CC", "a C compiler")],
)
def test_a_missing_compiler_is_told(device, variable, words, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, "no-such-compiler")
    with pytest.raises(ConfigError, match=rf"{words}, and there is no \${variable} \(no-such"):
        check_compilers(device, has_triton=True)
    monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"install it, or set train\.compile: false"):
        check_compilers(device, has_triton=True)


@pytest.mark.usefixtures("compiler")
def test_a_gpu_needs_triton():
    check_compilers("cuda", has_triton=True)
    with pytest.raises(ConfigError, match="needs triton"):
        check_compilers("cuda", has_triton=False)


def test_it_is_told_before_anything_starts(
    tmp_path, tiny_model_dir, tiny_teacher_dir, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shell = Shell(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys)
    shell.write(train={"compile": True})
    assert "compiler" in shell.npd("doctor", "run.yaml").out
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = shell.npd("doctor", "run.yaml")
    assert found.code != 0
    assert "FAIL  compiler" in found.out
    assert "train.compile needs a C++ compiler" in shell.npd("run", "run.yaml").complaint(2)
    assert not shell.layout.root.exists()
    shell.write(score={"compile": True})
    assert "score.compile needs a C++ compiler" in shell.npd("run", "run.yaml").complaint(2)
    shell.write(score={"compile": "auto"})
    assert "FAIL  compiler" not in shell.npd("doctor", "run.yaml").out
    ranks = ("--set", "score.compile=true", "--set", "score.ranks=2", "--set", "runtime.kind=local")
    assert "set score.compile: auto" in shell.npd("run", "run.yaml", *ranks).complaint(2)
