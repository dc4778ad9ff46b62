"""A teacher held by several ranks (real processes): the scores of one, whatever is killed."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import signal
import weakref

import numpy as np
import pytest

import npd
from cli_fixture import Shell
from npd.config import RunConfig
from npd.control.devices.placement import start_generators, start_scorers, start_trainer
from npd.control.model_checks import check_ranks
from npd.control.preflight import prepare
from npd.errors import ConfigError, ModelError, NpdError
from npd.runtime.local import LocalRuntime
from npd.runtime.rank_group import RankGroup
from npd.score.base import LogprobRequest
from npd.score.tensor_parallel import (
    Command,
    RankZeroTeacher,
    RankZeroTeachers,
    TeacherReplica,
    check_divisible,
)
from npd.store.layout import RunLayout
from npd.store.shards import read_scored
from npd.types import Outcome, SampleRequest
from npd.workers import Factory, GenerateTask, ScoreTask
from npd.workers.scorer import ScorerRank, ScorerWorker, TeacherShard
from open_runs import open_run
from run_process import is_alive, wait_for_child
from test_packed_models import PACKABLE, family_dir
from test_run import QuietView, check_books, check_same_run
from tiny_model import make_tokenizer, save_model
from tiny_run import tiny_config, write_prompts

pytestmark = pytest.mark.timeout(1200)


def check_scores(one, other, atol=2e-4):
    """Two files of scores agree to float noise.

    It may swap ids that are as likely, and carry a value over an edge of how the support is rounded
    for storing (steps of 0.004).
    """
    expected, found = read_scored(one), read_scored(other)
    assert [s.rollout.sample_id for s in expected] == [s.rollout.sample_id for s in found]
    for a, b in zip(expected, found, strict=True):
        assert a.rollout.response_ids.tolist() == b.rollout.response_ids.tolist()
        np.testing.assert_allclose(b.teacher_logprobs, a.teacher_logprobs, atol=atol)
        off = np.abs(b.topk_logprobs - a.topk_logprobs)
        assert off.max() < 5e-3
        assert (off < atol).mean() > 0.99
        assert (a.topk_ids == b.topk_ids).mean() > 0.99
        for name in ("nll_teacher", "nll_teacher_alone", "nll_student", "nll_student_alone"):
            values = getattr(a, name), getattr(b, name)
            assert values[1] == (None if values[0] is None else pytest.approx(values[0], abs=atol))


def scored_by_ranks(configs, layout, calls):
    """What a scorer answers to `calls`, or raises, over the files of `layout`; a config a rank."""
    factories = [Factory("scorer", config, layout.root) for config in configs]

    async def story():
        runtime = LocalRuntime(layout.root / "logs", call_timeout=600.0)
        try:
            workers = [
                runtime.spawn(f"scorer-{i}", factory, threads=1)
                for i, factory in enumerate(factories)
            ]
            group = RankGroup("scorer", workers, layout.root / "meeting")
            return [await answer(group, call) for call in calls]
        finally:
            await runtime.close()

    return asyncio.run(story())


async def answer(group, call):
    try:
        return (await group.call(*call)).value
    except NpdError as error:
        return error


# With a plan: norms of each head and experts; scaled embeddings and two kinds of layers. Of a Llama
# is the teacher of the whole run below.
SPREAD = ["Qwen3Moe", "Gemma3Text"]


@pytest.mark.slow
@pytest.mark.parametrize("family", SPREAD)
def test_ranks_score_as_one_process(family, tmp_path, tiny_model_dir):
    teacher = family_dir(family, {**PACKABLE[family], "vocab_size": 304}, tmp_path / "t", 0.2)
    make_tokenizer().save_pretrained(teacher)
    prompts = write_prompts(tmp_path / "prompts.jsonl")

    def config(name, ranks):
        return tiny_config(
            tiny_model_dir, teacher, prompts, tmp_path / name, score={"ranks": ranks,
            "top_k": 8, "row_tokens": 256, "dtype": "float32"}, runtime={"kind": "local",
            "device": "cpu"},
        )  # fmt: skip

    one, two = config("one", 1), config("two", 2)
    layout = RunLayout(one.directory)
    layout.create()
    trainer = Factory("trainer", one, layout.root)()
    trainer.publish(0)
    generator = Factory("generator", one, layout.root)()
    requests = tuple(
        SampleRequest(10 + i, 100 + i, p) for i, p in enumerate(prepare(one).prompts[:5])
    )
    stats = generator.generate(GenerateTask(0, 0, requests)).stats
    shutil.copytree(layout.root, two.directory)
    task = ScoreTask(0, 0, tuple(s.sample_id for s in stats))
    scorer = Factory("scorer", one, layout.root)()
    heldout = tuple(prepare(one).heldout)
    scorer.prepare_heldout(heldout)
    expected = scorer.score(task)
    for worker in (trainer, generator, scorer):
        worker.close()

    other = RunLayout(two.directory)
    calls = [("prepare_heldout", heldout), ("score", task), ("score", task)]
    _, found, again = scored_by_ranks([two, two], other, calls)
    check_scores(layout.heldout, other.heldout)
    check_scores(layout.scored(0), other.scored(0))
    assert [s.sample_id for s in found.stats] == [s.sample_id for s in expected.stats]
    assert again == found, "what is there is not made again"


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "is_there"), [(0, False), (1, True)])
def test_a_model_that_one_rank_cannot_load_is_named_by_all(
    victim, is_there, tmp_path, tiny_model_dir, tiny_teacher_dir
):
    bad, prompts = tmp_path / "bad", write_prompts(tmp_path / "prompts.jsonl")
    if is_there:
        shutil.copytree(tiny_teacher_dir, bad)
        os.truncate(bad / "model.safetensors", 100)

    def config(teacher):
        return tiny_config(
            tiny_model_dir, teacher, prompts, tmp_path / "run", score={"ranks": 2},
            runtime={"kind": "local", "device": "cpu"},
        )  # fmt: skip

    configs = [config(bad if rank == victim else tiny_teacher_dir) for rank in (0, 1)]
    layout = RunLayout(tmp_path / "run")
    layout.create()
    call = ("prepare_heldout", tuple(prepare(config(tiny_teacher_dir)).heldout))
    found = scored_by_ranks(configs, layout, [call, call])
    # The second answer: no rank was lost, and all are where they were.
    assert [type(error) for error in found] == [ModelError] * 2
    assert all(str(error).startswith(f"rank {victim}, on ") for error in found)
    assert all(str(bad) in str(error) for error in found)


@pytest.mark.slow
def test_a_run_with_a_spread_teacher_makes_the_student_of_one(
    tmp_path, tiny_model_dir, tiny_teacher_dir
):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    schedule = {"epochs": 2, "reuse": 2, "refresh": "never", "overlap": False}

    def config(name, ranks, kind):
        return tiny_config(
            tiny_model_dir, tiny_teacher_dir, prompts, tmp_path / name, schedule=schedule,
            score={"top_k": 8, "row_tokens": 256, "dtype": "float32", "ranks": ranks},
            runtime={"kind": kind, "device": "cpu", "threads": 1},
        )  # fmt: skip

    one = npd.run(config("one", 1, "inline"), view=QuietView())
    two = npd.run(config("two", 2, "local"), view=QuietView())
    layout = RunLayout(two.directory)
    check_same_run(one, two, rel=1e-3, atol=5e-3)
    logs = {path.name for path in layout.logs.glob("scorer*")}
    assert logs == {"scorer-0-0.log", "scorer-0-1.log"}
    assert not list(layout.root.glob(".meeting*")), "the place to meet is gone"


@pytest.mark.slow
def test_a_spread_teacher_on_ray(tmp_path, tiny_model_dir, tiny_teacher_dir, ray_address):
    schedule = {"epochs": 2, "reuse": 2, "refresh": "never", "overlap": False}
    config = tiny_config(
        tiny_model_dir, tiny_teacher_dir, write_prompts(tmp_path / "prompts.jsonl"),
        tmp_path / "run", schedule=schedule,
        score={"top_k": 8, "row_tokens": 256, "dtype": "float32", "ranks": 2},
        runtime={"kind": "ray", "device": "cpu", "threads": 1, "ray": {"address": ray_address}},
    )  # fmt: skip
    result = npd.run(config, view=QuietView())
    assert result.is_done
    layout = RunLayout(result.directory)
    assert check_books(layout, reuse=2)[Outcome.FAILED] == 0
    assert {path.stem for path in layout.logs.glob("scorer*.log")} >= {"scorer-0-0", "scorer-0-1"}


@pytest.mark.slow
def test_a_killed_rank_brings_the_group_back_and_nothing_is_lost(make_run):
    run = make_run(
        runtime={"kind": "local"},
        score={"top_k": 8, "row_tokens": 256, "dtype": "float32", "ranks": 2},
        schedule={"epochs": None, "steps": 20, "window": 20, "reuse": 2, "max_lag": 2,
                  "refresh": {"every_steps": 6}},
    )  # fmt: skip
    process = run.start()
    seen = set()
    for victim, events in (("scorer-0-1", 6), ("scorer-0-0", 16)):
        assert run.wait_for(events, process), run.log.read_text()[-2000:]
        names = ("scorer-0-0", "scorer-0-1")
        pids = {name: wait_for_child(process, name, known=seen) for name in names}
        seen |= set(pids.values())
        os.kill(pids[victim], signal.SIGKILL)
    run.finish(process)
    assert check_books(run.layout, reuse=2)[Outcome.FAILED] == 0
    assert not [pid for pid in seen if is_alive(pid)]
    assert not list(run.layout.root.glob(".meeting*"))


# Who does what.


class Told:
    """The others' ears: what the first rank tells, for a follower to hear afterwards."""

    def __init__(self):
        self.orders = []

    def notify(self, order):
        self.orders.append(order)
        return order

    def hear(self, _):
        return self.orders.pop(0)


