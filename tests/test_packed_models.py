"""Packed models: documents never see each other, and head(hidden) is the model's own logits."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from npd.errors import ModelError
from npd.models.lm_head import Head, head_of
from npd.models.loading import (
    PackedBatch,
    check_context,
    check_packable,
    hidden_states,
    load_model,
    pack_documents,
)
from npd.models.packed_attention import (
    Ability,
    Boundaries,
    Kernel,
    Request,
    Window,
    _on_device,
    choose,
    kernel_for,
    packed_attention,
    row_boundaries,
    row_of,
    varlen_kernel,
)
from npd.models.response_states import _first_fit, response_hidden
from tiny_model import make_model, make_tokenizer


def at(*bounds):
    return Boundaries(bounds)


def ids(*values):
    return np.array(values, dtype=np.int32)


@pytest.fixture(scope="module")
def packed(tiny_model_dir):
    return load_model(tiny_model_dir)


@pytest.fixture(scope="module")
def plain(tiny_model_dir):
    return load_model(tiny_model_dir, packed=False)


def logits(model, documents):
    with torch.no_grad():
        return head_of(model).logits(hidden_states(model, pack_documents(documents, "cpu")))


def plain_logits(model, document):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(document.astype(np.int64))[None]).logits[0]


def test_pack_documents_matches_its_example():
    batch = pack_documents([ids(5, 6), ids(7)], "cpu")
    assert batch.input_ids.tolist() == [[5, 6, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 0]]
    assert batch.cu_seqlens == (0, 2, 3)


@pytest.mark.parametrize("lengths", [(1,), (7, 3), (1, 1, 1), (5, 1, 19, 2)])
def test_packed_logits_are_those_of_each_document_alone(packed, plain, lengths):
    rng = np.random.default_rng(len(lengths))
    documents = [rng.integers(0, 300, n).astype(np.int32) for n in lengths]
    expected = torch.cat([plain_logits(plain, document) for document in documents])
    torch.testing.assert_close(logits(packed, documents), expected, atol=1e-5, rtol=1e-5)


def test_a_document_never_changes_another(packed):
    a, b, other = ids(10, 11, 12, 13), ids(40, 41, 42), ids(200, 7, 99, 150)
    torch.testing.assert_close(
        logits(packed, [a, b])[4:], logits(packed, [other, b])[4:], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        logits(packed, [b, a])[:3], logits(packed, [b, other])[:3], atol=1e-6, rtol=0
    )


def test_one_boundary_less_would_change_it(packed):
    """The check above can fail: the same row as one document gives other logits for B."""
    a, b, other = ids(10, 11, 12, 13), ids(40, 41, 42), ids(200, 7, 99, 150)

    def joined(first):
        row = pack_documents([first, b], "cpu")
        batch = PackedBatch(row.input_ids, row.position_ids, (0, 7))
        with torch.no_grad():
            return head_of(packed).logits(hidden_states(packed, batch))[4:]

    assert (joined(a) - joined(other)).abs().max() > 0.1


def test_missing_boundaries_raise(packed):
    batch = pack_documents([ids(5, 6), ids(7)], "cpu")
    with pytest.raises(AssertionError, match="without document boundaries"):
        packed(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)


def test_an_attention_mask_raises(packed):
    batch = pack_documents([ids(5, 6), ids(7)], "cpu")
    with (
        row_of(Boundaries(batch.cu_seqlens)),
        pytest.raises(AssertionError, match="takes none"),
    ):
        packed(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=torch.zeros(1, 1, 3, 3),
            use_cache=False,
        )


def sees(window, place, other):
    """Whether a token of a document sees another of it, one by one as the words have it."""
    if window is None or other > place:
        return other <= place
    if window.is_chunked:
        return place // window.size == other // window.size
    return place - other < window.size


@pytest.mark.parametrize("bounds", [(0, 1, 9), (0, 3, 9), (0, 9)])
@pytest.mark.parametrize("window", [None, Window(1), Window(3), Window(9), Window(3, True)])
def test_a_window_is_within_the_document(bounds, window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 9, 4, dtype=torch.float64) for n in (4, 2, 2))
    out, _ = packed_attention(nn.Module(), q, k, v, window, cu_seqlens=at(*bounds))
    seen = torch.zeros(9, 9, dtype=torch.bool)
    for start, end in pairwise(bounds):
        for place, other in product(range(end - start), repeat=2):
            seen[start + place, start + other] = sees(window, place, other)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) / 2
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    expected = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_a_layer_without_masks_says_its_window_itself():
    q = torch.randn(1, 2, 6, 4)
    told, _ = packed_attention(nn.Module(), q, q, q, None, cu_seqlens=at(0, 6), sliding_window=4)
    masked, _ = packed_attention(nn.Module(), q, q, q, Window(4), cu_seqlens=at(0, 6))
    plain, _ = packed_attention(nn.Module(), q, q, q, None, cu_seqlens=at(0, 6))
    assert torch.equal(told, masked)
    assert not torch.equal(told, plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4}},
        {"rope_parameters": {"a": {"rope_type": "dynamic"}}, "max_position_embeddings": 4},
        {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4},
    ],
)
def test_a_text_that_would_rotate_those_beside_it_otherwise_raises(settings):
    """Two of transformers' kinds choose the frequencies by the longest text of a batch."""
    module, q = nn.Module(), torch.zeros(1, 2, 9, 4)
    module.config = SimpleNamespace(**settings)
    packed_attention(module, q, q, q, None, cu_seqlens=at(0, 4, 8, 9))
    with pytest.raises(ModelError, match=r"text of 5 tokens exceeds .* 4"):
        packed_attention(module, q, q, q, None, cu_seqlens=at(0, 4, 9))


