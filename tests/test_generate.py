"""The generators: the contract of all of them, and the decode loop against plain references."""

import json
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fake_servers
import fakes
from npd.config import GenerateConfig
from npd.errors import DataError, ModelError, RunError, StoreError
from npd.generate import build_generator
from npd.generate.base import DatasetGenerator
from npd.generate.in_process import TransformersGenerator, generate_with
from npd.generate.sampling import Sampling, choose, inverse_cdf, nucleus
from npd.generate.served import ServedGenerator, ServingContext
from npd.models.loading import hidden_states, load_model, pack_documents
from npd.types import EncodedPrompt, FinishReason, SampleRequest
from tiny_model import make_model, save_model

VOCAB = 300  # the tiny model's embedding is padded to 304
LENGTHS = (3, 9, 1, 5, 5, 17, 2, 9)


def make_requests(lengths=LENGTHS, vocab=VOCAB, completions=True):
    rng = np.random.default_rng(0)

    def ids(length):
        return rng.integers(3, vocab, length).astype(np.int32)

    prompts = [
        EncodedPrompt(i, ids(n), np.array([1], np.int32), ids(3 + i) if completions else None)
        for i, n in enumerate(lengths)
    ]
    return [SampleRequest(100 + i, 7 * i + 1, prompt) for i, prompt in enumerate(prompts)]


def make_sampling(new=12, stop=range(30), **kwargs):
    return Sampling(new, frozenset(stop), 0, **{"batch_size": 8, "vocab_size": VOCAB, **kwargs})


def make_generator(stop=range(30), pad_id=0, vocab_size=VOCAB, **kwargs):
    config = GenerateConfig(**{"max_new_tokens": 6, "dtype": "float32", "batch_size": 4, **kwargs})
    return TransformersGenerator(config, stop_ids=stop, pad_id=pad_id, vocab_size=vocab_size)


def full_logprobs(model, rollout):
    """log p(y_t) of the response by one plain forward pass over the whole sequence."""
    whole = np.concatenate([rollout.prompt_ids, rollout.response_ids]).astype(np.int64)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(whole)[None]).logits[0].float()
    start = len(rollout.prompt_ids)
    logprobs = logits.log_softmax(-1)[start - 1 : -1]
    return logprobs.gather(-1, torch.from_numpy(whole[start:])[:, None])[:, 0].numpy()


def responses(rollouts):
    return [rollout.response_ids.tolist() for rollout in rollouts]


@pytest.fixture(scope="module")
def model():
    return make_model()


# The contract of every generator.


@contextmanager
def serving(engine, snapshot, log):
    """A generator by two fake servers of `engine`, which hold `snapshot`."""
    kind = fake_servers.FAKES[engine]
    with kind(snapshot) as one, kind(snapshot) as other:
        config = GenerateConfig(
            engine=engine, urls=(one.url, other.url), max_new_tokens=6, batch_size=4, seeded=True
        )
        around = ServingContext(log=log, context=512)
        yield ServedGenerator(config, around, stop_ids=[fakes.END])


@pytest.fixture(params=["fake", "transformers", "dataset", "vllm"])
def kind(request):
    return request.param


@pytest.fixture
def snapshot(kind, tiny_model_dir, tmp_path):
    """What the generator loads: the fake servers know models of their own only."""
    is_served = kind in fake_servers.FAKES
    return fake_servers.make_snapshot(tmp_path / "v", 1) if is_served else tiny_model_dir


@pytest.fixture
def generator(kind, snapshot, tmp_path):
    builders = {
        "fake": lambda: nullcontext(fakes.FakeGenerator(max_new_tokens=6)),
        "transformers": lambda: nullcontext(make_generator()),
        "dataset": lambda: nullcontext(DatasetGenerator(6)),
    }
    build = builders.get(kind, lambda: serving(kind, snapshot, tmp_path / "server.log"))
    with build() as generator:
        generator.load(snapshot, 3)
        yield generator
        generator.close()


def contract_asks():
    return make_requests(vocab=30)