class FakeReader:
    def __init__(self, model, log):
        if model == "broken":
            raise ModelError("cannot load")
        self.model, self.log = model, log
        log.append(("load", model))

    def write(self, requests):
        self.log.append(("write", self.model, requests))
        return requests

    def read(self, documents):
        self.log.append(("read", self.model, sorted(documents)))
        if "bad" in documents:
            raise ModelError("a token too high")
        return documents


def test_the_others_do_what_the_first_does_and_survive_what_it_is_told():
    told, first, second = Told(), [], []
    ids = np.array([1], dtype=np.int32)
    document = LogprobRequest(ids, ids)

    def load_first(model):
        return FakeReader(model, first)

    def whole_story():
        with pytest.raises(ModelError):
            RankZeroTeacher("broken", load_first, told.notify)
        reader = RankZeroTeacher("m", load_first, told.notify)
        assert reader.read({"a": document}) == {"a": document}
        assert reader.write(("ask",)) == ("ask",)
        with pytest.raises(NpdError):
            reader.read({"bad": document})
        RankZeroTeacher("m", load_first, told.notify).read({"b": document})
        told.notify(None)

    whole_story()
    TeacherReplica(lambda model: FakeReader(model, second), told.hear).follow()
    assert second == first
    assert first.count(("load", "m")) == 2, "loaded again when it is told so"
    assert not told.orders
    assert Command("m").what is None


