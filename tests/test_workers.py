"""Workers by themselves: what they make once they do not make again, and who ends a response."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fake_servers import FakeVllm, make_snapshot
from fakes import FakeGenerator, make_rollouts
from npd.config import FilterConfig, ScoreConfig
from npd.control.preflight import prepare
from npd.data.chat_tokenizer import ChatTokenizer
from npd.errors import RunError, StoreError
from npd.models import fingerprint
from npd.models.metadata import model_settings
from npd.store.layout import RunLayout
from npd.store.shards import read_rollouts, read_scored, write_rollouts
from npd.types import SampleRequest, Scored
from npd.workers import Factory, GenerateTask, ScoreTask, scored_stats
from npd.workers.generator import stop_ids
from npd.workers.scorer import heldout_rollouts
from npd.workers.tasks import ShardResult
from tiny_run import tiny_config, write_prompts


@pytest.fixture
def config(tmp_path, tiny_model_dir, tiny_teacher_dir):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    return tiny_config(tiny_model_dir, tiny_teacher_dir, prompts, tmp_path / "run")


@pytest.fixture
def layout(config):
    layout = RunLayout(config.directory)
    layout.create()
    return layout


def make_task(config, version=0, shard=0):
    prompts = prepare(config).prompts[:3]
    requests = tuple(SampleRequest(10 + i, 100 + i, prompt) for i, prompt in enumerate(prompts))
    return GenerateTask(shard, version, requests)


def test_a_shard_is_generated_and_scored_once(config, layout):
    trainer = Factory("trainer", config, layout.root)()
    trainer.publish(0)
    generator, scorer = (Factory(r, config, layout.root)() for r in ("generator", "scorer"))
    task = make_task(config)
    shard = generator.generate(task)
    stats = shard.stats
    written = layout.rollouts(0).stat().st_mtime_ns
    assert generator.generate(task) == shard
    assert layout.rollouts(0).stat().st_mtime_ns == written
    chosen = ScoreTask(0, 0, (stats[0].sample_id, stats[2].sample_id))
    scored = scorer.score(chosen).stats
    assert [s.sample_id for s in scored] == [10, 12], "only those asked for are scored"
    assert scorer.score(chosen) == ShardResult(scored)
    records = read_scored(layout.scored(0))
    assert scored[0].nll_teacher == pytest.approx(-records[0].teacher_logprobs.mean(), abs=1e-5)
    assert all(s.nll_student is not None and s.nll_student_alone is not None for s in scored)
    for worker in (trainer, generator, scorer):
        worker.close()


def served(config, tmp_path, **faults):
    """A server of a fake teacher, and the config with it as the teacher's."""
    vocab = model_settings(Path(config.teacher)).vocabulary
    weights = make_snapshot(tmp_path / "weights", 1, vocab=vocab)
    teacher = shutil.copytree(config.teacher, tmp_path / "teacher")
    shutil.copy(weights / fingerprint.FILE, teacher / fingerprint.FILE)
    server = FakeVllm(weights, **faults)
    score = ScoreConfig(engine="vllm", urls=(server.url,), top_k=8)
    filter_ = FilterConfig(name="none")
    update = {"teacher": str(teacher), "score": score, "filter": filter_}
    return server, config.model_copy(update=update)


def test_a_sample_the_teacher_cannot_read_fails_alone_and_is_asked_again(config, layout, tmp_path):
    Factory("trainer", config, layout.root)().publish(0)
    Factory("generator", config, layout.root)().generate(make_task(config))
    refused = read_rollouts(layout.rollouts(0))[1]
    whole = [*refused.prompt_ids.tolist(), *refused.response_ids.tolist()]
    server, config = served(config, tmp_path, refuses=lambda ids: ids == whole)
    task = ScoreTask(0, 0, (10, 11, 12))
    with server, closing(Factory("scorer", config, layout.root)()) as scorer:
        made = scorer.score(task)
        assert [s.sample_id for s in made.stats] == [10, 12]
        assert ["serves" in note for note in made.notes] == [True]
        (failed,) = made.failed
        assert failed.sample_id == 11
        assert failed.reason.startswith(f"{server.url} refuses (400)")
        written = layout.scored(0).read_bytes()
        asked = len(server.sent("/v1/completions"))
        again = scorer.score(task)
        assert again == ShardResult(made.stats, made.failed), "told once"
        assert len(server.sent("/v1/completions")) == asked + 1, "what is scored is not read again"
        assert layout.scored(0).read_bytes() == written
        server.faults.refuses = lambda ids: False
        assert [s.sample_id for s in scorer.score(task).stats] == [10, 11, 12]
        assert [s.rollout.sample_id for s in read_scored(layout.scored(0))] == [10, 11, 12]


