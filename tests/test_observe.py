"""Metrics, trackers, traces and live views: what is written can be read, also after a crash."""

import io
import json
import logging
import os
from dataclasses import asdict, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npd.errors import ConfigError, RunError, StoreError
from npd.observe.jsonl import JsonLines, read_json_lines
from npd.observe.live import (
    LiveState,
    PlainView,
    RichView,
    WorkerState,
    clock_text,
    make_view,
    render_panel,
)
from npd.observe.metrics import METRICS, MetricsWriter, metric, read_metrics
from npd.observe.trace import (
    Span,
    TraceWriter,
    busy_seconds,
    export_perfetto,
    idle_shares,
    overlap_seconds,
    read_trace,
    sessions,
)
from npd.observe.trackers import build_trackers
from npd.types import EvalReport, StepReport
from store_samples import file_size_limit

NOT_NUMBERS = {"step", "samples", "kl_sums", "teacher_kls"}
SPANS = [
    Span("generator", "generate", 100.0, 104.0, {"shard": 0}),
    Span("trainer", "train", 102.0, 107.5, {"segment": 0}),
    Span("generator", "generate", 106.0, 108.0, {"shard": 1}),
]


def write_lines(path, count):
    writer = MetricsWriter(path)
    for step in range(count):
        writer.write(step, {"loss": 1.0 / (step + 1), "kd": None})
    writer.close()


@pytest.mark.parametrize("record", [StepReport, EvalReport])
def test_every_number_of_a_report_is_in_the_table(record):
    names = {f.name for f in fields(record)} - NOT_NUMBERS
    assert names <= set(METRICS)
    assert all(m.unit and m.meaning for m in METRICS.values())


def test_unknown_metric_is_our_own_bug(tmp_path):
    assert metric("peak_memory/trainer").unit == "MiB"
    writer = MetricsWriter(tmp_path / "m.jsonl")
    with pytest.raises(AssertionError, match="los"):
        writer.write(1, {"los": 1.0})
    writer.close()
    assert read_metrics(tmp_path / "m.jsonl") == []


def test_metrics_come_back_as_written(tmp_path):
    path = tmp_path / "deep" / "m.jsonl"
    writer = MetricsWriter(path)
    writer.write(3, {"loss": 0.5, "grad_norm": float("inf"), "kd": None})
    writer.write(3, {"kl": 0.25}, kind="eval")
    train, held = read_metrics(path)
    assert (train["step"], train["kind"], train["loss"]) == (3, "train", 0.5)
    assert train["grad_norm"] is None
    assert train["kd"] is None
    assert read_metrics(path, "eval") == [held]
    assert held["time"] >= train["time"]
    writer.close()
    assert read_metrics(tmp_path / "none.jsonl") == []


