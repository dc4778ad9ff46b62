"""Files are whole or absent, whoever kills the writer; what is left over is swept."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from npd.errors import RunError, StoreError
from npd.store import files
from npd.store.layout import RunLayout
from npd.store.shards import read_rollouts, write_rollouts
from store_samples import make_rollout


def test_full_disk_is_a_run_error(tmp_path):
    def write(file):
        file.write(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError, match="no space left") as told:
        files.write_atomic(tmp_path / "a", write)
    assert not isinstance(told.value, StoreError)
    assert list(tmp_path.iterdir()) == []


def test_directory_that_cannot_be_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        write_rollouts(tmp_path / "file" / "a.arrow", [make_rollout(0)])


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from store_samples import make_rollout
from npd.store.layout import RunLayout
from npd.store.shards import write_rollouts
layout = RunLayout(Path(sys.argv[1]))
batch = [make_rollout(i, 20_000) for i in range(16)]
print("ready", flush=True)
for turn in range(1_000_000):
    write_rollouts(layout.rollouts(turn % 3), batch)
"""


def test_a_killed_writer_leaves_whole_files_and_sweepable_rest(tmp_path):
    layout = RunLayout(tmp_path)
    layout.create()
    swept = []
    for delay in (0.05, 0.013, 0.11, 0.027):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(Path(__file__).parents[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(delay)
            writer.send_signal(signal.SIGKILL)
        shards = sorted(layout.rollouts(0).parent.glob("*.arrow"))
        assert all(len(read_rollouts(path)) == 16 for path in shards)
        left = [p for p in layout.rollouts(0).parent.iterdir() if p not in shards]
        removed = layout.remove_temporary()
        assert removed == left
        assert sorted(layout.rollouts(0).parent.iterdir()) == shards
        swept += removed
    assert all(path.suffix == ".tmp" for path in swept)


def test_sweep_takes_only_left_overs(tmp_path):
    layout = RunLayout(tmp_path)
    layout.create()
    write_rollouts(layout.rollouts(0), [make_rollout(0)])
    theirs = [layout.logs / name for name in ("mine.tmp", ".mine.tmp", ".mine.txt.tmp")]
    for path in theirs:
        path.write_text("not ours")
    files.temporary(layout.rollouts(1)).write_bytes(b"half a shard")
    half = files.temporary(layout.snapshot(2))
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half a model")
    assert len(layout.remove_temporary()) == 2
    assert layout.remove_temporary() == []
    assert all(path.exists() for path in theirs)
    assert len(read_rollouts(layout.rollouts(0))) == 1


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    for path in (tmp_path / "config.json", tmp_path):
        with pytest.raises(StoreError, match="is not a file"):
            files.read_json(path)


def test_json_round_trip_and_errors(tmp_path):
    path = tmp_path / "deep" / "config.json"
    files.write_json(path, {"lr": 1e-5, "name": "Δ", "n": [1, None]})
    assert files.read_json(path) == {"lr": 1e-5, "name": "Δ", "n": [1, None]}
    path.write_text('{"lr": ')
    with pytest.raises(StoreError, match=r"config\.json is not valid JSON"):
        files.read_json(path)
    with pytest.raises(StoreError, match=r"none\.json is missing"):
        files.read_json(tmp_path / "none.json")


def test_replacing_a_file_leaves_its_open_readers_alone(tmp_path):
    path = tmp_path / "a"
    files.write_atomic(path, lambda file: file.write(b"old content"))
    with path.open("rb") as reader:
        files.write_atomic(path, lambda file: file.write(b"new"))
        assert reader.read() == b"old content"
    assert path.read_bytes() == b"new"
