"""A trainer of several ranks (real processes, gloo) computes what one rank computes."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from npd.config import LoraConfig, LossConfig
from npd.errors import ModelError, RunError, WorkerLostError
from npd.models.distributed import connect_alone
from npd.models.loading import load_model, outline
from npd.train.fsdp import gather, layout, tensors_of
from npd.types import Row, Segment, Step
from rank_bench import BenchFactory, gradients_of, on_ranks
from test_architectures import TAKEN, saved
from test_trainer import (
    FP32,
    SFT,
    make_rollouts,
    make_trainer,
    own,
    refs_of,
    score,
    student,  # noqa: F401
    teacher,  # noqa: F401
    weights_of,
)
from tiny_model import save_hybrid, save_model

LOSS = LossConfig(target="tail")
# Random text: the teacher finds most of it about this unlikely.
SKIPPING = LossConfig(target="tail", skip_after=0.002, skip_tokens=1)
LENGTHS = ((3, 5), (1, 1), (7, 12), (2, 9), (4, 3), (1, 6), (5, 5))
# Rows of each step, as indices of samples: more than ranks, fewer, one, unequal costs.
STEPS = (
    ((0,), (1, 2), (3,), (4,), (5, 6)),
    ((2,), (0, 1)),
    ((3, 4),),
    ((0, 1, 2, 3, 4, 5, 6), (2,), (6,)),
)


def dealt(rows, size):
    """Rows to ranks in turn: a rank may be left with none."""
    return tuple(tuple(rows[rank::size]) for rank in range(size))


def segment_on(size, samples, steps=STEPS, first=1):
    refs = refs_of(samples)
    made = [[Row(tuple(refs[i] for i in row)) for row in rows] for rows in steps]
    return Segment(
        0,
        0,
        tuple(
            Step(first + i, 1e-3 / (first + i), dealt(rows, size)) for i, rows in enumerate(made)
        ),
    )


def factory_of(size, directory, samples, config=FP32, loss=LOSS):
    by_id = tuple(zip([ref.sample_id for ref in refs_of(samples)], samples, strict=True))
    return BenchFactory(size, str(directory), config, loss, by_id)


@pytest.fixture(scope="module")
def samples(teacher):  # noqa: F811
    """Scored samples; half of them written by the snapshot whose drift is measured."""
    rollouts = [own(teacher, r) for r in make_rollouts(lengths=LENGTHS)]
    scored = [score(teacher, r) for r in rollouts]
    return [s if i % 2 else replace(s, rollout=replace(s.rollout, version=-1))
            for i, s in enumerate(scored)]  # fmt: skip


def spoilt(samples):
    """The samples under other ids, the fourth with a target that makes the loss infinite."""
    out = [
        replace(s, rollout=replace(s.rollout, sample_id=100 + s.rollout.sample_id)) for s in samples
    ]
    broken = out[3].topk_logprobs.copy()
    broken[1, 1] = 200.0
    return [*out[:3], replace(out[3], topk_logprobs=broken), *out[4:]]


def numbers(step):
    return {name: getattr(step, name) for name in step.__slots__ if name != "seconds"}


def check_alike(one, other, rel=2e-5):
    """Two lists of step reports agree to float noise."""
    assert [step.step for step in one] == [step.step for step in other]
    for a, b in zip(one, other, strict=True):
        for name, value in numbers(a).items():
            assert numbers(b)[name] == pytest.approx(value, rel=rel, abs=1e-6), (a.step, name)


def check_same(one, other, atol=3e-6, rtol=1e-5):
    """Two sets of arrays by name agree to float noise."""
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_allclose(other[name], one[name], atol=atol, rtol=rtol, err_msg=name)


def arrays(trainer):
    return {name: gather(w).float().numpy() for name, w in weights_of(trainer).items()}


BF16 = FP32.model_copy(update={"dtype": "bfloat16", "activation_checkpointing": True})


@pytest.fixture
def one_rank():
    """One rank as for the config: in bfloat16, ranks compute as one does in a group of its own."""
    made = []

    def make(config):
        if config.dtype != "bfloat16":
            return None
        if not made:
            made.append(connect_alone("cpu"))
        return made[0]

    yield make
    for dist in made:
        dist.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "tied", "config", "loss"),
    [(2, True, BF16, LOSS), (4, False, FP32, SKIPPING)],
    ids=["2-tied-bf16-recomputed", "4-untied-skipping"],
)
def test_ranks_take_the_steps_of_one(size, tied, config, loss, samples, tmp_path, one_rank):
    directory = save_model(tmp_path / "student", seed=0, tied=tied)
    alone = make_trainer(directory, samples, config, loss, dist=one_rank(config))
    kept, smallest = {}, {}

    def keep(*_):
        kept.update(gradients_of(alone))
        for name, grad in kept.items():
            smallest[name] = np.minimum(np.abs(grad), smallest.get(name, np.inf))

    alone.optimizer.register_step_pre_hook(keep)
    expected = alone.train(segment_on(1, samples))
    assert all((step.skipped_tokens > 0) == (loss is SKIPPING) for step in expected.steps)

    async def story(group):
        calls = [("train", segment_on(size, samples)), ("last_gradients",), ("weights",), ("held",)]
        return [(await group.call(*call)).value for call in calls]

    made = factory_of(size, directory, samples, config, loss)
    reports, gradients, weights, held = on_ranks(tmp_path, made, story)
    check_alike(expected.steps, reports[0].steps)
    check_same(kept, gradients, atol=1e-7, rtol=1e-3)
    # Where a gradient is less than Adam's eps but not 0, float noise in it decides the step: such a
    # weight (one of 20,000 here) is only held to the learning rate.
    is_noise = {name: (grad > 0) & (grad < 1e-8) for name, grad in smallest.items()}
    assert sum(int(where.sum()) for where in is_noise.values()) <= 3
    for name, where in is_noise.items():
        np.testing.assert_allclose(weights[name][where], arrays(alone)[name][where], atol=1e-3)
        weights[name] = np.where(where, arrays(alone)[name], weights[name])
    check_same(arrays(alone), weights)
    for report in reports[1:]:
        assert [numbers(s) for s in report.steps] == [numbers(s) for s in reports[0].steps]
        assert report.peak_memory_mib == reports[0].peak_memory_mib
    assert sum(held) == sum(w.size for w in weights.values()), "each number is held once"
    assert max(held) < 1.2 * sum(held) / size


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Lfm2", "FalconH1"])
def test_two_ranks_train_a_model_with_mixers_as_one(family, samples, tmp_path):
    directory = save_hybrid(tmp_path / "student", family)
    config = FP32.model_copy(update={"activation_checkpointing": True})
    alone = make_trainer(directory, samples, config, LOSS)
    expected = alone.train(segment_on(1, samples))

    async def story(group):
        return (await group.call("train", segment_on(2, samples))).value

    reports = on_ranks(tmp_path, factory_of(2, directory, samples, config, LOSS), story)
    check_alike(expected.steps, reports[0].steps, rel=1e-4)


@pytest.mark.slow
def test_a_checkpoint_goes_from_two_ranks_to_one_and_back_and_a_bad_step_changes_nothing(
    samples, tmp_path, tiny_model_dir
):
    bad = spoilt(samples)
    straight = make_trainer(tiny_model_dir, samples, FP32, LOSS)
    parts = [segment_on(1, samples, first=first) for first in (1, 5, 9)]
    expected = [straight.train(part) for part in parts]
    middle = make_trainer(tiny_model_dir, samples, FP32, LOSS)

    async def story(group):
        first = await group.call("train", segment_on(2, samples, first=1))
        await group.call("save", tmp_path / "of-two")
        assert middle.load_checkpoint(tmp_path / "of-two") == 4
        second = middle.train(parts[1])
        middle.save_checkpoint(tmp_path / "of-one")
        assert (await group.call("load", tmp_path / "of-one")).value == 8
        third = await group.call("train", segment_on(2, samples, first=9))
        before = (await group.call("weights")).value
        with pytest.raises(RunError, match=r"step 13: .*samples 103;.*train\.lr"):
            await group.call("train", segment_on(2, bad, steps=(((0, 1), (3,)),), first=13))
        # Every rank said the same, so the group is as it was: nobody waits for anybody.
        check_same(before, (await group.call("weights")).value, atol=0, rtol=0)
        return first.value[0], second, third.value[0], before

    made = factory_of(2, tiny_model_dir, [*samples, *bad])
    *reports, weights = on_ranks(tmp_path, made, story)
    for one, other in zip(expected, reports, strict=True):
        check_alike(one.steps, other.steps)
    check_same(arrays(straight), weights)
    layouts = [sorted(path.name for path in (tmp_path / d).iterdir()) for d in ("of-one", "of-two")]
    assert layouts[0] == layouts[1]


@pytest.mark.slow
def test_ranks_go_on_after_one_was_killed_while_the_other_waited(samples, tmp_path, tiny_model_dir):
    straight = make_trainer(tiny_model_dir, samples, FP32, LOSS)
    straight.train(segment_on(1, samples))
    expected = straight.train(segment_on(1, samples, first=5))

    async def story(group):
        await group.call("train", segment_on(2, samples))
        await group.call("save", tmp_path / "saved")
        with pytest.raises(WorkerLostError, match=r"trainer-1 .*SIGKILL"):
            await group.call("die", 1)
        with pytest.raises(WorkerLostError, match="a rank of trainer was lost, so its group ended"):
            await group.call("weights")
        await group.restart()
        await group.call("load", tmp_path / "saved")
        return (await group.call("train", segment_on(2, samples, first=5))).value

    reports = on_ranks(tmp_path, factory_of(2, tiny_model_dir, samples), story)
    check_alike(expected.steps, reports[0].steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "family", "changes"),
    [
        (2, "Gemma3Text", {}),
        (3, "Qwen2", {"dtype": "bfloat16"}),
        (3, "Qwen3Moe", {"lora": LoraConfig(rank=3, alpha=6)}),
    ],
)
def test_only_the_first_rank_reads_the_student(size, family, changes, tmp_path):
    directory = saved(family, TAKEN[family], tmp_path / "student")
    config = FP32.model_copy(update=changes)
    elsewhere = shutil.copytree(
        directory, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("*.safetensors")
    )
    texts = [replace(r, prompt_ids=r.prompt_ids % 96, response_ids=r.response_ids % 96)
             for r in make_rollouts(lengths=LENGTHS)]  # fmt: skip
    alone = make_trainer(directory, texts, config)
    start = {n: p.detach().float().numpy().copy() for n, p in alone.model.named_parameters()}
    expected = alone.train(segment_on(1, texts, STEPS[:1]))

    segment = segment_on(size, texts, STEPS[:1])

    async def story(group):
        calls = [("weights",), ("unshared",), ("held",), ("train", segment)]
        return [(await group.call(*call)).value for call in calls]

    made = replace(factory_of(size, directory, texts, config, SFT), elsewhere=str(elsewhere))
    weights, unshared, held, reports = on_ranks(tmp_path, made, story)
    check_same(start, weights, atol=0, rtol=0)
    assert sum(held) == sum(w.size for w in start.values())
    own = {n: t.numpy() for n, t in tensors_of(alone.model).items() if n not in start}
    for found in unshared:
        check_same(own, found, atol=0, rtol=0)
    assert own
    rel = 0.02 if config.dtype == "bfloat16" else 2e-5
    for a, b in zip(expected.steps, reports[0].steps, strict=True):
        assert (b.loss, b.grad_norm) == pytest.approx((a.loss, a.grad_norm), rel=rel)


@pytest.mark.slow
def test_a_student_that_cannot_be_read_ends_all_ranks_alike(samples, tmp_path, tiny_model_dir):
    empty = shutil.copytree(
        tiny_model_dir, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors")
    )

    async def story(group):
        with pytest.raises(ModelError, match=r"rank 0, on .*: cannot load a causal language model"):
            await group.call("weights")

    on_ranks(tmp_path, factory_of(2, empty, samples), story)


# One of them keeps a state from the checks at its start, so every rank loads it.
@pytest.mark.parametrize("family", sorted(set(TAKEN) - {"RecurrentGemma"}))
def test_a_student_built_without_memory_has_every_tensor(family, tmp_path):
    directory = saved(family, TAKEN[family], tmp_path / "student")
    built = outline(directory, is_packed=True).float()
    assert layout(built) == layout(load_model(directory))
    assert all(p.is_meta for p in built.parameters())