@settings(deadline=None)
@given(st.integers(min_value=0, max_value=400))
def test_a_line_torn_anywhere_costs_that_line_only(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("torn") / "m.jsonl"
    write_lines(path, 4)
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    whole = data.count(b"\n")
    assert [line["step"] for line in read_metrics(path)] == list(range(whole))
    write_lines(path, 1)
    assert [line["step"] for line in read_metrics(path)] == [*range(whole), 0]


def test_a_line_that_does_not_fit_leaves_no_part_of_itself(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = JsonLines(path)
    lines.append({"step": 1})
    whole = path.read_bytes()
    # A part is taken in, as by a disk that fills up, and the rest refused.
    with (
        file_size_limit(len(whole) + 5),
        pytest.raises(RunError, match=r"no space left while writing .*m\.jsonl"),
    ):
        lines.append({"step": 2})
    assert path.read_bytes() == whole
    lines.append({"step": 3})
    lines.close()
    assert read_json_lines(path) == [{"step": 1}, {"step": 3}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(StoreError, match=r"m\.jsonl, line 2 .*delete that line"):
        read_metrics(path)


def test_unknown_tracker_names_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"'wandb': use one of tensorboard"):
        build_trackers(["wandb"], tmp_path)
    assert build_trackers([], tmp_path) == []


def test_tensorboard_holds_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    (tracker,) = build_trackers(["tensorboard"], tmp_path)
    tracker.log(7, {"loss": 0.5, "kd": None})
    tracker.log(7, {"kl": 0.25}, kind="eval")
    tracker.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/kl", "train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(7, 0.5)]


def test_trace_round_trip_and_perfetto(tmp_path):
    writer = TraceWriter(tmp_path / "trace.jsonl")
    for span in SPANS:
        writer.append(span)
    writer.close()
    assert read_trace(tmp_path / "trace.jsonl") == SPANS
    assert export_perfetto(tmp_path / "trace.jsonl", tmp_path / "trace.json") == 3
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    work = [e for e in events if e["ph"] == "X"]
    assert {e["ph"] for e in events} == {"X", "M"}
    assert [lanes[e["tid"]] for e in work] == [s.worker for s in SPANS]
    assert [(e["ts"], e["dur"]) for e in work] == [
        (0, 4_000_000),
        (2_000_000, 5_500_000),
        (6_000_000, 2_000_000),
    ]
    assert work[1]["args"] == {"segment": 0}


def test_lines_of_a_trace_that_are_no_spans_are_passed_over(tmp_path):
    path = tmp_path / "trace.jsonl"
    good = Span("trainer", "train", 1.0, 2.5, {"segment": 0})
    bad = [
        *("", "{", "[1]", "null", "\ud800", "\x00" * 9, "{}", '{"worker": "trainer"}', "[" * 5000),
        json.dumps(asdict(good))[:-9],
        *(json.dumps(asdict(good) | other) for other in (
            {"start": "1"}, {"end": 0.5}, {"end": 1e300}, {"args": 3}, {"worker": 7}, {"more": 1},
        )),
    ]  # fmt: skip
    lines = [json.dumps(asdict(good)), *bad, json.dumps(asdict(good)), "torn"]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    assert read_trace(path) == [good, good]
    assert export_perfetto(path, tmp_path / "trace.json") == 2
    assert read_trace(tmp_path) == []


@pytest.mark.parametrize("make", [os.symlink, lambda _, path: os.mkfifo(path)])
def test_nothing_is_written_through_a_link_or_into_a_pipe(tmp_path, make):
    theirs = tmp_path / "theirs"
    theirs.write_text("mine\n")
    path = tmp_path / "metrics.jsonl"
    make(theirs, path)
    with pytest.raises(RunError, match=r"metrics\.jsonl.*npd does not write to it: remove"):
        MetricsWriter(path)
    assert theirs.read_text() == "mine\n"


def test_a_clock_that_was_set_back_between_sessions_counts_no_time():
    marks = [Span("controller", "start", at, at) for at in (1000.0, 10.0)]
    spans = [marks[0], Span("a", "train", 1001.0, 1005.0), marks[1], Span("a", "train", 11.0, 14.0)]
    assert sessions(spans) == [(1000.0, 1005.0), (10.0, 14.0)]
    assert sessions(marks) == []


def test_an_empty_trace_exports(tmp_path):
    assert export_perfetto(tmp_path / "no.jsonl", tmp_path / "trace.json") == 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_busy_idle_and_overlap_by_hand():
    assert busy_seconds(SPANS) == {("generator", "generate"): 6.0, ("trainer", "train"): 5.5}
    assert overlap_seconds(SPANS, ["generate", "score"], ["train"]) == 3.5
    assert overlap_seconds(SPANS, ["train"], ["evaluate"]) == 0.0
    shares = idle_shares(SPANS, 100.0, 110.0)
    assert shares == {"generator": pytest.approx(0.4), "trainer": pytest.approx(0.45)}


whole_spans = st.lists(
    st.builds(
        lambda worker, name, start, size: Span(worker, name, start, start + size),
        st.sampled_from("ab"),
        st.sampled_from(["generate", "score", "train"]),
        st.integers(0, 30),
        st.integers(0, 8),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(whole_spans)
def test_overlap_and_busy_equal_counting_every_second(spans):
    def at_work(second, chosen):
        return any(s.start <= second < s.end for s in chosen)

    feeding = [s for s in spans if s.name in ("generate", "score")]
    training = [s for s in spans if s.name == "train"]
    both = sum(at_work(t, feeding) and at_work(t, training) for t in range(40))
    assert overlap_seconds(spans, ["generate", "score"], ["train"]) == both
    for (worker, name), seconds in busy_seconds(spans).items():
        own = [s for s in spans if (s.worker, s.name) == (worker, name)]
        assert seconds == sum(at_work(t, own) for t in range(40))


def test_plain_view_is_quiet_between_lines_and_never_loses_the_last(caplog):
    caplog.set_level(logging.INFO, logger="npd.live")
    now = [0.0]
    view = PlainView(interval=10.0, clock=lambda: now[0])
    for second in range(25):
        now[0] = float(second)
        view.update(LiveState(elapsed=second, step=second, total_steps=30, loss=0.5))
    view.message("snapshot v1 published")
    view.close()
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" · ")[0] for line in lines] == [
        "step 0/30",
        "step 10/30",
        "step 20/30",
        "snapshot v1 published",
        "step 24/30",
    ]
    assert "loss 0.500" in lines[0]


def test_a_long_run_writes_fewer_lines():
    now, lines = [0.0], []
    view = PlainView(clock=lambda: now[0], write=lines.append)
    for second in range(0, 24 * 3600, 5):
        now[0] = float(second)
        view.update(LiveState(elapsed=second, step=second))
    assert len([line for line in lines if " s" in line]) <= 5, "the first minute: every 15 s"
    assert 700 < len(lines) < 900, "a day: every two minutes"


def test_without_a_terminal_the_view_is_plain():
    assert isinstance(make_view(io.StringIO()), PlainView)


FULL = LiveState(
    elapsed=751.0,
    step=120,
    total_steps=300,
    progress=0.4,
    title="run [1]",
    loss=1.25,
    drift=0.141,
    tokens_per_second={"train": 4500.0},
    workers=(WorkerState("scorer", "score shard 11", 1000.0), WorkerState("trainer", "", 990.0)),
    asked=512,
    rejected=60,
    eta=1100.0,
    latest_eval=EvalReport(100, 0.41, 0.71, None, 400, 30000, 12.0),
)


def drawn(state):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100)
    console.print(render_panel(state, now=1008.0))
    return console.file.getvalue()


def test_panel_shows_the_state():
    text = drawn(FULL)
    for part in ("run [1]", "120/300", "40%", "1.250", "0.141", "score shard 11", "8 s", "idle"):
        assert part in text
    assert "18:20 min" in text
    assert "agreement 71.0%" in text
    assert "exact match" not in text
    assert "step 0" in drawn(LiveState(elapsed=0.0, step=0))


def test_rich_view_draws_messages_and_the_last_state():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    view = make_view(stream)
    assert isinstance(view, RichView)
    view.update(FULL)
    view.message("refresh: v2 [not markup]")
    view.close()
    assert "refresh: v2 [not markup]" in stream.getvalue()
    assert "120/300" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1:00 min"), (725, "12:05 min"), (11220, "3:07 h")]
)
def test_clock_text(seconds, text):
    assert clock_text(seconds) == text
