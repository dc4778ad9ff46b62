"""Snapshots: whole or absent, checksummed, idempotent; pruning never takes what is used."""

import errno
import json
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from npd.errors import RunError, StoreError
from npd.store import snapshots
from npd.store.layout import RunLayout
from store_samples import file_size_limit


def writer(text="weights", calls=None):
    def write(directory):
        if calls is not None:
            calls.append(directory)
        (directory / "model.safetensors").write_bytes(text.encode())
        (directory / "config.json").write_text("{}")
        (directory / "extra").mkdir()
        (directory / "extra" / "merges.txt").write_text("a b")

    return write


def test_publish_then_verify(tmp_path):
    final = tmp_path / "v000001"
    checksum = snapshots.publish(final, writer())
    assert snapshots.verify(final) == checksum
    manifest = json.loads((final / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "config.json", "extra/merges.txt"}
    assert manifest["files"]["config.json"] == {
        "bytes": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    assert os.listdir(tmp_path) == ["v000001"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_what_is_published_can_be_read_by_whoever_reads_other_new_files(tmp_path, umask, mode):
    def write(directory):
        writer()(directory)
        (directory / "model.safetensors").chmod(0o600)
        (directory / "config.json").chmod(0o400)

    before = os.umask(umask)
    try:
        snapshots.publish(tmp_path / "v000001", write)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "v000001").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


def test_checksum_says_what_is_in_it_and_nothing_else(tmp_path):
    first = snapshots.publish(tmp_path / "a", writer())
    assert snapshots.publish(tmp_path / "b", writer()) == first
    assert snapshots.publish(tmp_path / "c", writer("others")) != first


def test_publish_again_writes_nothing(tmp_path):
    calls = []
    first = snapshots.publish(tmp_path / "v000001", writer(calls=calls))
    assert snapshots.publish(tmp_path / "v000001", writer("others", calls)) == first
    assert len(calls) == 1


def flip(final):
    content = bytearray((final / "model.safetensors").read_bytes())
    content[3] ^= 4
    (final / "model.safetensors").write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda final: (final / "model.safetensors").write_bytes(b"wei"),
    "file gone": lambda final: (final / "extra" / "merges.txt").unlink(),
    "manifest cut": lambda final: (final / "manifest.json").write_text('{"files": {'),
    "manifest empty": lambda final: (final / "manifest.json").write_text("[]"),
    "manifest edited": lambda final: (final / "manifest.json").write_text(
        (final / "manifest.json").read_text().replace('"bytes": 2', '"bytes": 3')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_told_and_mended_by_publishing_again(tmp_path, damage):
    final = tmp_path / "v000001"
    checksum = snapshots.publish(final, writer())
    damage(final)
    with pytest.raises(StoreError, match=r"v000001 is damaged .*delete it and resume"):
        snapshots.verify(final)
    assert snapshots.publish(final, writer()) == checksum == snapshots.verify(final)
    assert os.listdir(tmp_path) == ["v000001"]


def test_absent_snapshot_is_told(tmp_path):
    with pytest.raises(StoreError, match=r"v000009 is damaged \(manifest.json is missing"):
        snapshots.verify(tmp_path / "v000009")


def test_what_others_put_there_is_not_replaced(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.txt").write_text("the only copy")
    with pytest.raises(StoreError, match=r"student exists and has no manifest"):
        snapshots.publish(tmp_path / "student", writer())
    assert (tmp_path / "student" / "thesis.txt").read_text() == "the only copy"


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "student").mkdir()
    snapshots.publish(tmp_path / "student", writer())
    snapshots.verify(tmp_path / "student")


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def write(directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        snapshots.publish(tmp_path / "v000001", write)
    assert os.listdir(tmp_path) == []


def test_full_disk_is_a_run_error(tmp_path):
    def write(directory):
        (directory / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError, match=r"no space left while writing .*v000001.*resume"):
        snapshots.publish(tmp_path / "v000001", write)
    assert os.listdir(tmp_path) == []


def test_refused_write_inside_safetensors_is_a_run_error(tmp_path):
    """Its native writer raises an own error class, with the system's number only in the text."""

    def write(directory):
        save_file({"w": torch.zeros(10_000)}, directory / "model.safetensors")

    with file_size_limit(4096), pytest.raises(RunError, match="no space left while writing"):
        snapshots.publish(tmp_path / "v000001", write)
    assert os.listdir(tmp_path) == []


def test_latest(tmp_path):
    layout = RunLayout(tmp_path)
    layout.create()
    assert snapshots.latest(layout.snapshots) is None
    for version in (1, 2):
        snapshots.publish(layout.snapshot(version), writer(str(version)))
        snapshots.set_latest(layout.snapshots, version)
        assert snapshots.latest(layout.snapshots) == version
    with pytest.raises(AssertionError, match="not published"):
        snapshots.set_latest(layout.snapshots, 7)
    assert snapshots.latest(layout.snapshots) == 2
    (layout.snapshots / "LATEST").write_text("v00")
    with pytest.raises(StoreError, match="LATEST names no snapshot"):
        snapshots.latest(layout.snapshots)


def test_prune_keeps_what_is_kept_and_latest(tmp_path):
    layout = RunLayout(tmp_path)
    layout.create()
    for version in range(6):
        snapshots.publish(layout.snapshot(version), writer(str(version)))
    snapshots.set_latest(layout.snapshots, 2)
    (layout.snapshots / "notes").mkdir()
    assert snapshots.prune(layout.snapshots, {5, 4}) == [0, 1, 3]
    assert sorted(os.listdir(layout.snapshots)) == [
        "LATEST",
        "notes",
        "v000002",
        "v000004",
        "v000005",
    ]
    assert snapshots.prune(layout.snapshots, {5, 4}) == []


def test_prune_of_checkpoints(tmp_path):
    layout = RunLayout(tmp_path)
    for step in (100, 200, 300):
        snapshots.publish(layout.checkpoint(step), writer())
    assert snapshots.prune(layout.checkpoints, {300}) == [100, 200]
    snapshots.verify(layout.checkpoint(300))


def test_pruning_leaves_what_was_written_this_moment(tmp_path):
    """A checkpoint may be there before its event is; only what is older than the kept ones goes."""
    layout = RunLayout(tmp_path)
    for step in (100, 200, 300):
        snapshots.publish(layout.checkpoint(step), writer())
    assert snapshots.prune(layout.checkpoints, [200]) == [100]
    assert sorted(os.listdir(layout.checkpoints)) == ["step-000200", "step-000300"]


def test_what_belongs_to_a_forgotten_history_goes_with_its_pointer(tmp_path):
    layout = RunLayout(tmp_path)
    for version in range(3):
        snapshots.publish(layout.snapshot(version), writer())
    snapshots.set_latest(layout.snapshots, 2)
    snapshots.drop_newer(layout.snapshots, 1)
    assert snapshots.latest(layout.snapshots) is None
    assert sorted(os.listdir(layout.snapshots)) == ["v000000", "v000001"]
