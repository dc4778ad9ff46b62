"""Scorers, fake and real: packed scores are each sample's own, at the right positions."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fakes import END, FakeLM, FakeScorer, make_rollouts
from npd.config import ScoreConfig
from npd.errors import ModelError, RunError, WorkerLostError
from npd.models.lm_head import Head, head_of, read_hidden, top_k
from npd.models.loading import load_model
from npd.models.response_states import response_hidden
from npd.score import build_scorer
from npd.score.base import LogprobRequest
from npd.score.in_process import PrefillModel, _draw
from npd.train.loss import near_policy_loss
from npd.types import FinishReason, Rollout
from tiny_model import make_model, make_tokenizer

VOCAB = 300  # of the tiny tokenizer; the tiny models have 304 ids


def rollout(index, prompt, header, response, logprobs=None):
    def ids(values):
        return np.asarray(values, dtype=np.int32)

    return Rollout(
        sample_id=100 + index,
        prompt_index=index,
        version=0,
        prompt_ids=ids(prompt),
        header_ids=ids(header),
        response_ids=ids(response),
        logprobs=None if logprobs is None else np.asarray(logprobs, dtype=np.float32),
        finish=FinishReason.STOP,
        seed=index,
    )


def random_rollouts(shapes, seed=0, with_logprobs=True):
    rng = np.random.default_rng(seed)
    return [
        rollout(
            i,
            rng.integers(0, VOCAB, p),
            rng.integers(0, VOCAB, h),
            rng.integers(0, VOCAB, n),
            -rng.random(n) if with_logprobs else None,
        )
        for i, (p, h, n) in enumerate(shapes)
    ]


SUPPORT = ("topk_ids", "topk_logprobs")
SHAPES = [(5, 1, 7), (1, 1, 1), (12, 3, 2), (3, 2, 19), (8, 1, 1), (2, 4, 30), (6, 1, 5)]


@pytest.fixture(scope="module")
def make_scorer(tiny_model_dir, tiny_teacher_dir):
    def make(**kwargs):
        config = ScoreConfig(
            top_k=kwargs.pop("k", 6),
            row_tokens=kwargs.pop("row_tokens", 64),
            head_chunk=kwargs.pop("head_chunk", 5),
            dtype=kwargs.pop("dtype", "float32"),
        )
        settings = {
            "teacher": tiny_teacher_dir,
            "vocab_size": VOCAB,
            "needs_ifd": True,
            "needs_student_pass": False,
            "support": "topk",
            "device": "cpu",
            "trust_remote_code": False,
            "seed": 0,
        }
        scorer = build_scorer(config, **(settings | kwargs))
        scorer.load_student(tiny_model_dir, 0)
        return scorer

    return make


@pytest.fixture(scope="module")
def full_logprobs(tiny_model_dir, tiny_teacher_dir):
    """(who, context, response) -> [L, V] by a plain forward of one sample and a full softmax."""
    models = {
        "student": load_model(tiny_model_dir, packed=False),
        "teacher": load_model(tiny_teacher_dir, packed=False),
    }

    def of(who, context, response):
        whole = torch.from_numpy(np.concatenate([context, response]).astype(np.int64))[None]
        with torch.no_grad():
            table = models[who](input_ids=whole).logits[0].log_softmax(-1)
        return table[len(context) - 1 : -1].numpy()

    return of


def of_tokens(table, response):
    return table[np.arange(len(response)), response]


def assert_is_reference(scored, full_logprobs, *, k, atol):
    r = scored.rollout
    table = full_logprobs("teacher", r.prompt_ids, r.response_ids)
    best = np.argsort(-table[:, :VOCAB], axis=1)[:, :k]
    expected = of_tokens(table, r.response_ids)
    alone = of_tokens(full_logprobs("teacher", r.header_ids, r.response_ids), r.response_ids)
    student = of_tokens(full_logprobs("student", r.header_ids, r.response_ids), r.response_ids)
    if atol < 1e-3:
        np.testing.assert_array_equal(scored.topk_ids, best)
    own = np.take_along_axis(table, scored.topk_ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(scored.topk_logprobs, own, atol=atol)
    np.testing.assert_allclose(scored.teacher_logprobs, expected, atol=atol)
    np.testing.assert_allclose(scored.nll_teacher, -expected.mean(), atol=atol)
    np.testing.assert_allclose(scored.nll_teacher_alone, -alone.mean(), atol=atol)
    np.testing.assert_allclose(scored.nll_student_alone, -student.mean(), atol=atol)


@pytest.mark.parametrize("row_tokens", [1, 40, 1000])
@pytest.mark.parametrize("head_chunk", [1, 7, 512])
def test_packed_scores_are_each_samples_own(make_scorer, full_logprobs, row_tokens, head_chunk):
    rollouts = random_rollouts(SHAPES)
    scored = make_scorer(row_tokens=row_tokens, head_chunk=head_chunk).score(rollouts)
    assert [s.rollout for s in scored] == rollouts
    for s in scored:
        assert_is_reference(s, full_logprobs, k=6, atol=1e-4)


@pytest.mark.parametrize("row_tokens", [1, 50, 1000])
def test_samples_of_one_prompt_are_scored_as_if_alone(make_scorer, full_logprobs, row_tokens):
    first, second = random_rollouts([(24, 17, 9), (20, 1, 4)], seed=3)
    more = random_rollouts([(1, 1, n) for n in (1, 6, 15, 1)], seed=4)
    prompts = (first, second, first, first)
    rollouts = [first, second] + [
        replace(r, sample_id=i, prompt_ids=of.prompt_ids, header_ids=of.header_ids)
        for i, (r, of) in enumerate(zip(more, prompts, strict=True))
    ]
    for s in make_scorer(row_tokens=row_tokens).score(rollouts):
        assert_is_reference(s, full_logprobs, k=6, atol=1e-4)


def test_bfloat16_scores_are_within_its_precision(make_scorer, full_logprobs):
    for s in make_scorer(dtype="bfloat16").score(random_rollouts(SHAPES)):
        assert_is_reference(s, full_logprobs, k=6, atol=0.35)


def test_order_and_company_do_not_matter(make_scorer):
    rollouts = random_rollouts(SHAPES)
    scorer = make_scorer(needs_student_pass=True)
    together = {s.rollout.sample_id: s for s in scorer.score(rollouts)}
    reverse = {s.rollout.sample_id: s for s in scorer.score(rollouts[::-1])}
    for r in rollouts:
        (single,) = scorer.score([r])
        for other in (together[r.sample_id], reverse[r.sample_id]):
            np.testing.assert_array_equal(single.topk_ids, other.topk_ids)
            np.testing.assert_allclose(single.topk_logprobs, other.topk_logprobs, atol=1e-5)
            assert single.nll_teacher_alone == pytest.approx(other.nll_teacher_alone, abs=1e-5)
            assert single.nll_student == pytest.approx(other.nll_student, abs=1e-5)
            assert single.overlap == pytest.approx(other.overlap)


def test_student_nll_is_the_recorded_one_unless_it_must_be_measured(make_scorer, full_logprobs):
    (r,) = random_rollouts([(5, 1, 7)])
    table = full_logprobs("student", r.prompt_ids, r.response_ids)
    measured = -of_tokens(table, r.response_ids).mean()
    (recorded,) = make_scorer().score([r])
    assert recorded.nll_student == pytest.approx(-r.logprobs.mean())
    assert recorded.overlap is None
    (forced,) = make_scorer(needs_student_pass=True).score([r])
    assert forced.nll_student == pytest.approx(measured, abs=1e-4)
    (absent,) = make_scorer().score([replace(r, logprobs=None)])
    assert absent.nll_student == pytest.approx(measured, abs=1e-4)


@pytest.mark.parametrize("support", ["topk", "sampled"])
def test_overlap_is_the_share_of_the_teachers_top_k(make_scorer, full_logprobs, support):
    scorer = make_scorer(needs_student_pass=True, needs_ifd=False, k=50, support=support)
    for s in scorer.score(random_rollouts(SHAPES)):
        r = s.rollout
        tops = [
            np.argsort(-full_logprobs(who, r.prompt_ids, r.response_ids)[:, :VOCAB])[:, :50]
            for who in ("teacher", "student")
        ]
        shares = [len(set(a) & set(b)) / 50 for a, b in zip(*tops, strict=True)]
        assert s.overlap == pytest.approx(np.mean(shares))
        assert 0.05 < s.overlap < 0.95


def test_without_ifd_no_student_is_needed(tiny_teacher_dir):
    scorer = build_scorer(
        ScoreConfig(dtype="float32"),
        teacher=tiny_teacher_dir,
        vocab_size=VOCAB,
        needs_ifd=False,
        needs_student_pass=False,
        support="topk",
        device="cpu",
        trust_remote_code=False,
        seed=0,
    )
    (s,) = scorer.score(random_rollouts([(5, 1, 7)], with_logprobs=False))
    assert s.nll_teacher > 0
    assert (s.nll_teacher_alone, s.nll_student, s.nll_student_alone, s.overlap) == (None,) * 4


def test_load_student_takes_the_new_weights(make_scorer, tiny_teacher_dir):
    scorer = make_scorer(needs_student_pass=True)
    rollouts = random_rollouts(SHAPES)
    (before, *_) = scorer.score(rollouts)
    scorer.load_student(tiny_teacher_dir, 1)
    (after, *_) = scorer.score(rollouts)
    assert after.nll_student == pytest.approx(after.nll_teacher, abs=1e-5)
    assert after.nll_student_alone == pytest.approx(after.nll_teacher_alone, abs=1e-5)
    assert after.overlap == 1.0
    assert abs(before.nll_student_alone - after.nll_student_alone) > 1e-3


# The off-by-one, on a model whose distribution is written down.


class Lookup(nn.Module):
    """p(next | token) from a table: hidden states are one-hot ids, the head is the table itself."""

    base_model_prefix = "backbone"

    def __init__(self, table):
        super().__init__()
        self.head = nn.Linear(len(table), len(table), bias=False)
        self.head.weight = nn.Parameter(torch.tensor(np.log(table.T), dtype=torch.float32))
        self.config = type("Config", (), {"get_text_config": lambda self: self})()
        self.device = torch.device("cpu")

    def backbone(self, input_ids, **_):
        one_hot = nn.functional.one_hot(input_ids, len(self.head.weight)).float()
        return type("Out", (), {"last_hidden_state": one_hot})()

    def get_output_embeddings(self):
        return self.head


def test_each_position_predicts_the_next_token():
    table = np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.25, 0.125, 0.625]])
    reader = PrefillModel(Lookup(table), "lookup", 3, ScoreConfig(row_tokens=16))
    context, response = np.array([1, 0], np.int32), np.array([2, 1, 1], np.int32)
    reading = reader.read({"x": LogprobRequest(context, response, k=2)})["x"]
    np.testing.assert_allclose(np.exp(reading.logprobs), [0.1, 0.125, 0.4], rtol=1e-5)
    np.testing.assert_array_equal(reading.ids, [[0, 1], [2, 0], [0, 1]])
    expected = [[0.7, 0.2], [0.625, 0.25], [0.5, 0.4]]
    np.testing.assert_allclose(np.exp(reading.id_logprobs), expected, rtol=1e-5)
    assert reading.nll == pytest.approx(-np.log([0.1, 0.125, 0.4]).mean())


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *(x.numel() for x in tensors)])
        return out


@pytest.mark.parametrize("chunk", [4, 16])
@pytest.mark.parametrize("support", ["topk", "sampled"])
def test_only_a_chunk_of_positions_ever_has_logits(make_scorer, chunk, support):
    scorer = make_scorer(row_tokens=512, head_chunk=chunk, support=support)
    rollouts = random_rollouts([(60, 1, 60), (30, 1, 80)])
    with LargestTensor() as largest:
        scorer.score(rollouts)
    # The feed-forward layer of the row: both documents twice, with and without their prompts.
    body = (60 + 60 + 30 + 80 - 2 + 60 + 80) * 64
    assert largest.numel <= body < 140 * 304


def test_non_finite_scores_are_an_error():
    table = np.full((3, 3), np.nan)
    reader = PrefillModel(Lookup(table), "broken", 3, ScoreConfig(row_tokens=16))
    with pytest.raises(RunError, match=r"broken.*not finite"):
        reader.read({0: LogprobRequest(np.array([1], np.int32), np.array([2], np.int32))})


# Vocabularies.


def save_wide(path, vocab):
    model = make_model(5, vocab=vocab, tied=False)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 4.0
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_padding_ids_are_never_in_the_support_but_keep_their_mass(make_scorer, tmp_path):
    teacher = save_wide(tmp_path, 384)
    plain = load_model(teacher, packed=False)
    scorer = make_scorer(teacher=teacher, needs_ifd=False, k=VOCAB)
    (s,) = scorer.score(random_rollouts([(5, 1, 7)]))
    whole = np.concatenate([s.rollout.prompt_ids, s.rollout.response_ids]).astype(np.int64)
    with torch.no_grad():
        logits = plain(input_ids=torch.from_numpy(whole)[None]).logits[0]
    table = logits.log_softmax(-1)[4:-1].numpy()
    assert s.topk_ids.shape == (7, VOCAB)
    assert s.topk_ids.max() < VOCAB <= table.argmax(axis=1).max()
    mass = np.exp(s.topk_logprobs.astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(mass, np.exp(table)[:, :VOCAB].sum(axis=1), atol=1e-5)
    assert mass.min() < 0.9


def test_more_ids_asked_for_than_there_are(make_scorer):
    (s,) = make_scorer(k=1000).score(random_rollouts([(5, 1, 7)]))
    assert s.topk_ids.shape == (7, VOCAB)
    assert all(sorted(row) == list(range(VOCAB)) for row in s.topk_ids)


def test_an_id_the_teacher_does_not_know_is_an_error(make_scorer):
    with pytest.raises(ModelError, match=r"token id 304.*share one tokenizer"):
        make_scorer().score([rollout(0, [1, 2], [1], [5, 304])])


# The sampled support.


def test_sampled_ids_are_the_samples_own_and_carry_true_logprobs(make_scorer, full_logprobs):
    rollouts = random_rollouts(SHAPES)
    scorer = make_scorer(support="sampled", k=9, needs_ifd=False)
    scored = scorer.score(rollouts)
    again = {s.rollout.sample_id: s for s in scorer.score(rollouts[::-1])}
    for s in scored:
        r = s.rollout
        table = full_logprobs("teacher", r.prompt_ids, r.response_ids)
        own = np.take_along_axis(table, s.topk_ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(s.topk_logprobs, own, atol=1e-4)
        np.testing.assert_array_equal(s.topk_ids, again[r.sample_id].topk_ids)
    other_seed = make_scorer(support="sampled", k=9, needs_ifd=False, seed=1).score(rollouts)
    assert any((a.topk_ids != b.topk_ids).any() for a, b in zip(scored, other_seed, strict=True))


def test_equal_samples_draw_differently(make_scorer):
    (r,) = random_rollouts([(5, 1, 20)])
    scorer = make_scorer(support="sampled", k=9, needs_ifd=False)
    first, twin = scorer.score([r, replace(r, sample_id=7)])
    assert (first.topk_ids != twin.topk_ids).any()


def test_draws_reach_the_right_id_of_a_large_vocabulary():
    vocab = 200_003
    expected = torch.arange(0, vocab, 97)
    ids = _draw(torch.zeros(1, vocab), (expected[None].double() + 0.5) / vocab)
    assert torch.equal(ids[0], expected)


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 40) * 2
    draws = 200_000
    ids = _draw(logits, torch.rand(1, draws, dtype=torch.float64))
    p = logits[0].softmax(0).numpy()
    share = np.bincount(ids[0].numpy(), minlength=40) / draws
    assert np.all(np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / draws) + 1e-9)


def test_draws_never_leave_the_support():
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]])
    edge = torch.tensor([[0.0, 0.5, 1.0 - 2**-53]], dtype=torch.float64)
    assert set(_draw(logits, edge)[0].tolist()) <= {1, 3}


# The two-stage top-k.


@given(
    st.integers(1, 700), st.integers(1, 40), st.integers(1, 4), st.booleans(), st.integers(0, 99)
)
@settings(max_examples=150, deadline=None)
def test_top_k_equals_torch(vocab, k, rows, has_ties, seed):
    k = min(k, vocab)
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, vocab + 13, generator=generator)
    logits = (wide.round() if has_ties else wide)[:, :vocab]
    ids = top_k(logits, k)
    values, expected = logits.topk(k, dim=1)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())
    if not has_ties:
        assert torch.equal(ids, expected)


# Hidden states instead of the top-k.


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_blocks_of_logits_are_the_logits(chunk):
    head = Head(torch.randn(200_000, 4), torch.randn(200_000), 0.5, 30.0)
    hidden = torch.randn(23, 4)
    parts, blocks = zip(*head.blocks(hidden, chunk), strict=True)
    assert [i for part in parts for i in range(23)[part]] == list(range(23))
    assert max(map(len, blocks)) <= min(chunk, 2**21 // 200_000)
    torch.testing.assert_close(torch.cat(blocks), head.logits(hidden), rtol=1e-5, atol=1e-5)


class HiddenScorer:
    """Ships the teacher's hidden states of a response, as a scorer of another kind could."""

    def __init__(self, teacher):
        self.model = load_model(teacher)
        self.head = head_of(self.model)

    @torch.no_grad()
    def score(self, rollouts):
        pairs = [(r.prompt_ids, r.response_ids) for r in rollouts]
        ((row, hidden),) = response_hidden(self.model, pairs, 10_000)
        states = hidden.split([len(pairs[i][1]) for i in row])
        return [states[row.index(i)] for i in range(len(rollouts))]


