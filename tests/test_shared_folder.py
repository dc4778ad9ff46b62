"""Whole runs whose workers exchange files by a URL, each with a copy of its own."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import yaml

import npd
from npd.control.preflight import prepare
from npd.control.run_directory import open_directory
from npd.doctor import examine
from npd.errors import ConfigError, RunError
from npd.remote.objects import ObjectStore
from npd.remote.shared_folder import MARK, HandshakeRuntime, check_shared, release_shared
from npd.runtime.inline import InlineRuntime
from npd.runtime.local import LocalRuntime
from npd.store.layout import RunLayout
from npd.workers import Factory
from store_faults import FAULTS, install
from test_run import QuietView, check_books
from tiny_run import tiny_config, tiny_settings, write_prompts


@pytest.fixture
def make(tmp_path, tiny_model_dir, tiny_teacher_dir):
    """Makes tiny configs in `tmp_path`, over the same data, sharing `tmp_path/store`."""
    prompts = write_prompts(tmp_path / "prompts.jsonl")

    def build(name="run", *, url=f"file://{tmp_path / 'store'}", runtime=(), **sections):
        runtime = {"shared": url, "scratch": str(tmp_path / "scratch")} | dict(runtime)
        if url is None:
            del runtime["scratch"]
        return tiny_config(
            tiny_model_dir, tiny_teacher_dir, prompts, tmp_path / name, runtime=runtime, **sections
        )

    return build


def student_bytes(layout: RunLayout) -> bytes:
    return (layout.student / "model.safetensors").read_bytes()


def exchanged(root: Path) -> set[str]:
    """What is left of the kinds of files that workers exchange."""
    names = ("rollouts/*", "scored/*", "snapshots/*", "checkpoints/*", "heldout.arrow")
    return {str(path.relative_to(root)) for name in names for path in root.glob(name)}


def test_the_student_is_that_of_a_run_in_one_folder_bit_for_bit(make, tmp_path):
    plain = npd.run(make("plain", url=None), view=QuietView())
    shared = npd.run(make("shared"), view=QuietView())
    layout = RunLayout(shared.directory)
    assert student_bytes(layout) == student_bytes(RunLayout(plain.directory))
    check_books(RunLayout(shared.directory), reuse=2)
    assert exchanged(layout.root) == set(), "the run directory is the controller's alone"
    there = exchanged(tmp_path / "store" / "tiny")
    assert {name for name in there if not name.endswith(".json")} == exchanged(plain.directory)
    assert not (tmp_path / "scratch").exists() or not any((tmp_path / "scratch").iterdir())
    assert shared.data.examples, "the report shows texts, brought for it"
    assert shared.data.examples == plain.data.examples


@pytest.mark.slow
def test_a_local_run_comes_to_its_end_with_a_store_that_is_slow_and_fails_now_and_then(
    make, tmp_path, monkeypatch
):
    packages = install(tmp_path / "packages")
    monkeypatch.syspath_prepend(packages)  # worker processes look where we do
    monkeypatch.setenv(FAULTS, json.dumps({"fail_every": 23, "cut_every": 17, "seconds": 0.002}))
    config = make(
        url=f"faulty://{tmp_path / 'store'}",
        runtime={"kind": "local"},
        schedule={"epochs": None, "steps": 12, "window": 20, "refresh": {"every_steps": 4}},
    )
    result = npd.run(config, view=QuietView())
    assert result.is_done
    check_books(RunLayout(result.directory), reuse=2)
    assert (result.student / "model.safetensors").exists()
    assert exchanged(result.directory) == set()
    assert not any((tmp_path / "scratch").iterdir())
    snapshots = sorted(path.name for path in (tmp_path / "store/tiny/snapshots").glob("v*"))
    assert snapshots == ["v000002"], "pruned there"


@pytest.mark.slow
def test_a_store_that_dies_stops_the_run_in_one_line_and_resume_goes_on(
    make, tmp_path, monkeypatch
):
    install(tmp_path / "packages")
    dead = tmp_path / "dead"
    monkeypatch.setenv(FAULTS, json.dumps({"dead": str(dead)}))
    config = make(url=f"faulty://{tmp_path / 'store'}")

    class Killer(QuietView):
        def update(self, state):
            super().update(state)
            if state.step >= 3:
                dead.touch()

    with pytest.raises(RunError, match=r"cannot \w+ faulty://.* \(ConnectionError: .*resume the"):
        npd.run(config, view=Killer())
    with pytest.raises(ConfigError, match="cannot be used"):
        npd.run(config, resume=True, view=QuietView())
    dead.unlink()
    assert npd.run(config, resume=True, view=QuietView()).is_done
    plain = npd.run(make("plain", url=None), view=QuietView())
    assert student_bytes(RunLayout(config.directory)) == student_bytes(RunLayout(plain.directory))


def test_a_place_is_one_run_s_and_a_run_keeps_its_place(make, tmp_path):
    config = make()
    npd.run(config, view=QuietView())
    with pytest.raises(ConfigError, match="/store/tiny holds a run already: resume it"):
        npd.run(make("other"), view=QuietView())
    assert not (tmp_path / "other").exists(), "nothing was started"
    shutil.rmtree(RunLayout(config.directory).student)  # so that it has not come to its end
    elsewhere = make(url=f"file://{tmp_path}/store2")
    with pytest.raises(ConfigError, match="store2/tiny holds nothing, not the shards of"):
        npd.run(elsewhere, resume=True, view=QuietView())
    with pytest.raises(ConfigError, match="started with its shards in a URL: resume with"):
        npd.run(make(url=None), resume=True, view=QuietView())
    npd.run(make("third", url=f"file://{tmp_path}/store3"), view=QuietView())
    with pytest.raises(ConfigError, match="store3/tiny holds another run"):
        npd.run(make(url=f"file://{tmp_path}/store3"), resume=True, view=QuietView())
    plain = make("plain", url=None)
    npd.run(plain, view=QuietView())
    shutil.rmtree(RunLayout(plain.directory).student)
    with pytest.raises(ConfigError, match="started with its shards in its directory"):
        npd.run(make("plain", url=f"file://{tmp_path}/s4"), resume=True, view=QuietView())


def test_a_place_that_only_one_process_knows_is_found_before_any_model_loads(make):
    config = make(url="memory://store", runtime={"kind": "local"})
    view = QuietView()
    with pytest.raises(ConfigError, match=r"worker \S+ on \S+ does not find the controller"):
        npd.run(config, view=view)
    doing = {worker.doing for state in view.states for worker in state.workers}
    assert "load" not in doing
    assert doing <= {"idle"}


def test_a_folder_that_is_not_shared_is_found_before_any_model_loads(make, tmp_path):
    """As on another machine: the worker's run directory is another one under the same name."""
    config = make(url=None)
    prepared = prepare(config)
    layout = open_directory(config, prepared, resume=False, origins={})
    other = tmp_path / "mounted"

    async def gather(factory_root: Path, kind: type) -> None:
        runtime = HandshakeRuntime(kind(layout.logs), config, layout)
        try:
            for role in ("generator", "trainer"):
                runtime.spawn(role, Factory(role, config, factory_root), threads=1)
            await runtime.handshake()
        finally:
            await runtime.close()

    for kind in (InlineRuntime, LocalRuntime):
        with pytest.raises(
            ConfigError,
            match=rf"worker generator on \S+ does not share the run directory {other} with the "
            "controller: mount one folder there on every machine, or set runtime.shared to a URL",
        ):
            asyncio.run(gather(other, kind))
        asyncio.run(gather(layout.root, kind))
        assert not (layout.root / "arrivals").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"shared": "/mnt/runs"}, "must be a URL like s3://bucket/folder"),
        ({"shared": "simplecache::s3://bucket"}, "must be a URL like s3://bucket/folder"),
        *(
            ({"shared": text}, "must be a URL like s3://bucket/folder")
            for text in ("", " ", "/", "runs", "://x", "s3://bucket/a b", " s3://bucket", "s3:/x")
        ),
        *(
            ({"shared": text}, "must name a bucket, or an absolute folder")
            for text in (
                *("file://", "file:///", "file:////", "file:///.", "file:///tmp/..", "local:///"),
                *("file://runs", "file://./runs", "s3://", "s3:///", "s3://bucket/*", "s3://."),
            )
        ),
        (
            {"shared": "ftp://me:word@host/x"},
            r"runtime.shared \('ftp://\*\*\*@host/x'\) contains a pass",
        ),
        ({"shared": None, "scratch": "/x"}, "runtime.scratch holds copies of files from"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(make, settings, told):
    with pytest.raises(ConfigError, match=told):
        make(runtime=settings)


def test_a_run_that_made_nothing_leaves_its_place_free(make, tmp_path):
    config, layout = make(), RunLayout(tmp_path / "run")
    remote = ObjectStore(config.shared_url)
    for name in ("snapshots/v000000/x", "heldout.arrow", "heldout.arrow.json", "theirs.txt"):
        remote.write(name, b"{}")
    remote.write(MARK, b'{"run": "ours"}')
    with pytest.raises(ConfigError, match="holds a run already"):
        check_shared(config, resume=False)
    for other in ("theirs", None):
        release_shared(config, layout, other)
        assert len(remote.names("")) == 5, "another run's place stays as it is"
    release_shared(config, layout, "ours")
    check_shared(config, resume=False)
    assert remote.names("") == ["theirs.txt"]


def test_servers_that_run_already_need_a_folder_they_see_too(make, tmp_path):
    served = {"engine": "vllm", "urls": ["http://host:8000"]}
    with pytest.raises(ConfigError, match=r"set runtime\.scratch to a folder"):
        make(runtime={"scratch": None}, generate=served)
    make(generate=served)


def test_the_doctor_tries_the_place(tmp_path, tiny_model_dir, tiny_teacher_dir):
    prompts = write_prompts(tmp_path / "prompts.jsonl")

    def check(url):
        runtime = {"kind": "inline", "shared": url}
        settings = tiny_settings(
            tiny_model_dir, tiny_teacher_dir, prompts, tmp_path / "run", runtime=runtime
        )
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        found = {c.what: c for c in examine(str(tmp_path / "run.yaml"))}["shared files"]
        return found.status, found.says

    status, says = check(f"file://{tmp_path}/store")
    assert status == "ok"
    assert "takes and gives back a small object" in says
    assert list((tmp_path / "store" / "tiny").iterdir()) == [], "nothing is left there"
    status, says = check("nope://bucket/runs")
    assert status == "FAIL"
    assert "Protocol not known" in says