def test_boundaries_seen_in_inference_serve_training():
    with torch.inference_mode():
        _on_device((0, 5, 11), "cpu")
    assert not _on_device((0, 5, 11), "cpu").is_inference()


@pytest.mark.parametrize("feature", ["softcap", "s_aux", "position_bias"])
def test_attention_features_it_lacks_raise(feature):
    q = torch.zeros(1, 2, 6, 4)
    with pytest.raises(ModelError, match=feature):
        packed_attention(nn.Module(), q, q, q, None, cu_seqlens=at(0, 6), **{feature: 50.0})


def test_head_applies_bias_scale_and_softcap():
    torch.manual_seed(0)
    weight, bias, hidden = torch.randn(7, 3), torch.randn(7), torch.randn(5, 3)
    expected = 4.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 4.0)
    got = Head(weight, bias, scale=0.5, softcap=4.0).logits(hidden)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(Head(weight).logits(hidden), hidden @ weight.T)
    assert Head(weight.bfloat16()).logits(hidden).dtype == torch.float32


def save(model, path):
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("family", ["granite", "gemma2", "cohere"])
def test_head_of_knows_scaled_and_capped_families(family, tmp_path):
    import transformers as t

    common = {
        "vocab_size": 304,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    configs = {
        "granite": lambda: t.GraniteConfig(**common, logits_scaling=8.0),
        "gemma2": lambda: t.Gemma2Config(
            **common, head_dim=8, final_logit_softcapping=3.0, attn_logit_softcapping=None
        ),
        "cohere": lambda: t.CohereConfig(**common, logit_scale=0.25),
    }
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(configs[family]()).eval()
    loaded = load_model(save(model, tmp_path))
    head = head_of(loaded)
    assert head.scale != 1.0 or head.softcap is not None
    document = ids(3, 1, 4, 1, 5)
    torch.testing.assert_close(
        logits(loaded, [document]), plain_logits(model, document), atol=1e-4, rtol=1e-4
    )


def test_the_head_weight_is_the_models_own(packed):
    assert head_of(packed).weight is packed.get_output_embeddings().weight


@pytest.mark.parametrize("row_tokens", [1, 9, 20, 1000])
def test_response_hidden_is_the_state_before_each_token(packed, plain, row_tokens):
    rng = np.random.default_rng(3)
    shapes = [(1, 1), (4, 6), (2, 1), (7, 9), (1, 5)]
    pairs = [tuple(rng.integers(0, 300, n).astype(np.int32) for n in shape) for shape in shapes]
    seen = []
    with torch.no_grad():
        for row, hidden in response_hidden(packed, pairs, row_tokens):
            states = hidden.split([len(pairs[i][1]) for i in row])
            for i, state in zip(row, states, strict=True):
                context, response = pairs[i]
                whole = plain_logits(plain, np.concatenate([context, response]))
                expected = whole[len(context) - 1 : -1]
                torch.testing.assert_close(
                    head_of(packed).logits(state), expected, atol=1e-5, rtol=1e-5
                )
            seen += row
    assert sorted(seen) == list(range(len(pairs)))


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_first_fit_places_each_once_within_capacity(lengths, capacity):
    rows = _first_fit([(length, length) for length in lengths], capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[i] for i in row) <= capacity
    fits = [min(length, capacity) for length in lengths]
    assert len(rows) <= 2 * sum(fits) // capacity + 1


@pytest.mark.parametrize("vocab", [1, 304, 200_000])
def test_slices_cover_every_position_once(vocab):
    head = Head(torch.empty(vocab, 1))
    covered = [i for part in head.slices(700, 512) for i in range(700)[part]]
    assert covered == list(range(700))
    assert all(len(range(700)[part]) * vocab <= 2**23 for part in head.slices(700, 512))


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_model(tmp_path)


TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PACKABLE = {
    "Llama": TINY,
    "GPT2": GPT2,
    "Qwen3": {**TINY, "head_dim": 8},
    "Qwen3Moe": {**TINY, **MOE, "head_dim": 8},
    "Gemma3Text": {**TINY, "head_dim": 8},
    "Lfm2": {**TINY, "layer_types": ["conv", "full_attention"]},
    "Mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}
MIXING = {
    "Bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def family_dir(family, settings, path, std):
    """A saved random model of `family`; skips where this transformers has no such class."""
    import transformers

    config_class = getattr(transformers, f"{family}Config", None)
    if config_class is None:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**settings))
    for parameter in model.parameters() if std is not None else ():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=std)
    return save(model, path)


