"""Whole runs with a real vLLM server on CPU and the real 135M model: refreshes and faults."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import npd
from npd.errors import RunError
from npd.modeling import load_model
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.shards import read_rollouts
from npd.types import Outcome, Rollout
from test_run import QuietView, check_books
from test_vllm_real import (
    MANY,
    NOISE,
    Proxy,
    assert_gone,
    launch,
    own_logprobs,
    server,  # noqa: F401
    server_process,
)
from tiny_run import tiny_config, write_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class KeepingView(QuietView):
    """Copies every snapshot as it is published, before the run may prune it."""

    def __init__(self, layout: RunLayout, into: Path) -> None:
        super().__init__()
        self.layout, self.into = layout, into

    def message(self, text):
        super().message(text)
        if text.startswith("snapshot v"):
            for snapshot in self.layout.snapshots.glob("v*"):
                if not (self.into / snapshot.name).exists():
                    shutil.copytree(snapshot, self.into / snapshot.name)


def make_run(venv: Path, smol_dir: Path, folder: Path, **sections):
    prompts = write_prompts(folder / "prompts.jsonl", count=28)
    settings = {
        "generate": {
            "engine": "vllm",
            "launch": launch(venv).model_dump(),
            "dtype": "bfloat16",
            "max_new_tokens": 16,
            "shard_size": 6,
        },
        "score": {"dtype": "bfloat16", "top_k": 8},
        # Large steps, so that two snapshots differ by more than rounding.
        "train": {"batch_size": 6, "lr": 1e-4, "min_lr": 5e-5, "dtype": "bfloat16"},
        "schedule": {
            "epochs": 3, "reuse": 1, "refresh": {"at_epochs": [1, 2]}, "segment_steps": 2,
        },
        "eval": {"source": "none"},
        "checkpoint": {"every_steps": None},
    }  # fmt: skip
    for name, value in sections.items():
        settings[name] = {**settings.get(name, {}), **value}
    return tiny_config(smol_dir, smol_dir, prompts, folder / "run", **settings)


def run_to_the_end(config, kept: Path) -> RunLayout:
    """A run without a failed sample; every snapshot of it is in `kept` afterwards."""
    layout = RunLayout(config.directory)
    assert npd.run(config, view=KeepingView(layout, kept)).is_done
    assert check_books(layout, reuse=1)[Outcome.FAILED] == 0
    return layout


def check_who_wrote(layout: RunLayout, kept: Path) -> dict[int, int]:
    """Each rollout's log-probs are those of the snapshot it names; rollouts by version."""
    by_version = defaultdict(list)
    for path in sorted(layout.rollouts(0).parent.glob("*.arrow")):
        for rollout in read_rollouts(path):
            by_version[rollout.version].append(rollout)
    models = {v: load_model(kept / f"v{v:06d}", dtype="bfloat16", packed=False) for v in by_version}
    for version, rollouts in by_version.items():
        off = {
            v: np.concatenate([r.logprobs - own_logprobs(m, r) for r in rollouts[:8]])
            for v, m in models.items()
        }
        sizes = {v: float(np.square(values).mean()) for v, values in off.items()}
        assert min(sizes, key=sizes.get) == version, f"version {version} wrote like {sizes}"
        assert np.abs(off[version]).mean() < NOISE
    return {version: len(rollouts) for version, rollouts in by_version.items()}


def test_a_whole_run_with_two_refreshes_and_a_server_killed_by_the_way(
    vllm_venv, smol_dir, tmp_path
):
    config = make_run(vllm_venv, smol_dir, tmp_path)
    layout = RunLayout(config.directory)
    view = KeepingView(layout, tmp_path / "kept")
    killed = threading.Event()

    def kill_once() -> None:
        """When the first shard of the second snapshot's is being written."""
        while not killed.is_set():
            if any("snapshot v1" in line for line in view.messages):
                os.kill(server_process(layout.logs), signal.SIGKILL)
                killed.set()
            time.sleep(0.2)

    killer = threading.Thread(target=kill_once)
    killer.start()
    try:
        result = npd.run(config, view=view)
    finally:
        killed.set()
        killer.join()
    assert result.is_done
    outcomes = check_books(layout, reuse=1)
    assert outcomes[Outcome.FAILED] == 0
    with Ledger.reader(layout.ledger_db) as ledger:
        assert [row.version for row in ledger.snapshots()] == [0, 1, 2]
        lost = [payload for _, kind, payload in ledger.events() if kind == "ShardFailed"]
    assert len(lost) == 1, "the shard that the killed server held was asked again, once"
    assert "signal 9" in lost[0]["error"]
    assert any("asked again" in line for line in view.messages)
    assert sum("holds snapshot" in line for line in view.messages) >= 3
    assert set(check_who_wrote(layout, tmp_path / "kept")) == {0, 1, 2}
    assert_gone(layout.logs)


