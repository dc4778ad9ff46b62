"""Whole runs with a real vLLM server on CPU, and servers that npd starts: refreshes and faults."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

import npd
from npd.config import GenerateConfig
from npd.data.chat_tokenizer import ChatTokenizer
from npd.errors import RunError, WorkerLostError
from npd.generate.served import ServedGenerator, ServingContext
from npd.models import fingerprint
from npd.models.loading import load_model
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.shards import read_rollouts
from npd.types import Outcome, Rollout
from test_run import QuietView, check_books
from test_vllm_real import make_requests, shifted
from tiny_model import save_model
from tiny_run import tiny_config, write_prompts
from vllm_servers import (
    CONTEXT,
    Proxy,
    assert_gone,
    forgetful,
    kill_server,
    launch,
    own_logprobs,
    running_server,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# Nats a token that two engines differ by in float32, on average.
EXACT = 1e-3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny student and teacher with heads of 32 values, the fewest that vLLM has on a CPU."""
    folder = tmp_path_factory.mktemp("models")
    return tuple(save_model(folder / f"m{i}", seed=i, head_dim=32) for i in range(2))


@pytest.fixture(scope="module")
def moved(models):
    """The student as training might have moved it, embeddings still tied."""
    return shifted(models[0], models[0].with_name("moved"), seed=3)


@pytest.fixture(scope="module")
def server(vllm_venv, models, tmp_path_factory):
    """In float32: two engines differ by the order of sums alone."""
    folder = tmp_path_factory.mktemp("logs")
    with running_server(vllm_venv, models[0], folder, dtype="float32") as process:
        yield process


class KeepingView(QuietView):
    """Copies every snapshot as it is published, before the run may prune it."""

    def __init__(self, layout: RunLayout, into: Path) -> None:
        super().__init__()
        self.layout, self.into = layout, into
        self.when_published: Callable[[int], None] = lambda version: None

    def message(self, text):
        super().message(text)
        if text.startswith("snapshot v"):
            for snapshot in self.layout.snapshots.glob("v*"):
                if not (self.into / snapshot.name).exists():
                    shutil.copytree(snapshot, self.into / snapshot.name)
            self.when_published(int(text.removeprefix("snapshot v").split()[0].rstrip(":,")))


def make_run(models: tuple[Path, Path], folder: Path, **sections):
    """A run of the tiny student that a vLLM server writes for."""
    settings = {
        "generate": {
            "engine": "vllm", "dtype": "float32", "max_new_tokens": 16, "shard_size": 6,
        },
        "score": {"top_k": 8},
        "train": {"batch_size": 6},
        "schedule": {
            "epochs": 3, "reuse": 1, "refresh": {"at_epochs": [1, 2]}, "segment_steps": 2,
        },
        "eval": {"source": "none"},
        "checkpoint": {"every_steps": None},
    }  # fmt: skip
    for name, value in sections.items():
        settings[name] = {**settings.get(name, {}), **value}
    prompts = write_prompts(folder / "prompts.jsonl", count=28)
    return tiny_config(*models, prompts, folder / "run", **settings)


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
    models = {v: load_model(kept / f"v{v:06d}", packed=False) for v in by_version}
    for version, rollouts in by_version.items():
        off = {
            v: np.concatenate([r.logprobs - own_logprobs(m, r) for r in rollouts[:8]])
            for v, m in models.items()
        }
        sizes = {v: float(np.square(values).mean()) for v, values in off.items()}
        assert min(sizes, key=sizes.get) == version, f"version {version} wrote like {sizes}"
        assert np.abs(off[version]).mean() < EXACT
    return {version: len(rollouts) for version, rollouts in by_version.items()}


def with_secrets(launch: dict) -> dict:
    """A server's launch with a password in its environment and a token among its flags."""
    env = {**launch["env"], "CANARY_PASSWD": "canary-password"}
    return {**launch, "env": env, "args": [*launch["args"], "--hf-token", "canary-token"]}


