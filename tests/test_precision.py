"""The trainer's bfloat16 path on GPUs and ranks: FSDP casts the weights, the masters stay float32.

One rank in a group of its own (gloo) runs here what one GPU runs; `test_ranks` has several.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from npd.config import LoraConfig, LossConfig
from npd.errors import ModelError, RunError
from npd.models.distributed import connect_alone
from npd.models.lm_head import head_of
from npd.models.loading import hidden_states, load_model
from npd.train.batch import build_row
from npd.train.fsdp import is_kept_in_float32, shard
from npd.train.loss import near_policy_loss
from npd.train.objective import Objective
from npd.train.trainer import check_computes
from rank_bench import gradients_of, on_ranks
from test_architectures import TAKEN, saved
from test_ranks import LENGTHS, factory_of, numbers, segment_on
from test_trainer import (
    FP32,
    SFT,
    make_rollouts,
    make_trainer,
    score,
    segment_of,
    teacher,  # noqa: F401
    weights_of,
)
from tiny_model import make_model, save_model

KD = LossConfig(target="tail")
# Clipping would scale the gradients that are compared.
FP32 = FP32.model_copy(update={"clip": 1e9})
BF16 = FP32.model_copy(update={"dtype": "bfloat16"})
ROWS = ((0, 1, 2), (3, 4), (5, 6))


@pytest.fixture
def alone():
    dist = connect_alone("cpu")
    yield dist
    dist.close()


@pytest.fixture(scope="module")
def samples(teacher):  # noqa: F811
    return [score(teacher, r) for r in make_rollouts(lengths=LENGTHS)]


def after_one_step(directory, samples, config, loss=KD, **changes):
    """The trainer, its step's report and gradients."""
    trainer, grads = make_trainer(directory, samples, config, loss, **changes), {}
    trainer.optimizer.register_step_pre_hook(lambda *_: grads.update(gradients_of(trainer)))
    (report,) = trainer.train(segment_of(samples, ROWS)).steps
    return trainer, report, grads


def by_plain_autograd(directory, samples):
    """Loss and gradients without FSDP: bfloat16 copies of the weights, a sum over rows in float32.

    Its arithmetic is what the policy promises: every weight is rounded once, and so is its gradient
    once a row.
    """
    rounded = load_model(directory)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16()
    tokens = float(sum(len(s.rollout.response_ids) for s in samples))
    total, grads = 0.0, {}
    for indices in ROWS:
        row = build_row([samples[i] for i in indices], version=0, device="cpu")
        hidden = hidden_states(rounded, row.packed)[row.positions_N]
        out = near_policy_loss(
            hidden, head_of(rounded), row.labels_N, row.topk_ids_NK, row.topk_logprobs_NK,
            normalizer=tokens, **KD.of_tokens,
        )  # fmt: skip
        out.loss.backward()
        total += out.loss.item()
        for name, parameter in rounded.named_parameters():
            grads[name] = grads.get(name, 0.0) + parameter.grad.float().numpy()
            parameter.grad = None
    return total, grads