@pytest.mark.parametrize("family", PACKABLE)
def test_float32_models_are_checked_under_autocast_too(family, tmp_path):
    """As a trainer's is on a GPU, whose kernels differ by type."""
    model = load_model(family_dir(family, PACKABLE[family], tmp_path, 0.2))
    check_packable(model, compute_dtype="bfloat16")


def test_what_goes_wrong_under_autocast_only_is_refused(tmp_path):
    model = load_model(family_dir("Llama", TINY, tmp_path, 0.2))

    def forward(own, *args, **kwargs):
        bounds = row_boundaries()
        is_packed = bounds is not None and bounds.shared is None
        if torch.is_autocast_enabled("cpu") and is_packed:
            raise RuntimeError("no kernel for these heads")
        return own(*args, **kwargs)

    model = patched(model, "self_attn", forward)
    check_packable(model)
    with pytest.raises(ModelError, match="no kernel for these heads"):
        check_packable(model, compute_dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", PACKABLE)
def test_models_whose_documents_stay_apart_load(family, dtype, tmp_path):
    load_model(family_dir(family, PACKABLE[family], tmp_path, 0.2), dtype=dtype)


# With the larger weights, rounding in bfloat16 is as large as mixing.
@pytest.mark.parametrize("std", [0.2, 0.8, 1.0])
def test_rounding_of_a_deep_model_is_no_mixing(std, tmp_path):
    deep = {**TINY, "num_hidden_layers": 24}
    load_model(family_dir("Llama", deep, tmp_path, std), dtype="bfloat16")


@pytest.mark.parametrize(("std", "dtype"), [(None, "float32"), (0.2, "float32"), (0.2, "bfloat16")])
@pytest.mark.parametrize("family", MIXING)
def test_models_that_mix_documents_are_refused(family, std, dtype, tmp_path):
    directory = family_dir(family, MIXING[family], tmp_path, std)
    why = r"(mixes the documents of a packed row|uses custom attention code"
    why += r"|cannot take a packed row \(.*)"  # newer releases say so themselves
    with pytest.raises(ModelError, match=rf"{family}ForCausalLM\) {why}.*choose another model"):
        load_model(directory, dtype=dtype)


@pytest.mark.parametrize(
    ("source", "is_used"),
    [
        ("def varlen_attn(q, *, scale=None, window_size=(-1, -1)): ...", True),
        ("def varlen_attn(q, is_causal=False, return_aux=None): ...", False),
        ("def varlen_attn(q, *, window_size=(-1, -1)): ...", False),
        ("other = 1", False),
        ("import a_module_that_is_missing", False),
    ],
)
def test_a_varlen_kernel_that_cannot_be_causal_is_not_used(
    source, is_used, tmp_path, monkeypatch, request
):
    monkeypatch.syspath_prepend(tmp_path)
    name = f"varlen_of_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(source)
    assert (varlen_kernel(name) is not None) == is_used
    assert varlen_kernel("torch.no_such_module") is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attention_on_cuda_is_that_of_the_cpu(heads, scaling):
    torch.manual_seed(0)
    bounds = (0, 1, 70, 90, 219)
    inputs = [torch.randn(1, n, bounds[-1], 64).bfloat16() for n in (heads[0], heads[1], heads[1])]
    weight = torch.randn(1, bounds[-1], heads[0], 64)

    def run(device, dtype):
        qkv = [x.to(device, dtype).requires_grad_() for x in inputs]
        out, _ = packed_attention(nn.Module(), *qkv, None, scaling=scaling, cu_seqlens=at(*bounds))
        (out.float() * weight.to(device)).sum().backward()
        return [x.detach().float().cpu() for x in (out, *(x.grad for x in qkv))]

    for got, expected in zip(run("cuda", torch.bfloat16), run("cpu", torch.float32), strict=True):
        assert (got - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("has_gqa", [False, True])
def test_kernels_get_autocasts_type_once_a_row(packed, monkeypatch, has_gqa):
    """A model with float32 weights trains under autocast; its queries are float32 by then."""
    row = pack_documents([ids(5, 6, 7), ids(8, 9), ids(5, 6)], "cpu")
    calls = []

    def varlen(q, k, v, bounds_q, bounds_k, longest_q, longest_k, *, scale, window_size, gqa):
        calls.append((q.dtype, k.dtype, v.dtype))
        assert (longest_q, longest_k, window_size) == (3, 3, (-1, 0))
        assert bounds_q.tolist() == bounds_k.tolist() == [0, 3, 5, 7]
        assert (q.shape[1], k.shape[1], gqa) == ((4, 2, True) if has_gqa else (4, 4, False))
        parts = [
            nn.functional.scaled_dot_product_attention(
                *(x[start:end].transpose(0, 1) for x in (q, k, v)),
                is_causal=True, scale=scale, enable_gqa=gqa,
            ).transpose(0, 1)
            for start, end in ((0, 3), (3, 5), (5, 7))
        ]  # fmt: skip
        return torch.cat(parts)

    def older(*args, scale, window_size):
        return varlen(*args, scale=scale, window_size=window_size, gqa=False)

    def newer(*args, scale, window_size, enable_gqa=False):
        return varlen(*args, scale=scale, window_size=window_size, gqa=enable_gqa)

    with torch.autocast("cpu", torch.bfloat16):
        expected = hidden_states(packed, row)
        kernel = Kernel(newer if has_gqa else older, shares_heads=has_gqa)
        monkeypatch.setattr("npd.models.packed_attention.kernel_for", lambda request: kernel)
        got = hidden_states(packed, row)
    assert calls == [(torch.bfloat16,) * 3] * packed.config.num_hidden_layers
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02)


def banded(q, k, v, bounds, _, longest, __, *, scale, window_size, enable_gqa=False):
    """Attention [T, H, D] within documents as torch's kernel has it: so far back, so far ahead."""
    outputs = []
    for start, end in pairwise(bounds.tolist()):
        place = torch.arange(end - start)
        back = place[:, None] - place
        left, right = window_size
        seen = (back >= -right) & ((back <= left) | (left == -1))
        one = (x[start:end].transpose(0, 1) for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(
            *one, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(out.transpose(0, 1))
    assert longest == max(end - start for start, end in pairwise(bounds.tolist()))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, Window(3), Window(9), Window(4, is_chunked=True)])
@pytest.mark.parametrize("width", [16, 8])
def test_a_kernel_is_told_windows_and_given_wide_values(window, width, monkeypatch):
    torch.manual_seed(0)
    bounds = (0, 1, 8, 20)
    shapes = ((4, 16), (2, 16), (2, width))
    qkv = [torch.randn(1, heads, bounds[-1], size).bfloat16() for heads, size in shapes]
    expected, _ = packed_attention(nn.Module(), *qkv, window, cu_seqlens=at(*bounds))
    kernel = Kernel(banded, shares_heads=True)
    monkeypatch.setattr("npd.models.packed_attention.kernel_for", lambda request: kernel)
    got, _ = packed_attention(nn.Module(), *qkv, window, cu_seqlens=at(*bounds))
    assert got.shape == (1, bounds[-1], 4, width)
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02)


