"""`gpu_measure.py` writes a line for each measurement, and one for what it has no time for."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_measure
import gpu_meter
import gpu_sections

SCRIPT = Path(__file__).parents[1] / "gpu_measure.py"


def run(*words):
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What is measured in a minute and a half, by section."""
    out = tmp_path_factory.mktemp("measured")
    done = run(
        *("--quick", "--device", "cpu", "--only", "train", "loss", "decode"),
        *("--minutes", "1.5", "--out", out),
    )
    assert done.returncode == 0, done.stderr
    written = (out / "measured.jsonl").read_text()
    assert done.stdout == written
    found = {}
    for line in map(json.loads, written.splitlines()):
        found.setdefault(line.pop("section"), []).append(line)
    return found


def test_a_section_writes_finite_figures(lines):
    assert [line["chunk"] for line in lines["loss"]] == [1024, 2048, 4096, 8192, 1024, 4096]
    assert all(math.isfinite(line["ms"]) and line["ms"] > 0 for line in lines["loss"])
    (decoded,) = lines["decode"]
    assert decoded["divisor"] == 1
    assert math.isfinite(decoded["tok_s"])


def test_a_section_out_of_time_is_skipped_with_a_line(lines):
    (skipped,) = lines["train"]
    assert 0 < skipped["skipped"] <= 90


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_line():
    done = run()
    assert done.returncode == 1
    assert done.stderr.startswith("no GPU that torch can use here")
    assert len(done.stderr.splitlines()) == 1


def test_npd_s_kernels_are_a_family():
    names = ("npd.train.triton_passes", "npd.models.kernels.row_stats")
    kernels = [pytest.importorskip(name) for name in names]
    for name in gpu_meter.FAMILIES["npd"]:
        assert any(hasattr(module, name) for module in kernels)
        assert gpu_meter.family_of(name) == "npd"
    assert gpu_meter.family_of("Memcpy HtoD (Pinned -> Device)") == "copy"
    assert gpu_meter.family_of("unheard_of") == "other"


def test_kernels_are_summed_by_family():
    found = gpu_meter.summary({"nvjet_a": 1.0, "nvjet_b": 2.0, "_write_grads": 4.0})
    assert found["gpu_ms"] == 7.0
    assert found["family_ms"] == {"npd": 4.0, "gemm": 3.0}
    assert found["top"][0] == ("_write_grads", 4.0)


def test_each_section_is_a_function():
    assert all(callable(getattr(gpu_sections, name)) for name in gpu_measure.SECTIONS)