def test_what_the_first_lets_go_of_nobody_holds():
    told, first, second = Told(), [], []
    leaders = RankZeroTeachers(lambda model: FakeReader(model, first), told.notify)
    for name in ("m", "n", "m"):
        leaders.get(name).read({name: 0})
    leaders.unload()
    leaders.get("m").read({"b": 0})
    leaders.unload()
    told.notify(None)
    kept = weakref.WeakSet()

    def load(model):
        kept.add(reader := FakeReader(model, second))
        return reader

    follower = TeacherReplica(load, told.hear)
    follower.follow()
    assert second == first
    assert first.count(("load", "m")) == 2
    assert first.count(("load", "n")) == 1
    assert not kept


def test_held_out_text_is_written_in_the_type_that_one_process_writes_in(
    tmp_path, tiny_model_dir, tiny_teacher_dir
):
    prompts = write_prompts(tmp_path / "prompts.jsonl")

    def texts(name, make, writes, reads):
        config = tiny_config(
            tiny_model_dir, tiny_teacher_dir, prompts, tmp_path / name, score={"dtype": reads},
            generate={"dtype": writes}, eval={"max_new_tokens": 64}, runtime={"device": "cpu"},
            data={"heldout_size": 20},
        )  # fmt: skip
        layout = RunLayout(config.directory)
        layout.create()
        scorer = make(config, layout)
        scorer.prepare_heldout(tuple(prepare(config).heldout))
        scorer.close()
        return [s.rollout.response_ids.tolist() for s in read_scored(layout.heldout)]

    whole = texts("a", ScorerWorker, "float32", "bfloat16")
    assert texts("b", ScorerRank, "float32", "bfloat16") == whole
    assert texts("c", ScorerRank, "bfloat16", "float32") != whole, "the types write alike"