def test_attention_with_dropout_drops():
    qkv = [torch.ones(1, 2, 6, 8).bfloat16() for _ in range(3)]
    torch.manual_seed(0)
    out, _ = packed_attention(nn.Module(), *qkv, None, dropout=0.5, cu_seqlens=at(0, 6))
    assert not torch.equal(out, torch.ones_like(out)), "something was dropped"


OPTIONS = frozenset({"window_size", "scale"})
GQA = OPTIONS | {"enable_gqa"}
FAST, PLAIN, COPIED = (True, True), (False, True), (False, False)


@pytest.mark.parametrize(
    ("request_", "capability", "options", "expected", "why"),
    [
        ({}, (8, 0), GQA, FAST, None),
        ({}, (9, 0), GQA, FAST, None),
        ({}, (12, 0), GQA, FAST, None),
        ({"dtype": torch.float16}, (8, 6), GQA, FAST, None),
        ({"has_window": True}, (8, 0), GQA, FAST, None),
        ({"head_size": 256, "value_size": 256}, (9, 0), GQA, FAST, None),
        # DeepSeek's multi-head latent attention: values are padded.
        ({"head_size": 192, "value_size": 128}, (9, 0), GQA, FAST, None),
        # torch 2.11 has windows, and no heads that are shared.
        ({}, (9, 0), OPTIONS, (True, False), None),
        # torch 2.9 and 2.10
        ({}, (9, 0), frozenset(), PLAIN, "no variable-length kernel with windows"),
        ({}, (9, 0), frozenset({"is_causal"}), PLAIN, "no variable-length kernel with windows"),
        # T4 and V100: no flash attention either
        ({"dtype": torch.float16}, (7, 5), GQA, COPIED, "capability 7.5, and the kernel needs 8.0"),
        ({}, (7, 0), GQA, COPIED, "capability 7.0"),
        ({"dtype": torch.float32}, (9, 0), GQA, COPIED, "no torch.float32"),
        ({"head_size": 320, "value_size": 320}, (9, 0), GQA, COPIED, "heads have 320 values"),
        ({"head_size": 36, "value_size": 36}, (9, 0), GQA, PLAIN, "heads have 36 values"),
        ({"head_size": 64, "value_size": 128}, (9, 0), GQA, COPIED, "wider (128) than keys (64)"),
        ({"has_dropout": True}, (9, 0), GQA, PLAIN, "attention dropout"),
        ({"has_dropout": True, "has_window": True}, (9, 0), GQA, COPIED, "attention dropout"),
        # ROCm calls its GPUs cuda too, and has no compute capability.
        ({}, None, GQA, COPIED, "NVIDIA's GPUs only, not on this cuda"),
        ({"device": "xpu:0"}, None, GQA, COPIED, "not on this xpu"),
        ({"device": "cpu", "has_dropout": True}, None, GQA, PLAIN, None),
        ({"device": "cpu", "dtype": torch.float32}, None, GQA, PLAIN, None),
    ],
)
def test_kernels_are_chosen_by_what_they_can_do(request_, capability, options, expected, why):
    usual = {"device": "cuda:0", "dtype": torch.bfloat16, "head_size": 128, "value_size": 128}
    found = choose(Request(**{**usual, **request_}), Ability(capability, options))
    assert (found.is_varlen, found.shares_heads) == expected
    assert (found.why is None) == (why is None)
    assert why is None or why in found.why


