"""Settings: layers and origins, keys and values that cannot be, presets."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from npd.config import RunConfig
from npd.config.load import dump_config, load_config, preset_names
from npd.errors import ConfigError

MODELS = ("student=s", "teacher=t", "data.train=d.jsonl")
PRESETS = ["npd", "npd_adaptive", "offline_kd", "on_policy", "seqkd", "sft"]


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """Write `run.yaml` in an own working directory; returns a function that gives its name."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="run.yaml"):
        Path(name).write_text(text)
        return name

    return write


def complaint(source, *overrides):
    """What load_config says of something that cannot be."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)


def test_layers_and_their_origins(config_file):
    path = config_file(
        "preset: npd\nstudent: s\nteacher: t\ntrain:\n  lr: 3e-5\n  clip: 2\n"
        "loss: {kd_weight: 0.5}\n"
    )
    found = load_config(path, ["train.lr=2e-5", "data.columns.prompt=question"])
    assert found.config.train.lr == 2e-5
    assert found.config.train.clip == 2.0
    assert found.config.loss.kd_weight == 0.5
    assert found.config.schedule.reuse == 5
    assert found.config.data.columns == {"prompt": "question"}
    expected = {
        "student": "run.yaml",
        "train.lr": "--set",
        "train.clip": "run.yaml",
        "train.betas": "default",
        "schedule.reuse": "preset npd",
        "schedule.refresh.at_epochs": "preset npd",
        "data.columns.prompt": "--set",
        "seed": "default",
    }
    assert {path: found.origins[path] for path in expected} == expected


def test_a_long_path_is_named_whole(tmp_path):
    """Also in origins and messages, so that it can be opened."""
    folder = tmp_path / ("users-" * 20) / ("experiments-" * 10)
    folder.mkdir(parents=True)
    path = folder / "run.yaml"
    path.write_text("student: s\nteacher: t\ntop_kk: 3\n")
    assert complaint(path).startswith(f"{path}:3: unknown key top_kk")
    path.write_text("student: s\nteacher: t\n")
    assert load_config(path).origins["student"] == str(path)
    missing = folder / "runn.yaml"
    assert str(missing) in complaint(missing)


def test_every_value_has_an_origin():
    found = load_config("npd", MODELS)

    def leaves(values, prefix=""):
        for name, value in values.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    assert list(found.origins) == list(leaves(dump_config(found.config)))


def test_file_without_a_preset_stands_on_the_defaults(config_file):
    path = config_file("student: s\nteacher: t\nschedule: {epochs: 10}\n")
    found = load_config(path).config
    assert found == RunConfig(student="s", teacher="t", schedule={"epochs": 10})
    assert load_config(Path(path)).config == found


def test_last_override_of_a_key_counts():
    found = load_config("npd", [*MODELS, "seed=1", "seed=2", "schedule={reuse: 1}"]).config
    assert found.seed == 2
    assert found.schedule.reuse == 1
    assert found.schedule.epochs == 10, "a mapping is merged into its section"


def test_steps_take_back_the_epochs_of_a_layer_below():
    found = load_config("seqkd", [*MODELS, "schedule.steps=7"])
    assert (found.config.schedule.epochs, found.config.schedule.steps) == (None, 7)
    assert "exactly one of schedule.epochs" in complaint(
        "npd", *MODELS, "schedule.steps=7", "schedule.epochs=10"
    )


def test_null_takes_nothing_back():
    assert load_config("npd", [*MODELS, "schedule.steps=null"]).config.schedule.epochs == 10


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("schedule.refresh.drift=0.2", {"drift": 0.2}),
        ("schedule.refresh={every_steps: 3}", {"every_steps": 3}),
        ("schedule.refresh.at_epochs=[5, 10]", {"at_epochs": (5, 10)}),
        ("schedule.refresh=never", {}),
    ],
)
@pytest.mark.parametrize("preset", ["npd", "npd_adaptive"])
def test_one_refresh_rule_takes_back_another(preset, override, rule):
    refresh = load_config(
        preset, [*MODELS, "schedule.epochs=15", "schedule.window=all", override]
    ).config.schedule.refresh
    rules = refresh.model_dump(exclude={"min_steps", "in_flight"}, exclude_none=True)
    assert rules == rule


def test_two_refresh_rules_in_one_layer_are_refused():
    overrides = ("schedule.refresh.drift=0.2", "schedule.refresh.every_steps=3")
    assert "takes only one of every_steps" in complaint("npd", *MODELS, *overrides)


def test_rule_over_never():
    overrides = ["generate.source=student", "schedule.refresh.drift=0.2"]
    assert load_config("sft", [*MODELS, *overrides]).config.schedule.refresh.drift == 0.2


def test_section_whose_keys_are_all_commented_out_says_nothing(config_file):
    path = config_file("preset: npd\nstudent: s\nteacher: t\ntrain:\n  # lr: 1\nschedule: {}\n")
    assert load_config(path).config == load_config("npd", ["student=s", "teacher=t"]).config


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.e-5", "0.00001", "1.0e-5"])
def test_numbers_as_people_write_them(config_file, text):
    path = config_file(f"preset: npd\nstudent: s\nteacher: t\ntrain: {{lr: {text}}}\n")
    assert load_config(path).config.train.lr == 1e-5
    assert load_config("npd", [*MODELS, f"train.lr={text}"]).config.train.lr == 1e-5


def test_text_that_only_resembles_a_number_stays_text():
    assert load_config("npd", [*MODELS, "name=e5"]).config.name == "e5"
    assert load_config("npd", [*MODELS, "student=models/1e5"]).config.student == "models/1e5"


def test_data_may_be_the_file_alone(config_file):
    """The other keys of the section stay as lower layers have them."""
    section = "data: {train: a.jsonl, columns: {prompt: question}, max_prompt_tokens: 99}\n"
    path = config_file(f"preset: npd\nstudent: s\nteacher: t\n{section}")
    settings = load_config(path, ["data=b.jsonl"])
    data = settings.config.data
    assert (data.train, data.max_prompt_tokens) == ("b.jsonl", 99)
    assert data.columns == {"prompt": "question"}
    assert settings.origins["data.train"] == "--set"
    path = config_file("preset: npd\nstudent: s\nteacher: t\ndata: ''\n")
    assert complaint(path).startswith("run.yaml:4: data.train is empty")


def test_what_a_number_for_text_is_answered_by_works_as_it_is_typed(config_file):
    path = config_file("preset: npd\nstudent: s\nteacher: t\n")
    said = complaint(path, "name=3")
    typed = re.fullmatch(r".*: write (--set .*)", said)
    assert typed is not None
    assert load_config(path, [shlex.split(typed[1])[1]]).config.name == "3"


def test_overrides_are_yaml():
    overrides = ["train.betas=[0.8, 0.9]", "teacher=t=1", "observe.report=false", "data.limit="]
    found = load_config("npd", [*MODELS, *overrides]).config
    assert found.train.betas == (0.8, 0.9)
    assert found.teacher == "t=1"
    assert found.observe.report is False
    assert found.data.limit is None


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.lrr", "train.lr"),
        ("lr", "train.lr"),
        ("trian.lr", "train.lr"),
        ("train.lr.x", "train.lr"),
        ("schedule.reuze", "schedule.reuse"),
        ("kd_weight", "loss.kd_weight"),
        ("studnt", "student"),
        ("top_p", "generate.top_p"),
        ("schedule.refresh.every_step", "schedule.refresh.every_steps"),
        ("train.learning_rate", "train.lr"),
        ("max_completion_length", "generate.max_new_tokens"),
        ("gradient_accumulation_steps", "train.batch_size or train.row_tokens"),
    ],
)
def test_unknown_key_names_the_nearest(key, near):
    said = complaint("npd", *MODELS, f"{key}=1")
    assert said == f"--set {key}=1: unknown key {key}: did you mean {near}?"


def test_unknown_key_without_a_near_one_lists_its_section():
    assert "the keys of train are lr, min_lr," in complaint("npd", "train.zzz=1")
    assert "the keys of a config are name, run_dir," in complaint("npd", "zzz.yyy=1")
    assert "instead of a config file" in complaint("npd", "preset=sft")


def test_unknown_key_of_a_file_names_its_line(config_file):
    path = config_file("student: s\ntrain:\n  lr: 1\n  lrr: 2\ntop_kk: 3\n")
    assert complaint(path).splitlines() == [
        "run.yaml:4: unknown key train.lrr: did you mean train.lr?",
        "run.yaml:5: unknown key top_kk: did you mean score.top_k?",
    ]


def test_wrong_values_are_one_line_each_with_their_place(config_file):
    path = config_file(
        "preset: npd\nstudent: s\nteacher: t\ntrain:\n  lr: -1\n  betas: [0.9]\n"
        "schedule:\n  window: al\n  refresh: often\nname: 3\nscore: 4\n"
    )
    assert complaint(path, "observe.trackers=[wandb]").splitlines() == [
        "run.yaml:10: name must be text, not 3: put it in quotes",
        "run.yaml:11: score is a section: set score.<key>, not score itself",
        "run.yaml:5: train.lr must be greater than 0, not -1",
        "run.yaml:6: train.betas must be a list with more values, not [0.9]",
        "run.yaml:8: schedule.window must be a whole number or 'all', not 'al'",
        "run.yaml:9: schedule.refresh is a section: set schedule.refresh.<key>, "
        "not schedule.refresh itself (except to `never`)",
        "--set observe.trackers=[wandb]: observe.trackers must be 'tensorboard', not 'wandb'",
    ]


def test_missing_student_says_how_to_set_it():
    assert complaint("npd") == "npd: student is not set: give --set student=..."


def test_impossible_combination_names_the_source(config_file):
    path = config_file("student: s\nteacher: t\nschedule: {epochs: 4, steps: 3}\n")
    expected = "run.yaml: set exactly one of schedule.epochs and schedule.steps"
    assert complaint(path).startswith(expected)


@pytest.mark.parametrize(
    ("preset", "values", "uses"),
    [
        ("npd", [], "loss.kd_weight 0.9, filter.name delta_ifd"),
        ("sft", ["filter.name=outlier", "eval.source=none"], "filter.name outlier"),
        ("sft", ["filter.name=random", "eval.source=teacher"], "filter.name random, eval.source"),
        ("seqkd", ["generate.source=teacher", "eval.source=none"], "generate.source teacher"),
        ("npd", ["filter.name=none", "eval.source=none", "loss.kd_weight=1"], "loss.kd_weight 1"),
    ],
)
def test_a_run_without_its_teacher_is_told_what_asks_for_one(preset, values, uses):
    said = complaint(preset, "student=s", *values)
    assert f"this run needs a teacher: set `teacher` or `teachers` (for {uses}" in said


@pytest.mark.parametrize("override", ["seed", "=3", " =3", ""])
def test_override_that_sets_nothing(override):
    assert "write it as KEY=VALUE" in complaint("npd", *MODELS, override)


def test_broken_yaml_names_file_and_line(config_file):
    assert complaint(config_file("student: s\ntrain: [1\n")).startswith("run.yaml:3: not YAML")
    assert complaint(config_file("student: s\ntrain: a: b\n")).startswith("run.yaml:2: not YAML")
    assert complaint(config_file("a: \0\n")).startswith("run.yaml:1: not YAML")
    said = complaint("npd", "train.lr=[1")
    assert said.startswith("--set train.lr=[1: not YAML")


def test_odd_files(config_file, tmp_path):
    assert "run.yaml must hold `key: value` lines" in complaint(config_file("- a\n- b\n"))
    assert "student is not set" in complaint(config_file(""))
    Path("latin.yaml").write_bytes("name: é".encode("latin-1"))
    assert "latin.yaml is not UTF-8" in complaint("latin.yaml")
    assert "is a directory" in complaint(str(tmp_path))


def test_key_written_twice(config_file):
    path = config_file("student: s\ntrain:\n  lr: 1\n  clip: 1\n  lr: 2\n")
    assert complaint(path) == "run.yaml:5: train.lr is already set at run.yaml:3: remove one"


def test_missing_file_and_unknown_preset(config_file):
    said = complaint("on_polcy")
    assert "(did you mean on_policy?)" in said
    assert all(name in said for name in PRESETS)
    assert "does not exist" in complaint("none.yaml")
    path = config_file("preset: npdd\nstudent: s\n")
    assert complaint(path).startswith("run.yaml:1: there is no preset 'npdd' (did you mean npd?)")


def test_preset_name_wins_over_a_file_of_that_name(config_file):
    config_file("student: other\nteacher: t\nschedule: {epochs: 10}\n", name="npd")
    assert load_config("npd", MODELS).config.student == "s"
    assert load_config("./npd").config.student == "other"


def test_presets_are_these():
    assert preset_names() == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_preset_needs_only_models_and_data(name):
    found = load_config(name, MODELS)
    assert found.config.name == name
    assert found.config.schedule.epochs % found.config.schedule.reuse == 0


@pytest.mark.parametrize("name", PRESETS)
def test_preset_says_what_it_is_and_where_from(name):
    import npd.config.load

    text = (Path(npd.__file__).parent / "presets" / f"{name}.yaml").read_text()
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert 2 <= len(comment) <= 3
    assert set(yaml.safe_load(text)) <= {
        "name", "generate", "filter", "score", "loss", "train", "schedule"
    }  # fmt: skip


def test_presets_span_the_family():
    by_name = {name: load_config(name, MODELS).config for name in PRESETS}
    assert {name: c.generate.source for name, c in by_name.items()} == {
        "sft": "dataset",
        "seqkd": "teacher",
        "offline_kd": "dataset",
        "on_policy": "student",
        "npd": "student",
        "npd_adaptive": "student",
    }
    weights = {name: c.loss.kd_weight for name, c in by_name.items()}
    assert [weights[name] for name in ("sft", "seqkd", "on_policy")] == [0.0, 0.0, 1.0]
    assert {weights[name] for name in ("offline_kd", "npd", "npd_adaptive")} == {0.9}
    filtered = [name for name, c in by_name.items() if c.filter.name != "none"]
    assert filtered == ["npd", "npd_adaptive"]
    assert [name for name, c in by_name.items() if not c.needs_scores] == ["seqkd", "sft"]


def test_on_policy_is_strict():
    schedule = load_config("on_policy", MODELS).config.schedule
    config = load_config("on_policy", MODELS).config
    assert schedule.window == config.train.batch_size
    assert (schedule.reuse, schedule.max_lag, schedule.segment_steps) == (1, 0, 1)
    assert schedule.refresh.every_steps == 1
    assert not config.is_overlapped


def test_npd_is_the_papers_schedule():
    config = load_config("npd", MODELS).config
    schedule, train = config.schedule, config.train
    assert (schedule.epochs, schedule.reuse, schedule.window) == (10, 5, "all")
    assert schedule.refresh.at_epochs == (5,)
    assert (train.lr, train.min_lr, train.clip) == (1e-5, 1e-6, 1.0)
    assert (config.filter.low, config.filter.high, config.score.top_k) == (0.0, 0.8, 10)
    assert config.num_requests(100) == 200


@pytest.mark.parametrize("name", PRESETS)
def test_dump_round_trips_through_json(name):
    config = load_config(name, [*MODELS, "run_dir=runs/x", "data.columns={prompt: q}"]).config
    assert RunConfig.model_validate(json.loads(json.dumps(dump_config(config)))) == config


@given(
    lr=st.floats(1e-8, 1.0),
    seed=st.integers(0, 2**31),
    name=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8),
    drift=st.floats(1e-6, 10.0),
)
def test_what_is_set_is_what_is_read(lr, seed, name, drift):
    overrides = [f"train.lr={lr!r}", "train.min_lr=0", f"seed={seed}", f"name={json.dumps(name)}"]
    config = load_config("npd", [*MODELS, *overrides, f"schedule.refresh.drift={drift!r}"]).config
    assert (config.train.lr, config.seed, config.name) == (lr, seed, name)
    assert config.schedule.refresh.drift == drift


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("name: 2024-01-01", "2024-01-01"),
        ("name: 010", "010"),
        ("name: 1:30", "1:30"),
        ("name: 1e5x", "1e5x"),
        ("name: '5'", "5"),
        ("name: !!str 5", "5"),
    ],
)
def test_text_that_older_yaml_takes_for_something_else(config_file, text, name):
    path = config_file(f"preset: npd\nstudent: s\nteacher: t\n{text}\n")
    assert load_config(path).config.name == name


def test_keys_are_text_as_they_are_written(config_file):
    path = config_file("preset: npd\nstudent: s\nteachers: {on: a, 5: b, null: c}\n")
    assert list(load_config(path).config.teachers) == ["on", "5", "null"]


def test_merged_mappings_have_the_place_where_they_are_written(config_file):
    text = "preset: npd\nstudent: s\nteacher: t\nscore: &fast\n  workers: 2\n"
    path = config_file(f"{text}generate:\n  <<: *fast\n  shard_size: 8\n")
    found = load_config(path).config
    assert (found.generate.workers, found.generate.shard_size, found.score.workers) == (2, 8, 2)
    path = config_file(f"{text.replace('2', 'two')}generate: {{<<: *fast}}\n")
    assert complaint(path).splitlines() == [
        "run.yaml:5: generate.workers must be a whole number, not 'two'",
        "run.yaml:5: score.workers must be a whole number, not 'two'",
    ]


def test_config_as_json(config_file):
    path = config_file('{"preset": "npd", "student": "s", "teacher": "t", "seed": 3}')
    assert load_config(path).config.seed == 3


def test_problems_beyond_eight_are_counted(config_file):
    keys = ["lr", "min_lr", "warmup", "weight_decay", "clip", "batch_size", "row_tokens", "ranks"]
    text = "".join(f"  {key}: x\n" for key in [*keys, "dtype", "compile"])
    said = complaint(config_file(f"preset: npd\nstudent: s\nteacher: t\ntrain:\n{text}"))
    assert len(said.splitlines()) == 9
    assert said.splitlines()[-1] == "run.yaml: and 2 more problems: correct these first"


def test_a_config_with_all_values_written_out_is_read_back(config_file):
    from npd.printing import config_lines

    for name in PRESETS:
        found = load_config(name, MODELS)
        path = config_file("\n".join(config_lines(found)))
        assert load_config(path).config == found.config
