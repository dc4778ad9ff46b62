"""The record of a run: what it keeps of the config, and that a run goes on from it."""

from __future__ import annotations

import json

import pytest

from npd.config import LaunchConfig
from npd.control.resume_checks import as_recorded
from npd.control.run_directory import missing_folder, open_directory, remove_unless_started
from npd.control.run_record import load_run
from npd.data.inputs import RunInputs
from npd.errors import ConfigError, InputError
from npd.store.ledger import Ledger
from tiny_run import tiny_config

SIZES = ("batch_size", "shard_size", "shards_in_flight")


@pytest.fixture
def make(tmp_path, tiny_model_dir, tiny_teacher_dir):
    """Configs of one run, whose teacher's server is started with an environment."""

    def build(**environment):
        launch = {"command": ["serve"], "env": environment}
        return tiny_config(
            tiny_model_dir,
            tiny_teacher_dir,
            tmp_path / "prompts.jsonl",
            tmp_path / "run",
            score={"engine": "vllm", "launch": launch},
        )

    return build


def opened(config, *, resume):
    prepared = RunInputs([], [], {})
    return open_directory(config, prepared, resume=resume, origins={})


def test_secrets_stay_out_of_the_record_and_the_run_goes_on(make):
    config = make(HF_TOKEN="hush", MY_SECRET_KEY="hush", OMP_NUM_THREADS="1")
    layout = opened(config, resume=False)
    assert "hush" not in layout.config_json.read_text()
    kept = load_run(layout).score.launch.env
    assert kept == {"HF_TOKEN": "***", "MY_SECRET_KEY": "***", "OMP_NUM_THREADS": "1"}
    assert config.score.launch.env["HF_TOKEN"] == "hush", "the server is given it"
    for again in (config, make(HF_TOKEN="another"), make()):
        assert opened(again, resume=True).root == layout.root
    with pytest.raises(ConfigError, match=r"started with seed=0"):
        opened(config.model_copy(update={"seed": 1}), resume=True)


def test_what_a_run_decided_at_its_start_is_kept_when_it_goes_on(make):
    """Also where `auto` comes to something else by now: an early version had shards of 32."""
    served = {"engine": "vllm", "launch": LaunchConfig(command=("serve",))}
    config = make()
    generate = config.generate.model_copy(update=served | dict.fromkeys(SIZES, "auto"))
    config = config.model_copy(update={"generate": generate})
    assert as_recorded(config) == config, "there is no record yet"
    old = generate.model_copy(update=dict(zip(SIZES, (9, 32, 5), strict=True)))
    opened(config.model_copy(update={"generate": old}), resume=False)
    resumed = as_recorded(config).sized(300)
    assert [getattr(resumed.generate, key) for key in SIZES] == [9, 32, 5]
    opened(resumed, resume=True)
    with pytest.raises(ConfigError, match=r"generate.shard_size=32, now it is 300"):
        opened(config.sized(300), resume=True)


def test_a_record_of_before_shards_shared_a_generator_goes_on_with_one(make):
    config = make()
    generate = {"engine": "vllm", "launch": LaunchConfig(command=("serve",)), "shard_size": 7}
    generate = config.generate.model_copy(update=generate)
    config = config.model_copy(update={"generate": generate})
    assert config.generate.num_in_flight == 2
    layout = opened(config, resume=False)
    record = json.loads(layout.config_json.read_text())
    del record["config"]["generate"]["shards_in_flight"]
    layout.config_json.write_text(json.dumps(record))
    resumed = as_recorded(config)
    assert resumed.generate.num_in_flight == 1
    opened(resumed, resume=True)


@pytest.fixture
def begun(tmp_path, make):
    """Makes a new run's directory, deep down, with a ledger of these events and a log."""

    def begin(*kinds: str, folder="made/by/us"):
        config = make().model_copy(update={"run_dir": tmp_path / folder})
        outermost = missing_folder(config.directory)
        layout = opened(config, resume=False)
        with Ledger(layout.ledger_db) as ledger:
            for kind in ("Started", *kinds):
                ledger.append_event(kind, {})
            ledger.add_snapshot(0, 0, layout.snapshot(0), "checksum")
        (layout.snapshot(0) / "model").mkdir(parents=True)
        (layout.logs / "scorer-0.log").write_text("Traceback\nwhat it was\n")
        (layout.logs / ".x.1-ab.tmp").touch()
        return layout, outermost

    return begin