def test_the_loss_can_be_fed_from_hidden_states(make_scorer, tiny_teacher_dir):
    """The top-k made where the student trains is the top-k that a scorer stores."""
    rollouts = random_rollouts(SHAPES)
    stored = make_scorer(needs_ifd=False).score(rollouts)
    shipping = HiddenScorer(tiny_teacher_dir)
    hidden = torch.cat(shipping.score(rollouts))
    ids, logprobs = read_hidden(
        hidden, shipping.head, lambda _, logits, maxima: top_k(logits[:, :VOCAB], 6, maxima), 7
    )
    assert ids.tolist() == np.concatenate([s.topk_ids for s in stored]).tolist()

    student = torch.randn(len(hidden), 8, requires_grad=True)
    weight = torch.randn(304, 8)
    labels = torch.from_numpy(np.concatenate([r.response_ids for r in rollouts]).astype(np.int64))

    def loss_of(ids, logprobs):
        loss = near_policy_loss(student, weight, labels, ids.long(), logprobs, target="tail").loss
        return loss.detach(), *torch.autograd.grad(loss, student)

    kept = (np.concatenate([getattr(s, name) for s in stored]) for name in SUPPORT)
    for got, expected in zip(
        loss_of(ids, logprobs), loss_of(*map(torch.from_numpy, kept)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


# The contract, for every scorer.


@pytest.fixture(params=["fake", "transformers"])
def build(request, make_scorer, tmp_path):
    def fake(**kwargs):
        kwargs = {"k": 6} | kwargs
        scorer = FakeScorer(top_k=kwargs.pop("k"), **kwargs)
        scorer.load_student(tmp_path, 0)
        return scorer

    return fake if request.param == "fake" else make_scorer


def test_contract_shapes_and_meaning(build):
    rollouts = make_rollouts(8)
    scored = build().score(rollouts)
    assert [s.rollout.sample_id for s in scored] == [r.sample_id for r in rollouts]
    for s in scored:
        length = len(s.rollout.response_ids)
        assert s.topk_ids.shape == s.topk_logprobs.shape == (length, 6)
        assert (s.topk_ids.dtype, s.topk_logprobs.dtype) == (np.int32, np.float32)
        assert s.teacher_logprobs.shape == (length,)
        assert s.teacher_logprobs.dtype == np.float32
        assert s.nll_teacher == pytest.approx(-s.teacher_logprobs.mean(), abs=1e-5)
        assert s.nll_student == pytest.approx(-s.rollout.logprobs.mean(), abs=1e-5)
        assert min(s.nll_teacher_alone, s.nll_student_alone) > 0
        assert (np.diff(s.topk_logprobs, axis=1) <= 0).all()
        assert (np.exp(s.topk_logprobs.astype(np.float64)).sum(axis=1) <= 1 + 1e-5).all()


def test_contract_support_agrees_with_the_sampled_token(build):
    scored = build(k=32).score(make_rollouts(8))
    found = 0
    for s in scored:
        rows, columns = np.nonzero(s.topk_ids == s.rollout.response_ids[:, None])
        at_token = s.topk_logprobs[rows, columns]
        np.testing.assert_allclose(at_token, s.teacher_logprobs[rows], atol=1e-5)
        found += len(rows)
    assert found > 0


def test_contract_empty_call_and_close(build):
    scorer = build()
    assert scorer.score([]) == []
    scorer.close()
    with pytest.raises(AssertionError, match="after close"):
        scorer.score(make_rollouts(1))


def test_contract_sampled_support_repeats_itself(build):
    scorer, rollouts = build(support="sampled"), make_rollouts(4)
    first, second = scorer.score(rollouts), scorer.score(rollouts[::-1])[::-1]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.topk_ids, b.topk_ids)
        assert a.topk_ids.shape == (len(a.rollout.response_ids), 6)


# The fakes themselves.


def test_fake_distribution_is_the_written_one():
    lm = FakeLM(8, seed=3)
    context, response = np.array([2, 5], np.int32), np.array([3, END], np.int32)
    for t, document in enumerate(([2, 5], [2, 5, 3])):
        logits = lm.first[2] + lm.previous[document[-1]]
        p = np.exp(logits) / np.exp(logits).sum()
        got = np.exp(lm.response_logprobs(context, response)[t])
        np.testing.assert_allclose(got, p, rtol=1e-12)


def test_fake_generator_is_decided_by_its_seed():
    first, second = make_rollouts(6), make_rollouts(6)
    assert json.dumps([r.response_ids.tolist() for r in first]) == json.dumps(
        [r.response_ids.tolist() for r in second]
    )
    forced = make_rollouts(6, length=lambda seed: 2 + seed % 3)
    assert [len(r.response_ids) for r in forced] == [2 + (1000 + i) % 3 for i in range(6)]
    with pytest.raises(WorkerLostError, match="call 1"):
        make_rollouts(2, fail_on={1})
