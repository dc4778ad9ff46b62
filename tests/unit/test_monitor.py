"""What a run says where the teacher's top k hold little of its probability."""

from __future__ import annotations

from dataclasses import replace

import pytest

from npd.control.monitor import Monitor
from npd.schedule import events as ev
from npd.store.layout import RunLayout
from simulation import Simulation, make_config


class Lines:
    """A view that keeps what it is told."""

    def __init__(self):
        self.lines = []

    def update(self, state): ...
    def message(self, text):
        self.lines.append(text)

    def close(self): ...


def said(folder, *masses, **loss):
    """The lines about mass of a simulated run whose shards have those, and the last for good."""
    config = make_config(epochs=1, reuse=1, loss=loss)
    simulation, view = Simulation(config, 200, seed=3).run(), Lines()
    monitor = Monitor(config, RunLayout(folder), view)
    scored = 0
    for event, actions in zip(simulation.events, simulation.decided, strict=True):
        if isinstance(event, ev.ShardScored):
            mass = masses[min(scored, len(masses) - 1)]
            scored += 1
            stats = tuple(s._replace(teacher_mass=mass) for s in event.stats)
            event = replace(event, stats=stats)
        monitor.note(event, actions, simulation.plan)
    monitor.close()
    assert scored > 1 or loss.get("kd_weight") == 0
    return [line for line in view.lines if "of its probability" in line]


@pytest.mark.parametrize("target", ["topk", "renorm"])
def test_a_narrow_support_is_told_once_with_what_helps(tmp_path, target):
    [line] = said(tmp_path, 0.7, target=target)
    assert line.startswith("the teacher's top 10 hold 70.0% of its probability")
    assert line.endswith("compare with loss.target=tail")


@pytest.mark.parametrize(
    ("mass", "loss"),
    [(0.91, {}), (None, {}), (0.7, {"target": "tail"}), (0.7, {"target": "sampled"})],
)
def test_nothing_is_said_where_enough_is_held_or_the_loss_sees_the_rest(tmp_path, mass, loss):
    assert said(tmp_path, mass, **loss) == []


def test_it_is_a_mean_over_what_was_scored_and_not_one_shard_s(tmp_path):
    assert said(tmp_path / "a", 0.5, 0.95) == []
    [line] = said(tmp_path / "b", *[0.95] * 30, 0.6)
    assert "hold 89." in line


def test_nothing_is_said_where_the_teacher_is_not_in_the_loss(tmp_path):
    assert said(tmp_path, 0.7, kd_weight=0.0) == []
