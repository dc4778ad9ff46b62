"""Whole runs with a trainer of two processes: the student of one, whatever is killed on the way."""

from __future__ import annotations

import os
import signal

import pytest

import npd
from npd.errors import ConfigError
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from run_process import WINDOWED, check_all_steps, is_alive, wait_for_child
from test_run import QuietView, check_same_run
from tiny_run import tiny_config, write_prompts

pytestmark = pytest.mark.timeout(1200)
# Two or three rows a step, so that both ranks have work, and sometimes one has not.
TRAIN = {
    "batch_size": 6, "row_tokens": 112, "lr": 2e-3, "min_lr": 2e-4, "dtype": "float32",
}  # fmt: skip


@pytest.mark.slow
def test_a_run_on_two_ranks_makes_the_student_of_one(tmp_path, tiny_model_dir, tiny_teacher_dir):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    schedule = {"epochs": 4, "reuse": 2, "refresh": {"at_epochs": [2]}, "segment_steps": 2,
                "overlap": False}  # fmt: skip

    def config(name, ranks, kind):
        return tiny_config(
            tiny_model_dir, tiny_teacher_dir, prompts, tmp_path / name, schedule=schedule,
            train={**TRAIN, "ranks": ranks}, runtime={"kind": kind, "device": "cpu", "threads": 1},
        )  # fmt: skip

    one = npd.run(config("one", 1, "inline"), view=QuietView())
    two = npd.run(config("two", 2, "local"), view=QuietView())
    layout = RunLayout(two.directory)
    check_same_run(one, two)
    for a, b in zip(one.data.steps, two.data.steps, strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    assert max(step["num_rows"] for step in two.data.steps) > 1
    for a, b in zip(one.data.evals, two.data.evals, strict=True):
        assert b["exact_match"] == a["exact_match"]
    with Ledger.reader(layout.ledger_db) as ledger:
        assert [row.version for row in ledger.snapshots()] == [0, 1]
    assert not list(layout.root.glob(".meeting*")), "the place to meet is gone"
    assert {path.name for path in layout.logs.glob("trainer*.log")} == {
        "trainer-0.log",
        "trainer-1.log",
    }
    with pytest.raises(ConfigError, match=r"started with train\.ranks=2, now it is 1"):
        npd.run(config("two", 1, "local"), resume=True, view=QuietView())


@pytest.mark.slow
@pytest.mark.parametrize("victims", [("trainer-1", "trainer-0")])
def test_a_killed_rank_brings_the_group_back_and_nothing_is_lost(victims, make_run):
    run = make_run(
        runtime={"kind": "local"},
        train={**TRAIN, "ranks": 2},
        schedule=WINDOWED,
    )
    process = run.start()
    seen = set()
    for victim, events in zip(victims, (6, 20), strict=True):
        assert run.wait_for(events, process), run.log.read_text()[-2000:]
        names = ("trainer-0", "trainer-1")
        pids = {name: wait_for_child(process, name, known=seen) for name in names}
        seen |= set(pids.values())
        os.kill(pids[victim], signal.SIGKILL)
    run.finish(process)
    check_all_steps(run)
    assert len(seen) == 4, "the whole group was replaced"
    assert not [pid for pid in seen if is_alive(pid)]
    assert not list(run.layout.root.glob(".meeting*"))
