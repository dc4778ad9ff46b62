"""What is ahead of a training step: the next step's rows, and the host, which never waits."""

from __future__ import annotations

import threading
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import npd
from npd.config import LossConfig, TrainConfig
from npd.errors import StoreError
from npd.train.batch import build_row, prefetch
from npd.train.objective import Objective
from npd.train.trainer import Trainer
from npd.types import Row, Segment, Step
from test_trainer import (
    FP32,
    SFT,
    make_rollouts,
    make_trainer,
    own,
    refs_of,
    score,
    segment_of,
    student,  # noqa: F401
    teacher,  # noqa: F401
)

LIBRARY = Path(npd.__file__).parent
# Operations that make the host wait for a device: a value is fetched, or the size of a result
# depends on values; or a number of Python's becomes a tensor, which is copied from pageable memory.
WAITS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::lift_fresh",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_dim",
    "aten::_unique2",
}
# What asks for a value at once on a CPU, where it is there, by function.
ON_A_CPU = {"demand", "backward"}


class Waits(TorchDispatchMode):
    """Keeps, of each operation of `WAITS`, npd's function that asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if func.name() in WAITS:
            stack = traceback.extract_stack()
            frames = [f for f in stack if Path(f.filename).is_relative_to(LIBRARY)]
            self.found.add(frames[-1].name if frames else "autograd")
        return func(*args, **(kwargs or {}))


def steps_of(samples):
    """A segment of as many steps as samples, each of one sample."""
    refs = refs_of(samples)
    return Segment(0, 0, tuple(Step(i, 1e-3, ((Row((ref,)),),)) for i, ref in enumerate(refs)))


def reader(samples):
    by_id = dict(zip([ref.sample_id for ref in refs_of(samples)], samples, strict=True))
    return lambda ref: by_id[ref.sample_id]


# `meta` has no values that could be fetched, and no autocast; nothing is done on it as on a CPU.
@pytest.mark.parametrize(("device", "dtype"), [("meta", "float32"), ("cpu", "bfloat16")])
def test_a_micro_batch_does_not_wait_for_its_device(
    tiny_model_dir,
    teacher,  # noqa: F811
    device,
    dtype,
):
    samples = [score(teacher, own(teacher, rollout)) for rollout in make_rollouts()]
    config = FP32.model_copy(update={"dtype": dtype})
    trainer = make_trainer(tiny_model_dir, samples, config, LossConfig())
    row = build_row(samples, version=0, device="cpu").to(device)
    model, is_autocast = trainer.model.to(device), dtype == "bfloat16"
    objective = Objective(model, LossConfig(), is_autocast=is_autocast)
    with Waits() as waits:
        loss, _ = objective(row, 29)
        loss.backward(torch.full_like(loss, 1.0))
    assert waits.count > 100
    assert waits.found == (ON_A_CPU if device == "cpu" else set())


def test_a_wait_is_noticed():
    with Waits() as waits:
        assert bool(torch.ones(3).sum() > 0)
        torch.arange(3).nonzero()
    assert waits.found == {"autograd"}


def test_the_next_steps_rows_are_read_while_a_step_trains(tiny_model_dir):
    samples = make_rollouts()
    is_read = [threading.Event() for _ in samples]
    found = reader(samples)

    def read(ref):
        is_read[ref.sample_id].set()
        return found(ref)

    trainer = Trainer(FP32, SFT, student=tiny_model_dir, read=read, device="cpu")
    waited = []

    def wait_for_next(*_):
        step = -1 if trainer.last_step is None else trainer.last_step
        if step + 2 < len(samples):
            waited.append(is_read[step + 2].wait(30))

    trainer.model.base_model.register_forward_pre_hook(wait_for_next)
    trainer.train(steps_of(samples))
    assert waited
    assert all(waited)


def test_rows_are_those_of_their_steps_and_one_step_ahead_at_most():
    samples, reads = make_rollouts(), []
    found = reader(samples)

    def read(ref):
        reads.append(ref.sample_id)
        return found(ref)

    steps = prefetch(steps_of(samples), read, SFT, rank=0, is_pinned=False)
    for i, given in enumerate(steps):
        assert max(reads) <= i + 1
        expected = build_row([samples[i]], version=0, device="cpu")
        assert given.step.index == i
        assert given.idle == ()
        assert given.num_tokens == (len(samples[i].response_ids), 0)
        assert torch.equal(given.rows[0].packed.input_ids, expected.packed.input_ids)
        assert torch.equal(given.rows[0].labels_N, expected.labels_N)
    assert reads == [0, 1, 2, 3]


def test_a_rank_with_fewer_rows_is_given_the_shortest_sample_for_its_idle_turns():
    samples = make_rollouts()
    refs = refs_of(samples)
    ranks = (tuple(Row((ref,)) for ref in refs[:3]), (Row((refs[3],)),))
    segment = Segment(0, 0, (Step(0, 1e-3, ranks),))
    (given,) = prefetch(segment, reader(samples), SFT, rank=1, is_pinned=False)
    assert len(given.rows) == 1
    assert [row.labels_N.tolist() for row in given.idle] == [samples[1].response_ids.tolist()] * 2


def test_an_error_of_reading_is_raised_at_its_step(tiny_model_dir):
    samples, heard = make_rollouts(), []
    found = reader(samples)

    def read(ref):
        if ref.sample_id == 2:
            raise StoreError("shard 0 is damaged")
        return found(ref)

    trainer = Trainer(FP32, SFT, student=tiny_model_dir, read=read, device="cpu")
    with pytest.raises(StoreError, match="damaged"):
        trainer.train(steps_of(samples), on_step=lambda report: heard.append(report.step))
    assert heard == [0, 1]
    assert trainer.last_step == 1


def test_a_step_that_fails_leaves_no_reader_behind(tiny_model_dir):
    samples = make_rollouts()
    trainer = make_trainer(tiny_model_dir, samples)
    before = threading.active_count()

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.train(segment_of(samples, [[0, 1], [2, 3]], steps=3), on_step=stop)
    assert threading.active_count() == before


def test_an_empty_segment_reads_nothing():
    assert list(prefetch(Segment(0, 0, ()), None, SFT, rank=0, is_pinned=False)) == []


def test_training_is_float32_whatever_the_compute_type(tiny_model_dir):
    samples = make_rollouts()
    config = TrainConfig(dtype="bfloat16", row_tokens=256)
    trainer = make_trainer(tiny_model_dir, samples, config)
    trainer.train(segment_of(samples, [[0, 1, 2, 3]]))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    moments = [m for s in trainer.optimizer.state.values() for n, m in s.items() if n != "step"]
    assert {m.dtype for m in moments} == {torch.float32}
    assert trainer.optimizer.defaults["fused"] is True
