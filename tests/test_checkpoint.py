"""Checkpoints: what is loaded goes on exactly where it stopped, and damage is seen."""

import pytest
import torch

from npd.errors import StoreError
from npd.types import Segment
from test_trainer import (
    FP32,
    make_rollouts,
    make_trainer,
    moments_of,
    replace_config,
    response_logprobs,
    segment_of,
    weights_of,
)

ROWS = [[0, 2], [1, 3]]


def segments(rollouts, first):
    """Two segments that split four steps with differing learning rates after `first` steps."""
    whole = segment_of(rollouts, ROWS, steps=4)
    steps = tuple(
        type(step)(step.index, 1e-3 / (1 + step.index), step.ranks) for step in whole.steps
    )
    return Segment(0, 0, steps[:first]), Segment(1, 0, steps[first:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_going_on_from_a_checkpoint_repeats_an_uninterrupted_run(tiny_model_dir, tmp_path, dtype):
    rollouts, config = make_rollouts(), replace_config(dtype=dtype)
    head, tail = segments(rollouts, 2)
    straight = make_trainer(tiny_model_dir, rollouts, config)
    straight.train(head)
    straight.save_checkpoint(tmp_path / "step-1")
    expected = straight.train(tail)

    resumed = make_trainer(tiny_model_dir, rollouts, config)
    assert resumed.load_checkpoint(tmp_path / "step-1") == 1
    assert resumed.last_step == 1
    got = resumed.train(tail)
    numbers = [(s.step, s.loss, s.grad_norm, s.lr) for s in got.steps]
    assert numbers == [(s.step, s.loss, s.grad_norm, s.lr) for s in expected.steps]
    assert all(torch.equal(weights_of(straight)[n], w) for n, w in weights_of(resumed).items())
    assert all(torch.equal(moments_of(straight)[n], m) for n, m in moments_of(resumed).items())


def test_dropout_is_repeated_too(tmp_path):
    import json

    from tiny_model import save_model

    source = save_model(tmp_path / "source", seed=0)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    rollouts = make_rollouts()
    head, tail = segments(rollouts, 2)
    straight = make_trainer(source, rollouts)
    straight.train(head)
    straight.save_checkpoint(tmp_path / "c")
    expected = [step.loss for step in straight.train(tail).steps]
    resumed = make_trainer(source, rollouts)
    resumed.load_checkpoint(tmp_path / "c")
    assert [step.loss for step in resumed.train(tail).steps] == expected
    other = make_trainer(source, rollouts, seed=1)
    other.load_checkpoint(tmp_path / "c")
    assert [step.loss for step in other.train(tail).steps] != expected


def test_a_trainer_goes_back_in_place(tiny_model_dir, tmp_path):
    rollouts = make_rollouts()
    head, tail = segments(rollouts, 2)
    trainer = make_trainer(tiny_model_dir, rollouts)
    trainer.train(head)
    trainer.save_checkpoint(tmp_path / "c")
    first = [step.loss for step in trainer.train(tail).steps]
    trainer.load_checkpoint(tmp_path / "c")
    assert [step.loss for step in trainer.train(tail).steps] == first
    with torch.no_grad():
        embeddings = trainer.model.get_input_embeddings().weight
        assert trainer.model.get_output_embeddings().weight is embeddings


def test_a_checkpoint_before_the_first_step_is_a_fresh_start(tiny_model_dir, tmp_path):
    rollouts = make_rollouts()
    head, _ = segments(rollouts, 2)
    fresh = make_trainer(tiny_model_dir, rollouts)
    fresh.save_checkpoint(tmp_path / "c")
    expected = [step.loss for step in fresh.train(head).steps]
    resumed = make_trainer(tiny_model_dir, rollouts)
    assert resumed.load_checkpoint(tmp_path / "c") is None
    assert [step.loss for step in resumed.train(head).steps] == expected


def test_saving_again_replaces(tiny_model_dir, tmp_path):
    rollouts = make_rollouts()
    head, tail = segments(rollouts, 2)
    trainer = make_trainer(tiny_model_dir, rollouts)
    trainer.train(head)
    trainer.save_checkpoint(tmp_path / "c")
    trainer.train(tail)
    trainer.save_checkpoint(tmp_path / "c")
    resumed = make_trainer(tiny_model_dir, rollouts)
    assert resumed.load_checkpoint(tmp_path / "c") == 3
    assert all(torch.equal(weights_of(trainer)[n], w) for n, w in weights_of(resumed).items())
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_save_that_fails_leaves_the_old_checkpoint(tiny_model_dir, tmp_path):
    rollouts = make_rollouts()
    trainer = make_trainer(tiny_model_dir, rollouts)
    trainer.train(segments(rollouts, 1)[0])
    trainer.save_checkpoint(tmp_path / "c")
    # What JSON cannot hold stops the writer half-way, weights already written.
    trainer.last_step = object()
    with pytest.raises(TypeError):
        trainer.save_checkpoint(tmp_path / "c")
    assert make_trainer(tiny_model_dir, rollouts).load_checkpoint(tmp_path / "c") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.fixture
def saved(tiny_model_dir, tmp_path):
    rollouts = make_rollouts()
    trainer = make_trainer(tiny_model_dir, rollouts)
    trainer.train(segments(rollouts, 1)[0])
    trainer.save_checkpoint(tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_damage_is_a_store_error_and_changes_nothing(tiny_model_dir, saved, name, damage):
    data = bytearray((saved / name).read_bytes())
    (saved / name).unlink()
    if damage == "truncated":
        (saved / name).write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[-2] ^= 0x20
        (saved / name).write_bytes(data)
    trainer = make_trainer(tiny_model_dir, make_rollouts())
    before = weights_of(trainer)
    with pytest.raises(StoreError, match=str(saved)):
        trainer.load_checkpoint(saved)
    assert all(torch.equal(before[n], w) for n, w in weights_of(trainer).items())
    assert trainer.last_step is None
    assert not trainer.optimizer.state


def test_no_checkpoint_is_a_store_error(tiny_model_dir, tmp_path):
    with pytest.raises(StoreError, match="nowhere"):
        make_trainer(tiny_model_dir, make_rollouts()).load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("shape", [{"hidden": 48}, {"layers": 3}, {"tied": False}])
def test_another_models_checkpoint_is_refused(saved, tmp_path, shape):
    from tiny_model import save_model

    trainer = make_trainer(save_model(tmp_path / "other", **shape), make_rollouts())
    before = weights_of(trainer)
    with pytest.raises(StoreError, match="is not of this model"):
        trainer.load_checkpoint(saved)
    assert all(torch.equal(before[n], w) for n, w in weights_of(trainer).items())


def test_a_checkpoint_holds_no_pickle(saved):
    assert {path.suffix for path in saved.iterdir()} <= {".safetensors", ".json"}
    assert FP32.dtype == "float32"


def test_loaded_weights_are_used_by_the_head(tiny_model_dir, saved):
    trainer = make_trainer(tiny_model_dir, make_rollouts())
    trainer.load_checkpoint(saved)
    rollout = make_rollouts()[2]
    (report,) = trainer.train(segment_of([rollout], [[0]], lr=0.0)).steps
    trainer.save_pretrained(saved.parent / "out", dtype="float32")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved.parent / "out", dtype=torch.float32)
    labels = torch.from_numpy(rollout.response_ids).long()[:, None]
    expected = -response_logprobs(model, rollout).gather(-1, labels).mean().item()
    assert report.ce == pytest.approx(expected, rel=1e-5)