def test_a_run_whose_server_did_not_load_says_so_and_goes_on_with_another(
    server,  # noqa: F811
    smol_dir,
    tmp_path,
):
    """The run ends with one line that names the server; nothing stale was trained on."""
    with Proxy(server, swallows=1) as proxy:
        generate = {"urls": [proxy.url], "launch": None}
        config = make_run(Path(), smol_dir, tmp_path, generate=generate)
        with pytest.raises(RunError, match=f"{proxy.url} does not hold snapshot v1"):
            npd.run(config, view=QuietView())
    layout = RunLayout(config.directory)
    with Ledger.reader(layout.ledger_db) as ledger:
        assert ledger.conservation().holds
    versions = {
        rollout.version
        for path in layout.rollouts(0).parent.glob("*.arrow")
        for rollout in read_rollouts(path)
    }
    assert versions == {0}, "nothing is kept of a server that was not proven"
    config = make_run(Path(), smol_dir, tmp_path, generate={"urls": [server.url], "launch": None})
    assert npd.run(config, resume=True, view=QuietView()).is_done
    outcomes = check_books(layout, reuse=1)
    assert outcomes[Outcome.FAILED] == 0


@pytest.mark.parametrize("in_flight", ["mix", "abort"])
def test_a_whole_run_refreshed_while_responses_are_written(
    in_flight,
    server,  # noqa: F811
    smol_dir,
    tmp_path,
):
    """Stages overlap; every token's log-prob is that of the version it carries."""
    config = make_run(
        Path(),
        smol_dir,
        tmp_path,
        generate={"urls": [server.url], "launch": None, "max_new_tokens": 120, "shard_size": 4},
        score={"row_tokens": 512},
        train={"row_tokens": 512, "batch_size": 4, "lr": 2e-4, "min_lr": 1e-4},
        schedule={
            "epochs": None, "steps": 8, "window": 8, "reuse": 1, "max_lag": 2, "overlap": True,
            "refresh": {"every_steps": 2, "in_flight": in_flight}, "segment_steps": 2,
        },
    )  # fmt: skip
    layout = run_to_the_end(config, tmp_path / "kept")
    kept = tmp_path / "kept"
    models = {
        int(p.name[1:]): load_model(p, dtype="bfloat16", packed=False) for p in kept.iterdir()
    }
    written = [r for p in layout.rollouts(0).parent.glob("*.arrow") for r in read_rollouts(p)]
    assert {version for r in written for version in _versions(r).tolist()} >= {0, 1}
    off = defaultdict(list)
    for rollout in written:
        assert in_flight == "mix" or rollout.versions is None
        for version in set(_versions(rollout).tolist()):
            apart = np.abs(rollout.logprobs - own_logprobs(models[version], rollout))
            off[version].extend(apart[_versions(rollout) == version])
    assert all(np.mean(apart) < NOISE for apart in off.values() if len(apart) > MANY)
    assert any(len(apart) > MANY for apart in off.values())


def _versions(rollout: Rollout) -> np.ndarray:
    if rollout.versions is not None:
        return rollout.versions
    return np.full(len(rollout.response_ids), rollout.version)


def test_a_whole_run_of_a_lora_student_sends_adapters_alone(vllm_venv, smol_dir, tmp_path):
    """npd starts the server with the base model; each snapshot reaches it as another adapter."""
    config = make_run(
        vllm_venv,
        smol_dir,
        tmp_path,
        train={"batch_size": 6, "lr": 2e-3, "min_lr": 1e-3, "dtype": "bfloat16", "lora": {}},
        schedule={
            "epochs": 2, "reuse": 1, "refresh": {"at_epochs": [1]}, "segment_steps": 2,
        },
    )  # fmt: skip
    layout = run_to_the_end(config, tmp_path / "kept")
    for snapshot in (tmp_path / "kept").iterdir():
        assert {file.suffix for file in snapshot.iterdir()} == {".safetensors", ".json"}
        assert sum(file.stat().st_size for file in snapshot.iterdir()) < 32 * 2**20
    assert set(check_who_wrote(layout, tmp_path / "kept")) == {0, 1}
    assert_gone(layout.logs)
