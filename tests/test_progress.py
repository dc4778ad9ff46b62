"""What moves while a run goes on: the clock inside a segment, waits, sessions, `npd show`."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

import npd
from cli_fixture import Shell
from npd.control.monitor import Monitor
from npd.observe.live import LiveState, WorkerState, steps_text, summary
from npd.observe.pace import Pace, StepNote, read_note, write_note
from npd.observe.trace import CONTROLLER, Span, read_trace, sessions, total
from npd.store.database import is_locked
from npd.store.files import write_json
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from test_run import QuietView
from tiny_run import tiny_config, write_prompts


@pytest.fixture
def make(tmp_path, tiny_model_dir, tiny_teacher_dir):
    prompts = write_prompts(tmp_path / "prompts.jsonl")

    def build(**sections):
        return tiny_config(tiny_model_dir, tiny_teacher_dir, prompts, tmp_path / "run", **sections)

    return build


@pytest.fixture
def watched(make, tmp_path):
    """A monitor of a run of epochs whose plan has decided 16 steps, two fifths of it."""
    layout, view = RunLayout(tmp_path / "watched"), QuietView()
    layout.create()
    monitor = Monitor(make(), layout, view)
    plan = SimpleNamespace(
        step=16, progress=0.4, most_steps=44, version=1, num_live=3, num_requested=20
    )
    yield SimpleNamespace(monitor=monitor, layout=layout, view=view, plan=plan)
    monitor.close()


def test_steps_of_the_segment_under_way_are_shown_as_they_are_done(watched):
    monitor, view = watched.monitor, watched.view
    monitor.resumed(watched.plan)
    assert (view.states[-1].step, view.states[-1].total_steps) == (0, 44)
    assert view.states[-1].is_total_rough
    write_note(watched.layout.trainer_step, StepNote(2, 12, 6000, 3.0))
    monitor.tick()
    assert view.states[-1].step == 0, "nobody is training: it is an old note"
    monitor.started("trainer", "train")
    state = view.states[-1]
    assert (state.step, state.total_steps) == (12, 40)
    assert state.progress == pytest.approx(0.3)
    assert state.tokens_per_second == {"train": pytest.approx(2000.0)}
    write_note(watched.layout.trainer_step, StepNote(2, 17, 6000, 3.0))
    monitor.tick()
    assert view.states[-1].step == 0, "beyond what was decided it is none of this run"
    assert view.states[-1].elapsed >= state.elapsed


def test_the_status_is_left_for_whoever_asks_and_gone_with_the_run(watched):
    monitor, view = watched.monitor, watched.view
    monitor.resumed(watched.plan)
    monitor.started("trainer", "train")
    found = json.loads(watched.layout.status_json.read_text())
    assert (found["step"], found["of"], found["is_rough"], found["eta"]) == (0, 44, True, None)
    write_note(watched.layout.trainer_step, StepNote(1, 8, 100, 1.0))
    monitor.tick()
    before, now = view.states[-2:]
    assert (before.progress, now.progress) == (0.0, pytest.approx(0.2))
    assert now.eta == pytest.approx((now.elapsed - before.elapsed) * 0.8 / 0.2)
    monitor.close()
    assert not watched.layout.status_json.exists()


def test_a_note_that_is_torn_or_cannot_be_written_is_none(tmp_path):
    for text in ("", "1 2", "1 2 3 x", "a b c d"):
        (tmp_path / "note").write_text(text)
        assert read_note(tmp_path / "note") is None
    write_note(tmp_path / "no" / "folder", StepNote(1, 2, 3, 4.0))
    assert read_note(tmp_path / "no" / "folder") is None
    write_note(tmp_path / "note", StepNote(1, 2, 3, 4.0))
    assert read_note(tmp_path / "note") == StepNote(1, 2, 3, 4.0)


def test_lines_say_how_far_and_what_is_done_before_the_first_step():
    loading = LiveState(elapsed=42.0, step=0, workers=(WorkerState("scorer", "load", 0.0),))
    assert summary(loading).startswith("step 0 · 0% · 42 s")
    assert summary(loading).endswith("load")
    rough = LiveState(elapsed=1.0, step=3, total_steps=40, is_total_rough=True)
    assert steps_text(rough) == "3/~40"


WAITS = [
    ([], "for a moment"),
    ([("trainer", "idle", 0.0)], "for a moment"),
    ([("trainer", "train", 95.0)], "about 20 s"),  # 20 s less 5, and the checkpoint's 5
    ([("trainer", "train", 95.0), ("generator", "generate", 60.0)], "about 25 s"),
    ([("generator", "generate", 0.0)], "about 5 s"),
    ([("scorer", "score", 90.0)], "the time is unknown, as scorer runs its first score"),
]


@pytest.mark.parametrize(("workers", "said"), WAITS)
def test_a_wait_is_as_long_as_such_work_took_before(workers, said):
    pace = Pace()
    for name, seconds in (("train", 10.0), ("train", 30.0), ("generate", 60.0), ("checkpoint", 5)):
        pace.add(Span("w", name, 0.0, float(seconds)))
    assert pace.wait_text([WorkerState(*worker) for worker in workers], now=100.0) == said


def span(start, end, worker="trainer"):
    return Span(worker, "train", start, end)


SESSIONS = [
    ([], []),
    ([span(3.0, 5.0), span(4.0, 9.0)], [(3.0, 9.0)]),
    ([span(1.0, 1.0, CONTROLLER), span(3.0, 5.0)], [(1.0, 5.0)]),
    (
        [
            span(1.0, 1.0, CONTROLLER),
            span(3.0, 5.0),
            span(60.0, 60.0, CONTROLLER),
            span(61.0, 64.0),
        ],
        [(1.0, 5.0), (60.0, 64.0)],
    ),
    (  # killed before anything ended, and a clock that was set back
        [span(5.0, 5.0, CONTROLLER), span(4.0, 4.0, CONTROLLER), span(3.5, 20.0)],
        [(5.0, 5.0), (4.0, 20.0)],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spans", "going"), SESSIONS)
def test_a_pause_is_no_part_of_the_run(spans, going):
    assert sessions(spans) == going


class Interrupting(QuietView):
    """Ends the run, as Ctrl-C does, at the first snapshot after the start."""

    def message(self, text):
        super().message(text)
        if text.startswith("snapshot v1"):
            os.kill(os.getpid(), 2)


def test_a_run_that_was_stopped_and_resumed_counts_its_sessions(make):
    view = Interrupting()
    stopped = npd.run(make(), view=view)
    assert not stopped.is_done
    (said,) = [m for m in view.messages if m.startswith("stopping: waiting")]
    assert "Ctrl-C again stops at once" in said
    assert "about" in said or "for a moment" in said or "not known" in said
    data = npd.run(make(), resume=True, view=QuietView()).data
    assert len(data.going) == 2
    assert data.wall_seconds == total(data.going) < data.ended - data.started
    layout = RunLayout(stopped.directory)
    assert {s.worker for s in data.spans} == {s.worker for s in read_trace(layout.trace_jsonl)} - {
        CONTROLLER
    }
    assert read_note(layout.trainer_step).step == data.steps[-1]["step"]


def test_show_tells_a_run_that_goes_on_from_one_that_stopped(
    tmp_path, tiny_model_dir, tiny_teacher_dir, capsys, monkeypatch, make
):
    monkeypatch.chdir(tmp_path)
    shell = Shell(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys)
    npd.run(make(), view=Interrupting())
    layout = RunLayout(tmp_path / "run")
    assert "not finished: after step" in shell.npd("show", "run").out
    assert not is_locked(layout.ledger_db)
    with Ledger(layout.ledger_db):
        assert is_locked(layout.ledger_db)
        said = shell.npd("show", "run").out
        assert "running   step" in said
        assert "not finished" not in said
        write_json(layout.status_json, {"step": 9, "of": 40, "is_rough": True, "eta": 75.0})
        assert "running   step 9 of about 40, about 1:15 min left" in shell.npd("show", "run").out
        write_json(layout.status_json, {"step": "x"})
        assert "running   step" in shell.npd("show", "run").out
    assert "not finished" in shell.npd("show", "run").out
    with Ledger(layout.ledger_db):
        pass  # looking took no lock


def test_no_lock_is_seen_where_there_is_none(tmp_path):
    assert not is_locked(tmp_path / "ledger.db")
    (tmp_path / "ledger.lock").write_text("1\n")
    assert not is_locked(tmp_path / "ledger.db")