def test_the_reason_against_the_fast_kernel_is_said_once(caplog):
    """Asked as on a GPU that is none of NVIDIA's; sizes that no other test asks for."""
    for size in (24, 40):
        request = Request("xpu:7", torch.bfloat16, size, size)
        assert kernel_for(request) == kernel_for(request) == Kernel(None, shares_heads=False)
    assert caplog.text.count("document by document, which is slower: torch's variable-length") == 1
    kernel_for(Request("hpu:7", torch.float32, 24, 24))
    assert "hpu" not in caplog.text, "float32 is the user's choice"


@pytest.mark.parametrize("window", [None, Window(3)])
def test_keys_that_are_copied_for_each_head_give_the_same(window, monkeypatch):
    torch.manual_seed(0)
    qkv = [torch.randn(1, heads, 20, 8) for heads in (6, 2, 2)]
    expected, _ = packed_attention(nn.Module(), *qkv, window, cu_seqlens=at(0, 1, 8, 20))
    kernel = Kernel(None, shares_heads=False)
    monkeypatch.setattr("npd.models.packed_attention.kernel_for", lambda request: kernel)
    got, _ = packed_attention(nn.Module(), *qkv, window, cu_seqlens=at(0, 1, 8, 20))
    torch.testing.assert_close(got, expected)


