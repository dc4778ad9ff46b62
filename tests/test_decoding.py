"""The decode loop when rows change hands: refills, moves of the cache, shared prompts."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from npd.errors import ModelError
from npd.generate.decoding import (
    Draft,
    cache_name,
    decode,
    decode_attention,
    without_cudnn_attention,
)
from npd.generate.in_process import generate_with
from npd.generate.sampling import Sampling
from npd.types import EncodedPrompt, FinishReason, SampleRequest
from test_generate import full_logprobs
from tiny_model import make_model

VOCAB = 300  # the tiny model's embedding is padded to 304
TINY = {
    "vocab_size": 304,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
GEMMA = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 304}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES = {
    "GPT2": {"vocab_size": 304, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "Gemma3Text": {**TINY, **SLIDING, "head_dim": 8},
    # Layers that use the keys of others.
    "Gemma4Text": {**TINY, **SLIDING, **GEMMA, "head_dim": 8, "global_head_dim": 8}
    | {"num_kv_shared_layers": 2},
    # Keys and values of different sizes.
    "DeepseekV3": {**TINY, **MLA},
}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"vocab_size": 304, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
# Layers with a state in place of keys, beside them, and without any keys.
RECURRENT = {
    "Lfm2": {**TINY, "layer_types": ["conv", "full_attention"] * 2},
    "Qwen3_5Text": {**TINY, **LINEAR, "head_dim": 8}
    | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "FalconH1": {**TINY, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16}
    | {"mamba_d_ssm": 64},
    "Mamba": {**MAMBA, "initializer_range": 0.2},
    "Mamba2": {**MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 2, "initializer_range": 0.2},
}
FAMILIES |= RECURRENT


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_a_prompt_may_be_of_any_integer_type(model):
    requests = make_requests(3)
    prompts = [replace(a.prompt, prompt_ids=a.prompt.prompt_ids.astype(np.int64)) for a in requests]
    wide = [ask._replace(prompt=prompt) for ask, prompt in zip(requests, prompts, strict=True)]
    sampling = Sampling(5, frozenset(), 0)
    found, expected = (list(generate_with(model, given, sampling)) for given in (wide, requests))
    assert [r.response_ids.tolist() for r in found] == [r.response_ids.tolist() for r in expected]


def test_a_text_that_would_rotate_those_beside_it_otherwise_is_refused(model):
    requests = make_requests(2)
    longest = max(len(ask.prompt.prompt_ids) for ask in requests)
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": longest + 5}
    other = copy.copy(model)
    other.config = copy.copy(model.config)
    other.config.rope_parameters = scaling
    list(generate_with(other, requests, Sampling(5, frozenset(), 0)))
    with pytest.raises(ModelError, match="rotary positions depend on other texts"):
        list(generate_with(other, requests, Sampling(6, frozenset(), 0)))


def make_requests(count, group=1, longest=20, vocab=VOCAB):
    """`group` asks of each prompt; those of one prompt are not neighbours."""
    rng = np.random.default_rng(0)
    prompts = [
        EncodedPrompt(i, rng.integers(3, vocab, n).astype(np.int32), np.array([1], np.int32))
        for i, n in enumerate(rng.integers(2, longest + 1, count // group))
    ]
    return [SampleRequest(i, 7 * i + 1, prompts[i % len(prompts)]) for i in range(count)]


def make_limits(count, longest):
    """Lengths that spread as those of real responses do."""
    lengths = np.exp(np.random.default_rng(1).normal(np.log(longest / 4), 0.9, count))
    return [int(n) for n in lengths.clip(1, longest)]


def make_sampling(new, batch_size, stop=(), **kwargs):
    return Sampling(new, frozenset(stop), 0, batch_size=batch_size, vocab_size=VOCAB, **kwargs)


def alone(model, requests, limits, new):
    sampling = make_sampling(new, 1)
    return [
        generate_with(model, [ask], sampling, limits=[limit])[0]
        for ask, limit in zip(requests, limits, strict=True)
    ]


def assert_same(found, expected, atol=2e-5):
    for one, other in zip(found, expected, strict=True):
        assert one.sample_id == other.sample_id
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert np.allclose(one.logprobs, other.logprobs, atol=atol, rtol=0)


class Fed:
    """Shapes [rows, tokens] of what a model is fed while this is on."""

    def __init__(self, model):
        self.shapes = []
        self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self._hook.remove()

    @property
    def prompts(self):
        return [shape for shape in self.shapes if shape[1] > 1]

    @property
    def steps(self):
        return [rows for rows, width in self.shapes if width == 1]


@pytest.mark.parametrize("batch_size", [2, 5, 16])
def test_rows_that_change_hands_write_what_they_write_alone(model, batch_size):
    """Long enough that the cache is moved to the left and made anew several times."""
    limits = make_limits(20, 150)
    requests = make_requests(20)
    found = generate_with(model, requests, make_sampling(150, batch_size), limits=limits)
    assert [len(rollout.response_ids) for rollout in found] == limits
    assert {rollout.finish for rollout in found} == {FinishReason.LENGTH}
    assert_same(found, alone(model, requests, limits, 150))


@pytest.mark.parametrize("batch_size", [1, 3, 8, 12])
def test_samples_of_one_prompt_read_it_once(model, batch_size):
    requests = make_requests(24, group=8)
    limits = make_limits(24, 40)
    with Fed(model) as fed:
        found = generate_with(model, requests, make_sampling(40, batch_size), limits=limits)
    assert sum(rows for rows, _ in fed.prompts) == 3
    assert_same(found, alone(model, requests, limits, 40))


def test_equal_prompts_of_different_records_share_their_reading_only(model):
    ids = np.array([5, 6, 7], np.int32)
    requests = [
        SampleRequest(i, i, EncodedPrompt(i, ids.copy(), ids[:1], teacher=f"t{i}"))
        for i in range(3)
    ]
    with Fed(model) as fed:
        found = generate_with(model, requests, make_sampling(5, 3))
    assert fed.prompts == [(1, 3)]
    assert [(r.prompt_index, r.teacher) for r in found] == [(0, "t0"), (1, "t1"), (2, "t2")]
    assert len({tuple(r.response_ids.tolist()) for r in found}) == 3


def test_rows_stay_full_while_asks_wait(model):
    limits = [3] * 60 + [50] * 4
    requests = make_requests(64)
    with Fed(model) as fed:
        generate_with(model, requests, make_sampling(50, 8), limits=limits)
    # The first token of each response comes of its prompt.
    needed = sum(limits) - len(limits)
    assert needed <= sum(fed.steps) <= needed + 8
    assert max(fed.steps) == 8


def test_few_rows_at_once_are_given_away_or_dropped_together(model):
    limits = list(range(2, 34))
    with Fed(model) as fed:
        generate_with(model, make_requests(32), make_sampling(40, 32), limits=limits)
    assert set(fed.steps) <= {32, 28, 24, 21, 18, 15, 13, 11, 9, 7, 6, 5, 4, 3, 2, 1}


def test_responses_that_end_with_their_first_token_leave_no_row_idle(model):
    requests = make_requests(40)
    with Fed(model) as fed:
        found = generate_with(model, requests, make_sampling(9, 4), limits=[1] * 40)
    assert fed.steps == []
    assert [len(rollout.response_ids) for rollout in found] == [1] * 40


def test_a_limit_and_a_stop_meet_in_one_token(model):
    draft = Draft(make_requests(1)[0], 1)
    decode(model, [draft], make_sampling(1, 1, stop=range(304)))
    assert draft.is_done
    assert draft.rollout(2, True).finish is FinishReason.STOP
    assert draft.rollout(2, False).logprobs is None


def of_family(family):
    """A random model; skips where this transformers has no such class."""
    import transformers

    config_class = getattr(transformers, f"{family}Config", None)
    if config_class is None:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    config = config_class(**FAMILIES[family], **ENDS)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if family in RECURRENT:
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("family", RECURRENT)
def test_a_state_goes_with_its_row(family):
    """A sample depends on no neighbour, while rows join, leave and move together in one batch."""
    model = of_family(family)
    requests, limits = make_requests(20, longest=9), make_limits(20, 90)
    with Fed(model) as fed:
        found = generate_with(model, requests, make_sampling(90, 5), limits=limits)
    assert max(fed.steps) == 5
    assert_same(found, alone(model, requests, limits, 90), atol=1e-4)
    fewer = generate_with(model, requests[::3], make_sampling(90, 5), limits=limits[::3])
    assert_same(fewer, found[::3], atol=1e-4)


def test_prompts_of_one_length_are_prefilled_together_before_a_state():
    model = of_family("Lfm2")
    prompts = [np.arange(3, 3 + n, dtype=np.int32) + i for i, n in enumerate((4, 6, 4, 6, 6))]
    requests = [
        SampleRequest(i, i, EncodedPrompt(i, ids, ids[:1])) for i, ids in enumerate(prompts)
    ]
    with Fed(model) as fed:
        generate_with(model, requests, make_sampling(2, 5))
    assert fed.prompts == [(3, 6), (2, 4)]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_match_a_full_forward_pass_when_rows_change_hands(family):
    model = of_family(family)
    requests, limits = make_requests(9, group=2), make_limits(9, 80)
    for rollout in generate_with(model, requests, make_sampling(80, 3), limits=limits):
        assert np.allclose(rollout.logprobs, full_logprobs(model, rollout), atol=5e-5, rtol=0)


def test_a_row_that_is_done_needs_no_more_positions_than_the_model_has():
    """One row of 16 is done at the end of the context, too few to be given away, while others go on
    that joined later."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**FAMILIES["GPT2"], n_positions=24, **ENDS)).eval()
    ids = np.array([3, 4, 5, 6], np.int32)
    requests = [SampleRequest(i, i, EncodedPrompt(i, ids, ids[:1])) for i in range(31)]
    limits = [20] + [10] * 15 + [20] * 15
    found = generate_with(model, requests, make_sampling(20, 16), limits=limits)
    assert_same(found, alone(model, requests, limits, 20))