def distance(grads, others):
    """The relative distance of all gradients together."""
    squares = [(np.square(grads[n] - others[n]).sum(), np.square(others[n]).sum()) for n in others]
    return float(np.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recomputes", [False, True])
def test_one_rank_is_plain_autograd_to_the_bit(tied, recomputes, alone, samples, tmp_path):
    directory = save_model(tmp_path / "student", seed=0, tied=tied)
    config = BF16.model_copy(update={"activation_checkpointing": recomputes})
    trainer, report, grads = after_one_step(directory, samples, config, dist=alone)
    loss, expected = by_plain_autograd(directory, samples)
    assert report.loss == pytest.approx(loss, rel=1e-6)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        np.testing.assert_array_equal(grads[name], grad, err_msg=name)
    for parameter in trainer.model.parameters():
        assert parameter.dtype == torch.float32
        assert all(m.dtype == torch.float32 for m in trainer.optimizer.state[parameter].values())


@pytest.mark.slow
@pytest.mark.parametrize(("size", "tied"), [(2, True), (3, False)])
def test_ranks_are_plain_autograd(size, tied, samples, tmp_path):
    directory = save_model(tmp_path / "student", seed=0, tied=tied)

    async def story(group):
        calls = [("train", segment_on(size, samples, steps=(ROWS,))), ("last_gradients",)]
        return [(await group.call(*call)).value for call in calls]

    (report, *_), grads = on_ranks(tmp_path, factory_of(size, directory, samples, BF16, KD), story)
    loss, expected = by_plain_autograd(directory, samples)
    assert report.steps[0].loss == pytest.approx(loss, rel=1e-6)
    # Two ranks double the loss and halve the gradient, which rounds nothing. A factor of three
    # moves every rounding of the backward pass: 2^-9 each, some tens of them in a row.
    assert distance(grads, expected) < (1e-6 if size == 2 else 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("config", [BF16, FP32], ids=["bf16", "fp32"])
def test_ranks_that_keep_the_weights_take_the_same_steps(config, samples, tmp_path):
    directory = save_model(tmp_path / "student", seed=0)

    async def story(group):
        calls = [("train", segment_on(2, samples)), ("weights",), ("held",)]
        return [(await group.call(*call)).value for call in calls]

    runs = []
    for shares in ("full", "optimizer"):
        given = config.model_copy(update={"shard": shares})
        (report, *_), weights, held = on_ranks(
            tmp_path, factory_of(2, directory, samples, given, KD), story
        )
        runs.append([[numbers(step) for step in report.steps], held])
        runs[-1].append({name: w.tobytes() for name, w in weights.items()})
    assert runs[0] == runs[1]
    assert sum(runs[0][1]) == sum(w.numel() for w in load_model(directory).parameters())


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen2", "Gemma3Text"])
def test_the_gradient_is_about_as_exact_as_under_autocast(family, alone, tmp_path):
    directory = saved(family, TAKEN[family], tmp_path / "student")
    texts = make_rollouts(lengths=LENGTHS)
    for text in texts:
        for ids in (text.prompt_ids, text.response_ids):
            ids %= 96
    exact, autocast, policy = (
        after_one_step(directory, texts, config, SFT, dist=dist)[2]
        for config, dist in ((FP32, None), (BF16, None), (BF16, alone))
    )
    # Autocast rounds inputs of products only; here what lies between layers is rounded too. (Not of
    # a mixture of experts, whose router sends a near tie elsewhere.)
    assert 0.0 < distance(policy, exact) < 1.5 * distance(autocast, exact)


def test_a_teachers_log_probs_are_not_rounded(alone, samples, tiny_model_dir):
    """FSDP would round every floating-point number in a module's arguments."""
    _, report, _ = after_one_step(tiny_model_dir, samples, BF16, dist=alone)
    mass = np.concatenate([np.exp(s.topk_logprobs).sum(axis=1) for s in samples]).mean()
    assert report.teacher_mass == pytest.approx(float(mass), rel=1e-6)


def test_what_is_written_and_evaluated_are_the_float32_weights(alone, samples, tmp_path):
    directory = save_model(tmp_path / "student", seed=0)
    trainer, _, _ = after_one_step(directory, samples, BF16, dist=alone)
    weights = {name: p.full_tensor() for name, p in weights_of(trainer).items()}
    trainer.save_pretrained(tmp_path / "out", dtype="float32")
    found = dict(load_model(tmp_path / "out").named_parameters())
    with trainer.full_model() as model:
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        evaluated = dict(model.named_parameters())
        for name, p in trainer.model.named_parameters():
            assert evaluated[name].data_ptr() == p.to_local().data_ptr(), "nothing is copied"
    for name, weight in weights.items():
        assert torch.equal(found[name], weight)
        assert torch.equal(evaluated[name], weight)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=3, alpha=6, dropout=0.1)])
