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
from npd.config import RayConfig
from npd.control.preflight import Preflight, Start
from npd.errors import ConfigError
from npd.runtime.ray_cluster import cluster_address
from npd.store.layout import RunLayout
from run_process import WINDOWED, check_all_steps, is_alive
from test_run import QuietView, check_same_run
from tiny_run import tiny_config, write_prompts

pytestmark = pytest.mark.timeout(3600)
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
def test_killed_actors_are_replaced_and_a_killed_controller_takes_them_along(make_run, on_ray):
    """Then the run resumes. Nothing is lost by either."""
    run = make_run(runtime=on_ray, schedule=WINDOWED, train={**TRAIN, "ranks": 2})
    process = run.start()
    victims = ("generator-0", "scorer-0", "trainer-0", "trainer-1")
    killed = []
    for victim, events in zip(victims, (6, 12, 18, 26), strict=True):
        assert run.wait_for(events, process), run.log.read_text()[-2000:]
        if (pid := seats(run.layout.root).get(victim)) is not None:
            os.kill(pid, signal.SIGKILL)
            killed.append(victim)
    assert len(killed) >= 3
    assert run.wait_for(32, process), run.log.read_text()[-2000:]
    pids = seats(run.layout.root)
    assert pids
    process.kill()
    process.wait()
    _wait_until_gone(pids.values())
    run.finish()
    check_all_steps(run)
    text = run.log.read_text()
    assert "Traceback" not in text
    assert "(raylet)" not in text, "Ray's own words in between the run's"


def test_no_cluster_at_the_address_is_one_line(tmp_path, tiny_model_dir, tiny_teacher_dir):
    ray = {"kind": "ray", "ray": {"address": "127.0.0.1:1"}}
    config = _config(tmp_path, tiny_model_dir, tiny_teacher_dir, ray)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    # In a process of its own: Ray reads its token from the environment once, as it is imported.
    command = [sys.executable, "-m", "npd", "run", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == ConfigError.exit_code
    assert "no Ray cluster at runtime.ray.address '127.0.0.1:1'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cluster_named_nowhere_is_refused_before_anything_is_made(
    tmp_path, tiny_model_dir, tiny_teacher_dir, monkeypatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = _config(tmp_path, tiny_model_dir, tiny_teacher_dir, {"kind": "ray"})
    with pytest.raises(ConfigError, match=r"ray start --head.*runtime\.kind: local") as caught:
        npd.run(config, view=QuietView())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    checks = Preflight(config, start=Start()).checks()
    (check,) = (check for check in checks if check.what == "cluster")
    assert (check.status, check.says) == ("FAIL", str(caught.value))


@pytest.mark.parametrize(
    ("given", "variable", "name"),
    [
        ("auto", None, "runtime.ray.address 'auto'"),
        ("h:1", "h:2", "runtime.ray.address 'h:1'"),
        (None, "h:2", "RAY_ADDRESS 'h:2'"),
    ],
)
def test_the_setting_names_the_cluster_or_else_the_environment(monkeypatch, given, variable, name):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert cluster_address(RayConfig(address=given)) == name


@pytest.mark.parametrize("address", ["local", "ray://head:10001", ""])
def test_an_address_in_the_environment_must_be_a_clusters(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=r"runtime\.kind: local"):
        cluster_address(RayConfig())


def _config(folder, student, teacher, runtime):
    prompts = write_prompts(folder / "prompts.jsonl")
    return tiny_config(student, teacher, prompts, folder / "run", runtime=runtime)


def _wait_until_gone(pids) -> None:
    deadline = time.monotonic() + 600
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive
