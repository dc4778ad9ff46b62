"""Architectures of transformers, tiny and random: what npd takes is right, what it refuses is said.

Taken: a packed row's states are those of each document alone under the architecture's own code, in
rows that share contexts too, its gradients are theirs, and a sample's log-probs are those it is
scored with. Every window is shorter than the documents.
"""

import numpy as np
import pytest
import torch
from torch import nn

from npd.errors import ModelError
from npd.generate.in_process import check_decoding, generate_with, too_far
from npd.generate.sampling import Sampling
from npd.models.lm_head import head_of
from npd.models.loading import check_weights, hidden_states, load_model, pack_documents
from npd.models.replica import check_packing, check_writing, make, shrunk
from npd.models.response_states import response_hidden
from npd.train.trainer import recompute_activations
from npd.types import EncodedPrompt, SampleRequest

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
GPT2 |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEAD = {"head_dim": 8}
WINDOW = {"sliding_window": 4}
# One name or another is each family's.
MOE = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
MOE |= {"num_experts_per_tok": 2, "moe_k": 2, "moe_num_shared_experts": 1, "n_shared_experts": 1}
MOE |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
MOE |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8, "head_dim": 8}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 4}
HALF = {"layer_types": ["sliding_attention", "full_attention"]}

TAKEN = {
    "Llama": TINY,
    "GPT2": GPT2,
    "Mistral": TINY | WINDOW,
    "Qwen2": TINY | WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "Qwen2Moe": TINY | MOE | WINDOW | {"use_sliding_window": True, "max_window_layers": 0},
    "Qwen3Moe": TINY | MOE | HEAD,
    "Mixtral": TINY | MOE | WINDOW,
    "Phimoe": TINY | MOE | WINDOW,
    "Gemma3Text": TINY | HEAD | WINDOW | HALF,
    "Afmoe": TINY | MOE | HEAD | WINDOW | HALF,
    "Llama4Text": TINY
    | HEAD
    | {
        "num_local_experts": 4,
        "intermediate_size_mlp": 64,
        "attention_chunk_size": 4,
        "layer_types": ["chunked_attention", "full_attention"],
    },
}
MORE_TAKEN = {
    "Apertus": TINY,
    "Arcee": TINY,
    "BioGpt": {k: v for k, v in TINY.items() if k != "num_key_value_heads"},
    "BitNet": TINY,
    "Cohere": TINY,
    "Cohere2": TINY | WINDOW | HALF,
    "Cwm": TINY | HEAD | WINDOW | HALF,
    "DeepseekV2": TINY | MOE | LATENT,
    "DeepseekV3": TINY | MOE | LATENT,
    "DiffLlama": TINY | HEAD,
    "Dots1": TINY | MOE | HEAD,
    "Ernie4_5": TINY | HEAD,
    "Ernie4_5_Moe": TINY | MOE,
    "Exaone4": TINY | WINDOW | HALF,
    "FlexOlmo": TINY | MOE,
    "GPTNeoX": TINY,
    "Gemma": TINY | HEAD,
    "Glm": TINY | HEAD,
    "Glm4": TINY | HEAD,
    "Glm4Moe": TINY | MOE | HEAD,
    "Granite": TINY | {"logits_scaling": 3.0},
    "GraniteMoe": TINY | MOE,
    "GraniteMoeShared": TINY | MOE | {"shared_intermediate_size": 16},
    "Helium": TINY | HEAD,
    "HunYuanDenseV1": TINY | HEAD,
    "JetMoe": TINY | {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "MiniCPM3": TINY | LATENT,
    "NanoChat": TINY,
    "OPT": {
        "vocab_size": 96,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
    },
    "Olmo": TINY,
    "Olmo2": TINY,
    "Olmo3": TINY | WINDOW | HALF,
    "Olmoe": TINY | MOE,
    "Persimmon": TINY,
    "Phi": TINY,
    "Phi3": TINY | WINDOW,
    "Qwen3": TINY | HEAD | WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "SeedOss": TINY | HEAD,
    "Nemotron": TINY,
    "SmolLM3": TINY,
    "StableLm": TINY,
    "Starcoder2": TINY | WINDOW,
}
# Token mixers that are recurrent or convolutional, with attention in some layers or in none.
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
CONV = {"layer_types": ["conv", "full_attention"]}
MAMBA = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
SSM = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 4}
HYBRID = {
    "Lfm2": TINY | CONV,
    "Qwen3Next": TINY | MOE | HEAD | LINEAR | MIXED,
    "Mamba": MAMBA,
    "FalconH1": TINY | SSM | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "RecurrentGemma": TINY
    | HEAD
    | {"lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
}
MORE_HYBRID = {
    "Bamba": TINY | SSM | {"attn_layer_indices": [1]},
    "FalconMamba": MAMBA,
    "GraniteMoeHybrid": TINY | MOE | SSM | MIXED | {"shared_intermediate_size": 32},
    "Jamba": TINY
    | {"num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4}
    | {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinear": TINY | MOE | LATENT | MIXED | {"linear_head_dim": 8, "linear_num_heads": 4},
    "Lfm2Moe": TINY | MOE | CONV | {"num_dense_layers": 1},
    "Mamba2": MAMBA | {"num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 4},
    "MiniMax": TINY | MOE | HEAD | {"block_size": 8},
    "NemotronH": TINY
    | MOE
    | HEAD
    | {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2}
    | {"chunk_size": 4, "moe_shared_expert_intermediate_size": 16, "num_hidden_layers": 4}
    | {"layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"]},
    "OlmoHybrid": TINY | LINEAR | MIXED | {"linear_num_value_heads": 2},
    "Qwen3_5MoeText": TINY | MOE | HEAD | LINEAR | MIXED,
    "Qwen3_5Text": TINY | HEAD | LINEAR | MIXED,
    "Rwkv": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    "Zamba": TINY
    | {"num_key_value_heads": 4, "n_mamba_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4}
    | {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1},
    "Zamba2": TINY
    | {"num_key_value_heads": 4, "n_mamba_heads": 4, "mamba_d_state": 8, "chunk_size": 4}
    | {"num_hidden_layers": 3}
    | {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
    "Zaya": TINY | MOE | HEAD | {"router_hidden_size": 16, "num_experts_per_tok": 1},
    "xLSTM": MAMBA | {"num_heads": 4, "chunk_size": 8},
}
# What decoding in process says of those that only score and train.
UNWRITTEN = {
    "MiniMax": "cannot generate in process",
    # Newer releases put its state in the cache, and not all of it.
    "RecurrentGemma": "(keeps a state outside of its cache|nats per token off|cannot generate)",
    "Rwkv": "keeps a state outside of its cache",
    "xLSTM": "cannot generate in process",
}
WITHOUT_REPLICA = {"DeepseekV3", "Zamba", "Zamba2", "xLSTM"}
TAKEN |= HYBRID
MORE_TAKEN |= MORE_HYBRID
OWN = "custom attention code, which cannot be replaced"
UNUSED = "uses custom attention code instead"
# Why a row cannot be packed, and what decoding says: nothing where it is right.
REFUSED = {
    "CodeGen": (GPT2 | {"n_ctx": 256, "rotary_dim": 4}, UNUSED, ""),
    "Gemma2": (TINY | HEAD | WINDOW, "scores that are capped (softcap), which npd does not", ""),
    "GptOss": (TINY | MOE | HEAD | WINDOW, "attention sinks (s_aux), which npd does not", ""),
    "GPTJ": (GPT2 | {"rotary_dim": 4}, OWN, ""),
    "Doge": (
        TINY | {"keep_window_size": 8},
        "cannot take a packed row",
        "cannot generate in process",
    ),
}
MORE_REFUSED = {
    "Bloom": ({"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}, UNUSED, ""),
    "Falcon": (TINY, OWN, ""),
    "GPTNeo": (
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        OWN,
        "",
    ),
    "GPTNeoXJapanese": (TINY, UNUSED, ""),
    "InklingText": (
        TINY
        | MOE
        | HEAD
        | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}
        | {"sliding_window_size": 4, "local_layer_ids": [0], "d_rel": 4, "rel_extent": 16}
        | {"mlp_layer_types": ["dense", "sparse"]},
        "an attention bias by position (position_bias), which npd does not",
        "",
    ),
    "Mpt": (
        {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
        "cannot take a packed row",
        "",
    ),
    "VaultGemma": (TINY | HEAD | WINDOW, "capped (softcap)", ""),
    "XGLM": (
        {
            "vocab_size": 96,
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 256,
        },
        UNUSED,
        "",
    ),
}


# Refused by older releases of transformers, right in later ones.
UP_TO_DATE = {"CodeGen", "GPTJ"}


def is_newer(says):
    """Whether a release of transformers refuses packed rows of its own accord."""
    return "can't keep packed seque" in says


def slow(names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def saved(family, settings, path):
    """A directory of a random model of `family` whose weights have opinions."""
    import transformers

    config_class = getattr(transformers, f"{family}Config", None)
    if config_class is None:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**settings))
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 or "bias" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    return path


@torch.no_grad()
def states_alone(path, documents):
    """States [L, d] of each document, by the architecture's own code and nothing of npd's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    backbone = getattr(model, model.base_model_prefix, None) or model.model
    inputs = [torch.from_numpy(document).long()[None] for document in documents]
    return [backbone(input_ids=ids, use_cache=False).last_hidden_state[0] for ids in inputs]


def random_ids(count, seed):
    return np.random.default_rng(seed).integers(3, 90, count).astype(np.int32)


@torch.no_grad()
def check_rows(model, path):
    documents = [random_ids(n, n) for n in (11, 3, 17)]
    packed = hidden_states(model, pack_documents(documents, "cpu"))
    expected = torch.cat(states_alone(path, documents))
    torch.testing.assert_close(packed, expected, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def check_shared_rows(model, path):
    context = random_ids(17, 0)
    pairs = [(context, random_ids(n, n)) for n in (6, 1, 9)]
    alone = states_alone(path, [np.concatenate(pair) for pair in pairs])
    for members, states in response_hidden(model, pairs, 64, share=True):
        expected = torch.cat([alone[i][len(context) - 1 : -1] for i in members])
        torch.testing.assert_close(states, expected, atol=2e-4, rtol=1e-3)


def check_gradients(model, path):
    """A step's gradients against plain autograd over the documents one by one."""
    documents = [random_ids(n, n) for n in (11, 3, 17, 5)]
    head = head_of(model)
    states = hidden_states(model, pack_documents(documents, "cpu"))
    # Between a row's forward and backward pass another row may be run.
    with torch.no_grad():
        hidden_states(model, pack_documents(documents[:1], "cpu"))
    logprobs = head.logits(states).log_softmax(dim=-1)
    targets = torch.from_numpy(np.concatenate(documents)).long().roll(-1)
    logprobs.gather(1, targets[:, None]).sum().backward()

    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").train()
    start = 0
    for document in documents:
        ids = torch.from_numpy(document).long()[None]
        found = plain(input_ids=ids, use_cache=False).logits[0].log_softmax(dim=-1)
        end = start + len(document)
        found.gather(1, targets[start:end, None]).sum().backward()
        start = end
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert expected.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in expected:
            size = expected[name].norm().clamp(min=1e-3)
            assert (parameter.grad - expected[name]).norm() / size < 1e-4, name


@torch.no_grad()
def check_samples(model, path):
    prompts = [random_ids(n, n) for n in (7, 2, 12)]
    requests = [
        SampleRequest(i, i, EncodedPrompt(i, prompt, prompt)) for i, prompt in enumerate(prompts)
    ]
    writer = load_model(path, packed=False)
    for rollout in generate_with(writer, requests, Sampling(9, frozenset(), 0, 1.0, 1.0, 2)):
        response = torch.from_numpy(rollout.response_ids).long()[:, None]
        whole = np.concatenate([rollout.prompt_ids, rollout.response_ids])
        states = hidden_states(model, pack_documents([whole], "cpu"))
        logprobs = head_of(model).logits(states).log_softmax(dim=-1)
        scored = logprobs[len(rollout.prompt_ids) - 1 : -1].gather(1, response)[:, 0]
        np.testing.assert_allclose(rollout.logprobs, scored.numpy(), atol=1e-3)


@pytest.mark.parametrize("family", [*TAKEN, *slow(MORE_TAKEN)])
def test_what_is_taken_is_right(family, tmp_path):
    saved(family, (TAKEN | MORE_TAKEN)[family], tmp_path)
    check_weights(tmp_path)
    model = load_model(tmp_path)
    check_rows(model, tmp_path)
    check_shared_rows(model, tmp_path)
    if family not in UNWRITTEN:
        check_samples(model, tmp_path)
        return
    with pytest.raises(ModelError, match=UNWRITTEN[family]):
        check_decoding(load_model(tmp_path, packed=False))


@pytest.mark.parametrize("is_recomputed", [False, True])
@pytest.mark.parametrize("family", ["Llama", *HYBRID, *slow(MORE_HYBRID)])
def test_gradients_of_a_row_are_those_of_its_documents(family, is_recomputed, tmp_path):
    saved(family, TAKEN[family] if family in TAKEN else MORE_TAKEN[family], tmp_path)
    model = load_model(tmp_path).train()
    if is_recomputed:
        if not model.supports_gradient_checkpointing:
            pytest.skip("this architecture cannot recompute activations")
        recompute_activations(model)
    check_gradients(model, tmp_path)


@pytest.mark.parametrize("family", [*REFUSED, *slow(MORE_REFUSED)])
def test_what_is_refused_is_named_with_its_role_and_reason(family, tmp_path):
    settings, unpacked, unwritten = (REFUSED | MORE_REFUSED)[family]
    saved(family, settings, tmp_path)
    try:
        taken = load_model(tmp_path, role="student")
    except ModelError as error:
        says = str(error)
    else:
        assert family in UP_TO_DATE
        check_rows(taken, tmp_path)
        check_shared_rows(taken, tmp_path)
        check_samples(taken, tmp_path)
        return
    assert says.startswith(f"the student {tmp_path}: this architecture (")
    assert unpacked in says or is_newer(says)
    assert "choose another model" in says
    assert "\n" not in says
    writer = load_model(tmp_path, packed=False)
    if not unwritten:
        check_decoding(writer)
        return
    with pytest.raises(ModelError, match=unwritten):
        check_decoding(writer)


@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe", "Gemma3Text", "Mixtral"])
def test_rounding_to_bfloat16_is_no_refusal(family, tmp_path):
    saved(family, TAKEN[family], tmp_path)
    load_model(tmp_path, dtype="bfloat16")
    check_decoding(load_model(tmp_path, dtype="bfloat16", packed=False))


def test_one_text_apart_by_rounding_is_no_refusal_and_all_texts_are():
    measured = [1.155, 0.040, 0.082, 0.019, 0.062, 0.061]  # a pruned SmolLM2 in bfloat16
    assert too_far(measured, torch.bfloat16) is None
    assert too_far(measured, torch.float32) == 1.155
    assert too_far([1.3] * 6, torch.bfloat16) == pytest.approx(1.3)
    assert too_far([0.0] * 5 + [float("nan")], torch.bfloat16) is not None


@pytest.mark.parametrize("family", ["XGLM", "GPTNeoXJapanese", "Bloom"])
def test_rounding_to_bfloat16_hides_no_attention_that_is_not_used(family, tmp_path):
    saved(family, (REFUSED | MORE_REFUSED)[family][0], tmp_path)
    with pytest.raises(ModelError, match=UNUSED):
        load_model(tmp_path, dtype="bfloat16")


def enlarged(family, settings):
    """A config of sizes such as real models have; nothing of that size is made."""
    import transformers

    config_class = getattr(transformers, f"{family}Config", None)
    if config_class is None:
        pytest.skip(f"this transformers has no {family}")
    names = ("hidden_size", "n_embd", "intermediate_size", "vocab_size", "head_dim")
    names += ("mamba_d_head", "mamba_d_ssm")
    counts = ("num_attention_heads", "num_key_value_heads", "n_head", "num_experts")
    wider = {k: v * 16 if k in (*names, *counts) else v for k, v in settings.items()}
    return config_class(**wider)


@pytest.mark.parametrize("family", [*TAKEN, *slow(MORE_TAKEN)])
def test_an_architecture_is_known_from_a_replica(family):
    """And the replica is one: its own code runs it. Not of all, which the load check is for."""
    config = enlarged(family, (TAKEN | MORE_TAKEN)[family])
    check_packing(config)
    if family in UNWRITTEN and family not in WITHOUT_REPLICA:
        with pytest.raises(ModelError, match=UNWRITTEN[family]):
            check_writing(config, check_decoding)
    else:
        check_writing(config, check_decoding)
    if family not in WITHOUT_REPLICA:
        assert make(shrunk(config), None).num_parameters() < 1e6


@pytest.mark.parametrize("family", [*REFUSED, *slow(MORE_REFUSED)])
def test_an_architecture_is_refused_by_a_replica(family):
    settings, unpacked, unwritten = (REFUSED | MORE_REFUSED)[family]
    config = enlarged(family, settings)
    says = ""
    try:
        check_packing(config)
    except ModelError as error:
        says = str(error)
    assert unpacked in says or is_newer(says) or (not says and family in UP_TO_DATE)
    if not unwritten:
        check_writing(config, check_decoding)
        return
    with pytest.raises(ModelError, match=unwritten):
        check_writing(config, check_decoding)


def test_a_config_that_makes_no_replica_says_nothing():
    import transformers

    config = transformers.LlamaConfig(**TINY)
    config.hidden_act = "no such function"
    check_packing(config)
    assert make(shrunk(config), None) is None
