"""AdamW with moments of 8 bits: close to AdamW, exact to save, a quarter of its moments' memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npd.config import LoraConfig
from npd.models.distributed import connect_alone
from npd.train.objective import AdamW8bit, Moments, moments_of
from rank_bench import on_ranks
from test_ranks import LENGTHS, arrays, check_same, factory_of, segment_on
from test_trainer import FP32, SFT, make_rollouts, make_trainer, segment_of, weights_of
from tiny_model import save_model

EIGHT = FP32.model_copy(update={"optimizer": "adamw8bit"})
BETAS = (0.9, 0.95)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Wide enough that most matrices are quantised, shared by two ranks too."""
    return save_model(tmp_path_factory.mktemp("wide") / "student", seed=0, hidden=128)


@pytest.fixture(scope="module")
def samples():
    return make_rollouts(lengths=LENGTHS)


def stored(values, is_signed):
    held = Moments.zeros(len(values), is_signed=is_signed, device=values.device)
    held.write(0, values)
    return held


@settings(max_examples=50)
@given(
    st.integers(0, 2**31),
    st.integers(1, 1500),
    st.floats(0.0, 12.0),
    st.floats(-30.0, 3.0),
    st.booleans(),
)
def test_what_is_read_is_stored_again_to_the_bit(seed, num, decades, largest, is_signed):
    """So plain numbers are all that a checkpoint needs."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** (largest - decades * rng.random(num))
    sizes *= rng.choice([-1.0, 0.0, 1.0] if is_signed else [0.0, 1.0], num)
    values = torch.from_numpy(sizes.astype(np.float32))
    held = stored(values, is_signed)
    found = held.read(0, num)
    again = stored(found, is_signed)
    assert torch.equal(again.codes, held.codes)
    assert torch.equal(again.scales, held.scales)
    assert torch.equal(found.sign(), values.sign()) or is_signed
    largest_by_block = [part.abs().max() for part in values.split(256)]
    for part, other, most in zip(
        values.split(256), found.split(256), largest_by_block, strict=True
    ):
        # In the top decade 64 levels (128 without sign) lie between 0.1 and 1; below, the levels'
        # distance falls with the decade more slowly than their size.
        assert (part - other).abs().max() <= most * 0.9 / 64
        assert other.abs().max() == most


def test_a_second_moment_never_vanishes():
    values = torch.full((256,), 1e-12)
    values[0] = 1.0
    found = stored(values, is_signed=False).read(0, 256)
    assert (found > 0).all()
    assert stored(torch.zeros(256), is_signed=False).read(0, 256).abs().max() == 0.0


def both_optimisers(size):
    """The same weights under AdamW and under AdamW of 8 bits."""
    torch.manual_seed(0)
    start = torch.randn(size)
    made = []
    for make in (torch.optim.AdamW, AdamW8bit):
        weight = torch.nn.Parameter(start.clone())
        made.append(
            (weight, make([{"params": [weight], "weight_decay": 0.1}], lr=1e-2, betas=BETAS))
        )
    return made


def descend(made, steps=40):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        noise = torch.randn(made[0][0].shape, generator=generator)
        for weight, optimizer in made:
            weight.grad = weight.detach() * 0.1 + 0.03 * noise
            optimizer.step()


def test_small_tensors_take_the_steps_of_adamw():
    made = both_optimisers((63, 65))
    descend(made)
    torch.testing.assert_close(made[1][0], made[0][0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (129, 77), (3, 17, 200)])
def test_large_tensors_nearly_do(size):
    made = both_optimisers(size)
    start = made[0][0].detach().clone()
    descend(made)
    (exact, _), (rough, optimizer) = made
    apart, way = (exact - rough).norm(), (exact - start).norm()
    assert 0.0 < apart < 0.02 * way
    moments = moments_of(optimizer, rough)
    assert moments["exp_avg"].shape == rough.shape
    held = optimizer.state[rough]["exp_avg_sq"]
    assert held.codes.nbytes + held.scales.nbytes < 1.02 * rough.numel() + 300


def test_a_token_that_comes_rarely_takes_no_leap():
    """Its first moment outlives gradients of 0; its second must too."""
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = AdamW8bit([{"params": [weight]}], lr=1e-3, betas=BETAS)
    for step in range(5):
        weight.grad = torch.zeros(64, 64)
        if step == 0:
            weight.grad[:, 0], weight.grad[:, 1] = 1e-2, 4e-6
        before = weight.detach().clone()
        optimizer.step()
        assert (weight - before).abs().max() < 3e-3


def test_a_tiny_set_is_learnt_by_heart(student, samples):
    trainer = make_trainer(student, samples, EIGHT)
    steps = trainer.train(segment_of(samples, [(0, 1, 2, 3, 4, 5, 6)], lr=3e-3, steps=30)).steps
    exact = make_trainer(student, samples, FP32)
    expected = exact.train(segment_of(samples, [(0, 1, 2, 3, 4, 5, 6)], lr=3e-3, steps=30)).steps
    assert steps[-1].ce < 0.3 * steps[0].ce
    assert 0.0 < abs(steps[5].ce - expected[5].ce) < 0.05 * expected[5].ce
    sizes = [
        held.codes.nbytes + held.scales.nbytes if isinstance(held, Moments) else held.nbytes
        for state in trainer.optimizer.state.values()
        for held in state.values()
    ]
    assert sum(sizes) < 2.6 * sum(p.numel() for p in trainer.model.parameters())


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=64, alpha=64)], ids=["all", "lora"])
def test_killed_and_resumed_is_uninterrupted_to_the_bit(in_group, lora, student, samples, tmp_path):
    """In a group of its own with weights cast by FSDP, as one GPU is."""
    config = EIGHT.model_copy(update={"lora": lora, "dtype": "bfloat16" if in_group else "float32"})
    dist = connect_alone("cpu") if in_group else None
    rows = segment_of(samples, [(0, 1, 2, 3), (4, 5, 6)], steps=2)
    straight = make_trainer(student, samples, config, dist=dist)
    straight.train(rows)
    straight.save_checkpoint(tmp_path / "saved")
    resumed = make_trainer(student, samples, config, dist=dist)
    resumed.load_checkpoint(tmp_path / "saved")
    assert any(
        isinstance(held, Moments)
        for state in resumed.optimizer.state.values()
        for held in state.values()
    )
    expected = straight.train(rows)
    found = resumed.train(rows)
    assert [step.loss for step in found.steps] == [step.loss for step in expected.steps]
    check_same(arrays(straight), arrays(resumed), atol=0, rtol=0)
    if dist is not None:
        dist.close()


@pytest.mark.slow
def test_ranks_resume_to_the_bit_and_any_number_of_them_goes_on(student, samples, tmp_path):
    made = factory_of(2, student, samples, EIGHT, SFT)
    first, second = (segment_on(2, samples, first=first) for first in (1, 5))

    async def straight(group):
        await group.call("train", first)
        await group.call("save", tmp_path / "of-two")
        await group.call("train", second)
        return (await group.call("weights")).value

    async def resumed(group):
        assert (await group.call("load", tmp_path / "of-two")).value == 4
        await group.call("train", second)
        return (await group.call("weights")).value

    expected = on_ranks(tmp_path / "straight", made, straight)
    check_same(expected, on_ranks(tmp_path / "resumed", made, resumed), atol=0, rtol=0)
    # Blocks of a shard are not those of the whole, so one rank rounds a little otherwise.
    alone = make_trainer(student, samples, EIGHT, SFT)
    assert alone.load_checkpoint(tmp_path / "of-two") == 4
    start = {name: w.clone() for name, w in weights_of(alone).items()}
    alone.train(segment_on(1, samples, first=5))
    way = math.sqrt(sum(float((w - start[n]).square().sum()) for n, w in weights_of(alone).items()))
    apart = math.sqrt(sum(np.square(expected[n] - w).sum() for n, w in arrays(alone).items()))
    assert apart < 0.1 * way


def test_a_parameter_without_a_step_has_no_moments(student, samples):
    trainer = make_trainer(student, samples, EIGHT)
    for parameter in trainer.model.parameters():
        assert moments_of(trainer.optimizer, parameter) == {}