def test_tied_and_untied_models_load(tmp_path):
    for tied in (True, False):
        model = make_model(3, tied=tied)
        loaded = load_model(save(model, tmp_path / str(tied)))
        torch.testing.assert_close(
            logits(loaded, [ids(9, 8, 7)]), plain_logits(model, ids(9, 8, 7)), atol=1e-5, rtol=1e-5
        )


def test_threads_may_load_at_once(tiny_model_dir, tiny_teacher_dir):
    paths = [tiny_model_dir, tiny_teacher_dir] * 8
    expected = {path: load_model(path).state_dict() for path in paths[:2]}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(load_model, paths))
    for path, model in zip(paths, found, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[path][name])


@pytest.mark.parametrize(
    "says",
    [
        {"_attn_implementation": "eager"},
        {"attn_implementation": "sdpa"},
        {"_attn_implementation": {"": "eager"}},
        {"_attn_implementation": "flash_attention_3"},
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"use_cache": True},
    ],
    ids=str,
)
def test_the_config_of_a_model_does_not_choose_its_attention(says, tmp_path):
    directory = family_dir("Llama", TINY, tmp_path, 0.2)
    documents = [ids(9, 8, 7), ids(5, 6)]
    expected = logits(load_model(directory), documents)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **says}))
    assert torch.equal(logits(load_model(directory), documents), expected)
    writes = load_model(directory, packed=False)
    assert writes.config._attn_implementation == "sdpa"
    torch.testing.assert_close(plain_logits(writes, documents[0]), expected[:3], atol=1e-5, rtol=0)