def test_contract_one_rollout_per_ask_in_order(generator):
    requests = contract_asks()
    rollouts = generator.generate(requests)
    assert [r.sample_id for r in rollouts] == [a.sample_id for a in requests]
    assert [r.prompt_index for r in rollouts] == [a.prompt.index for a in requests]
    assert [r.seed for r in rollouts] == [a.seed for a in requests]
    for ask, rollout in zip(requests, rollouts, strict=True):
        assert np.array_equal(rollout.prompt_ids, ask.prompt.prompt_ids)
        assert np.array_equal(rollout.header_ids, ask.prompt.header_ids)


def test_contract_shapes_types_and_bounds(generator):
    for rollout in generator.generate(contract_asks()):
        assert rollout.response_ids.dtype == np.int32
        assert 1 <= len(rollout.response_ids) <= 6
        assert rollout.finish in FinishReason
        assert len(rollout.response_ids) == 6 or rollout.finish is FinishReason.STOP
        if rollout.logprobs is not None:
            assert rollout.logprobs.dtype == np.float32
            assert rollout.logprobs.shape == rollout.response_ids.shape
            assert (rollout.logprobs <= 0).all()


def test_contract_asking_again_gives_the_same(generator):
    requests = contract_asks()
    again = generator.generate(requests[::-1])[::-1]
    assert responses(generator.generate(requests)) == responses(again)


def test_contract_version_is_the_loaded_one(generator, snapshot):
    is_dataset = isinstance(generator, DatasetGenerator)
    for version in (3, 4):
        generator.load(snapshot, version)
        seen = {rollout.version for rollout in generator.generate(contract_asks())}
        assert seen == {0 if is_dataset else version}


def test_contract_no_asks_no_rollouts(generator):
    assert generator.generate([]) == []


def test_build_generator_follows_the_config():
    built = build_generator(GenerateConfig(source="dataset"), stop_ids=[2], pad_id=0)
    assert isinstance(built, DatasetGenerator)
    built = build_generator(GenerateConfig(), stop_ids=[2], pad_id=0)
    assert isinstance(built, TransformersGenerator)


# The decode loop.


@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0.5}, {"top_p": 0.7}, {"temperature": 0.0}])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_logprobs_are_the_untempered_ones_of_a_full_forward_pass(model, kwargs, batch_size):
    sampling = make_sampling(batch_size=batch_size, **kwargs)
    for rollout in generate_with(model, make_requests(), sampling):
        reference = full_logprobs(model, rollout)
        assert np.allclose(rollout.logprobs, reference, atol=2e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_greedy_equals_generate(model, batch_size):
    requests = make_requests()
    rollouts = generate_with(model, requests, make_sampling(temperature=0.0, batch_size=batch_size))
    for ask, rollout in zip(requests, rollouts, strict=True):
        ids = torch.from_numpy(ask.prompt.prompt_ids.astype(np.int64))[None]
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=list(range(30)),
            suppress_tokens=list(range(VOCAB, 304)),
        )
        assert rollout.response_ids.tolist() == out[0, ids.shape[1] :].tolist()


def test_greedy_sees_every_finish(model):
    """Guards the test above: it would say little if no greedy row stopped early."""
    rollouts = generate_with(model, make_requests(), make_sampling(temperature=0.0))
    assert {rollout.finish for rollout in rollouts} == set(FinishReason)


@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0.7, "top_p": 0.9}])
def test_a_sample_does_not_depend_on_its_batch(model, kwargs):
    """Alone nothing is padded and nothing is dropped, so this covers padding and compaction too."""
    requests = make_requests(LENGTHS * 3)
    alone = [
        generate_with(model, [ask], make_sampling(new=20, batch_size=1, **kwargs))[0]
        for ask in requests
    ]
    for batch_size in (3, 24):
        sampling = make_sampling(new=20, batch_size=batch_size, **kwargs)
        together = generate_with(model, requests, sampling)
        assert responses(together) == responses(alone)
    assert len({len(rollout.response_ids) for rollout in alone}) > 3


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True},
    ],
    ids=["one-kv-head", "no-sharing", "sliding-window"],
)
def test_other_attention_shapes_match_a_full_forward_pass(kwargs):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        **{"num_key_value_heads": 2, **kwargs},
        vocab_size=304,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=8,
        sliding_window=4,
        initializer_range=0.2,
    )
    model = Qwen3ForCausalLM(config).eval()
    for batch_size in (1, 8):
        for rollout in generate_with(model, make_requests(), make_sampling(batch_size=batch_size)):
            assert np.allclose(rollout.logprobs, full_logprobs(model, rollout), atol=2e-5, rtol=0)