def command_lines() -> bytes:
    """What anybody on this machine can read of the processes that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_bytes())
    return b"\n".join(found)


def generator_of(models, folder: Path, around: dict | None = None, **kwargs) -> ServedGenerator:
    config = GenerateConfig(engine="vllm", dtype="float32", max_new_tokens=350, **kwargs)
    chat = ChatTokenizer.load(models[0])
    context = ServingContext(folder / "server.log", CONTEXT, **(around or {}))
    # It ends no response of its own, so that each takes its time.
    return ServedGenerator(config, context, stop_ids=(), vocab_size=chat.vocab_size)


def check_written_by(snapshot: Path, rollouts: list[Rollout]) -> None:
    model = load_model(snapshot, packed=False)
    off = [np.abs(r.logprobs - own_logprobs(model, r)).mean() for r in rollouts]
    assert max(off) < EXACT


def test_our_server_is_started_anew_where_a_reload_forgets_and_is_lost_when_it_is_killed(
    vllm_venv, models, moved, tmp_path
):
    """And a snapshot that is not there is named, whatever becomes of the server."""
    notes: list[str] = []
    requests = make_requests(ChatTokenizer.load(models[0]), 16)
    is_doomed = False

    def newest() -> None:
        if is_doomed:
            kill_server(tmp_path)

    around = {"in_flight": "mix", "newest": newest, "notify": notes.append}
    with closing(generator_of(models, tmp_path, around, launch=forgetful(vllm_venv))) as generator:
        generator.load(models[0], 0)
        generator.load(moved, 1)
        assert sum("is restarted" in note for note in notes) == 1
        check_written_by(moved, generator.generate(requests))
        is_doomed = True
        with pytest.raises(WorkerLostError, match="signal 9"):
            generator.generate(requests)
    assert len(list(tmp_path.glob("server-*.log"))) == 2
    assert_gone(tmp_path)


def test_a_snapshot_that_is_not_there_is_named(server, models, moved, tmp_path):
    gone = shutil.copytree(moved, tmp_path / "gone")
    fingerprint.write(fingerprint.of_directory(gone), gone)
    (gone / "model.safetensors").unlink()
    with closing(generator_of(models, tmp_path, urls=(server.url,))) as generator:
        with pytest.raises(RunError, match=f"{server.url} could not load {gone}"):
            generator.load(gone, 0)
        generator.load(models[0], 1)


def test_a_whole_run_of_a_lora_student_whose_server_is_killed(vllm_venv, models, tmp_path):
    """npd starts the server with the base model; each snapshot reaches it as another adapter."""
    secret = with_secrets(launch(vllm_venv).model_dump())
    config = make_run(
        models,
        tmp_path,
        generate={"launch": secret},
        train={"lora": {}},
    )
    layout = RunLayout(config.directory)
    view = KeepingView(layout, tmp_path / "kept")
    lines = []

    def kill_once(version: int) -> None:
        """Before the first shard of the second snapshot."""
        if version == 1:
            lines.append(command_lines())
            kill_server(layout.logs)

    view.when_published = kill_once
    assert npd.run(config, view=view).is_done
    assert check_books(layout, reuse=1)[Outcome.FAILED] == 0
    with Ledger.reader(layout.ledger_db) as ledger:
        assert [row.version for row in ledger.snapshots()] == [0, 1, 2]
        lost = [payload for _, kind, payload in ledger.events() if kind == "ShardFailed"]
    assert len(lost) == 1, "the shard that the killed server held was retried, once"
    assert "signal 9" in lost[0]["error"]
    assert any("failed, retrying" in line for line in view.messages)
    assert sum("serves snapshot" in line for line in view.messages) >= 3
    assert set(check_who_wrote(layout, tmp_path / "kept")) == {0, 1, 2}
    for snapshot in (tmp_path / "kept").iterdir():
        assert {file.suffix for file in snapshot.iterdir()} == {".safetensors", ".json"}
    assert_gone(layout.logs)
    assert b"vllm" in lines[0], "the server was running"
    assert b"canary" not in lines[0]
    written = [path for path in layout.root.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not [str(path) for path in written if b"canary" in path.read_bytes()]
    assert not [line for line in view.messages if "canary" in line]


def test_in_phases_the_server_is_stopped_while_others_have_the_device(vllm_venv, models, tmp_path):
    config = make_run(
        models,
        tmp_path,
        generate={"launch": launch(vllm_venv).model_dump()},
        schedule={"epochs": 2, "refresh": {"at_epochs": [1]}},
        runtime={"share": "phases"},
    )
    layout = RunLayout(config.directory)
    view = KeepingView(layout, tmp_path / "kept")
    gone: list[int] = []

    def look(version: int) -> None:
        """While the trainer publishes."""
        if version == 1:
            assert_gone(layout.logs)
            gone.append(version)

    view.when_published = look
    assert npd.run(config, view=view).is_done
    assert gone == [1]
    assert check_books(layout, reuse=1)[Outcome.FAILED] == 0
    assert set(check_who_wrote(layout, tmp_path / "kept")) == {0, 1}
    assert len(list(layout.logs.glob("server-*.log"))) == 2
    assert_gone(layout.logs)


def test_a_run_whose_server_did_not_load_says_so_and_goes_on_with_another(server, models, tmp_path):
    """The run ends with one line that names the server; nothing stale was trained on."""
    with Proxy(server, passes=1) as proxy:
        generate = {"urls": [proxy.url]}
        config = make_run(models, tmp_path, generate=generate)
        with pytest.raises(RunError, match=f"{proxy.url} does not serve snapshot v1"):
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
    config = make_run(models, tmp_path, generate={"urls": [server.url]})
    assert npd.run(config, resume=True, view=QuietView()).is_done
    outcomes = check_books(layout, reuse=1)
    assert outcomes[Outcome.FAILED] == 0


def test_a_whole_run_refreshed_while_responses_are_written(server, models, tmp_path):
    """Stages overlap; every token's log-prob is that of the version it carries."""
    config = make_run(
        models,
        tmp_path,
        generate={"urls": [server.url], "max_new_tokens": 120, "shard_size": 4},
        score={"row_tokens": 512},
        train={"row_tokens": 512, "batch_size": 4},
        schedule={
            "epochs": None, "steps": 8, "window": 8, "reuse": 1, "max_lag": 2, "overlap": True,
            "refresh": {"every_steps": 2, "in_flight": "mix"}, "segment_steps": 2,
        },
    )  # fmt: skip
    layout = run_to_the_end(config, tmp_path / "kept")
    kept = tmp_path / "kept"
    written_by = {int(p.name[1:]): load_model(p, packed=False) for p in kept.iterdir()}
    written = [r for p in layout.rollouts(0).parent.glob("*.arrow") for r in read_rollouts(p)]
    assert {version for r in written for version in _versions(r).tolist()} >= {0, 1}
    off = defaultdict(list)
    for rollout in written:
        for version in set(_versions(rollout).tolist()):
            apart = np.abs(rollout.logprobs - own_logprobs(written_by[version], rollout))
            off[version].extend(apart[_versions(rollout) == version])
    assert all(np.mean(apart) < EXACT for apart in off.values())


def _versions(rollout: Rollout) -> np.ndarray:
    if rollout.versions is not None:
        return rollout.versions
    return np.full(len(rollout.response_ids), rollout.version)
