"""Several teachers on servers of their own: who is asked what, what a config must say, doctor."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import threading
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

import npd
from cli_fixture import Shell
from fake_servers import FakeVllm, make_snapshot, read_lm
from fakes import make_rollouts
from npd.config import RunConfig
from npd.config.load import load_config
from npd.control.devices.memory import other_bytes
from npd.control.devices.placement import share_of_servers
from npd.control.model_checks import models_read_here
from npd.control.preflight import prepare
from npd.control.run_directory import open_directory
from npd.control.run_record import load_run
from npd.data.chat_tokenizer import ChatTokenizer
from npd.data.inputs import RunInputs
from npd.errors import ConfigError
from npd.models import fingerprint
from npd.models.metadata import model_settings, size_of
from npd.observe.trace import read_trace
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.shards import read_rollouts, read_scored, write_rollouts
from npd.types import SampleRequest
from npd.workers import Factory, GenerateTask, ScoreTask
from process_tree import children
from teacher_fixtures import QuietView, name_teachers, teaching_settings
from tiny_model import make_tokenizer, save_model


@pytest.fixture(scope="module")
def code_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("code"), seed=7, layers=1)


class Classroom:
    """Two fake servers, `math` and `code`, with model directories that they show to hold."""

    def __init__(self, folder, student, teachers):
        self.folder, self.student = folder, student
        self.lms, self.models, self.servers = {}, {}, {}
        for seed, (name, path) in enumerate(teachers.items(), 1):
            weights = make_snapshot(
                folder / f"{name}-weights", seed, vocab=model_settings(path).vocabulary
            )
            self.models[name] = shutil.copytree(path, folder / name)
            shutil.copy(weights / fingerprint.FILE, self.models[name] / fingerprint.FILE)
            self.lms[name], self.servers[name] = read_lm(weights), FakeVllm(weights)

    def config(self, *, urls=None, **sections):
        prompts = name_teachers(self.folder / "prompts.jsonl", "math", "code")
        urls = urls or {name: [server.url] for name, server in self.servers.items()}
        teachers = {n: {"model": str(m), "urls": urls[n]} for n, m in self.models.items()}
        settings = teaching_settings(
            self.student, teachers, prompts, self.folder / "run", **sections
        )
        return RunConfig.model_validate(settings)

    def asked(self, name):
        """The prompts that its server had to read or write on."""
        return [body["prompt"] for body in self.servers[name].sent("/v1/completions")]


@pytest.fixture
def classroom(tmp_path, tiny_model_dir, tiny_teacher_dir, code_dir):
    with ExitStack() as stack:
        room = Classroom(tmp_path, tiny_model_dir, {"math": tiny_teacher_dir, "code": code_dir})
        for server in room.servers.values():
            stack.enter_context(server)
        yield room


ENGINE = [sys.executable, str(Path(__file__).parent / "fake_engine.py")]
SIZES = ("batch_size", "shard_size")
SCORED = {"score": {"engine": "vllm", "top_k": 8}, "filter": {"name": "none"}}


def test_each_teachers_servers_read_and_write_for_its_own_prompts(classroom):
    config, view = classroom.config(**SCORED), QuietView()
    result = npd.run(config, view=view)
    layout, prepared = RunLayout(result.directory), prepare(config)
    assert result.is_done
    files = [*layout.scored(0).parent.glob("*.arrow"), layout.heldout]
    records = [record for path in files for record in read_scored(path)]
    for record in records:
        rollout = record.rollout
        expected = classroom.lms[rollout.teacher].token_logprobs(
            rollout.prompt_ids, rollout.response_ids
        )
        np.testing.assert_allclose(record.teacher_logprobs, expected, atol=1e-4)
    of_all = {p.index: p for p in (*prepared.prompts, *prepared.heldout)}
    assert all(r.rollout.teacher == of_all[r.rollout.prompt_index].teacher for r in records)
    for name, other in (("math", "code"), ("code", "math")):
        foreign = [p.prompt_ids.tolist() for p in of_all.values() if p.teacher == other]
        own = [p.prompt_ids.tolist() for p in of_all.values() if p.teacher == name]
        asked = classroom.asked(name)
        assert all(any(ids[: len(p)] == p for ids in asked) for p in own)
        assert not [ids for ids in asked if any(ids[: len(p)] == p for p in foreign)]
        told = f"scorer-0: {classroom.servers[name].url} serves {classroom.models[name]}"
        assert sum(message.startswith(told) for message in view.messages) == 1


def test_servers_get_large_shards_by_default_and_the_record_says_how_large(classroom):
    """32 of 40 samples would be one shard and a rest; a run of this size still pipelines."""
    sections = {
        "generate": {"source": "teacher", "engine": "vllm", **dict.fromkeys(SIZES, "auto")},
        "schedule": {"refresh": "never", "overlap": True}, "loss": {"kd_weight": 0.0},
        "filter": {"name": "none"}, "eval": {"source": "none"},
        "data": {"train": str(classroom.folder / "prompts.jsonl"), "heldout_size": 0},
    }  # fmt: skip
    result = npd.run(classroom.config(**sections), view=QuietView())
    layout = RunLayout(result.directory)
    recorded = load_run(layout).generate
    assert (recorded.batch_size, recorded.shard_size) == (256, 12)
    written = [len(read_rollouts(p)) for p in sorted(layout.rollouts(0).parent.glob("*.arrow"))]
    assert set(written) == {12}
    assert result.data.conservation["trained_out"] == sum(written)


def test_two_shards_of_a_killed_generator_are_both_written_again(classroom):
    """Processes: one generator, and two shards at once on two servers."""
    sections = {
        "generate": {"source": "teacher", "engine": "vllm", "shard_size": 12, "batch_size": 2},
        "schedule": {"refresh": "never", "overlap": True, "reuse": 1, "epochs": 1},
        "loss": {"kd_weight": 0.0}, "filter": {"name": "none"}, "eval": {"source": "none"},
        "data": {"train": str(classroom.folder / "prompts.jsonl"), "heldout_size": 0},
        "runtime": {"kind": "local", "device": "cpu", "threads": 1},
    }  # fmt: skip
    config = classroom.config(**sections)
    for server in classroom.servers.values():
        server.faults.token_seconds = 0.02

    def kill() -> None:
        for server in classroom.servers.values():
            server.engine.await_tokens(10)
        (pid,) = (
            pid
            for pid in children(os.getpid())
            if b"generator-0" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        )
        os.kill(int(pid), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    result = npd.run(config, view=QuietView())
    killer.join()
    layout = RunLayout(result.directory)
    with Ledger.reader(layout.ledger_db) as ledger:
        events = list(ledger.events())
    lost = [payload["shard"] for _, kind, payload in events if kind == "ShardFailed"]
    assert lost == [0, 1], "once each"
    assert result.data.conservation["trained_out"] == result.data.conservation["asked"] == 24
    spans = [s for s in read_trace(layout.trace_jsonl) if s.name == "generate"]
    assert sorted(s.args["shard"] for s in spans) == [0, 1]
    assert all(one.end <= other.start for one, other in pairwise(spans))


def test_what_one_teachers_server_refuses_leaves_alone(classroom):
    config = classroom.config(**SCORED)
    prompt = next(p for p in prepare(config).prompts if p.teacher == "code")
    refused = prompt.prompt_ids.tolist()
    classroom.servers["code"].faults.refuses = lambda ids: ids[: len(refused)] == refused
    result = npd.run(config, view=QuietView())
    assert result.data.conservation["failed"] == 2
    assert result.data.conservation["trained_out"] == 38


def test_teachers_on_servers_write_too(classroom):
    sections = {
        "generate": {"source": "teacher", "engine": "vllm"}, "schedule": {"refresh": "never"},
        "loss": {"kd_weight": 0.0}, "filter": {"name": "none"}, "eval": {"source": "none"},
    }  # fmt: skip
    config = classroom.config(**sections)
    (layout := RunLayout(config.directory)).create()
    requests = tuple(
        SampleRequest(10 + i, 100 + i, p) for i, p in enumerate(prepare(config).prompts[:6])
    )
    with closing(Factory("generator", config, layout.root)()) as worker:
        stats = worker.generate(GenerateTask(0, 0, requests)).stats
    assert [s.sample_id for s in stats] == [ask.sample_id for ask in requests]
    assert [r.teacher for r in read_rollouts(layout.rollouts(0))] == ["math", "code"] * 3
    for name in ("math", "code"):
        own = [ask.prompt.prompt_ids.tolist() for ask in requests if ask.prompt.teacher == name]
        assert sorted(classroom.asked(name)[-3:]) == sorted(own)


def test_a_scorer_starts_a_server_for_each_teacher_it_is_asked_of(classroom):
    launch = {"command": ENGINE, "start_timeout": 60.0}
    sections = classroom.config(**SCORED).model_dump(mode="json")
    for name, teacher in sections["teachers"].items():
        weights = classroom.folder / f"{name}-weights"
        teacher |= {"model": str(weights), "urls": [], "launch": launch}
    config = RunConfig.model_validate(sections)
    (layout := RunLayout(config.directory)).create()
    rollouts = make_rollouts(4, vocab_size=30)
    named = [
        replace(r, teacher=name) for r, name in zip(rollouts, ("math", "code") * 2, strict=True)
    ]
    write_rollouts(layout.rollouts(0), named)
    ids = tuple(r.sample_id for r in named)
    with closing(Factory("scorer", config, layout.root)()) as worker:
        worker.score(ScoreTask(0, 0, ids[:1]))
        assert logs_of(layout) == {"math"}, "not before somebody is asked for"
        worker.score(ScoreTask(0, 0, ids))
    assert logs_of(layout) == {"math", "code"}
    for record in read_scored(layout.scored(0)):
        rollout = record.rollout
        lm = classroom.lms[rollout.teacher]
        expected = lm.token_logprobs(rollout.prompt_ids, rollout.response_ids)
        np.testing.assert_allclose(record.teacher_logprobs, expected, atol=1e-4)


def logs_of(layout):
    """Teachers that a server of ours has a log of."""
    return {path.stem.split("-")[3] for path in layout.logs.glob("server-vllm-teacher-*.log")}


def test_weights_on_servers_need_not_be_here(classroom):
    assert models_read_here(classroom.config(**SCORED)) == [("student", str(classroom.student))]
    for model in classroom.models.values():
        (Path(model) / "model.safetensors").unlink()
    assert prepare(classroom.config(**SCORED)).prompts


def test_where_a_teacher_is_served_may_change_on_resume(classroom):
    urls = {"math": ["http://a:1"], "code": ["http://b:1"]}
    config = classroom.config(**SCORED)
    open_directory(config, RunInputs([], [], {}), resume=False, origins={})
    moved = classroom.config(urls=urls, **SCORED)
    open_directory(moved, RunInputs([], [], {}), resume=True, origins={})


def test_each_worker_has_servers_and_gpus_of_its_own_for_each_teacher(classroom):
    urls = {
        "math": ["http://a:1", "http://a:2", "http://a:3"],
        "code": ["http://b:1", "http://b:2"],
    }
    config = classroom.config(urls=urls, score={"engine": "vllm", "workers": 2})
    shares = [share_of_servers(config, "scorer", i) for i in range(2)]
    assert [share.teachers["math"].urls for share in shares] == [
        ("http://a:1", "http://a:3"), ("http://a:2",),
    ]  # fmt: skip
    assert [share.score_of("code").urls for share in shares] == [("http://b:1",), ("http://b:2",)]
    launch = {"venv": "x", "gpus": ("0", "1,2")}
    teachers = {"math": {"model": "m", "launch": launch}}
    config = load_config("npd", ["student=s", f"teachers={json.dumps(teachers)}",
                                 "score.engine=vllm", "score.workers=2"]).config  # fmt: skip
    shares = [share_of_servers(config, "scorer", i) for i in range(2)]
    assert [share.score_of("math").launch.gpus for share in shares] == [("0",), ("1,2",)]
    assert share_of_servers(config, "trainer", 0) is config


def test_secrets_of_a_teachers_server_stay_out_of_the_record(classroom):
    launch = {"command": ["serve"], "env": {"HF_TOKEN": "hush"}}
    config = classroom.config(**SCORED)
    teacher = config.teachers["math"].model_copy(
        update={"urls": (), "launch": npd.config.LaunchConfig(**launch)}
    )
    config = config.model_copy(update={"teachers": {"math": teacher}})
    layout = open_directory(config, RunInputs([], [], {}), resume=False, origins={})
    assert "hush" not in layout.config_json.read_text()
    assert load_run(layout).teachers["math"].launch.env == {"HF_TOKEN": "***"}


# What a config must say of servers.

URL, LAUNCH = "urls: [http://a:1]", "launch: {venv: x}"
SERVED = ["score.engine=vllm"]
WRITES = [
    "generate.source=teacher", "generate.engine=vllm", "schedule.refresh=never",
    "filter.name=none", "loss.kd_weight=0", "eval.source=none",
]  # fmt: skip


@pytest.mark.parametrize(
    ("math", "sets", "says"),
    [
        (URL, [], "teachers.math.urls and teachers.math.launch are for servers, but score.engine"),
        ("", SERVED, "teachers.math needs a server (score.engine): set exactly one"),
        (f"{URL}, {LAUNCH}", SERVED, "set exactly one of teachers.math.urls"),
        (URL, [*SERVED, "score.workers=2"],
         "score.workers (2) is more than the servers of teachers.math.urls (1)"),
        ("urls: [a:1]", SERVED, "teachers.math.urls must be URLs like"),
        ("urls: [http://a:1, http://a:1]", SERVED, "lists a server twice"),
        ("launch: {venv: x, gpus: ['0']}", [*SERVED, "score.workers=2"],
         "teachers.math.launch.gpus has entries for 1 servers, but score.workers is 2"),
        ("launch: {venv: x, command: [y]}", SERVED, "takes only one of venv and command"),
        ("launch: {venv: x, args: [--port, '1']}", SERVED, "teachers.math.launch.args sets --port"),
        (URL, [*SERVED, "score.urls=[http://b:1]"],
         "score.urls and score.launch are for `teacher`, which is not set"),
        (URL, [*SERVED, "generate.engine=vllm", "generate.urls=[http://a:1]"],
         "http://a:1 is in teachers.math.urls and in generate.urls: a server holds one model"),
        ("launch: {venv: x, start_timeout: 3600}", SERVED,
         "must be more than the teachers' launch.start_timeout together (3600 s)"),
        (URL, [*SERVED, "score.request_timeout=3600"],
         "must be more than score.request_timeout (3600 s)"),
        ("", WRITES, "teachers.math needs a server (generate.engine)"),
        (LAUNCH, [*WRITES, *SERVED], "would start its servers twice, for score and for generate"),
        (URL, [*WRITES, "generate.urls=[http://b:1]"],
         "generate.urls and generate.launch are for `teacher`"),
    ],
)  # fmt: skip
def test_what_the_servers_of_teachers_cannot_be(math, sets, says):
    sets = ["student=s", f"teachers={{math: {{model: m, {math}}}}}", *sets]
    with pytest.raises(ConfigError) as caught:
        load_config("npd", sets)
    assert says in str(caught.value)


def test_two_teachers_cannot_be_on_one_server():
    both = "{math: {model: m, urls: [http://a:1]}, code: {model: c, urls: [http://a:1]}}"
    with pytest.raises(ConfigError, match=r"in teachers\.math\.urls and in teachers\.code\.urls"):
        load_config("npd", ["student=s", f"teachers={both}", *SERVED])


def test_a_default_teacher_and_named_ones_have_servers_of_their_own():
    sets = ["student=s", "teacher=t", f"teachers={{math: {{model: m, {URL}}}}}", *SERVED]
    with pytest.raises(ConfigError, match=r"needs a server: set exactly one of score\.urls"):
        load_config("npd", sets)
    config = load_config("npd", [*sets, "score.urls=[http://b:1]"]).config
    assert config.score_of("default").urls == ("http://b:1",)
    assert config.score_of("math").urls == ("http://a:1",)
    assert config.score_of("math").top_k == config.score.top_k


# npd doctor, and the stages alone.


@pytest.fixture
def shell(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys)


def write(shell, teachers, *names, **sections):
    prompts = name_teachers(shell.folder / "prompts.jsonl", *names)
    settings = teaching_settings(
        shell.student, teachers, Path(prompts.name), Path("run"), **sections
    )
    (shell.folder / "run.yaml").write_text(yaml.safe_dump(settings))


def examined(shell):
    done = shell.npd("doctor", "run.yaml", "--json")
    assert done.err == ""
    return done.code, [tuple(check.values()) for check in json.loads(done.out)["checks"]]


def test_doctor_looks_at_every_teacher(shell, code_dir):
    write(shell, {"math": shell.teacher, "code": code_dir, "idle": code_dir}, "math", "code")
    code, checks = examined(shell)
    assert code == 0
    assert {what for _, what, _ in checks} >= {"teachers.math", "teachers.code", "teachers.idle"}
    shared = [says for _, what, says in checks if what.startswith("vocabulary: ")]
    assert sorted(says.split(" and student share")[0] for says in shared) == [
        "teachers.code", "teachers.idle", "teachers.math",
    ]  # fmt: skip
    (warned,) = [says for status, what, says in checks if (status, what) == ("warn", "data")]
    assert warned.startswith("teachers.idle: no prompt names it, so it is not loaded: take it out")
    config = load_config("run.yaml").config
    teachers = size_of(str(shell.teacher)).parameters + 2 * size_of(str(code_dir)).parameters
    expected = 4 * (2 * size_of(str(shell.student)).parameters + teachers)
    assert other_bytes(config, size_of(str(shell.student))) == expected


def test_doctor_fails_on_a_teacher_of_another_vocabulary_and_on_unknown_names(shell, code_dir):
    other = save_model(shell.folder / "other", seed=1)
    make_tokenizer(["quite other words make quite other merges"] * 20).save_pretrained(other)
    write(shell, {"math": shell.teacher, "code": other}, "math", "code")
    code, checks = examined(shell)
    assert code == 2
    (failed,) = [says for status, _, says in checks if status == "FAIL"]
    assert str(other) in failed
    write(shell, {"math": shell.teacher, "code": code_dir}, "math", "cod")
    code, checks = examined(shell)
    assert code == 2
    (failed,) = [says for status, _, says in checks if status == "FAIL"]
    assert "names the teacher 'cod' (did you mean code?)" in failed


def test_doctor_asks_the_servers_of_each_teacher(shell, classroom):
    server = classroom.servers["math"].url
    launch = {"command": [sys.executable, "-m", "serve", "{model}"]}
    math, code = (str(classroom.models[name]) for name in ("math", "code"))
    teachers = {
        "math": {"model": math, "urls": [server]},
        "code": {"model": code, "launch": launch},
    }
    write(shell, teachers, "math", "code", **SCORED)
    _, checks = examined(shell)
    of_math = [says for _, what, says in checks if what == "teachers.math server"]
    assert any(f"{server} is vLLM 0.32.0" in says for says in of_math)
    assert any(f"{server} serves {math}: log-probs within" in says for says in of_math)
    of_code = [says for _, what, says in checks if what == "teachers.code.launch"]
    assert any(f"serve {code}" in says for says in of_code)


def test_stages_alone_know_each_samples_teacher(shell, code_dir):
    teachers = {"math": shell.teacher, "code": code_dir}
    write(shell, teachers, "math", "code")
    assert shell.npd("generate", "run.yaml", "--out", "r.arrow").code == 0
    written = read_rollouts(Path("r.arrow"))
    texts = [ChatTokenizer.load(shell.student).decode(r.prompt_ids) for r in written]
    numbers = [int(re.search(r"number (\d+)", text)[1]) for text in texts]
    assert [r.teacher for r in written] == [("math", "code")[i % 2] for i in numbers]
    assert shell.npd("score", "run.yaml", "--rollouts", "r.arrow", "--out", "s.arrow").code == 0
    mixed = read_scored(Path("s.arrow"))
    for name, teacher in teachers.items():
        write(shell, {"math": teacher, "code": teacher}, "math", "code")
        assert (
            shell.npd("score", "run.yaml", "--rollouts", "r.arrow", "--out", f"{name}.a").code == 0
        )
        for one, alone in zip(mixed, read_scored(Path(f"{name}.a")), strict=True):
            if one.rollout.teacher == name:
                assert one.nll_teacher == pytest.approx(alone.nll_teacher, abs=1e-5)
    by_other = ["generate.source=teacher", "schedule.refresh=never", "generate.shard_size=20"]
    sets = [part for s in by_other for part in ("--set", s)]
    command = ["generate", "run.yaml", "--snapshot", str(code_dir), "--out", "o.arrow", *sets]
    assert shell.npd(*command).code == 0, "another model writes for all of them"
    assert {r.teacher for r in read_rollouts(Path("o.arrow"))} == {"math", "code"}
    write(shell, {"math": shell.teacher}, "math")
    said = shell.npd("score", "run.yaml", "--rollouts", "r.arrow", "--out", "t.arrow").complaint(2)
    first, *rest = [r.sample_id for r in written if r.teacher == "code"]
    assert f"r.arrow: sample {first} (and {len(rest)} more) names the teacher 'code'" in said