@pytest.mark.parametrize("is_packed", [True, False])
def test_any_loaded_model_can_write_and_stays_as_it_was(tiny_model_dir, model, is_packed):
    loaded = load_model(tiny_model_dir, packed=is_packed)
    attention = loaded.config._attn_implementation
    rollouts = generate_with(loaded, make_requests(), make_sampling())
    assert responses(rollouts) == responses(generate_with(model, make_requests(), make_sampling()))
    assert loaded.config._attn_implementation == attention
    if is_packed:
        batch = pack_documents([rollouts[0].prompt_ids], "cpu")
        assert torch.isfinite(hidden_states(loaded, batch)).all()


def test_a_sample_depends_on_its_seed(model):
    ask = make_requests()[0]
    requests = [
        SampleRequest(i, seed, ask.prompt) for i, seed in enumerate([5, 6, 5, -1, 2**64 - 1])
    ]
    first, other, same, negative, wrapped = responses(
        generate_with(model, requests, make_sampling())
    )
    assert first == same
    assert first != other
    assert negative == wrapped


def test_a_longer_limit_only_continues_a_response(model):
    requests = make_requests()
    short = responses(generate_with(model, requests, make_sampling(new=5)))
    long = responses(generate_with(model, requests, make_sampling(new=10)))
    assert all(b[: len(a)] == a for a, b in zip(short, long, strict=True))


def test_finish_says_how_a_response_ended(model):
    rollouts = generate_with(model, make_requests() * 4, make_sampling())
    assert {rollout.finish for rollout in rollouts} == set(FinishReason)
    for rollout in rollouts:
        stops = [token < 30 for token in rollout.response_ids.tolist()]
        assert not any(stops[:-1])
        assert stops[-1] == (rollout.finish is FinishReason.STOP)
        assert stops[-1] or len(stops) == 12


def test_a_response_of_one_end_token_is_recorded(model):
    rollouts = generate_with(model, make_requests(), make_sampling(stop=range(304)))
    assert all(len(rollout.response_ids) == 1 for rollout in rollouts)
    assert {rollout.finish for rollout in rollouts} == {FinishReason.STOP}


def test_samples_follow_the_softmax():
    """Pearson's statistic over a vocabulary of 6: its 1 - 1e-6 quantile at 5 degrees is 35.9."""
    model = make_model(seed=3, hidden=16, vocab=8, std=0.3)
    prompt = EncodedPrompt(0, np.array([3, 4], np.int32), np.array([1], np.int32))
    count = 4000
    requests = [SampleRequest(i, i, prompt) for i in range(count)]
    for kwargs, power in (({}, 1.0), ({"temperature": 0.5}, 2.0)):
        sampling = make_sampling(new=1, batch_size=1000, vocab_size=6, stop=(), **kwargs)
        seen = np.bincount(
            [rollout.response_ids[0] for rollout in generate_with(model, requests, sampling)],
            minlength=6,
        )
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[3, 4]])).logits[0, -1, :6]
        expected = (logits * power).softmax(-1).numpy() * count
        assert len(seen) == 6
        assert ((seen - expected) ** 2 / expected).sum() < 35.9


