"""What a run tells of samples it left aside: the warning, its remedy, and the share kept."""

from __future__ import annotations

import pytest

from npd.config.load import dump_config
from npd.control.monitor import Monitor
from npd.observe.metrics import read_metrics
from npd.observe.report import ReportData
from npd.observe.report.advice import wasted_line
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.types import Outcome
from simulation import Simulation, make_config


def data_of(unused: dict, asked: int = 100, **sections) -> ReportData:
    config = dump_config(make_config(epochs=5, **sections))
    counted = {"asked": asked, "trained_out": asked - sum(unused.values())}
    return ReportData("run", config, 0.0, 1.0, unused=unused, conservation=counted)


CUT, LOW = (Outcome.REJECTED, "truncated"), (Outcome.REJECTED, "degenerate")


def test_it_warns_below_a_quarter_only():
    assert wasted_line(data_of({CUT: 75})) is None
    assert wasted_line(data_of({CUT: 40, LOW: 36})).startswith(
        "76 of 100 samples (76 %) left without being trained on: truncated 40, degenerate 36. "
    )
    assert wasted_line(data_of({}, asked=0)) is None
    assert wasted_line(data_of({CUT: 1}, asked=1)).startswith("1 of 1 sample (100 %) left")


def test_a_control_that_was_told_to_keep_little_is_no_waste():
    dropped = (Outcome.REJECTED, "random")
    told = {"name": "random", "keep": 0.1}
    assert wasted_line(data_of({dropped: 90}, filter=told)) is None
    assert "Raise filter.keep (0.1)" in wasted_line(data_of({dropped: 96}, filter=told))


@pytest.mark.parametrize(
    ("outcome", "reason", "filters", "remedy"),
    [
        (Outcome.REJECTED, "truncated", {}, "Raise generate.max_new_tokens (20)"),
        (Outcome.REJECTED, "short", {}, "Lower filter.min_response_tokens (4)"),
        (Outcome.REJECTED, "repeating", {}, "raise filter.max_repeat (0.5)"),
        (Outcome.REJECTED, "degenerate", {}, "Lower filter.low (0.0), or raise filter.tolerance"),
        (Outcome.REJECTED, "disconnect", {}, "Raise filter.high (0.8)"),
        (Outcome.REJECTED, "disconnect", {"bounds": "quantile"}, "Raise filter.high_quantile"),
        (Outcome.REJECTED, "length", {"name": "length"}, "Raise filter.high (0.8)"),
        (Outcome.REJECTED, "unscored", {}, "the run's logs/"),
        (Outcome.STALE, "lag", {}, "raise schedule.max_lag (1)"),
        (Outcome.FAILED, "score: refused", {}, "the run's logs/"),
    ],
)
def test_the_remedy_is_that_of_the_most_frequent_reason(outcome, reason, filters, remedy):
    other = (Outcome.REJECTED, "something else")
    line = wasted_line(data_of({other: 30, (outcome, reason): 60}, filter=filters))
    assert remedy in line


def test_failures_of_many_words_count_as_one_reason():
    found = {(Outcome.FAILED, f"generate: request {i} refused"): 1 for i in range(50)}
    assert "failed 50, truncated 40. " in wasted_line(data_of({**found, CUT: 40}))


def test_a_run_that_rejects_most_says_so_in_every_place(shell):
    shell.write(observe={"report": True})
    sets = ["--set", "filter.drop_truncated=true", "--set", "generate.max_new_tokens=9"]
    done = shell.npd("run", "run.yaml", *sets)
    assert done.code == 0, done.err
    with Ledger.reader(shell.layout.ledger_db) as ledger:
        rows = ledger.samples()
    wasted = sum(row.uses == 0 for row in rows)
    assert 0.75 < wasted / len(rows) < 1, "the settings above make no such run any more"
    (line,) = (line for line in done.out.splitlines() if line.startswith("warning   "))
    assert f"{wasted} of {len(rows)} samples" in line
    assert "Raise generate.max_new_tokens (9)" in line
    assert line in shell.npd("show", "run").out
    assert line.removeprefix("warning   ") in shell.layout.report_html.read_text()


def test_a_run_that_keeps_enough_does_not_warn(shell):
    shell.write(observe={"report": True})
    done = shell.npd("run", "run.yaml")
    assert "warning" not in done.out
    assert 'class="warning"' not in shell.layout.report_html.read_text()


class _Nowhere:
    def update(self, state): ...
    def message(self, text): ...
    def close(self): ...


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_the_share_kept_counts_every_filter(tmp_path, source):
    """Stages in turn judge the whole window before the first segment, and nothing after it."""
    unscored = {"loss": {"kd_weight": 0.0}, "filter": {"name": "none"}}
    config = make_config(
        epochs=1,
        reuse=1,
        overlap=False,
        generate={"source": source},
        **(unscored if source == "teacher" else {}),
    )
    assert config.needs_scores == (source == "student")
    simulation = Simulation(config, 60, seed=3).run()
    layout = RunLayout(tmp_path)
    monitor = Monitor(config, layout, _Nowhere())
    for event, actions in zip(simulation.events, simulation.decided, strict=True):
        monitor.note(event, actions, simulation.plan)
    monitor.close()
    first, *others = (line["kept_share"] for line in read_metrics(layout.metrics_jsonl, "run"))
    rejected = sum(outcome is Outcome.REJECTED for outcome in simulation.outcomes.values())
    assert 0 < rejected < 60
    assert first == pytest.approx(1 - rejected / 60)
    assert set(others) == {None}