def test_held_out_text_alone_leaves_no_teacher_loaded(tmp_path, tiny_model_dir, tiny_teacher_dir):
    config = tiny_config(
        tiny_model_dir, tiny_teacher_dir, write_prompts(tmp_path / "prompts.jsonl"),
        tmp_path / "run", loss={"kd_weight": 0.0}, filter={"name": "none"}, score={"ranks": 2},
        runtime={"kind": "local", "device": "cpu"},
    )  # fmt: skip
    assert not config.needs_scores
    layout = RunLayout(config.directory)
    layout.create()
    scorer = ScorerRank(config, layout)  # joins nobody: the whole teacher is its part
    scorer.prepare_heldout(tuple(prepare(config).heldout))
    gc.collect()
    assert layout.heldout.exists()
    assert not [found for found in gc.get_objects() if type(found) is TeacherShard]
    scorer.close()


# What is refused, and where ranks run.

SETTINGS = {
    "student": "s",
    "teacher": "t",
    "data": {"train": "p"},
    "schedule": {"steps": 5, "refresh": "never"},
    "runtime": {"kind": "local"},
    "score": {"ranks": 2},
}


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("runtime", {"kind": "inline"}, r"score\.ranks 2 needs a process"),
        ("runtime", {"device": "cuda:1"}, r"score\.ranks 2 needs a GPU for each.*cuda:1"),
        ("runtime", {"kind": "ray", "ray": {"gpus": {"scorer": 0.5}}}, r"needs a whole GPU"),
        ("generate", {"source": "teacher"}, r"vllm, and generate\.launch\.tensor_parallel"),
        ("score", {"ranks": 2, "engine": "vllm", "urls": ["http://h:1"]},
         r"score\.ranks: 1 and score\.launch\.tensor_parallel"),
    ],
)  # fmt: skip
def test_what_several_ranks_cannot_do_is_refused(section, values, words):
    RunConfig.model_validate(SETTINGS)
    with pytest.raises(ConfigError, match=words):
        RunConfig.model_validate({**SETTINGS, section: values})


