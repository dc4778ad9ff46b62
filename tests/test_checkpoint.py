"""Checkpoints: what is loaded goes on exactly where it stopped, and damage is seen."""

import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from npd.errors import RunError, StoreError
from npd.models.distributed import DistContext
from npd.train.checkpoint import _DTYPES, HostCopy
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


def wait_until_saved(trainer, directory):
    while not trainer.is_saved(directory):
        time.sleep(0.001)


def test_a_checkpoint_holds_the_state_of_its_start_though_training_goes_on(
    tiny_model_dir, tmp_path
):
    rollouts = make_rollouts()
    head, tail = segments(rollouts, 2)
    trainer = make_trainer(tiny_model_dir, rollouts)
    trainer.train(head)
    trainer.save_checkpoint(tmp_path / "waited")
    is_over = threading.Event()
    trainer.start_checkpoint(tmp_path / "c", lambda _: is_over.wait(60))
    trainer.train(tail)
    assert not trainer.is_saved(tmp_path / "c"), "it is kept elsewhere too, which is not over"
    is_over.set()
    wait_until_saved(trainer, tmp_path / "c")
    assert trainer.is_saved(tmp_path / "c"), "for good"
    for file in (tmp_path / "waited").iterdir():
        assert file.read_bytes() == (tmp_path / "c" / file.name).read_bytes()
    assert make_trainer(tiny_model_dir, rollouts).load_checkpoint(tmp_path / "c") == 1


def test_the_next_checkpoint_waits_for_the_one_before(tiny_model_dir, tmp_path):
    rollouts = make_rollouts()
    head, tail = segments(rollouts, 2)
    trainer = make_trainer(tiny_model_dir, rollouts)
    trainer.train(head)
    stored = []
    assert trainer.start_checkpoint(tmp_path / "a", lambda path: stored.append(path.name)) >= 0.0
    trainer.start_checkpoint(tmp_path / "a")
    trainer.train(tail)
    trainer.start_checkpoint(tmp_path / "b", lambda path: stored.append(path.name))
    assert trainer.is_saved(tmp_path / "a")
    wait_until_saved(trainer, tmp_path / "b")
    assert stored == ["a", "b"]
    steps = [make_trainer(tiny_model_dir, rollouts).load_checkpoint(tmp_path / n) for n in "ab"]
    assert steps == [1, 3]


def test_a_failed_write_is_told_by_every_later_call_about_it(tiny_model_dir, tmp_path):
    trainer = make_trainer(tiny_model_dir, make_rollouts())
    (tmp_path / "file").touch()
    trainer.start_checkpoint(tmp_path / "file" / "c")
    for _ in range(2):
        with pytest.raises(RunError, match=r"cannot write .*file/c"):
            wait_until_saved(trainer, tmp_path / "file" / "c")
    with pytest.raises(RunError, match=r"cannot write .*file/c"):
        trainer.start_checkpoint(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_closed_trainer_writes_no_more(tiny_model_dir, tmp_path):
    trainer = make_trainer(tiny_model_dir, make_rollouts())
    trainer.start_checkpoint(tmp_path / "a")
    trainer.close()
    assert not [t for t in threading.enumerate() if t.name == "npd-checkpoint"]
    assert [path.name for path in tmp_path.iterdir()] in ([], ["a"]), "whole or not at all"
    other = make_trainer(tiny_model_dir, make_rollouts())
    other.close()
    other.start_checkpoint(tmp_path / "b")
    other.close()
    assert not list(tmp_path.glob("*b*"))


SHAPES = st.lists(st.integers(0, 5), max_size=3)


@given(st.lists(st.tuples(SHAPES, st.sampled_from([*_DTYPES])), max_size=6), st.integers(3, 7))
def test_a_copy_is_what_safetensors_reads_wherever_its_blocks_end(shapes, power):
    copy = HostCopy(is_pinned=False, block=2**power)
    for turn in range(2):  # the second into the memory of the first
        tensors = {
            f"t{i}": (100 * torch.rand(shape) - turn).to(dtype)
            for i, (shape, dtype) in enumerate(shapes)
        }
        copy.clear()
        copy.add("one", tensors, DistContext())
        copy.add("two", {"only": torch.arange(9.0).reshape(3, 3).t()}, DistContext())
        files = {name: b"".join(map(bytes, pieces)) for name, pieces in copy.files()}
        found = load(files["one"])
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert all(found[name].dtype is tensor.dtype for name, tensor in tensors.items())
        assert torch.equal(load(files["two"])["only"], torch.arange(9.0).reshape(3, 3).t())


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