def test_a_run_that_made_nothing_leaves_nothing(begun, tmp_path):
    error = InputError("wrong")
    layout, outermost = begun("SnapshotPublished", "Evaluated", "ShardFailed")
    assert outermost == tmp_path / "made"
    assert remove_unless_started(layout, outermost, error)
    assert list(tmp_path.iterdir()) == []
    assert error.__notes__ == ["--- the last lines of scorer-0.log\nTraceback\nwhat it was"]
    assert str(error) == "wrong"


@pytest.mark.parametrize("kind", ["ShardGenerated", "ShardScored", "SegmentTrained"])
def test_a_run_that_made_something_stays(begun, kind):
    layout, outermost = begun("SnapshotPublished", kind)
    before = {*layout.root.rglob("*")}
    assert not remove_unless_started(layout, outermost, InputError("wrong"))
    assert before <= {*layout.root.rglob("*")}


def test_what_npd_did_not_make_stays(begun, tmp_path):
    (tmp_path / "theirs").mkdir()
    layout, outermost = begun(folder="theirs")
    assert outermost is None
    assert remove_unless_started(layout, outermost, InputError("wrong"))
    assert list((tmp_path / "theirs").iterdir()) == []
    layout, outermost = begun()
    (layout.root / "notes.txt").touch()
    (layout.root.parent / "other").mkdir()
    assert remove_unless_started(layout, outermost, InputError("wrong"))
    assert [path.name for path in layout.root.iterdir()] == ["notes.txt"]
    assert (layout.root.parent / "other").is_dir()


def test_a_damaged_ledger_is_not_taken_for_an_empty_one(begun):
    layout, outermost = begun()
    layout.ledger_db.write_bytes(b"not a database" * 100)
    assert not remove_unless_started(layout, outermost, InputError("wrong"))
    assert layout.config_json.exists()


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("train", {"activation_checkpointing": True}),
        ("train", {"compile": True}),
        ("loss", {"impl": "reference"}),
        ("loss", {"chunk": 7}),
        ("score", {"row_tokens": 77, "head_chunk": 7, "compile": True}),
        ("generate", {"batch_size": 3}),
        ("eval", {"batch_size": 3}),
    ],
)
def test_what_decides_nothing_may_change(make, section, changes):
    """After an error for lack of memory the run goes on with less at a time."""
    config = make()
    opened(config, resume=False)
    changed = getattr(config, section).model_copy(update=changes)
    opened(config.model_copy(update={section: changed}), resume=True)


def test_what_was_decided_at_the_start_stays_so(make):
    """`auto` is what the record says, whatever this machine would make of it; numbers are not."""
    asked = make()
    assert as_recorded(asked) is asked, "there is no record yet"
    started = asked.model_copy(
        update={
            "score": asked.score.model_copy(update={"row_tokens": 8192, "head_chunk": 1024}),
            "train": asked.train.model_copy(update={"activation_checkpointing": True}),
            "loss": asked.loss.model_copy(update={"chunk": 77}),
        }
    )
    opened(started, resume=False)
    auto = asked.score.model_copy(update={"row_tokens": "auto"})
    found = as_recorded(asked.model_copy(update={"score": auto}))
    assert found.score.sizes == (8192, 1024)
    assert found.train.activation_checkpointing is True
    assert found.loss.chunk == 77
    free = started.score.model_copy(update={"head_chunk": 5})
    assert as_recorded(started.model_copy(update={"score": free})).score.sizes == (8192, 5)


@pytest.mark.parametrize(
    ("section", "changes"),
    [("train", {"row_tokens": 99}), ("train", {"dtype": "float32"}), ("score", {"top_k": 3})],
)
def test_what_decides_may_not(make, section, changes):
    config = make()
    opened(config, resume=False)
    old = getattr(config, section)
    key, value = next(iter(changes.items()))
    if getattr(old, key) == value:
        changes = {key: "bfloat16"}
    with pytest.raises(ConfigError, match=rf"started with {section}\.{key}="):
        opened(config.model_copy(update={section: old.model_copy(update=changes)}), resume=True)