def test_a_score_of_another_text_is_not_taken_for_this_one(config, layout, tmp_path):
    Factory("trainer", config, layout.root)().publish(0)
    Factory("generator", config, layout.root)().generate(make_task(config))
    first, second, _ = read_rollouts(layout.rollouts(0))
    server, config = served(config, tmp_path)
    with server, closing(Factory("scorer", config, layout.root)()) as scorer:
        scorer.score(ScoreTask(0, 0, (10,)))
        changed = replace(first, response_ids=first.response_ids[::-1].copy())
        write_rollouts(layout.rollouts(0), [changed, second])
        scorer.score(ScoreTask(0, 0, (10, 11)))
    for record, rollout in zip(read_scored(layout.scored(0)), (changed, second), strict=True):
        np.testing.assert_array_equal(record.rollout.response_ids, rollout.response_ids)


def test_heldout_text_that_the_teacher_cannot_read_is_an_error(config, layout, tmp_path):
    server, config = served(config, tmp_path)
    prompts = prepare(config).heldout
    known = len(prompts[1].prompt_ids)

    def is_whole_text(ids):
        return len(ids) > known and ids[:known] == prompts[1].prompt_ids.tolist()

    server.faults.refuses = is_whole_text
    with server, closing(Factory("scorer", config, layout.root)()) as scorer:
        with pytest.raises(RunError, match=rf"held-out sample {prompts[1].index}: .*refuses"):
            scorer.prepare_heldout(tuple(prompts))
        assert not layout.heldout.exists()


def test_a_file_of_another_task_is_not_taken_for_this_one(config, layout):
    Factory("trainer", config, layout.root)().publish(0)
    generator = Factory("generator", config, layout.root)()
    task = make_task(config)
    generator.generate(task)
    fewer = generator.generate(GenerateTask(0, 0, task.requests[:2]))
    assert [s.sample_id for s in fewer.stats] == [10, 11]
    assert [r.sample_id for r in read_rollouts(layout.rollouts(0))] == [10, 11], "made anew"


def test_a_damaged_snapshot_is_found_before_anything_is_written_with_it(config, layout):
    Factory("trainer", config, layout.root)().publish(0)
    weights = layout.snapshot(0) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(StoreError, match=r"model\.safetensors"):
        Factory("generator", config, layout.root)().generate(make_task(config))
    assert not layout.rollouts(0).exists()


def test_the_teacher_ends_its_text_with_its_own_end_tokens_too(config, tmp_path, tiny_teacher_dir):
    teacher = shutil.copytree(tiny_teacher_dir, tmp_path / "teacher")
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    config = config.model_copy(update={"teacher": str(teacher)})
    chat = ChatTokenizer.load(config.student)
    assert 7 not in stop_ids(config, chat, None)
    assert stop_ids(config, chat, "default") == chat.stop_ids | {2, 7}


def test_heldout_text_is_made_once_with_a_wide_support(config, layout):
    prompts = tuple(prepare(config).heldout)
    scorer = Factory("scorer", config, layout.root)()
    tokens = scorer.prepare_heldout(prompts)
    assert tokens.num_tokens == sum(len(s.topk_ids) for s in read_scored(layout.heldout))
    written = layout.heldout.stat().st_mtime_ns
    assert scorer.prepare_heldout(prompts) == tokens
    assert layout.heldout.stat().st_mtime_ns == written
    assert all(s.topk_ids.shape[1] == 64 for s in read_scored(layout.heldout))


def test_what_writes_heldout_text_is_closed_also_when_it_fails(config, monkeypatch):
    generator = FakeGenerator(fail_on={1}, error=RunError)
    monkeypatch.setattr("npd.generate.build_generator", lambda *_, **__: generator)
    with pytest.raises(RunError, match="fails on call 1"):
        heldout_rollouts(
            config,
            ChatTokenizer.load(config.student),
            prepare(config).heldout,
            "cpu",
            lambda _: None,
        )
    assert generator.is_closed


def test_teacher_mass_counts_a_repeated_draw_once():
    rollout = make_rollouts(1)[0]
    length = len(rollout.response_ids)
    ids = np.tile(np.array([[3, 5, 3]], dtype=np.int32), (length, 1))
    logprobs = np.log(np.tile(np.array([[0.5, 0.25, 0.5]], dtype=np.float32), (length, 1)))
    scored = Scored(rollout, ids, logprobs, logprobs[:, 0], nll_teacher=1.0)
    assert scored_stats(scored).teacher_mass == pytest.approx(0.75)


def test_rollouts_carry_the_version_that_wrote_them(config, layout):
    trainer = Factory("trainer", config, layout.root)()
    generator = Factory("generator", config, layout.root)()
    for version in (0, 1):
        trainer.publish(version)
        generator.generate(make_task(config, version, shard=version))
        assert {r.version for r in read_rollouts(layout.rollouts(version))} == {version}


def test_a_student_is_there_whole_while_a_newer_one_is_written(config, layout):
    trainer = Factory("trainer", config, layout.root)()
    trainer.export()
    before = (layout.student / "model.safetensors").read_bytes()
    blocked = layout.root / "student-new"
    blocked.mkdir()
    (blocked / "leftover").write_text("of a killed export")
    assert trainer.export() == str(layout.student)
    assert (layout.student / "model.safetensors").read_bytes() == before
    assert not blocked.exists()