def test_the_second_token_is_independent_of_the_first_uniform():
    """One stream gives every token its own uniform: pairs fill the joint distribution."""
    torch.manual_seed(0)
    logits = torch.zeros(1, 4)
    sampling = make_sampling(new=2, vocab_size=4)
    rngs = [np.random.Generator(np.random.Philox(key=seed)).random(2) for seed in range(4000)]
    uniforms = torch.from_numpy(np.stack(rngs))
    first, _ = choose(logits.expand(4000, 4), uniforms[:, 0], sampling)
    second, _ = choose(logits.expand(4000, 4), uniforms[:, 1], sampling)
    pairs = torch.bincount(first * 4 + second, minlength=16).numpy()
    assert ((pairs - 250) ** 2 / 250).sum() < 56.5  # 1 - 1e-6 quantile at 15 degrees


# From logits to tokens.


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 5, 255, 256, 257, 700]),
    st.floats(0.0, 1.0, exclude_max=True),
)
def test_inverse_cdf_matches_a_plain_cumulated_sum(seed, vocab, uniform):
    rng = np.random.default_rng(seed)
    weights = (rng.random((3, vocab)) * (rng.random((3, vocab)) < 0.3)).astype(np.float32)
    weights[:, rng.integers(vocab)] = 0.5
    uniforms = np.array([uniform, 0.0, np.nextafter(1.0, 0.0)])
    got = inverse_cdf(torch.from_numpy(weights), torch.from_numpy(uniforms)).numpy()
    cdf = weights.astype(np.float64).cumsum(-1)
    for row, index in enumerate(got):
        target = uniforms[row] * cdf[row, -1]
        below = cdf[row, index - 1] if index else 0.0
        assert weights[row, index] > 0
        assert below - 1e-4 <= target <= cdf[row, index] + 1e-4


def test_inverse_cdf_is_exact_between_the_edges():
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    uniforms = torch.tensor([0.0, 0.24, 0.25, 0.74, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(weights.expand(6, 6), uniforms).tolist() == [1, 1, 3, 3, 4, 4]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.99))
def test_nucleus_keeps_the_fewest_ids_that_hold_top_p(seed, top_p):
    probs = np.random.default_rng(seed).dirichlet(np.full(20, 0.3), 4)
    kept = nucleus(torch.from_numpy(probs), top_p).numpy()
    for row, out in zip(probs, kept, strict=True):
        held = out[out > 0]
        assert np.array_equal(out[out > 0], row[out > 0])
        assert held.sum() >= top_p - 1e-9
        assert held.sum() - held.min() < top_p + 1e-9
        assert held.min() >= row[out == 0].max(initial=0.0)


