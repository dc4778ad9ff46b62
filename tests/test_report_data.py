"""A run told from its directory: what is counted, and what is only looked at in part."""

from __future__ import annotations

from collections import Counter

import npd
from npd.control import report_data
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.types import Outcome
from test_run import QuietView
from tiny_run import tiny_config, write_prompts


def test_a_part_of_many_samples_is_shown_and_all_are_counted(
    tmp_path, tiny_model_dir, tiny_teacher_dir, monkeypatch
):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    config = tiny_config(
        tiny_model_dir, tiny_teacher_dir, prompts, tmp_path / "run",
        filter={"name": "random", "keep": 0.5, "drop_truncated": False},
    )  # fmt: skip
    npd.run(config, view=QuietView())
    layout = RunLayout(tmp_path / "run")
    whole = report_data.summarize(layout, config, tokenizer=config.student)
    with Ledger.reader(layout.ledger_db) as ledger:
        rows = ledger.samples()
    assert whole.every == 1
    assert [s.stats.sample_id for s in whole.samples] == [row.sample_id for row in rows]
    assert whole.reasons == Counter((r.outcome, r.reason) for r in rows)
    assert whole.unused == Counter((r.outcome, r.reason) for r in rows if not r.uses)
    assert whole.reasons[Outcome.REJECTED, "random"] > 0

    monkeypatch.setattr(report_data, "_MOST_SAMPLES", len(rows) // 3)
    part = report_data.summarize(layout, config, tokenizer=config.student)
    assert part.every == 4
    assert [s.stats.sample_id for s in part.samples] == [row.sample_id for row in rows][::4]
    for name in ("conservation", "reasons", "unused", "throughput", "bounds", "steps"):
        assert getattr(part, name) == getattr(whole, name), name
    assert part.samples == whole.samples[::4]
    assert part.examples
