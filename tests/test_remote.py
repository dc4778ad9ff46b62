"""Objects below a URL: tried again, told clearly, whole or absent."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npd.errors import ConfigError, RunError, StoreError
from npd.remote.objects import ObjectStore, check_usable
from npd.remote.sync import ArtifactSync
from npd.remote.worker_cache import WorkerCache
from npd.store import snapshots
from npd.store.layout import RunLayout
from store_faults import FAULTS, install

FAST = (0.0, 0.0, 0.0)


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """Sets what goes wrong from now on."""
    install(tmp_path / "packages")

    def set_faults(**values):
        monkeypatch.setenv(FAULTS, json.dumps(values))

    return set_faults


@pytest.fixture
def url(tmp_path):
    return f"faulty://{tmp_path}/store"


def make_exchange(url, root) -> tuple[RunLayout, ArtifactSync]:
    layout = RunLayout(root)
    layout.create()
    return layout, ArtifactSync(ObjectStore(url, pauses=FAST), root)


def publish(path, **contents):
    snapshots.publish(path, lambda into: [(into / n).write_text(t) for n, t in contents.items()])


def test_objects_are_written_read_listed_and_removed(tmp_path):
    remote = ObjectStore(f"file://{tmp_path}/a place/")
    assert remote.read("x") is None
    assert remote.names("folder") == []
    remote.write("folder/x", b"one")
    remote.write("folder/x", b"three")
    remote.write("folder/sub/y", b"")
    assert remote.read("folder/x") == b"three"
    assert remote.names("folder") == ["sub", "x"]
    remote.remove("folder")
    remote.remove("folder")
    assert remote.names("folder") == []
    with pytest.raises(FileNotFoundError):
        remote.download("folder/x", tmp_path / "here")


def test_what_fails_for_a_moment_is_tried_again(tmp_path, url, faults):
    faults(fail_every=2, calls=str(tmp_path / "calls"))
    remote = ObjectStore(url, pauses=FAST)
    for number in range(5):
        remote.write(f"x{number}", b"content")
        assert remote.read(f"x{number}") == b"content"
    assert len((tmp_path / "calls").read_text().splitlines()) > 10


def test_what_fails_for_good_is_one_line_with_object_and_cause(tmp_path, url, faults):
    remote = ObjectStore(url, pauses=FAST)
    faults(dead=str(tmp_path), calls=str(tmp_path / "calls"))
    for work in (
        lambda: remote.write("x", b""),
        lambda: remote.read("x"),
    ):
        with pytest.raises(
            RunError, match=r"store/x \(ConnectionError: the store is down\)"
        ) as told:
            work()
        assert "\n" not in str(told.value)
    assert len((tmp_path / "calls").read_text().splitlines()) == 2 * (1 + len(FAST))


def test_an_upload_that_was_cut_is_sent_again(tmp_path, url, faults):
    (tmp_path / "file").write_bytes(b"x" * 1000)
    remote = ObjectStore(url, pauses=FAST)
    faults(cut_every=1)
    with pytest.raises(RunError, match="it has 500 of 1000 bytes"):
        remote.upload(tmp_path / "file", "file")
    faults(cut_every=3)
    for _ in range(4):
        remote.upload(tmp_path / "file", "file")
        assert (tmp_path / "store" / "file").read_bytes() == b"x" * 1000


@pytest.mark.parametrize(
    ("url", "package", "told"),
    [
        ("nope://bucket/x", None, r"ValueError: Protocol not known: nope.*like s3://bucket/folder"),
        ("s3://bucket/x", "s3fs", r"s3://bucket/x needs a package: pip install s3fs"),
        ("gs://bucket/x", "gcsfs", r"needs a package: pip install gcsfs"),
        ("az://bucket/x", "adlfs", r"needs a package: pip install adlfs"),
        ("sftp://host/x", "paramiko", r"needs a package: .*paramiko"),
    ],
)
def test_a_url_of_no_use_says_what_to_install_or_write(url, package, told):
    if package and find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError, match=told) as error:
        check_usable(url)
    assert "\n" not in str(error.value)


def test_a_place_that_cannot_be_used_is_found_and_nothing_left_where_it_can(tmp_path, url, faults):
    check_usable(url)
    assert list((tmp_path / "store").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"runtime.shared .*/file cannot be used \(\w+Error"):
        check_usable(f"file://{tmp_path}/file")
    faults(is_closed=True)
    with pytest.raises(ConfigError, match=r"cannot be used \(PermissionError: read only"):
        check_usable(url)
    faults(dead=str(tmp_path))
    with pytest.raises(ConfigError, match=r"the store is down.*: correct the URL, or give this "):
        check_usable(url)


def test_a_file_and_a_directory_come_back_to_the_byte(tmp_path):
    here, push = make_exchange(f"file://{tmp_path}/store", tmp_path / "a")
    there, pull = make_exchange(f"file://{tmp_path}/store", tmp_path / "b")
    assert not pull.has(there.rollouts(3))
    assert not pull.download(there.rollouts(3))
    assert not pull.download(there.snapshot(1))
    here.rollouts(3).write_bytes(b"shard")
    publish(here.snapshot(1), weights="w" * 100, config="c")
    for path in (here.rollouts(3), here.snapshot(1)):
        push.upload(path)
    assert pull.has(there.rollouts(3))
    assert pull.has(there.snapshot(1))
    assert pull.download(there.rollouts(3))
    assert pull.download(there.snapshot(1))
    assert there.rollouts(3).read_bytes() == b"shard"
    assert snapshots.verify(there.snapshot(1)) == snapshots.verify(here.snapshot(1))
    assert there.remove_temporary() == []


def test_what_a_killed_writer_left_is_not_there(tmp_path, url, faults):
    """Whatever operation the writer dies at, the reader finds all of it or nothing."""
    here, _ = make_exchange(url, tmp_path / "a")
    publish(here.snapshot(1), weights="w" * 100, config="c", tokenizer="t")
    here.scored(1).write_bytes(b"scored")
    for path in (here.snapshot(1), here.scored(1)):
        for survived in range(1, 10):
            store = f"faulty://{tmp_path}/{path.name}-{survived}"
            writer = ArtifactSync(ObjectStore(store, pauses=()), here.root)
            faults(fail_every=survived)
            try:
                writer.upload(path)
                is_whole = True
            except RunError:
                is_whole = False
            faults()
            there, reader = make_exchange(store, tmp_path / f"{path.name}-{survived}-reader")
            wanted = there.root / path.relative_to(here.root)
            assert reader.has(wanted) is reader.download(wanted) is is_whole
            ArtifactSync(ObjectStore(store, pauses=()), here.root).upload(path)
            assert reader.download(wanted)
        assert is_whole, "the last one was not cut"


def test_a_download_that_was_cut_is_fetched_again_and_damage_told(tmp_path, url, faults):
    here, push = make_exchange(url, tmp_path / "a")
    publish(here.checkpoint(5), model="m" * 100)
    here.scored(1).write_bytes(b"s" * 100)
    for path in (here.checkpoint(5), here.scored(1)):
        push.upload(path)
    faults(cut_every=3)
    for number in range(3):
        there, pull = make_exchange(url, tmp_path / f"b{number}")
        for path in (there.checkpoint(5), there.scored(1)):
            assert pull.download(path)
    assert there.scored(1).read_bytes() == b"s" * 100
    faults()
    (tmp_path / "store" / "scored" / "000001.arrow").write_bytes(b"t" * 100)
    (tmp_path / "store" / "checkpoints" / "step-000005" / "model").unlink()
    there, pull = make_exchange(url, tmp_path / "c")
    with pytest.raises(StoreError, match=r"store/scored/000001.arrow is missing or does not match"):
        pull.download(there.scored(1))
    with pytest.raises(StoreError, match=r"step-000005/model is missing or does not match"):
        pull.download(there.checkpoint(5))
    assert there.remove_temporary() == []
    assert not there.scored(1).exists()
    (tmp_path / "store" / "scored" / "000001.arrow.json").unlink()
    assert not pull.has(there.scored(1)), "as the line says"


def test_what_an_earlier_life_left_here_is_used_only_where_it_is_the_same(tmp_path, url, faults):
    here, push = make_exchange(url, tmp_path / "a")
    here.scored(1).write_bytes(b"new")
    push.upload(here.scored(1))
    there, pull = make_exchange(url, tmp_path / "b")
    there.scored(1).write_bytes(b"old")
    assert pull.download(there.scored(1))
    assert there.scored(1).read_bytes() == b"new"
    faults(calls=str(tmp_path / "calls"))
    _, again = make_exchange(url, tmp_path / "b")
    assert again.download(there.scored(1))
    assert "get" not in (tmp_path / "calls").read_text()


def test_pruning_leaves_what_is_kept_and_what_is_on_its_way(tmp_path):
    here, exchange = make_exchange(f"file://{tmp_path}/store", tmp_path / "a")
    for version in range(6):
        publish(here.snapshot(version), weights=str(version))
        exchange.upload(here.snapshot(version))
    (tmp_path / "store" / "snapshots" / "v000005" / "manifest.json").unlink()
    exchange.prune(here.snapshots, range(3, 5))
    assert sorted(os.listdir(tmp_path / "store" / "snapshots")) == ["v000003", "v000004", "v000005"]
    exchange.prune(here.snapshots, [])
    exchange.remove_incomplete(here.snapshots)
    assert sorted(os.listdir(tmp_path / "store" / "snapshots")) == ["v000003", "v000004"]


def test_a_worker_finds_the_newest_snapshot_with_its_pointer(tmp_path):
    here, exchange = make_exchange(f"file://{tmp_path}/store", tmp_path / "a")
    cache = WorkerCache(
        tmp_path / "b", ArtifactSync(ObjectStore(f"file://{tmp_path}/store"), tmp_path / "b")
    )
    layout = cache.open()
    assert snapshots.latest(layout.snapshots) is None
    for version in (1, 2):
        publish(here.snapshot(version), weights=str(version))
        exchange.upload(here.snapshot(version))
        exchange.set_latest(here.snapshots / "LATEST", version)
        assert snapshots.latest(layout.snapshots) == version
        assert (layout.snapshot(version) / "weights").read_text() == str(version)
    exchange.set_latest(here.snapshots / "LATEST", 3)
    assert snapshots.latest(layout.snapshots) == 2, "pruned before it was fetched: the next follows"


@settings(max_examples=4, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=45, max_size=90))
def test_scratch_is_bounded_and_what_is_asked_for_is_there(tmp_path_factory, calls):
    root = tmp_path_factory.mktemp("scratch")
    here, exchange = make_exchange(f"file://{root}/store", root / "a")
    for shard in range(41):
        here.scored(shard).write_text(f"shard {shard}")
        exchange.upload(here.scored(shard))
    for version in range(10):
        publish(here.snapshot(version), weights=str(version))
        exchange.upload(here.snapshot(version))
    cache = WorkerCache(root / "b", ArtifactSync(ObjectStore(f"file://{root}/store"), root / "b"))
    layout = cache.open()
    start = 0
    for number, (shard, version) in enumerate(calls):
        if number % 50 == 49:  # a life ends; the next one takes over what it left
            cache = WorkerCache(
                root / "b", ArtifactSync(ObjectStore(f"file://{root}/store"), root / "b")
            )
            layout, start = cache.open(), number
        assert layout.scored(shard).read_text() == f"shard {shard}"
        assert (layout.snapshot(version) / "weights").read_text() == str(version)
        publish(RunLayout(root / "b").checkpoint(number), model="m")
        layout.checkpoint(number)
        cache.end_call()
        assert exchange.has(here.checkpoint(number))
        assert len(list((root / "b" / "snapshots").glob("v*"))) <= 2
        assert list((root / "b" / "checkpoints").iterdir()) == []
        kept = {path.stem for path in (root / "b" / "scored").iterdir()}
        if number - start >= 31:
            assert kept == {f"{shard:06d}" for shard, _ in calls[number - 31 : number + 1]}
    cache.close()
    assert not (root / "b").exists()


def test_a_note_that_names_a_file_outside_is_refused(tmp_path):
    here, exchange = make_exchange(f"file://{tmp_path}/store", tmp_path / "a")
    entry = {"bytes": 1, "sha256": ""}
    note = {"format": 1, "checksum": "", "files": {"../../../outside": entry}}
    exchange.remote.write("snapshots/v000001/manifest.json", json.dumps(note).encode())
    with pytest.raises(
        StoreError, match=r"names \.\./\.\./\.\./outside, a file outside its directory"
    ):
        exchange.download(here.snapshot(1))


def test_probes_of_snapshots_reach_the_next_life_of_a_worker(tmp_path):
    for life, versions in enumerate((["v000001"], ["v000001", "v000002"])):
        root = tmp_path / f"life{life}"
        cache = WorkerCache(root, ArtifactSync(ObjectStore(f"file://{tmp_path}/store"), root))
        probes = cache.open().probes
        assert sorted(path.name for path in probes.glob("*")) == versions[:-1]
        (probes / versions[-1]).mkdir(parents=True)
        (probes / versions[-1] / "probe.json").write_text("{}")
        cache.end_call()
        cache.close()
