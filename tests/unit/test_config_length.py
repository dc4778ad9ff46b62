"""Shorter and longer runs: what follows from the length, and remedies that work when typed."""

from __future__ import annotations

import re
import shlex

import pytest

from npd.config import RunConfig
from npd.config.length import best_reuse, following, points_at
from npd.config.load import dump_config, load_config, preset_names
from npd.config.sources import resume_command
from npd.errors import ConfigError

MODELS = ["student=s", "teacher=t", "data.train=d.jsonl"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Config files by name, in the working directory."""
    monkeypatch.chdir(tmp_path)
    texts = {
        "bare.yaml": "student: s\nteacher: t\n",
        "long.yaml": "preset: npd\nstudent: s\nschedule: {steps: 100}\nteacher: t\n",
        "two.yaml": "preset: npd\nstudent: s\nteacher: t\nschedule: {steps: 100, epochs: 4}\n",
        "often.yaml": "student: s\nteacher: t\nschedule: {epochs: 8, reuse: 2, "
        "refresh: {at_epochs: [2, 4, 6], in_flight: finish}}\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)


def rule_of(config: RunConfig) -> dict[str, object]:
    refresh = config.schedule.refresh.model_dump(exclude={"min_steps", "in_flight"})
    return {rule: value for rule, value in refresh.items() if value is not None}


# (source, overrides): epochs, steps, reuse and the refresh rule.
RUNS = {
    ("npd", ""): (10, None, 5, {"at_epochs": (5,)}),
    ("npd", "schedule.steps=30"): (None, 30, 5, {"at_steps": (15,)}),
    ("npd", "schedule.steps=31"): (None, 31, 5, {"at_steps": (16,)}),
    ("npd", "schedule.steps=2"): (None, 2, 5, {"at_steps": (1,)}),
    ("npd", "schedule.steps=1"): (None, 1, 5, {}),
    ("npd", "schedule.epochs=1"): (1, None, 1, {}),
    ("npd", "schedule.epochs=2"): (2, None, 1, {"at_epochs": (1,)}),
    ("npd", "schedule.epochs=3"): (3, None, 3, {}),
    ("npd", "schedule.epochs=4"): (4, None, 2, {"at_epochs": (2,)}),
    ("npd", "schedule.epochs=7"): (7, None, 1, {"at_epochs": (4,)}),
    ("npd", "schedule.epochs=20"): (20, None, 5, {"at_epochs": (5,)}),
    ("npd", "schedule.epochs=3 schedule.reuse=1"): (3, None, 1, {"at_epochs": (2,)}),
    ("npd", "schedule.epochs=6 schedule.refresh.at_epochs=4"): (6, None, 2, {"at_epochs": (4,)}),
    ("npd", "schedule.steps=9 schedule.refresh=never"): (None, 9, 5, {}),
    ("npd", "schedule.steps=9 schedule.refresh.at_epochs=null"): (None, 9, 5, {}),
    ("npd", "schedule.steps=9 schedule.refresh.drift=0.2"): (None, 9, 5, {"drift": 0.2}),
    ("npd", "schedule.steps=9 schedule.refresh.at_steps=[3,6]"): (
        None, 9, 5, {"at_steps": (3, 6)}
    ),
    ("npd_adaptive", "schedule.epochs=3"): (3, None, 3, {"drift": 0.1}),
    ("on_policy", "schedule.epochs=3"): (3, None, 1, {"every_steps": 1}),
    ("on_policy", "schedule.steps=5"): (None, 5, 1, {"every_steps": 1}),
    ("sft", "schedule.epochs=1"): (1, None, 1, {}),
    ("sft", "schedule.epochs=5"): (5, None, 5, {}),
    ("sft", "schedule.steps=30"): (None, 30, 3, {}),
    ("bare.yaml", ""): (10, None, 5, {"at_epochs": (5,)}),
    ("bare.yaml", "schedule.steps=30"): (None, 30, 5, {"at_steps": (15,)}),
    ("bare.yaml", "schedule.epochs=3"): (3, None, 3, {}),
    ("long.yaml", ""): (None, 100, 5, {"at_steps": (50,)}),
    ("long.yaml", "schedule.steps=30"): (None, 30, 5, {"at_steps": (15,)}),
    ("long.yaml", "schedule.steps=300"): (None, 300, 5, {"at_steps": (50,)}),
    ("long.yaml", "schedule.epochs=4"): (4, None, 2, {"at_epochs": (2,)}),
    ("often.yaml", "schedule.epochs=4"): (4, None, 2, {"at_epochs": (2,)}),
    ("often.yaml", "schedule.steps=16"): (None, 16, 2, {"at_steps": (4, 8, 12)}),
    ("often.yaml", "schedule.steps=2"): (None, 2, 2, {"at_steps": (1,)}),
}  # fmt: skip


@pytest.mark.parametrize(("source", "sets"), RUNS)
def test_a_run_of_another_length_keeps_its_shape(files, source, sets):
    config = load_config(source, [*MODELS, *sets.split()]).config
    schedule = config.schedule
    found = (schedule.epochs, schedule.steps, schedule.reuse, rule_of(config))
    assert found == RUNS[source, sets]


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("length", [*(f"epochs={n}" for n in range(1, 13)), "steps=1", "steps=7"])
def test_every_preset_takes_every_length(preset, length):
    sets = [*MODELS, f"schedule.{length}"]
    found = load_config(preset, sets)
    assert RunConfig.model_validate(dump_config(found.config)) == found.config
    said = shlex.split(resume_command(dump_config(found.config), found.origins))
    assert said[2] == preset
    assert load_config(preset, said[4:-1:2]).config == found.config


def test_what_followed_is_said_with_its_origin(files):
    found = load_config("npd", [*MODELS, "schedule.steps=30"])
    assert found.origins["schedule.refresh.at_steps"] == "follows schedule.steps"
    assert found.origins["schedule.refresh.at_epochs"] == "follows schedule.steps"
    assert found.origins["schedule.steps"] == "--set"
    assert found.notes == (
        "schedule.steps 30 implies schedule.refresh.at_steps [15], unless they are set too",
    )
    (said,) = load_config("npd", [*MODELS, "schedule.epochs=3"]).notes
    assert "schedule.reuse 3 and schedule.refresh never" in said
    assert load_config("npd", MODELS).notes == ()


PYTHON = [
    ({}, (10, None, 5, {"at_epochs": (5,)})),
    ({"steps": 30}, (None, 30, 5, {"at_steps": (15,)})),
    ({"epochs": 3}, (3, None, 3, {})),
    ({"epochs": 8, "reuse": 2}, (8, None, 2, {"at_epochs": (4,)})),
    ({"steps": 8, "refresh": "never"}, (None, 8, 5, {})),
    ({"steps": 8, "refresh": {"at_steps": 3}}, (None, 8, 5, {"at_steps": (3,)})),
]


@pytest.mark.parametrize(("schedule", "expected"), PYTHON)
def test_a_config_from_python_follows_its_length_too(schedule, expected):
    config = RunConfig(student="s", teacher="t", schedule=schedule)
    found = config.schedule
    assert (found.epochs, found.steps, found.reuse, rule_of(config)) == expected


# What cannot be, by how it is asked for: each line must end in what makes it load.
WALLS = {
    "both lengths": ("npd", "schedule.steps=7 schedule.epochs=10"),
    "both lengths in a file": ("two.yaml", ""),
    "no length": ("npd", "schedule.epochs=null"),
    "reuse beyond the epochs": ("npd", "schedule.epochs=3 schedule.reuse=5"),
    "reuse that does not divide": ("sft", "schedule.reuse=2"),
    "reuse against the refresh": ("npd", "schedule.reuse=2"),
    "refresh after the end": ("npd", "schedule.epochs=10 schedule.refresh.at_epochs=[5,10]"),
    "only after the end": ("npd", "schedule.epochs=5 schedule.refresh.at_epochs=[5]"),
    "refresh out of order": ("npd", "schedule.reuse=1 schedule.refresh.at_epochs=[6,3]"),
    "epochs of a run in steps": ("npd", "schedule.steps=9 schedule.refresh.at_epochs=[5]"),
    "epochs of a run of one step": ("npd", "schedule.steps=1 schedule.refresh.at_epochs=[5]"),
    "steps of a run in epochs": ("npd", "schedule.refresh.at_steps=[5]"),
    "step after the end": ("npd", "schedule.steps=9 schedule.refresh.at_steps=[5,9]"),
    "steps out of order": ("npd", "schedule.steps=9 schedule.refresh.at_steps=[5,4]"),
    "two rules": ("npd", "schedule.refresh.drift=0.1 schedule.refresh.every_steps=4"),
    "three rules": (
        "npd",
        "schedule.refresh.drift=0.1 schedule.refresh.every_steps=4 schedule.refresh.at_epochs=[5]",
    ),
    "refresh of a data set": ("sft", "schedule.refresh.every_steps=4"),
    "drift of tempered samples": ("npd_adaptive", "generate.temperature=0.7"),
    "window below a batch": ("on_policy", "train.batch_size=128"),
    "window below a batch, overlapped": ("npd", "schedule.window=20"),
    "window below two shards": ("npd_adaptive", "generate.shard_size=600"),
    "rows below a sample": ("npd", "train.row_tokens=50"),
    "scored rows below a sample": ("npd", "score.row_tokens=50"),
    "responses never long enough": ("npd", "generate.max_new_tokens=2"),
    "lr below its end": ("npd", "train.lr=1e-7"),
}


@pytest.mark.parametrize("name", WALLS)
def test_a_remedy_works_when_it_is_typed(files, name):
    source, sets = WALLS[name]
    given = [*MODELS, *sets.split()]
    with pytest.raises(ConfigError) as caught:
        load_config(source, given)
    said = str(caught.value)
    assert re.search(r"--set (\S+|'[^']*')$", said), said
    for way in re.split(r" or (?=--set)", said.rpartition(": ")[2]):
        words = shlex.split(way.removeprefix("either "))
        assert set(words[::2]) == {"--set"}, way
        load_config(source, [*given, *words[1::2]])


def test_the_parts():
    moved = {"refresh.at_epochs": None, "refresh.at_steps": [15]}
    below = {"epochs": 10, "reuse": 5, "refresh.at_epochs": (5,)}
    assert following(below, {"steps": 30}) == moved
    assert following({}, {"steps": 3}) == {}
    assert following({"epochs": 4, "reuse": 2}, {"epochs": "x"}) == {}
    assert following({"epochs": 10, "reuse": 5}, {"epochs": True}) == {}
    assert points_at([0.5], 30) == [15]
    assert points_at([0.1, 0.2, 0.9], 3) == [1, 2]
    assert points_at([0.5], 1) == []
    assert points_at([0.5], 12, unit=4) == [8]
    assert [best_reuse(n, 5) for n in (1, 2, 3, 6, 7, 10)] == [1, 2, 3, 3, 1, 5]
    assert best_reuse(6, 5, [4]) == 2
