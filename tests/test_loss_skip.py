"""Tokens after one that the teacher finds unlikely: left out of the loss, and only of the loss."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch

from npd.config import LossConfig
from npd.models.lm_head import head_of
from npd.models.loading import hidden_states, load_model
from npd.train.batch import build_row, kept
from npd.train.loss import near_policy_loss
from test_trainer import (
    make_rollouts,
    make_trainer,
    own,
    score,
    segment_of,
    teacher,  # noqa: F401
    weights_of,
)

SKIP = LossConfig(skip_after=0.01, skip_tokens=2)


@pytest.fixture
def samples(teacher):  # noqa: F811
    """Scored samples; the teacher finds two tokens of the longest ones unlikely."""
    found = [score(teacher, own(teacher, rollout)) for rollout in make_rollouts()]
    for at, places in ((0, (4,)), (2, (1, 2, 8)), (3, (0,))):
        logprobs = np.full(len(found[at].rollout.response_ids), -1.0, np.float32)
        logprobs[list(places)] = -5.0  # 0.7 %
        found[at] = replace(found[at], teacher_logprobs=logprobs)
    found[1] = replace(found[1], teacher_logprobs=np.full(1, -9.0, np.float32))
    return found


def test_what_follows_an_unlikely_token_is_left_out_up_to_the_end(samples):
    left_out = [np.flatnonzero(~kept(sample, SKIP)).tolist() for sample in samples]
    # After the last token there is nothing; the one token of the second sample always counts.
    assert left_out == [[], [], [2, 3, 4, 9, 10], [1, 2]]


def test_a_stretch_of_unlikely_tokens_is_left_out_whole(samples):
    logprobs = np.full(12, -1.0, np.float32)
    logprobs[[1, 3, 5, 8]] = -np.inf
    found = kept(replace(samples[2], teacher_logprobs=logprobs), SKIP)
    assert np.flatnonzero(found).tolist() == [0, 1, 8, 11]


@pytest.mark.parametrize("after", [0.0, 0.005])
def test_nothing_is_left_out_without_a_bound_or_above_it(samples, after):
    loss = LossConfig(skip_after=after)
    assert all(kept(sample, loss).all() for sample in (samples[0], samples[2], samples[3]))


def test_text_that_no_teacher_has_seen_is_trained_on_whole(samples):
    assert all(kept(sample.rollout, SKIP).all() for sample in samples)


def test_a_step_is_the_loss_with_weight_0_at_those_tokens(tiny_model_dir, samples):
    trainer = make_trainer(tiny_model_dir, samples, loss=SKIP)
    (report,) = trainer.train(segment_of(samples, [[0, 2], [1, 3]])).steps
    model = load_model(tiny_model_dir, device="cpu", packed=True)
    row = build_row(samples, version=0, device="cpu")
    weights = torch.from_numpy(np.concatenate([kept(sample, SKIP) for sample in samples])).float()
    assert (len(weights), int(weights.sum())) == (27, 20)
    expected = near_policy_loss(
        hidden_states(model, row.packed)[row.positions_N],
        head_of(model),
        row.labels_N,
        row.topk_ids_NK,
        row.topk_logprobs_NK,
        weights_N=weights,
        behavior_N=row.behavior_N,
    )
    assert (report.response_tokens, report.skipped_tokens) == (20, 7)
    assert report.loss == pytest.approx(float(expected.loss.detach()), rel=1e-5)
    # What is left out is context all the same.
    assert report.total_tokens == sum(sample.rollout.num_tokens for sample in samples)


def test_packing_does_not_change_a_step(tiny_model_dir, samples):
    found = []
    for rows in ([[0], [1], [2], [3]], [[3, 1, 2, 0]]):
        trainer = make_trainer(tiny_model_dir, samples, loss=SKIP)
        trainer.train(segment_of(samples, rows))
        found.append(weights_of(trainer))
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=1e-4, atol=1e-6)


def test_the_loss_s_own_options_are_those_that_are_not_of_skipping():
    options = SKIP.of_tokens
    assert set(options) < set(inspect.signature(near_policy_loss).parameters)
    assert set(LossConfig.model_fields) - set(options) == {"skip_after", "skip_tokens"}


def test_it_changes_what_is_learned(tiny_model_dir, samples):
    found = []
    for loss in (SKIP, LossConfig()):
        trainer = make_trainer(tiny_model_dir, samples, loss=loss)
        trainer.train(segment_of(samples, [[0, 1, 2, 3]]))
        found.append(weights_of(trainer))
    assert any(not torch.equal(weight, found[1][name]) for name, weight in found[0].items())