def test_a_teacher_that_cannot_be_shared_out_is_refused_before_anything_starts(
    tmp_path, tiny_model_dir, tiny_teacher_dir, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shell = Shell(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys)
    shell.write(score={"ranks": 2}, runtime={"kind": "local"})
    assert "score.ranks" in shell.npd("doctor", "run.yaml").out
    # Four heads and two of keys and values: three ranks cannot have as many each.
    shell.write(score={"ranks": 3}, runtime={"kind": "local"})
    found = shell.npd("doctor", "run.yaml")
    assert "FAIL  score.ranks" in found.out
    said = shell.npd("run", "run.yaml").complaint(2)
    assert "score.ranks 3 does not divide its num_attention_heads (4): set score.ranks to 2" in said
    assert not shell.layout.root.exists()


def test_an_adapter_is_no_teacher_to_share_out(
    tmp_path, tiny_model_dir, tiny_teacher_dir, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    base = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_teacher_dir)}
    (adapter / "adapter_config.json").write_text(json.dumps(base))
    (adapter / "adapter_model.safetensors").touch()
    shell = Shell(tmp_path, tiny_model_dir, adapter, capsys)
    shell.write(score={"ranks": 2}, runtime={"kind": "local"})
    says = "adapter is a LoRA adapter: merge it into its base (npd export"
    assert says in shell.npd("doctor", "run.yaml").out
    assert says in shell.npd("run", "run.yaml").complaint(2)


def test_a_model_without_a_plan_is_refused(tmp_path):
    directory = family_dir("GPT2", {**PACKABLE["GPT2"], "vocab_size": 304}, tmp_path / "g", 0.2)
    check_divisible(str(directory), 1)
    with pytest.raises(ModelError, match="no tensor-parallel plan for gpt2"):
        check_divisible(str(directory), 2)


def test_a_transformers_that_cannot_share_out_is_refused(tiny_model_dir, monkeypatch):
    check_divisible(str(tiny_model_dir), 2)
    monkeypatch.setattr("transformers.DistributedConfig", None)
    check_divisible(str(tiny_model_dir), 1)
    with pytest.raises(ModelError, match=r"score\.ranks 2 needs transformers 5\.17 or newer"):
        check_divisible(str(tiny_model_dir), 2)


def test_a_run_without_a_teacher_needs_no_plan(tiny_model_dir):
    values = {**SETTINGS, "student": str(tiny_model_dir), "teacher": None,
              "loss": {"kd_weight": 0.0}, "filter": {"name": "none"},
              "eval": {"source": "completion"}}  # fmt: skip
    check_ranks(RunConfig.model_validate(values))


class FakeRuntime:
    def __init__(self):
        self.spawned, self.factories = {}, []

    def spawn(self, name, factory, *, threads, environment=None, needs=None):
        self.spawned[name] = (threads, dict(environment or {}))
        self.factories.append(factory)
        return self


def test_each_rank_has_a_gpu_after_the_trainers(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6")
    monkeypatch.setattr("npd.control.devices.placement.num_gpus", lambda *_: 7)
    runtime = FakeRuntime()
    config = RunConfig.model_validate(
        {**SETTINGS, "train": {"ranks": 2}, "score": {"ranks": 2, "workers": 2},
         "runtime": {"kind": "local", "device": "cuda", "threads": 4}}
    )  # fmt: skip
    run = open_run(config, RunLayout(tmp_path))
    start_generators(run, runtime)
    start_trainer(run, runtime)
    assert [scorer.name for scorer in start_scorers(run, runtime)] == ["scorer-0", "scorer-1"]
    gpus = {name: env.get("CUDA_VISIBLE_DEVICES") for name, (_, env) in runtime.spawned.items()}
    assert gpus == {
        "generator-0": "6", "trainer-0": "0", "trainer-1": "1",
        "scorer-0-0": "2", "scorer-0-1": "3", "scorer-1-0": "4", "scorer-1-1": "5",
    }  # fmt: skip


def test_an_undivided_vocabulary_is_named(tmp_path):
    save_model(tmp_path / "t", vocab=305)
    with pytest.raises(ModelError, match=r"does not divide its vocab_size \(305\)"):
        check_divisible(str(tmp_path / "t"), 2)
