"""Whole runs as actors on a real Ray cluster: the student of one process, whatever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import npd
from leftovers import Surroundings
from npd.errors import ConfigError
from npd.store.layout import RunLayout
from run_process import LIMIT, WINDOWED, check_all_steps, is_alive
from test_run import QuietView, check_books, check_same_run
from tiny_run import tiny_config, write_prompts

pytestmark = pytest.mark.timeout(1200)
TRAIN = {
    "batch_size": 6, "row_tokens": 112, "lr": 2e-3, "min_lr": 2e-4, "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def on_ray(ray_address):
    return {"kind": "ray", "device": "cpu", "threads": 1, "ray": {"address": ray_address}}


def seats(run: Path) -> dict[str, int]:
    """Process ids of a run's actors by worker name, as the kernel has them."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            files = {os.readlink(link) for link in (entry / "fd").glob("[12]")}
        except OSError:
            continue
        for file in files:
            if file.startswith(str(run / "logs")):
                found[Path(file).stem] = int(entry.name)
    return found


@pytest.mark.slow
def test_a_run_on_ray_makes_the_student_of_one_process(
    tmp_path, tiny_model_dir, tiny_teacher_dir, on_ray
):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    schedule = {"epochs": 4, "reuse": 2, "refresh": {"at_epochs": [2]}, "segment_steps": 2,
                "overlap": False}  # fmt: skip

    def config(name, ranks, runtime):
        return tiny_config(
            tiny_model_dir, tiny_teacher_dir, prompts, tmp_path / name, schedule=schedule,
            train={**TRAIN, "ranks": ranks}, runtime=runtime,
        )  # fmt: skip

    inline = {"kind": "inline", "device": "cpu", "threads": 1}
    one = npd.run(config("one", 1, inline), view=QuietView())
    two = npd.run(config("two", 2, on_ray), view=QuietView())
    layout = RunLayout(two.directory)
    check_same_run(one, two)
    logs = {path.name for path in layout.logs.glob("*.log")}
    assert {"generator-0.log", "scorer-0.log", "trainer-0.log", "trainer-1.log"} <= logs
    assert not seats(layout.root), "an actor outlived its run"


@pytest.mark.slow
def test_killed_actors_are_replaced_and_nothing_is_lost(make_run, on_ray):
    run = make_run(runtime=on_ray, schedule=WINDOWED, train={**TRAIN, "ranks": 2})
    process = run.start()
    victims = ("generator-0", "scorer-0", "trainer-0", "trainer-1")
    killed = []
    for victim, events in zip(victims, (6, 12, 18, 26), strict=True):
        if not run.wait_for(events, process):
            break
        if (pid := seats(run.layout.root).get(victim)) is not None:
            os.kill(pid, signal.SIGKILL)
            killed.append(victim)
    run.finish(process)
    assert len(killed) >= 3
    check_all_steps(run)
    text = run.log.read_text()
    assert "Traceback" not in text
    assert "(raylet)" not in text, "Ray's own words in between the run's"


@pytest.mark.slow
def test_a_killed_controller_takes_its_actors_along_and_resumes(make_run, on_ray):
    run = make_run(runtime=on_ray, schedule=WINDOWED)
    process = run.start()
    assert run.wait_for(12, process), run.log.read_text()[-2000:]
    pids = seats(run.layout.root)
    assert len(pids) == 3
    process.kill()
    process.wait()
    _wait_until_gone(pids.values())
    run.finish()
    check_books(run.layout, reuse=2)


@pytest.mark.slow
def test_one_machine_is_a_cluster_of_its_own_and_leaves_nothing(make_run, tmp_path):
    """`address` null: Ray is started for the run, and gone with it, however the run ends."""
    ray = {"kind": "ray", "device": "cpu", "threads": 1}
    run = make_run(runtime=ray, schedule=WINDOWED)
    around = Surroundings(tmp_path)
    run.environment = around.environment

    def started(events=None):
        process = run.start()
        if events is not None:
            assert run.wait_for(events, process), run.log.read_text()[-2000:]
            around.look()
            lines = around.processes().values()
            assert any(line[0].endswith("raylet") for line in lines), "Ray is seen"
        return process

    def left(process):
        # Its folder is not in TMPDIR where that is too long for Unix sockets.
        folders = Path("/tmp").glob(f"npd-ray-{process.pid}-*")
        return [*around.left(patience=30.0), *map(str, folders)]

    process = started(6)
    listening = _far_listeners(set(around.processes()))
    process.kill()
    process.wait()
    assert left(process) == [], "kill -9"
    assert not listening, "a port is open to other machines"
    process = started(14)
    process.terminate()
    assert process.wait(LIMIT) == 130, run.log.read_text()[-2000:]
    assert left(process) == [], "SIGTERM"
    process = started()
    run.finish(process)
    assert left(process) == [], "success"
    check_books(run.layout, reuse=2)
    assert "Traceback" not in run.log.read_text()


def test_no_cluster_at_the_address_is_one_line(tmp_path, tiny_model_dir, tiny_teacher_dir):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    ray = {"kind": "ray", "ray": {"address": "127.0.0.1:1"}}
    path = tmp_path / "run.yaml"
    config = tiny_config(tiny_model_dir, tiny_teacher_dir, prompts, tmp_path / "run", runtime=ray)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    command = [sys.executable, "-m", "npd", "run", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == ConfigError.exit_code
    assert "no Ray cluster at runtime.ray.address '127.0.0.1:1'" in done.stderr
    assert "Traceback" not in done.stderr


def _wait_until_gone(pids) -> None:
    deadline = time.monotonic() + 30
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive


def _far_listeners(pids: set[int]) -> list[str]:
    """Addresses other than loopback on which any of the processes listens."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                name = os.readlink(link)
            except OSError:
                continue
            if name.startswith("socket:["):
                inodes.add(name[8:-1])
    far = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            is_near = fields[1].startswith("0100007F") or "0100007F:" in fields[1]
            if fields[3] == "0A" and fields[9] in inodes and not is_near:
                far.append(fields[1])
    return far