def test_killed_and_resumed_is_uninterrupted_to_the_bit(lora, alone, samples, tmp_path):
    directory = save_model(tmp_path / "student", seed=0)
    config = BF16.model_copy(update={"lora": lora})
    straight, *_ = after_one_step(directory, samples, config, dist=alone)
    straight.save_checkpoint(tmp_path / "saved")
    resumed = make_trainer(directory, samples, config, KD, dist=alone)
    resumed.load_checkpoint(tmp_path / "saved")
    for trainer in (straight, resumed):
        trainer.train(segment_of(samples, ROWS))
    expected = weights_of(straight)
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight.full_tensor(), expected[name].full_tensor()), name
    resumed.save_snapshot(tmp_path / "snapshot")
    assert load_model(tmp_path / "snapshot", packed=False) is not None


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_step_that_ran_out_of_memory_is_taken_again(in_backward, alone, samples, tmp_path):
    directory = save_model(tmp_path / "student", seed=0)
    _, expected, grads = after_one_step(directory, samples, BF16, dist=alone)
    trainer, found, times = make_trainer(directory, samples, BF16, KD, dist=alone), {}, []

    def fail(*_):
        times.append(None)
        if len(times) == 2:  # in the second row: the first one's gradients are there
            raise torch.OutOfMemoryError("out of memory")

    last = trainer.model.model.layers[-1]
    if in_backward:
        last.register_forward_hook(lambda _, __, out: out.register_hook(fail) and None)
    else:
        last.register_forward_hook(fail)
    trainer.optimizer.register_step_pre_hook(lambda *_: found.update(gradients_of(trainer)))
    (report,) = trainer.train(segment_of(samples, ROWS)).steps
    assert len(times) == 2 + len(ROWS)
    # The rows are shorter than half of train.row_tokens, so they are the same again.
    assert report.loss == expected.loss
    assert distance(found, grads) == 0.0


def test_where_not_even_a_sample_fits_the_next_step_is_clean(alone, samples, tiny_model_dir):
    trainer = make_trainer(tiny_model_dir, samples, BF16, KD, dist=alone)

    def is_full(*_):
        raise torch.OutOfMemoryError("out of memory")

    hook = trainer.model.model.norm.register_forward_hook(is_full)
    with pytest.raises(RunError, match=r"a sample of 18 tokens and loss\.chunk 1: set train\.act"):
        trainer.train(segment_of(samples, ROWS))
    hook.remove()
    (report,) = trainer.train(segment_of(samples, [(5,), (6,)])).steps
    fresh = make_trainer(tiny_model_dir, samples, BF16, KD, dist=alone)
    assert report.loss == fresh.train(segment_of(samples, [(5,), (6,)])).steps[0].loss


def test_an_architecture_that_demands_float32_weights_keeps_autocast(alone, tmp_path):
    from test_architectures import MORE_TAKEN

    directory = saved("Ernie4_5_Moe", MORE_TAKEN["Ernie4_5_Moe"], tmp_path / "student")
    model = load_model(directory)
    assert is_kept_in_float32(model)
    assert not is_kept_in_float32(make_model())
    texts = make_rollouts(lengths=((5, 7), (3, 4)))
    for text in texts:
        for ids in (text.prompt_ids, text.response_ids):
            ids %= 96
    rows = segment_of(texts, [(0, 1)])
    in_group, plain = (
        make_trainer(directory, texts, BF16, SFT, dist=dist).train(rows).steps[0]
        for dist in (alone, None)
    )
    assert in_group.loss == plain.loss


def test_an_architecture_that_does_not_run_in_bfloat16_is_refused(alone):
    class Strict(nn.Module):
        def forward(self, hidden):
            return hidden @ torch.eye(hidden.shape[-1])

    model = make_model()
    model.model.norm = Strict()
    objective = Objective(model, SFT, is_autocast=False)
    shard(objective, model, alone, "cpu", torch.bfloat16)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*train\.dtype: float32"):
        check_computes(objective, model, "cpu")


def test_the_check_leaves_random_numbers_and_weights_alone(alone, samples, tiny_model_dir):
    torch.manual_seed(5)
    expected = copy.deepcopy(torch.get_rng_state())
    trainer = make_trainer(tiny_model_dir, samples, BF16, KD, dist=alone)
    assert torch.equal(torch.get_rng_state(), expected)
    assert not any(p.grad is not None for p in trainer.model.parameters())