MULTIMODAL = {
    "text_config": {**TINY, "head_dim": 8, "sliding_window": 4, "model_type": "gemma3_text"},
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "model_type": "siglip_vision_model",
    },
    "mm_tokens_per_image": 4,
    "image_token_index": 60,
    "boi_token_index": 61,
    "eoi_token_index": 62,
}


@pytest.mark.parametrize("owner", ["text_config", "vision_config"])
def test_the_configs_of_a_models_parts_do_not_choose_its_attention(owner, tmp_path):
    directory = family_dir("Gemma3", MULTIMODAL, tmp_path, 0.2)
    documents = [ids(9, 8, 7, 6, 5, 4), ids(5, 6)]
    expected = logits(load_model(directory), documents)
    config = json.loads((directory / "config.json").read_text())
    config[owner]["_attn_implementation"] = "eager"
    (directory / "config.json").write_text(json.dumps(config))
    model = load_model(directory)
    assert torch.equal(logits(model, documents), expected)
    configs = (model.config, model.config.text_config, model.config.vision_config)
    assert len({config._attn_implementation for config in configs}) == 1


def patched(model, name, forward):
    """The model with `forward(own, *args, **kwargs)` in place of a method of each attention."""
    for layer in model.model.layers:
        own = getattr(layer, name).forward
        getattr(layer, name).forward = partial(forward, own)
    return model


def looks_ahead(own, hidden_states, *args, **kwargs):
    """As code that is not causal: a token sees the one behind it, if it is the same document's."""
    bounds = row_boundaries()
    is_whole = bounds is None or bounds.shared is not None
    ends = {hidden_states.shape[1]} if is_whole else set(bounds.cu_seqlens)
    nexts = [t + 1 if t + 1 not in ends else t for t in range(hidden_states.shape[1])]
    return own(hidden_states + hidden_states[:, nexts], *args, **kwargs)


def shares_wrong(own, *args, **kwargs):
    """As code that takes each token of a row for one of whole documents."""
    bounds = row_boundaries()
    is_shared = bounds is not None and bounds.shared is not None
    with row_of(Boundaries((0, 5, 7)) if is_shared else bounds):
        return own(*args, **kwargs)


def forgets_boundaries(own, hidden_states, *args, **kwargs):
    bounds = row_boundaries()
    is_plain = bounds is not None and bounds.shared is None
    with row_of(Boundaries((0, hidden_states.shape[1])) if is_plain else bounds):
        return own(hidden_states, *args, **kwargs)


def is_not_finite_alone(own, hidden_states, *args, **kwargs):
    out, weights = own(hidden_states, *args, **kwargs)
    return (out * torch.nan if row_boundaries() is None else out), weights


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (is_not_finite_alone, "mixes the documents of a packed row"),
        (looks_ahead, "lets a token attend to later tokens"),
        (shares_wrong, "gives other results if documents share a prefix"),
        (forgets_boundaries, "uses custom attention code"),
    ],
)
def test_code_that_does_another_thing_with_a_row_is_refused(forward, says, tmp_path):
    model = load_model(family_dir("Llama", TINY, tmp_path, 0.2))
    check_packable(model)
    with pytest.raises(ModelError, match=rf"LlamaForCausalLM\) {says}"):
        check_packable(patched(model, "self_attn", forward))


def test_a_long_context_is_refused_before_a_model_is_loaded(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    directory = family_dir("Llama", {**TINY, "rope_parameters": rope}, tmp_path, None)
    check_context(directory, 512)
    with pytest.raises(ModelError, match=r"513 tokens .* context is 512"):
        check_context(directory, 513)
    settings = {**TINY, "original_max_position_embeddings": 64, "pad_token_id": 0}
    settings["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    directory = family_dir("Phi3", settings, tmp_path / "phi", None)
    check_context(directory, 64)
    with pytest.raises(ModelError, match=r"text of 65 tokens exceeds .* 64"):
        check_context(directory, 65)