class Older(torch.nn.Module):
    def forward(self, input_ids, past_key_values=None, **kwargs): ...


class Newer(torch.nn.Module):
    def forward(self, input_ids, cache=None, **kwargs): ...


class WithoutAttention(torch.nn.Module):
    def forward(self, input_ids, cache_params=None, **kwargs): ...


class OfItsOwn(torch.nn.Module):
    def forward(self, input_ids, past_key_values=None, cache=None): ...


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        (Older, "past_key_values"),
        (Newer, "cache"),
        (OfItsOwn, "past_key_values"),
        (WithoutAttention, "cache_params"),
    ],
)
def test_a_cache_is_given_under_the_name_that_the_model_knows(architecture, name):
    assert cache_name(architecture()) == name


def test_a_state_outside_of_the_cache_is_one_clear_error():
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(vocab_size=304, hidden_size=32, num_hidden_layers=2, context_length=64)
    with pytest.raises(ModelError, match=r"outside of its cache.*generate\.engine"):
        generate_with(RwkvForCausalLM(config).eval(), make_requests(2), make_sampling(4, 2))


def test_decoding_keeps_off_cudnns_attention_which_plans_for_every_length(model):
    """It comes first on newer GPUs; what holds outside is as before, also after errors."""
    seen = []

    def watch(module, *_):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())

    handle = model.base_model.register_forward_pre_hook(watch)
    try:
        for outside in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(outside)
            generate_with(model, make_requests(4), make_sampling(5, 2))
            assert torch.backends.cuda.cudnn_sdp_enabled() is outside
            with pytest.raises(ZeroDivisionError), decode_attention(model):
                raise ZeroDivisionError
            assert torch.backends.cuda.cudnn_sdp_enabled() is outside
            one, other = without_cudnn_attention(), without_cudnn_attention()
            one.__enter__()
            other.__enter__()
            one.__exit__(None, None, None)  # the first to begin ends first, as threads may
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            other.__exit__(None, None, None)
            assert torch.backends.cuda.cudnn_sdp_enabled() is outside
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
        handle.remove()
    assert seen
    assert not any(seen)
