"""The teacher on servers, by fakes without HTTP: what is asked, within which bounds, what comes."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fake_servers import make_snapshot, read_lm
from fakes import FakeLM, make_rollouts
from npd.config import LaunchConfig, ScoreConfig
from npd.engines import Refused, ServerFacts, Unavailable
from npd.engines.base import PromptLogprobs
from npd.engines.pool import ServerPool
from npd.errors import ConfigError, ModelError, RunError, WorkerLostError
from npd.models import fingerprint
from npd.models.metadata import size_of
from npd.score import build_scorer
from npd.score.base import LogprobFailure, LogprobRequest, Logprobs
from npd.score.scorer import TeacherStudentScorer
from npd.score.served import ServedTeacher
from npd.store.shards import read_scored, write_scored
from npd.types import Failed, Scored
from npd.workers import scored_stats

VOCAB = 32


class FakeServer:
    """What a teacher's server is asked for, over a FakeLM.

    `limit` is the most log-probs a position, `context` the tokens it holds. It counts the tokens
    it has in hand; `refuses` and `fails` are lengths it will not, or cannot, read.
    """

    def __init__(self, lm, name="http://a", *, limit=64, context=100, refuses=(), fails=()):
        self.lm, self.name, self.limit, self.context = lm, name, limit, context
        self.refuses, self.fails = set(refuses), set(fails)
        self.key_is_wrong = self.is_damaged = False
        self.in_hand = self.most_in_hand = 0
        self.asked = []

    async def facts(self):
        if self.key_is_wrong:
            raise Refused(self.name, 401, "Unauthorized")
        return ServerFacts("vLLM", "0.32.0", ("fake",), self.context, False)

    async def is_healthy(self):
        return True

    async def read(self, ids, k, *, model=None):
        self.asked.append((len(ids), k))
        self.in_hand += len(ids)
        self.most_in_hand = max(self.most_in_hand, self.in_hand)
        for _ in range(len(ids)):  # longer ones take longer, so that order is not by chance
            await asyncio.sleep(0)
        self.in_hand -= len(ids)
        if k > self.limit:
            cause = f"Requested prompt logprobs of {k}, which is greater than max allowed: "
            raise Refused(self.name, 400, f"{cause}{self.limit}")
        if max(ids) >= self.lm.vocab_size:
            raise Refused(self.name, 400, f"Token id {max(ids)} is out of vocabulary")
        if len(ids) in self.refuses:
            raise Refused(self.name, 400, "no such luck")
        if len(ids) in self.fails:
            raise Unavailable(self.name, "fails at /v1/completions: 500")
        table = self.lm.response_logprobs(np.array(ids[:1]), np.array(ids[1:]))
        top = np.argsort(-table, axis=1, kind="stable")[:, :k]
        return PromptLogprobs(
            table[np.arange(len(table)), ids[1:]].astype(np.float32)
            * (np.nan if self.is_damaged else 1),
            top.astype(np.int32),
            np.take_along_axis(table, top, axis=1).astype(np.float32),
        )


class FakePool(ServerPool):
    """The real pool over fake servers; `is_lost` is our own server's end."""

    def __init__(self, config, servers, *, is_lost=False):
        super().__init__("vllm", config, log=Path("unused"))
        self.fakes, self.is_lost, self.is_closed, self.spec = servers, is_lost, False, None

    async def open(self, spec, *, connections, admin_urls=()):
        self.spec, self.servers = spec, list(self.fakes)

    async def close(self):
        self.is_closed = True
        await super().close()

    def check(self, error):
        if self.is_lost:
            raise WorkerLostError(f"{error}: it hangs")


@pytest.fixture
def opened():
    """Opens teachers over fake servers, and closes them."""
    made = []

    def make(
        *servers, vocab_size=VOCAB, context=60, widest=0, is_lost=False, teacher="a/b", **section
    ):
        config = ScoreConfig(**({"engine": "vllm", "top_k": 6, "patience": 0.0} | section))
        pool = FakePool(config, servers, is_lost=is_lost)
        opening = ServedTeacher(
            config,
            pool,
            teacher=str(teacher),
            vocab_size=vocab_size,
            context=context,
            tolerance=0.15,
            widest=widest,
        )
        made.append(opening)
        return opening

    yield make
    for teacher in made:
        teacher.close()


def documents(count, k, vocab_size=VOCAB, seed=0):
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(0, vocab_size, rng.integers(low, high)).astype(np.int32)

    return {f"document {i}": LogprobRequest(ids(1, 9), ids(1, 12), k) for i in range(count)}


