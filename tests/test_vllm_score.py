"""Scoring by a real vLLM server on CPU with the real 135M model, beside the in-process scorer.

Both compute in bfloat16, whose log-probs are rounded by some 0.02 to 0.1 nats a token whichever
engine computes them, more where a token is unlikely (its logit is further from 0).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from npd.config import FilterConfig, RunConfig, ScoreConfig
from npd.data.chat_tokenizer import ChatTokenizer
from npd.engines.client import Refused
from npd.errors import WorkerLostError
from npd.score import build_scorer, open_teacher
from npd.store.layout import RunLayout
from npd.store.shards import read_scored, write_rollouts
from npd.types import FinishReason, Prompt, Rollout, Scored
from npd.workers.scorer import ScorerWorker
from npd.workers.tasks import ScoreTask, scored_stats
from process_tree import children
from vllm_servers import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# Nats: the mean |difference| over tokens, the largest of a response's mean NLL (the shortest has 5
# tokens, so little averages out), the largest of teacher mass. In float32 only the order of sums
# differs, so that a wrong position, id or normalisation could not hide; measured: see docs/log.md.
NOISE = {"bfloat16": (0.1, 0.15, 0.01), "float32": (1e-4, 1e-4, 1e-4)}
NLLS = ("nll_teacher", "nll_teacher_alone", "nll_student", "nll_student_alone")
# Log-probs closer than this may change places.
SEPARATED = 0.25

PAIRS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is 12 times 11?", "12 times 11 is 132."),
    ("Name three colours.", "Red, green and blue."),
    ("Why is the sky blue?", "Air scatters blue light more than red light, so the sky looks blue."),
    ("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet around the year 1600."),
    ("How do I boil an egg?", "Put it into boiling water, wait eight minutes, and cool it."),
    ("Is a whale a fish?", "No. Whales are mammals: they breathe air and feed milk to calves."),
    ("Translate 'good morning' to German.", "Guten Morgen."),
    ("Give me one fact about Mars.", "A day on Mars is about forty minutes longer than on Earth."),
    ("What comes after Wednesday?", "purple wardrobe seventeen quickly"),
    ("Tell me a short story.", "Once there was a fox who lived near a mill. " * 8),
)


def rollouts_of(chat: ChatTokenizer) -> list[Rollout]:
    """Responses of all kinds: right, wrong, terse, long, nonsense."""
    prompts = [Prompt(i, text=text, completion=said) for i, (text, said) in enumerate(PAIRS)]
    return [
        Rollout(
            sample_id=10 + e.index,
            prompt_index=e.index,
            version=0,
            prompt_ids=e.prompt_ids,
            header_ids=e.header_ids,
            response_ids=e.completion_ids,
            logprobs=None,
            finish=FinishReason.STOP,
            seed=e.index,
        )
        for e in chat.encode_all(prompts)
    ]


@pytest.fixture(scope="module")
def config(smol_dir, vllm_venv, tmp_path_factory):
    return RunConfig(
        run_dir=tmp_path_factory.mktemp("run"),
        student=str(smol_dir),
        teacher=str(smol_dir),
        data={"max_prompt_tokens": 128},
        generate={"max_new_tokens": 200},
        score={"engine": "vllm", "launch": launch(vllm_venv), "row_tokens": 512},
        schedule={"epochs": 10},
        eval={"max_new_tokens": 12, "batch_size": 8},
        runtime={"device": "cpu"},
    )


@pytest.fixture(scope="module")
def chat(config):
    return ChatTokenizer.load(config.student)


@pytest.fixture(scope="module")
def exact(config):
    """The same config, in float32."""
    score = config.score.model_copy(update={"dtype": "float32"})
    return config.model_copy(update={"score": score})


@pytest.fixture(scope="module")
def teacher(exact, chat):
    """The real teacher in float32 on a server of its own, for all tests of this file but one."""
    served = open_teacher(exact, chat.vocab_size, exact.directory / "server.log", widest=64)
    yield served
    served.close()


def build(config, chat, served, score: ScoreConfig):
    scorer = build_scorer(
        score,
        teacher=served or config.teacher,
        vocab_size=chat.vocab_size,
        needs_ifd=True,
        needs_student_pass=True,
        support="topk",
        device="cpu",
        trust_remote_code=False,
        seed=0,
    )
    scorer.load_student(Path(config.student), 0)
    return scorer


def check_scores(config, chat, by_server: list[Scored], dtype: str) -> None:
    """The records of a server's teacher and of the same one in this process agree to rounding.

    A worker whose filters need no student scores without one.
    """
    rollouts = [record.rollout for record in by_server]
    in_process = build(config, chat, None, ScoreConfig(row_tokens=512, dtype=dtype)).score(rollouts)
    off, nlls, mass, overlaps, shared, told = [], [], [], [], 0, 0
    for a, b in zip(by_server, in_process, strict=True):
        off.append(np.abs(a.teacher_logprobs - b.teacher_logprobs))
        scalars = [(getattr(a, name), getattr(b, name)) for name in NLLS]
        nlls += [abs(ours - theirs) for ours, theirs in scalars if ours is not None]
        mass.append(abs(scored_stats(a).teacher_mass - scored_stats(b).teacher_mass))
        overlaps.append(0.0 if a.overlap is None else abs(a.overlap - b.overlap))
        # Ids that stand out from the last of the ten, which noise may exchange for an eleventh.
        stands_out = b.topk_logprobs > b.topk_logprobs[:, -1:] + SEPARATED
        is_there = (b.topk_ids[:, :, None] == a.topk_ids[:, None, :]).any(axis=2)
        shared, told = shared + int((is_there & stands_out).sum()), told + int(stands_out.sum())
    differences = np.concatenate(off)
    print(f"|difference| mean {differences.mean():.2g}, largest {differences.max():.2g} nats/token")
    print(
        f"{shared} of {told} ids shared; NLL, mass off by at most {max(nlls):.2g}, {max(mass):.2g}"
    )
    print(f"overlap off by {np.mean(overlaps):.4f} on average")
    token_noise, mean_noise, mass_noise = NOISE[dtype]
    assert differences.mean() < token_noise
    assert max(nlls) < mean_noise
    assert max(mass) < mass_noise
    assert np.mean(overlaps) < 0.05  # the last of ten ids changes places with an eleventh
    assert told > 1000
    assert shared / told > 0.95


def test_a_worker_writes_held_out_text_and_scores_by_one_server(config, chat):
    """And is lost with it: whoever runs it starts another, and has the shard scored again.

    First in this file, so that two servers never share the memory.
    """
    nannies = children(os.getpid())
    layout = RunLayout(config.directory)
    layout.create()
    rollouts = rollouts_of(chat)
    write_rollouts(layout.rollouts(0), rollouts)
    worker = ScorerWorker(config.model_copy(update={"filter": FilterConfig(name="none")}), layout)
    try:
        prompts = tuple(
            chat.encode_all([Prompt(i, text=text) for i, (text, _) in enumerate(PAIRS)])
        )
        worker.prepare_heldout(prompts)
        heldout = read_scored(layout.heldout)
        assert [s.rollout.prompt_index for s in heldout] == list(range(len(PAIRS)))
        assert all(s.topk_ids.shape == (len(s.rollout.response_ids), 64) for s in heldout)
        assert all(chat.decode(s.rollout.response_ids).strip() for s in heldout)
        greedy = np.mean(
            np.concatenate([s.topk_ids[:, 0] == s.rollout.response_ids for s in heldout])
        )
        assert greedy > 0.95
        stats = worker.score(ScoreTask(0, 0, tuple(r.sample_id for r in rollouts))).stats
        assert [s.sample_id for s in stats] == [r.sample_id for r in rollouts]
        assert len(list(layout.logs.glob("server-vllm-teacher-*.log"))) == 1, "one server for all"
        check_scores(config, chat, read_scored(layout.scored(0)), "bfloat16")
        write_rollouts(layout.rollouts(1), rollouts)
        (nanny,) = children(os.getpid()) - nannies
        (server,) = children(nanny)
        os.kill(int(server), signal.SIGKILL)
        with pytest.raises(WorkerLostError, match="vllm server"):
            worker.score(ScoreTask(1, 0, (rollouts[0].sample_id,)))
    finally:
        worker.close()


def test_a_server_scores_as_the_process_does_in_float32(exact, chat, teacher):
    rollouts = rollouts_of(chat)
    by_server = build(exact, chat, teacher, exact.score).score(rollouts)
    assert all(a.rollout is b for a, b in zip(by_server, rollouts, strict=True))
    assert not [a for a in by_server if None in (a.overlap, *(getattr(a, name) for name in NLLS))]
    check_scores(exact, chat, by_server, "float32")


def test_a_launched_server_gives_the_support_of_held_out_text(teacher):
    assert teacher.max_k == 64


def test_a_sample_as_long_as_the_config_allows_is_read(chat, teacher):
    from npd.score.base import LogprobRequest

    ids = np.resize(np.array(chat.tokenizer("one two three")["input_ids"], np.int32), 328)
    found = teacher.read({"sample 1": LogprobRequest(ids[:128], ids[128:], 10)})["sample 1"]
    assert found.ids.shape == (200, 10)
    assert found.logprobs.shape == (200,)


def test_an_id_the_server_does_not_know_is_refused(teacher, chat):
    (answer,) = teacher.run_jobs([chat.vocab_size], lambda server, top: server.read([top, 0], 0))
    assert isinstance(answer, Refused)
    assert "out of vocabulary" in answer.cause
