"""A run under random `kill -9`, in short (`make soak` takes longer), and who its victims are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leak_checks import LeakCheck
from soak import Soak, _judge
from victims import CONTROLLER, KINDS, find_victims

LIMIT = 1000.0
SOAK = Path(__file__).parents[1] / "soak.py"


@pytest.fixture
def start(tmp_path):
    """Starts `soak.py --quick`; ends it, and it its runs, if the test does not see its end."""
    started = []

    def begin(**environment):
        command = [sys.executable, SOAK, "--quick", "--out", tmp_path]
        with (tmp_path / "out.log").open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment}
            )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_under_random_kills_ends_by_itself_and_nothing_is_lost(start, tmp_path):
    assert start().wait(LIMIT) == 0, (tmp_path / "out.log").read_text()[-3000:]
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["problems"] == []
    assert len(found["kills"]) == 10
    assert len({kill["kind"] for kill in found["kills"]}) >= 2
    assert "Nothing was wrong" in (tmp_path / "soak.md").read_text()


@pytest.mark.slow
def test_a_soak_that_is_told_to_end_takes_its_runs_along(start, tmp_path):
    around = LeakCheck(tmp_path)
    # What torch compiled it keeps for good.
    process = start(**around.environment, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "torch"))
    while sum("npd" in line for line in around.processes().values()) < 3:
        assert process.poll() is None, (tmp_path / "out.log").read_text()[-3000:]
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert around.left(patience=0.0) == []


def test_undisturbed_runs_that_agree_by_chance_leave_room():
    near, far = Soak(), Soak()
    _judge(0.505, [0.5, 0.5, 0.5], near)
    _judge(0.6, [0.5, 0.5, 0.5], far)
    assert near.problems == []
    assert far.problems == ["held-out KL 0.6000, expected 0.4427 to 0.5573"]


def test_victims_are_the_runs_workers_and_servers_by_their_command_lines():
    worker = ["python", "-c", "program", "[]", "7", "100"]
    server = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "generator-0"]
    processes = {
        100: ["python", "-m", "npd", "run", "run.yaml"],
        101: [*worker, "generator-0", "runs/logs/generator-0.log"],
        102: [*worker, "scorer-1", "runs/logs/scorer-1.log"],
        103: [*worker, "trainer", "runs/logs/trainer.log"],
        104: [*worker, "trainer-1", "runs/logs/trainer-1.log"],
        105: ["python", "supervisor.py", "9", *server],
        106: server,
        107: ["VLLM::EngineCore"],
        109: ["tail", "-f", "notes.txt"],
    }
    found = {v.pid: v.kind for v in find_victims(100, processes, [CONTROLLER, *KINDS])}
    rank = "trainer rank"
    assert found == {
        100: "controller", 101: "generator", 102: "scorer", 103: rank, 104: rank,
        106: "server", 107: "server",
    }  # fmt: skip
    assert find_victims(100, processes, ["server"])[0].pid == 106
    assert find_victims(1, processes, [CONTROLLER]) == []
