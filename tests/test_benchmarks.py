"""The benchmarks run and print a figure. What the figure is, `make bench` judges, not a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", ["pack", "controller", "scale"])
def test_a_quick_benchmark_prints_a_figure(name, tmp_path):
    found = tmp_path / "figures.json"
    command = [sys.executable, BENCHMARKS / f"bench_{name}.py", "--quick", "--json", found]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(found.read_text())["figures"]
    assert figures
    for figure in figures:
        assert figure["ours"][0] > 0
        assert figure["what"] in done.stdout
