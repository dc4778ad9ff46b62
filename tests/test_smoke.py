"""`npd run CONFIG --smoke`: the whole loop of somebody's own config, tiny, before it is run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

import npd
from cli_fixture import Shell
from npd.config.load import load_config, preset_names
from npd.config.smoke import smoke_settings
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.types import Outcome
from tiny_run import write_prompts


@pytest.fixture
def shell(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys)


def write_config(shell: Shell, preset: str, **sections) -> None:
    """A config as people write one: a preset, the models and the data, and what they must set."""
    write_prompts(Path("prompts.jsonl"), 40)
    settings = {
        "preset": preset,
        "student": str(shell.student),
        "teacher": str(shell.teacher),
        "data": {"train": "prompts.jsonl", "heldout_size": 8, "max_prompt_tokens": 96},
        "generate": {"max_new_tokens": 200},
        "runtime": {"kind": "inline", "device": "cpu", "threads": 1},
    }
    for name, value in sections.items():
        settings[name] = {**settings.get(name, {}), **value} if isinstance(value, dict) else value
    Path("run.yaml").write_text(yaml.safe_dump(settings))


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_passes_through_every_stage_in_a_few_steps(shell, preset):
    write_config(shell, preset)
    done = shell.npd("run", "run.yaml", "--smoke")
    assert done.code == 0, done.err
    layout = RunLayout(Path(f"runs/{preset}-smoke"))
    config = load_config("run.yaml").config
    assert not config.directory.exists(), "the run itself is not started"
    assert layout.student.is_dir()
    with Ledger.reader(layout.ledger_db) as ledger:
        outcomes = {outcome for outcome, _ in ledger.reasons()}
        versions = [row.version for row in ledger.snapshots()]
        steps = [step.index for segment in ledger.segments_after(0) for step in segment.steps]
        assert ledger.conservation().asked <= 40
    assert steps == [1, 2, 3, 4]
    assert Outcome.REJECTED not in outcomes, "what is checked is the loop, not the answers"
    refreshed = 0 if config.schedule.refresh.is_never else 1
    assert max(versions, default=0) >= refreshed
    last = done.out.splitlines()[-1]
    assert last.startswith("smoke     every stage worked")
    assert last.endswith("start the run with npd run run.yaml")


def test_the_next_smoke_run_replaces_the_last_and_nothing_else(shell):
    write_config(shell, "sft", name="mine", run_dir="kept/here")
    layout = RunLayout(Path("kept/here-smoke"))
    assert shell.npd("run", "run.yaml", "--smoke", "--set", "data.limit=30").code == 0
    marked = layout.root / "of the first"
    marked.touch()
    again = shell.npd("run", "run.yaml", "--smoke", "--set", "seed=3")
    assert again.code == 0, again.err
    assert not marked.exists()
    assert json.loads(layout.config_json.read_text())["config"]["seed"] == 3
    said = again.out.splitlines()[-1].partition("start the run with ")[2]
    assert shlex.split(said) == ["npd", "run", "run.yaml", "--set", "seed=3"]

    with Ledger(layout.ledger_db):
        assert "already running" in shell.npd("run", "run.yaml", "--smoke").complaint(1)
    record = json.loads(layout.config_json.read_text())
    layout.config_json.write_text(json.dumps({**record, "origins": {}}))
    said = shell.npd("run", "run.yaml", "--smoke").complaint(2)
    assert "--smoke did not start" in said
    assert layout.student.is_dir()


def test_what_the_run_itself_could_not_do_is_found(shell):
    write_config(shell, "npd", generate={"max_new_tokens": 900})
    said = shell.npd("run", "run.yaml", "--smoke").complaint(2)
    assert "context" in said
    assert not Path("runs").exists()
    write_config(shell, "npd")
    said = shell.npd("run", "run.yaml", "--smoke", "--resume").complaint(2)
    assert "leave out either" in said


SHAPES = [
    ("npd", [], {"schedule.refresh.at_steps": (2,), "schedule.reuse": 2, "schedule.window": "all"}),
    ("npd_adaptive", [], {"schedule.refresh.at_steps": (2,), "schedule.refresh.drift": None}),
    ("on_policy", [], {"schedule.window": 4, "schedule.refresh.every_steps": 1}),
    ("npd", ["generate.workers=3"], {"train.batch_size": 6, "generate.shard_size": 2}),
    ("npd", ["filter.name=random"], {"filter.keep": 1.0}),
    ("npd", ["filter.name=outlier"], {"filter.usual_nll": 1e9}),
    ("npd", ["data.heldout=h.jsonl"], {"data.heldout_limit": 4, "data.heldout": "h.jsonl"}),
    ("npd", ["data.limit=7"], {"data.limit": 7}),
    ("npd", ["teachers.math=m"], {"data.limit": None}),
    ("npd", ["train.lora={rank: 4}"], {"train.lora.rank": 4}),
    ("npd", ["run_dir=."], {"run_dir": Path("run-smoke")}),
    ("npd", ["run_dir=a/b"], {"run_dir": Path("a/b-smoke")}),
    ("npd", ["schedule.steps=900"], {"schedule.steps": 4, "schedule.refresh.at_steps": (2,)}),
]


@pytest.mark.parametrize(("preset", "sets", "expected"), SHAPES)
def test_what_a_smoke_run_changes(preset, sets, expected):
    given = ["student=s", "teacher=t", "data.train=d.jsonl", *sets]
    settings = smoke_settings(load_config(preset, given))

    def value(path):
        found = settings.config
        for name in path.split("."):
            found = getattr(found, name)
        return found

    assert {path: value(path) for path in expected} == expected
    assert settings.config.name == f"{preset}-smoke"
    assert settings.origins["schedule.steps"] == "--smoke"
    assert settings.origins["student"] == "--set"


def test_a_shared_place_is_replaced_with_it(shell):
    shared = shell.folder / "bucket"
    write_config(shell, "sft", runtime={"shared": f"file://{shared}"})
    for _ in range(2):
        result = npd.run("run.yaml", smoke=True, progress=False)
        assert result.is_done
    assert [path.name for path in shared.iterdir()] == ["sft-smoke"]