def test_readings_are_of_the_response_alone(opened):
    lm = FakeLM(VOCAB)
    found = opened(FakeServer(lm), FakeServer(lm, "http://b")).read(asked := documents(30, 5))
    assert set(found) == set(asked)
    for key, reading in found.items():
        context, response = asked[key].context, asked[key].response
        table = lm.response_logprobs(context, response)
        best = np.argsort(-table, axis=1, kind="stable")[:, :5]
        np.testing.assert_allclose(reading.logprobs, lm.token_logprobs(context, response), 1e-5)
        np.testing.assert_array_equal(reading.ids, best)
        np.testing.assert_allclose(
            reading.id_logprobs, np.take_along_axis(table, best, axis=1), rtol=1e-5
        )
        assert (reading.ids.dtype, reading.id_logprobs.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("row_tokens", [1, 25, 60, 1000])
def test_tokens_in_flight_are_bounded_at_each_server(opened, row_tokens):
    servers = [FakeServer(FakeLM(VOCAB)), FakeServer(FakeLM(VOCAB), "http://b")]
    teacher = opened(*servers, row_tokens=row_tokens)
    asked = documents(40, 3)
    teacher.read(asked)
    longest = max(len(d.context) + len(d.response) for d in asked.values())
    for server in servers:
        assert server.most_in_hand <= max(row_tokens, longest)
        if row_tokens == 60:
            assert server.most_in_hand > longest, "several at once"
    served = sorted(length for s in servers for length, k in s.asked if k == 3)
    assert served == sorted(len(d.context) + len(d.response) for d in asked.values())


def test_a_document_without_a_support_asks_for_none(opened):
    server = FakeServer(FakeLM(VOCAB))
    reading = opened(server).read(documents(1, 0))["document 0"]
    assert reading.ids.shape == (len(reading.logprobs), 0)
    assert server.asked[-1][1] == 0


def test_padding_ids_are_looked_past(opened):
    lm, server = FakeLM(VOCAB), None
    lm.previous[:, 28:] += 3.0  # padding of the embedding that leads everywhere
    server = FakeServer(lm)
    teacher = opened(server, vocab_size=28, widest=16)
    for key, document in (asked := documents(9, 6, vocab_size=28)).items():
        reading = teacher.read({key: document})[key]
        table = lm.response_logprobs(document.context, document.response)[:, :28]
        np.testing.assert_array_equal(reading.ids, np.argsort(-table, axis=1, kind="stable")[:, :6])
    assert {k for _, k in server.asked[-len(asked) :]} <= {6, 12}


def test_what_no_server_tells_has_no_mass_in_the_loss_or_the_store(opened, tmp_path):
    import torch

    from npd.train.loss_targets import make_support

    lm = FakeLM(VOCAB)
    lm.previous[:, 28:] += 30.0
    teacher = opened(FakeServer(lm, limit=6), vocab_size=28, widest=64)
    assert teacher.max_k == 6
    scorer = TeacherStudentScorer(
        teacher, lambda _: teacher, top_k=6, needs_ifd=True, needs_student_pass=False
    )
    scorer.load_student(tmp_path, 0)
    write_scored(tmp_path / "scored.arrow", scorer.score(make_rollouts(5, vocab_size=28)))
    for scored in read_scored(tmp_path / "scored.arrow"):
        assert scored.topk_ids.max() < 28
        assert all(len(set(row)) == 6 for row in scored.topk_ids.tolist())
        assert np.isfinite(scored.topk_logprobs).all()
        assert scored_stats(scored).teacher_mass < 1e-6
        ids, logprobs = map(torch.from_numpy, (scored.topk_ids, scored.topk_logprobs))
        assert make_support(ids, logprobs, "tail", 28, torch.float32).valid_NK.all()


def test_scores_are_those_of_the_distribution(opened, tmp_path):
    teacher, student = FakeLM(VOCAB, seed=1), FakeLM(VOCAB, seed=0)
    scorer = TeacherStudentScorer(
        opened(FakeServer(teacher)),
        lambda _: opened(FakeServer(student)),
        top_k=6,
        needs_ifd=True,
        needs_student_pass=True,
    )
    scorer.load_student(tmp_path, 0)
    for scored in scorer.score(rollouts := make_rollouts(8)):
        r = scored.rollout
        for nll, lm, context in (
            (scored.nll_teacher, teacher, r.prompt_ids),
            (scored.nll_teacher_alone, teacher, r.header_ids),
            (scored.nll_student, student, r.prompt_ids),
            (scored.nll_student_alone, student, r.header_ids),
        ):
            expected = -lm.token_logprobs(context, r.response_ids).mean()
            assert nll == pytest.approx(expected, abs=1e-5)
    scorer.close()
    with pytest.raises(AssertionError, match="after close"):
        scorer.score(rollouts)


def test_the_builder_takes_a_teacher_that_is_served(opened, tiny_model_dir):
    rollouts = make_rollouts(3)
    scorer = build_scorer(
        ScoreConfig(top_k=6, dtype="float32"),
        teacher=opened(FakeServer(FakeLM(VOCAB))),
        vocab_size=VOCAB,
        needs_ifd=True,
        needs_student_pass=False,
        support="topk",
        device="cpu",
        trust_remote_code=False,
        seed=0,
    )
    scorer.load_student(tiny_model_dir, 0)
    assert [s.rollout for s in scorer.score(rollouts)] == rollouts


# What a server cannot do.


@pytest.mark.parametrize(("limit", "widest", "max_k"), [(64, 64, 64), (20, 64, 20), (6, 64, 6)])
def test_the_widest_support_is_what_every_server_gives(opened, limit, widest, max_k):
    servers = [FakeServer(FakeLM(100)), FakeServer(FakeLM(100), "http://b", limit=limit)]
    assert opened(*servers, vocab_size=100, widest=widest).max_k == max_k


def test_a_support_no_wider_than_the_vocabulary_is_asked_for(opened):
    teacher = opened(FakeServer(FakeLM(VOCAB)), top_k=50, widest=64)
    reading = teacher.read(documents(1, 50))["document 0"]
    assert teacher.max_k == reading.ids.shape[1] == VOCAB


@pytest.mark.parametrize(
    ("server", "error", "says"),
    [
        ({"limit": 5}, ConfigError, r"http://a does not return 6 .*--max-logprobs 16\b.*top_k"),
        ({"context": 60}, ConfigError, r"http://a .*--max-model-len 61\b"),
        ({"vocab": 31}, ModelError, r"http://a .*token id 31 .*vocabulary"),
        ({"key_is_wrong": True}, ConfigError, r"http://a refuses \(401\): Unauthorized"),
    ],
)
def test_limits_are_found_at_the_start(opened, server, error, says):
    fake = FakeServer(
        FakeLM(server.get("vocab", VOCAB)),
        limit=server.get("limit", 64),
        context=server.get("context", 100),
    )
    fake.key_is_wrong = "key_is_wrong" in server
    with pytest.raises(error, match=says) as caught:
        opened(FakeServer(FakeLM(VOCAB), "http://b"), fake, widest=16)
    assert "\n" not in str(caught.value)


# Which model a server holds.


def test_a_server_shows_that_it_holds_the_teacher(opened, tmp_path):
    teacher = make_snapshot(tmp_path / "teacher", 3)
    servers = [FakeServer(read_lm(teacher), name) for name in ("http://a", "http://b")]
    notes = opened(*servers, teacher=teacher).notes
    assert [note.partition(" ")[0] for note in notes] == ["http://a", "http://b"]
    assert all(f"serves {teacher}: log-probs within 0.0000 nats" in note for note in notes)


def test_a_server_of_another_model_is_refused(opened, tmp_path):
    teacher = make_snapshot(tmp_path / "teacher", 3)
    servers = [FakeServer(read_lm(teacher)), FakeServer(FakeLM(VOCAB), "http://b")]
    with pytest.raises(ConfigError, match=rf"http://b does not serve {teacher}.*; serve {teacher}"):
        opened(*servers, teacher=teacher)


def test_what_cannot_be_compared_is_said_not_to_be_verified(opened, tmp_path):
    teacher = make_snapshot(tmp_path / "teacher", 3)
    (tmp_path / "bare").mkdir()
    server = FakeServer(FakeLM(VOCAB), context=9)
    for given in ({"teacher": "a/b"}, {"teacher": tmp_path / "bare"}, {"teacher": teacher}):
        (note,) = opened(server, context=8, **given).notes
        assert note.startswith(f"http://a: not verified to serve {given['teacher']}")


def test_only_a_model_that_is_small_is_loaded_to_compare(tmp_path, tiny_model_dir, monkeypatch):
    size = size_of(str(tiny_model_dir)).parameters
    monkeypatch.setattr(fingerprint, "CHEAP", size - 1)
    assert fingerprint.of_cheap(str(tiny_model_dir)) is None
    monkeypatch.setattr(fingerprint, "CHEAP", size)
    found = fingerprint.of_cheap(str(tiny_model_dir))
    assert found.flat.shape == (sum(len(ids) - 1 for ids in found.sequences),)
    unread = shutil.copytree(tiny_model_dir, tmp_path / "unread")
    settings = json.loads((unread / "config.json").read_text()) | {"model_type": "nobody-knows"}
    (unread / "config.json").write_text(json.dumps(settings))
    assert fingerprint.of_cheap(str(unread)) is None, "a server may know it"


def test_our_server_is_started_with_what_it_must_hold(tmp_path):
    for limit, room in ((512, 61), (60, 60)):
        (tmp_path / "config.json").write_text(
            f'{{"max_position_embeddings": {limit}, "vocab_size": 40}}'
        )
        config = ScoreConfig(engine="vllm", top_k=6)
        pool = FakePool(config, [FakeServer(FakeLM(VOCAB))])
        teacher = ServedTeacher(
            config,
            pool,
            teacher=str(tmp_path),
            vocab_size=VOCAB,
            context=60,
            tolerance=0.15,
            widest=64,
        )
        assert (pool.spec.context, pool.spec.max_logprobs) == (room, 64)
        assert teacher.num_padding_ids == 8
        teacher.close()
        assert pool.is_closed


def test_our_server_is_not_started_for_an_adapter(tmp_path):
    adapter = '{"base_model_name_or_path": "a/b", "r": 8}'
    (tmp_path / "adapter_config.json").write_text(adapter)
    config = ScoreConfig(engine="vllm", launch=LaunchConfig())
    pool = FakePool(config, [FakeServer(FakeLM(VOCAB))])
    with pytest.raises(ConfigError, match="is an adapter"):
        ServedTeacher(
            config, pool, teacher=str(tmp_path), vocab_size=VOCAB, context=60, tolerance=1
        )
    assert pool.spec is None


def test_a_teacher_that_cannot_be_opened_is_closed():
    config = ScoreConfig(engine="vllm", top_k=6)
    pool = FakePool(config, [FakeServer(FakeLM(VOCAB), limit=1)])
    with pytest.raises(ConfigError, match="max-logprobs"):
        ServedTeacher(config, pool, teacher="a/b", vocab_size=VOCAB, context=60, tolerance=1)
    assert pool.is_closed


def test_a_refused_document_is_unread_alone(opened):
    asked = {
        "sample 7": LogprobRequest(np.arange(9, dtype=np.int32), np.arange(8, dtype=np.int32), 2)
    }
    others = {key: d for key, d in documents(9, 2).items() if len(d.context) + len(d.response) < 17}
    found = opened(FakeServer(FakeLM(VOCAB), refuses={17})).read(asked | others)
    assert found.pop("sample 7") == LogprobFailure("http://a refuses (400): no such luck")
    assert set(found) == set(others)
    assert all(isinstance(reading, Logprobs) for reading in found.values())


def test_a_sample_of_a_refused_document_has_no_record(opened, tmp_path):
    rollouts = make_rollouts(9)
    lengths = [len(r.prompt_ids) + len(r.response_ids) for r in rollouts]
    alone = [len(r.header_ids) + len(r.response_ids) for r in rollouts]
    for refuses in (lengths[3], alone[5]):  # with its prompt, or without
        server = FakeServer(FakeLM(VOCAB), refuses={refuses})
        scorer = TeacherStudentScorer(
            opened(server),
            lambda _: opened(FakeServer(FakeLM(VOCAB))),
            top_k=6,
            needs_ifd=True,
            needs_student_pass=True,
        )
        scorer.load_student(tmp_path, 0)
        found = scorer.score(rollouts)
        for rollout, whole, bare, item in zip(rollouts, lengths, alone, found, strict=True):
            if refuses in (whole, bare):
                reason = "http://a refuses (400): no such luck"
                assert item == Failed(rollout.sample_id, reason)
            else:
                assert item.rollout is rollout
        assert any(isinstance(item, Scored) for item in found)


def test_a_document_that_keeps_failing_is_unread(opened):
    server = FakeServer(FakeLM(VOCAB), fails={17})
    asked = {
        "sample 7": LogprobRequest(np.arange(9, dtype=np.int32), np.arange(8, dtype=np.int32), 2)
    }
    found = opened(server).read(asked)["sample 7"]
    assert found.reason.startswith("http://a fails at")
    assert sum(length == 17 for length, _ in server.asked) == 3, "tried again before it is given up"


def test_the_loss_of_our_server_is_the_workers(opened):
    server = FakeServer(FakeLM(VOCAB), fails={17})
    asked = {
        "sample 7": LogprobRequest(np.arange(9, dtype=np.int32), np.arange(8, dtype=np.int32), 2)
    }
    with pytest.raises(WorkerLostError, match="http://a fails at"):
        opened(server, is_lost=True).read(asked)


def test_log_probs_that_are_not_finite_are_an_error(opened):
    server = FakeServer(FakeLM(VOCAB))
    teacher = opened(server)
    server.is_damaged = True
    with pytest.raises(RunError, match=r"document 0 that are not finite"):
        teacher.read(documents(1, 0))