def test_a_tiny_temperature_is_greedy():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 30
    uniforms = torch.full((5,), 0.999, dtype=torch.float64)
    cold = make_sampling(temperature=1e-30, vocab_size=None)
    greedy = make_sampling(temperature=0.0, vocab_size=None)
    assert torch.equal(choose(logits, uniforms, cold)[0], choose(logits, uniforms, greedy)[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padded_vocabulary_is_never_chosen_but_counts_in_the_logprob(temperature):
    logits = torch.zeros(50, 8)
    logits[:, 6:] = 9.0
    uniforms = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    sampling = make_sampling(temperature=temperature, vocab_size=6)
    ids, logprobs = choose(logits, uniforms, sampling)
    assert ids.max() < 6
    assert torch.allclose(logprobs, logits.log_softmax(-1)[:, 0])


# Snapshots and errors.


def test_load_in_place_equals_a_fresh_load(tiny_model_dir, tmp_path):
    other = save_model(tmp_path / "other", seed=5)
    different = make_model(seed=5)
    with torch.no_grad():
        for parameter in different.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    different.save_pretrained(other)
    moved, fresh = make_generator(), make_generator()
    moved.load(tiny_model_dir, 0)
    before = responses(moved.generate(make_requests()))
    held = moved._model
    moved.load(other, 1)
    fresh.load(other, 1)
    assert moved._model is held
    assert (moved.snapshot, moved.version) == (other, 1)
    after, expected = moved.generate(make_requests()), fresh.generate(make_requests())
    assert responses(after) == responses(expected) != before
    for a, b in zip(after, expected, strict=True):
        assert np.array_equal(a.logprobs, b.logprobs)


@pytest.mark.parametrize("kwargs", [{"layers": 1}, {"tied": False}])
def test_load_of_another_architecture_builds_anew(tiny_model_dir, tmp_path, kwargs):
    other = save_model(tmp_path / "other", seed=5, **kwargs)
    generator = make_generator()
    generator.load(tiny_model_dir, 0)
    generator.load(other, 1)
    reference = make_model(seed=5, **kwargs)
    for rollout in generator.generate(make_requests()):
        assert np.allclose(rollout.logprobs, full_logprobs(reference, rollout), atol=2e-5)


def test_load_in_place_reads_sharded_weights(tiny_model_dir, tmp_path):
    sharded = tmp_path / "sharded"
    make_model(seed=5).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    generator = make_generator()
    generator.load(tiny_model_dir, 0)
    held = generator._model
    generator.load(sharded, 1)
    assert generator._model is held
    for rollout in generator.generate(make_requests()):
        assert np.allclose(rollout.logprobs, full_logprobs(make_model(seed=5), rollout), atol=2e-5)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_truncated_snapshot_is_a_store_error_and_leaves_nothing_loaded(
    tiny_model_dir, tmp_path, is_first
):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    generator = make_generator()
    if not is_first:
        generator.load(tiny_model_dir, 0)
    with pytest.raises(StoreError, match="broken"):
        generator.load(broken, 1)
    assert generator.version is None
    with pytest.raises(AssertionError, match="load"):
        generator.generate(make_requests())
    generator.load(tiny_model_dir, 2)
    assert {rollout.version for rollout in generator.generate(make_requests())} == {2}


def test_a_missing_snapshot_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        make_generator().load(tmp_path / "nowhere", 0)


def test_the_teacher_as_writer_leaves_no_logprobs(tiny_teacher_dir):
    generator = make_generator(source="teacher")
    generator.load(tiny_teacher_dir, 0)
    assert all(rollout.logprobs is None for rollout in generator.generate(make_requests()))


def test_non_finite_weights_are_a_run_error():
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(RunError, match=r"sample 105 \(prompt 5\)"):
        generate_with(model, make_requests(), make_sampling())


def test_a_model_whose_weights_are_not_finite_is_named_as_it_is_loaded(tiny_teacher_dir, tmp_path):
    broken = shutil.copytree(tiny_teacher_dir, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    says = rf"the teacher {broken}: its weights are not finite \(model\.norm\.weight\)"
    with pytest.raises(ModelError, match=says):
        make_generator(source="teacher").load(broken, 0)


def test_a_sample_beyond_the_context_is_a_model_error(model):
    with pytest.raises(ModelError, match=r"17 tokens .* 500 .* 512.*max_new_tokens"):
        generate_with(model, make_requests(), make_sampling(new=500))
    with pytest.raises(ModelError, match="context of 512"):
        generate_with(model, make_requests([505]), make_sampling(new=8))
    generate_with(model, make_requests([504]), make_sampling(new=8))


# The data as the writer.


def test_dataset_completions_come_back_cut_at_the_limit():
    requests = make_requests([2, 2, 2])
    rollouts = DatasetGenerator(4).generate(requests)
    assert [len(rollout.response_ids) for rollout in rollouts] == [3, 4, 4]
    assert [str(rollout.finish) for rollout in rollouts] == ["stop", "stop", "length"]
    for ask, rollout in zip(requests, rollouts, strict=True):
        assert np.array_equal(rollout.response_ids, ask.prompt.completion_ids[:4])
        assert rollout.logprobs is None


@pytest.mark.parametrize("completion", [None, np.array([], np.int32)])
def test_dataset_without_completion_names_the_prompt_and_the_remedy(completion):
    ids = np.array([1], np.int32)
    ask = SampleRequest(0, 0, EncodedPrompt(41, ids, ids, completion))
    with pytest.raises(DataError, match=r"prompt 41 .*completion.*generate\.source"):
        DatasetGenerator(4).generate([ask])


def test_snapshot_without_weights_is_a_model_error(tmp_path):
    folder = Path(tmp_path) / "empty"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="empty"):
        make_generator().load(folder, 0)
