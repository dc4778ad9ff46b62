"""Whole runs on tiny real models: every preset, resume, and what they leave behind."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import npd
from fake_servers import FakeVllm, make_snapshot
from npd.config.load import load_config
from npd.control.controller import Controller
from npd.control.preflight import prepare
from npd.errors import ConfigError, DataError, ModelError, RunError
from npd.models import fingerprint
from npd.models.metadata import model_settings
from npd.observe.live import LiveState
from npd.observe.metrics import read_metrics
from npd.observe.trace import overlap_seconds, read_trace
from npd.schedule.events import decode
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.shards import read_rollouts
from npd.types import Outcome
from run_process import check_books
from tiny_model import save_model
from tiny_run import tiny_config, tiny_settings, write_prompts


class QuietView:
    """A view that remembers."""

    def __init__(self):
        self.states: list[LiveState] = []
        self.messages: list[str] = []
        self.is_closed = False

    def update(self, state):
        self.states.append(state)

    def message(self, text):
        self.messages.append(text)

    def close(self):
        self.is_closed = True


def _maker(folder, student, teacher):
    prompts = write_prompts(folder / "prompts.jsonl")

    def build(name="run", student=student, **sections):
        return tiny_config(student, teacher, prompts, folder / name, **sections)

    return build


@pytest.fixture
def make(tmp_path, tiny_model_dir, tiny_teacher_dir):
    """Makes tiny configs in `tmp_path`, over the same data; `student` replaces the model."""
    return _maker(tmp_path, tiny_model_dir, tiny_teacher_dir)


@pytest.fixture(scope="module")
def make_shared(tmp_path_factory, tiny_model_dir, tiny_teacher_dir):
    """Makes configs of runs that several tests read."""
    return _maker(tmp_path_factory.mktemp("shared"), tiny_model_dir, tiny_teacher_dir)


@pytest.fixture(scope="module")
def whole(make_shared):
    """An undisturbed run with a report, and the view that saw it."""
    view = QuietView()
    return npd.run(make_shared("whole", observe={"report": True}), view=view), view


@pytest.fixture(scope="module")
def interrupted(make_shared):
    """The same run, stopped half way with two checkpoints."""
    config = make_shared("cut", checkpoint={"every_steps": 2, "keep": 2})
    return npd.run(config, view=Interrupting()), config


@pytest.fixture
def cut(interrupted, tmp_path):
    """A config that resumes a copy of the interrupted run."""
    result, config = interrupted
    shutil.copytree(result.directory, tmp_path / "cut")
    return config.model_copy(update={"run_dir": tmp_path / "cut"})


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()


def check_same_student(one, two):
    """Bit for bit."""
    a, b = weights(one.student), weights(two.student)
    assert all(torch.equal(a[name], b[name]) for name in a)


def check_same_run(one, two, *, rel=1e-4, atol=4e-3, rtol=1e-7):
    """Two runs asked, kept and trained on the same, and made one student to float noise."""
    a, b = RunLayout(one.directory), RunLayout(two.directory)
    assert check_books(b, reuse=2) == check_books(a, reuse=2)
    for first, second in zip(one.data.steps, two.data.steps, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=rel)
    for first, second in zip(one.data.evals, two.data.evals, strict=True):
        assert second["kl"] == pytest.approx(first["kl"], rel=rel)
    expected, found = weights(one.student), weights(two.student)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=atol, err_msg=name)


def test_a_run_ends_with_a_student_a_report_and_balanced_books(whole, tiny_model_dir):
    result, view = whole
    layout = RunLayout(result.directory)
    assert result.is_done
    outcomes = check_books(layout, reuse=2)
    assert outcomes[Outcome.TRAINED_OUT] > 0
    assert sum(outcomes.values()) == 2 * 20
    student, start = weights(result.student), weights(tiny_model_dir)
    assert any(not torch.equal(student[name], start[name]) for name in start)
    page = result.report.read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert json.loads(layout.trace_json.read_text())["traceEvents"]
    assert view.is_closed
    assert view.states[-1].progress == pytest.approx(1.0)
    with Ledger.reader(layout.ledger_db) as ledger:
        assert [row.version for row in ledger.snapshots()] == [0, 1]


def test_the_record_has_what_auto_came_to(whole):
    layout = RunLayout(whole[0].directory)
    record = json.loads(layout.config_json.read_text())["config"]
    assert record["score"]["row_tokens"] == 256, "as it was asked for"
    assert record["score"]["head_chunk"] == 512
    assert record["train"]["activation_checkpointing"] is False


def test_the_student_moves_towards_the_teacher(make):
    schedule = {"epochs": 24, "reuse": 4, "refresh": {"at_epochs": [8, 16]}}
    result = npd.run(make(schedule=schedule, loss={"target": "tail"}), view=QuietView())
    evals = result.data.evals
    assert evals[-1]["kl"] < 0.8 * evals[0]["kl"]
    steps = read_metrics(RunLayout(result.directory).metrics_jsonl, "train")
    assert [m["step"] for m in steps] == list(range(1, len(steps) + 1))


def test_two_runs_of_the_same_config_are_the_same_run(whole, make):
    first, second = whole[0], npd.run(make(), view=QuietView())
    check_same_student(first, second)
    assert [s["loss"] for s in first.data.steps] == [s["loss"] for s in second.data.steps]


@pytest.mark.parametrize(
    ("preset", "extra"),
    [
        ("sft", {}),
        ("seqkd", {}),
        ("offline_kd", {}),
        ("on_policy", {"schedule": {"steps": 4, "epochs": None}}),
        ("npd", {}),
        ("npd_adaptive", {"schedule": {"steps": 8, "epochs": None}}),
    ],
)
def test_every_preset_runs_on_the_same_code_and_data(
    preset, extra, tmp_path, tiny_model_dir, tiny_teacher_dir
):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    settings = tiny_settings(tiny_model_dir, tiny_teacher_dir, prompts, tmp_path / "run")
    for name in ("name", "schedule"):
        del settings[name]
    settings["filter"].pop("name", None)
    overrides = [f"{k}={json.dumps(v)}" for k, v in _flat(settings | extra)]
    overrides += ["train.batch_size=4"]
    if preset in ("on_policy", "npd_adaptive"):
        overrides += ["schedule.window=4"] if preset == "on_policy" else ["schedule.window=12"]
    config = load_config(preset, overrides).config
    result = npd.run(config, view=QuietView())
    assert result.is_done
    assert result.step > 0
    check_books(RunLayout(result.directory), reuse=config.schedule.reuse)


def _flat(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_an_existing_run_is_not_overwritten_and_a_missing_one_not_resumed(make_shared, whole):
    with pytest.raises(ConfigError, match="holds no run to resume"):
        npd.run(make_shared("none"), resume=True, view=QuietView())
    config, directory = make_shared("whole"), whole[0].directory
    before = {p: p.stat().st_mtime_ns for p in directory.rglob("*.arrow")}
    with pytest.raises(ConfigError, match="holds a run already"):
        npd.run(config, view=QuietView())
    again = npd.run(config, resume=True, view=QuietView())
    assert again.is_done
    assert {p: p.stat().st_mtime_ns for p in directory.rglob("*.arrow")} == before


def test_resume_refuses_another_config_other_data_and_other_models(make, tmp_path, tiny_model_dir):
    student = shutil.copytree(tiny_model_dir, tmp_path / "student")
    npd.run(make(student=student), view=QuietView())
    with pytest.raises(ConfigError, match=r"train\.lr"):
        npd.run(make(student=student, train={"lr": 5e-3}), resume=True, view=QuietView())
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    rows[3]["completion"] = "something else"
    changed = "".join(json.dumps(row) + "\n" for row in rows)
    original = (tmp_path / "prompts.jsonl").read_text()
    (tmp_path / "prompts.jsonl").write_text(changed)
    with pytest.raises(DataError, match="the prompts changed"):
        npd.run(make(student=student), resume=True, view=QuietView())
    write_prompts(tmp_path / "prompts.jsonl", 23)
    with pytest.raises(DataError, match="the prompts changed"):
        npd.run(make(student=student), resume=True, view=QuietView())
    (tmp_path / "prompts.jsonl").write_text(original)
    save_model(student, seed=5)
    with pytest.raises(ModelError, match="the student changed"):
        npd.run(make(student=student), resume=True, view=QuietView())


def test_nothing_is_held_out_or_scored_for_it_where_nothing_is_evaluated(make):
    result = npd.run(make(eval={"source": "none"}), view=QuietView())
    layout = RunLayout(result.directory)
    assert not layout.heldout.exists()
    assert result.data.evals == []
    with Ledger.reader(layout.ledger_db) as ledger:
        assert ledger.conservation().asked == 2 * 24, "all prompts are trained on"


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(whole, cut):
    layout = RunLayout(cut.directory)
    with Ledger.reader(layout.ledger_db) as ledger:
        kept = [row.path for row in ledger.checkpoints() if row.path.exists()]
    assert len(kept) == 2
    weights_file = kept[-1] / "model.safetensors"
    data = bytearray(weights_file.read_bytes())
    data[-9] ^= 4
    weights_file.write_bytes(data)
    view = QuietView()
    resumed = npd.run(cut, resume=True, view=view)
    assert any("an earlier checkpoint" in message for message in view.messages)
    check_same_student(whole[0], resumed)


def test_resume_without_any_checkpoint_repeats_everything(whole, cut):
    shutil.rmtree(RunLayout(cut.directory).checkpoints)
    check_same_student(whole[0], npd.run(cut, resume=True, view=QuietView()))


def test_the_ledger_and_the_shards_name_the_same_prompts(make, tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    rows[2]["prompt"] = "a very long one " * 60
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = npd.run(make(data={"on_long_prompt": "drop"}), view=QuietView())
    layout = RunLayout(result.directory)
    with Ledger.reader(layout.ledger_db) as ledger:
        booked = {row.sample_id: row.prompt_index for row in ledger.samples()}
    for path in layout.rollouts(0).parent.glob("*.arrow"):
        for rollout in read_rollouts(path):
            assert rollout.prompt_index == booked[rollout.sample_id]


def test_teachers_that_the_run_does_not_have_are_refused_before_anything_starts(make, tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["teacher"] = f"t{i % 2}"
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"jsonl:1 \(and 11 more\) names the teacher 't0'"):
        npd.run(make(), view=QuietView())
    assert not make().directory.exists()


def check_resumes(whole, cut, config):
    """`cut`, interrupted after a step, resumes as `config` to the student of `whole`."""
    assert not cut.is_done
    assert 0 < cut.step < whole.step
    with Ledger.reader(RunLayout(config.directory).ledger_db) as ledger:
        assert ledger.last_checkpoint().step == cut.step
        assert not list(ledger.segments_after(cut.step)), "saved later than it was trained"
        assert list(ledger.segments_after(cut.step - 1)), "saved as more than it was trained"
    resumed = npd.run(config, resume=True, view=QuietView())
    assert resumed.is_done
    check_same_student(whole, resumed)
    check_books(RunLayout(resumed.directory), reuse=2)


def test_an_interrupted_run_resumes_to_the_same_weights_bit_for_bit(whole, interrupted, cut):
    assert not any(step["skipped_tokens"] for step in whole[0].data.steps)
    check_resumes(whole[0], interrupted[0], cut)


def test_an_interrupted_run_that_skips_tokens_does_too(make):
    loss = {"skip_after": 0.002}
    whole = npd.run(make("whole", loss=loss), view=QuietView())
    assert all(step["skipped_tokens"] for step in whole.data.steps)
    cut = npd.run(make("cut", loss=loss), view=Interrupting())
    check_resumes(whole, cut, make("cut", loss=loss))


def test_a_lost_shard_file_is_made_again_on_resume(whole, cut):
    layout = RunLayout(cut.directory)
    with Ledger.reader(layout.ledger_db) as ledger:
        shard = ledger.samples("live")[0].shard
    layout.rollouts(shard).unlink()
    layout.scored(shard).unlink()
    check_same_student(whole[0], npd.run(cut, resume=True, view=QuietView()))


class Interrupting(QuietView):
    """Sends the process a real SIGINT once so many states were shown and a step was taken."""

    def __init__(self):
        super().__init__()
        self._sent = False

    def update(self, state):
        super().update(state)
        if state.step >= 4 and not self._sent:
            self._sent = True
            os.kill(os.getpid(), signal.SIGINT)


class InterruptingEarly(QuietView):
    """Sends the process a real SIGINT at the first line, before there are workers."""

    def message(self, text):
        super().message(text)
        if len(self.messages) == 1:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupt_before_the_work_begins_says_how_to_go_on(make):
    view = InterruptingEarly()
    with pytest.raises(KeyboardInterrupt):
        npd.run(make(train={"batch_size": 1000}), view=view)
    assert view.messages[-1] == (
        "interrupted before the work began: resume with npd.run(config, resume=True)"
    )
    assert npd.run(make(train={"batch_size": 1000}), resume=True, view=QuietView()).is_done


def test_local_processes_overlap_and_keep_the_books(make):
    config = make(
        runtime={"kind": "local"},
        schedule={"epochs": None, "steps": 30, "window": 20, "reuse": 2,
                  "refresh": {"every_steps": 8}, "max_lag": 2, "segment_steps": 2},
    )  # fmt: skip
    result = npd.run(config, view=QuietView())
    layout = RunLayout(result.directory)
    check_books(layout, reuse=2)
    spans = read_trace(layout.trace_jsonl)
    assert overlap_seconds(spans, ["train"], ["generate", "score"]) > 0
    with Ledger.reader(layout.ledger_db) as ledger:
        versions = [row.version for row in ledger.snapshots()]
    assert versions == [0, 1, 2, 3]


def test_a_non_finite_loss_stops_with_one_line_and_balanced_books(make):
    with pytest.raises(RunError, match=r"step 2.*gradient norm nan.*not taken"):
        npd.run(make(train={"lr": 1e30, "clip": 1e30}), view=QuietView())
    check_books(RunLayout(make().directory), reuse=2)


def test_a_filter_that_keeps_nothing_ends_with_the_reasons(make):
    with pytest.raises(RunError, match=r"degenerate \d+.*Start a new run, with a looser filter"):
        npd.run(make(filter={"low": 50.0, "high": 60.0, "min_nll": 0.0}), view=QuietView())


@pytest.mark.parametrize("source", ["dataset", "student"])
@pytest.mark.parametrize("name", ["outlier", "overlap"])
def test_filters_that_need_no_answer_alone_run_over_any_text(make, source, name):
    keep = 0.8 if name == "overlap" else None
    chosen = {"name": name, "keep": keep, "usual_nll": 0.0, "deviations": 1.0}
    schedule = {"refresh": "never"}
    result = npd.run(
        make(filter=chosen, generate={"source": source}, schedule=schedule), view=QuietView()
    )
    rejected = {why for (what, why) in result.data.reasons if what is Outcome.REJECTED}
    assert rejected == {name}
    assert all(s.stats.nll_student is not None for s in result.data.samples)
    assert all(s.stats.nll_student_alone is None for s in result.data.samples)


def test_events_are_readable_by_later_code(whole):
    with Ledger.reader(RunLayout(whole[0].directory).ledger_db) as ledger:
        kinds = Counter()
        for _, kind, payload in ledger.events():
            payload.pop("digest")
            kinds[type(decode(kind, payload)).__name__] += 1
    assert kinds["Started"] == 1
    assert kinds["SegmentTrained"] > 0
    assert Controller.__doc__
    assert logging.getLogger("npd").handlers == []


def test_what_the_teachers_server_refuses_leaves_alone(make, tmp_path, tiny_teacher_dir):
    vocab = model_settings(tiny_teacher_dir).vocabulary
    weights = make_snapshot(tmp_path / "weights", 1, vocab=vocab)
    teacher = shutil.copytree(tiny_teacher_dir, tmp_path / "teacher")
    shutil.copy(weights / fingerprint.FILE, teacher / fingerprint.FILE)
    refused = prepare(make()).prompts[3].prompt_ids.tolist()
    view = QuietView()
    with FakeVllm(weights, refuses=lambda ids: ids[: len(refused)] == refused) as server:
        score = {"engine": "vllm", "urls": [server.url], "top_k": 8}
        config = make(score=score, filter={"name": "none"})
        result = npd.run(config.model_copy(update={"teacher": str(teacher)}), view=view)
    assert result.is_done
    layout = RunLayout(result.directory)
    assert check_books(layout, reuse=2) == {Outcome.TRAINED_OUT: 38, Outcome.FAILED: 2}
    with Ledger.reader(layout.ledger_db) as ledger:
        rows = ledger.samples(Outcome.FAILED)
    assert {row.prompt_index for row in rows} == {3}
    assert all(row.reason.startswith(f"score: {server.url} refuses (400)") for row in rows)
    told = f"scorer-0: {server.url} serves {teacher}: log-probs within"
    assert sum(message.startswith(told) for message in view.messages) == 1
    assert any("score failed for 1 sample: " in message for message in view.messages)
