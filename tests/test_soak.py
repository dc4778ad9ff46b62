"""A run under random `kill -9`, in short (`make soak` takes longer), and who its victims are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from victims import CONTROLLER, KINDS, find_victims

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_under_random_kills_ends_by_itself_and_nothing_is_lost(tmp_path):
    command = [sys.executable, SOAK, "--quick", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["problems"] == []
    assert len(found["kills"]) == 10
    assert len({kill["kind"] for kill in found["kills"]}) >= 2
    assert "Nothing was wrong" in (tmp_path / "soak.md").read_text()


def test_victims_are_the_runs_workers_and_servers_by_their_command_lines():
    worker = ["python", "-c", "program", "[]", "7", "100"]
    server = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "generator-0"]
    processes = {
        100: ["python", "-m", "npd", "run", "run.yaml"],
        101: [*worker, "generator-0", "runs/logs/generator-0.log"],
        102: [*worker, "scorer-1", "runs/logs/scorer-1.log"],
        103: [*worker, "trainer", "runs/logs/trainer.log"],
        104: [*worker, "trainer-1", "runs/logs/trainer-1.log"],
        105: ["python", "nanny.py", "9", *server],
        106: server,
        107: ["VLLM::EngineCore"],
        108: ["ray::Seat.answer"],
        109: ["tail", "-f", "notes.txt"],
    }
    found = {v.pid: v.kind for v in find_victims(100, processes, [CONTROLLER, *KINDS])}
    rank = "trainer rank"
    assert found == {
        100: "controller", 101: "generator", 102: "scorer", 103: rank, 104: rank,
        106: "server", 107: "server", 108: "ray actor",
    }  # fmt: skip
    assert find_victims(100, processes, ["server"])[0].pid == 106
    assert find_victims(1, processes, [CONTROLLER]) == []
