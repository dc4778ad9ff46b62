"""Weights of a model directory: those of its architecture, by name and shape, or refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from npd.errors import ModelError
from npd.models.loading import check_weights, load_model
from test_architectures import REFUSED, UNUSED, saved
from test_packed_models import GPT2, MOE, TINY, family_dir

LLAMA = ("Llama", {**TINY, "tie_word_embeddings": False})
TIED = ("Llama", {**TINY, "tie_word_embeddings": True})
MIXTRAL = ("Mixtral", {**TINY, "num_local_experts": 4})
DEEPSEEK = ("Dots1", {**TINY, **MOE, "n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 8})
DEEPSEEK[1].update(n_group=1, topk_group=1, first_k_dense_replace=1)


def rewritten(directory, change):
    """The directory with `change` made of the tensors of its only file."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return directory


def configured(directory, **settings):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return directory


def without(*parts):
    return lambda tensors: {
        name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)
    }


def named(change):
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def plus(name, *shape):
    return lambda tensors: {**tensors, name: torch.zeros(*shape)}


def halved(part):
    return lambda tensors: {
        name: tensor[:16].clone() if part in name else tensor for name, tensor in tensors.items()
    }


LAYER = "model.layers.1.mlp."
WRONG = {
    "a part of a layer is lost": (
        *LLAMA,
        without("layers.1.mlp"),
        r"3 tensors of LlamaForCausalLM are missing from its weights and would be random: "
        rf"{LAYER}down_proj.weight, {LAYER}gate_proj.weight, {LAYER}up_proj.weight\. Copy",
    ),
    "one tensor is lost": (
        *LLAMA,
        without("model.norm"),
        r"1 tensor of LlamaForCausalLM is missing .*: model.norm.weight\.",
    ),
    "compiled": (
        *LLAMA,
        named("_orig_mod.{}".format),
        r"and 18 more\. Its names begin with '_orig_mod.', from a wrapper",
    ),
    "of one process of several": (*LLAMA, named("module.{}".format), "begin with 'module.'"),
    "renamed": (*LLAMA, named("student.{}".format), "21 tensors .* would be random"),
    "no head": (*LLAMA, without("lm_head"), r"lm_head.weight\. Set \"tie_word_embeddings\": true"),
    "neither of two tied": (*TIED, without("embed", "lm_head"), "model.embed_tokens.weight"),
    "another shape": (
        *LLAMA,
        halved("q_proj"),
        r"2 tensors of its weights are not of the shape .*LlamaForCausalLM: "
        r"model.layers.0.self_attn.q_proj.weight \(\[16, 32\], not \[32, 32\]\)",
    ),
    "a bias too many": (
        *LLAMA,
        plus("model.layers.0.self_attn.q_proj.bias", 32),
        r"of no module of LlamaForCausalLM: .*q_proj.bias\. Restore its own",
    ),
    "a layer too many": (*LLAMA, plus("model.layers.2.mlp.up_proj.weight", 64, 32), "no module"),
    "a norm too many": (*LLAMA, plus("model.layers.0.self_attn.q_norm.weight", 8), "no module"),
    "a bias of the head": (*LLAMA, plus("lm_head.bias", 64), "lm_head.bias"),
    "a norm beside the layers": (*LLAMA, plus("model.embed_norm.weight", 32), "embed_norm"),
    "an expert is lost": (*MIXTRAL, without("experts.3."), r"\[3, 32, 64\], not \[4, 32, 64\]"),
    "a part of an expert is lost": (
        *MIXTRAL,
        without("layers.1.block_sparse_moe.experts.3.w1"),
        r"1 tensor of experts missing .*: model.layers.1.block_sparse_moe.experts.3.w1.weight",
    ),
    "a bias of GPT-2 is lost": (
        "GPT2",
        GPT2,
        without("h.1.attn.c_attn.bias"),
        "transformer.h.1.attn.c_attn.bias",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_weights_that_are_not_the_architectures_are_refused_with_their_names(kind, tmp_path):
    """From the headers, and again as they are loaded, in the same words."""
    family, settings, change, says = WRONG[kind]
    directory = rewritten(family_dir(family, settings, tmp_path, 0.2), change)
    with pytest.raises(ModelError, match=says) as unread:
        check_weights(directory)
    for packed in (True, False):
        with pytest.raises(ModelError) as loaded:
            load_model(directory, role="teacher", packed=packed)
        assert str(loaded.value) == f"the teacher {directory}: {unread.value}"
    assert "\n" not in str(unread.value)


def legacy_gpt2(tensors):
    """As the first GPT-2 files are: no prefix, and buffers of the causal mask."""
    return {
        **{name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        "h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
    }


RIGHT = {
    "tied": (*TIED, lambda tensors: tensors),
    "tied, both written": (
        *TIED,
        lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()},
    ),
    "tied, only the head": (
        *TIED,
        lambda t: {"lm_head.weight" if "embed" in name else name: x for name, x in t.items()},
    ),
    "without the body's prefix": (*LLAMA, named(lambda name: name.removeprefix("model."))),
    "frequencies of older releases": (
        *LLAMA,
        plus("model.layers.0.self_attn.rotary_emb.inv_freq", 4),
    ),
    "a head of another task": (*LLAMA, plus("v_head.summary.weight", 1, 32)),
    "a head for tokens further ahead": (*LLAMA, plus("mtp.layers.0.up_proj.weight", 64, 32)),
    "a tower for images": (*LLAMA, plus("model.visual.blocks.0.norm.weight", 8)),
    "an expert each": (*MIXTRAL, lambda tensors: tensors),
    "experts that share": (*DEEPSEEK, lambda tensors: tensors),
    "the first GPT-2": ("GPT2", GPT2, legacy_gpt2),
}
GPT_NEO = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
GPT_NEO |= {"attention_types": [[["global", "local"], 1]]}


@pytest.mark.parametrize("kind", RIGHT)
def test_weights_that_transformers_loads_as_they_were_saved_are_taken(kind, tmp_path):
    family, settings, change = RIGHT[kind]
    directory = family_dir(family, settings, tmp_path, 0.2)
    # Copied: what is loaded may be the file itself, which is written over.
    expected = {name: t.clone() for name, t in load_model(directory).state_dict().items()}
    rewritten(directory, change)
    check_weights(directory)
    got = load_model(directory).state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_causal_mask_that_was_saved_is_taken(tmp_path):
    directory = family_dir("GPTNeo", GPT_NEO, tmp_path, None)
    check_weights(rewritten(directory, plus("transformer.h.0.attn.attention.bias", 1, 1, 8, 8)))


def test_layers_that_predict_further_ahead_are_taken_where_the_config_names_them(tmp_path):
    directory = family_dir(*LLAMA, tmp_path, 0.2)
    configured(rewritten(directory, plus("model.layers.2.eh_proj.weight", 32, 64)))
    with pytest.raises(ModelError, match="of no module"):
        check_weights(directory)
    check_weights(configured(directory, num_nextn_predict_layers=1))


def sharded(tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(family_dir(*LLAMA, tmp_path, 0.2))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def test_shards_are_those_of_the_index(tmp_path):
    """A file that the index does not name, of another format say, is not read."""
    directory = sharded(tmp_path)
    save_file({"layers.0.wq.weight": torch.zeros(2, 2)}, directory / "consolidated.safetensors")
    check_weights(directory)
    load_model(directory)
    shard = next(directory.glob("model-00002*"))
    shard.unlink()
    says = rf"1 file of \d .* is missing: {shard.name}"
    with pytest.raises(ModelError, match=says):
        check_weights(directory)


def test_a_shard_without_what_the_index_says_of_it(tmp_path):
    directory = sharded(tmp_path)
    shard = next(directory.glob("model-00002*"))
    save_file(dict(list(load_file(shard).items())[1:]), shard, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 tensor of LlamaForCausalLM is missing"):
        check_weights(directory)


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(index, tmp_path):
    directory = sharded(tmp_path)
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"index\.json is damaged"):
        check_weights(directory)


def test_weights_under_a_name_that_is_not_read(tmp_path):
    directory = family_dir(*LLAMA, tmp_path, None)
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    with pytest.raises(ModelError, match=r"no .safetensors weights that transformers reads"):
        check_weights(directory)


def test_more_layers_than_tensors_are_not_built(tmp_path):
    directory = configured(family_dir(*LLAMA, tmp_path, None), num_hidden_layers=10_000_000)
    with pytest.raises(ModelError, match="10,000,000 layers, but the weights are 21 tensors"):
        check_weights(directory)


def test_a_model_that_writes_no_text_is_named(tmp_path):
    directory = configured(family_dir(*LLAMA, tmp_path, None), model_type="vit")
    with pytest.raises(ModelError, match="vit model, for which transformers has no causal"):
        check_weights(directory)


def test_large_tensors_that_are_missing_take_no_memory(tmp_path):
    """The config of a large model beside the weights of a small one: 16 GiB are missing."""
    directory = family_dir(*LLAMA, tmp_path, None)
    configured(directory, hidden_size=2**16, intermediate_size=2**18, vocab_size=2**16)
    rewritten(directory, without("embed_tokens"))
    with pytest.raises(ModelError, match=r"model\.embed_tokens"):
        check_weights(directory)


def test_weights_that_are_no_numbers_are_named(tmp_path):
    def spoilt(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        return tensors

    directory = rewritten(family_dir(*LLAMA, tmp_path, 0.2), spoilt)
    with pytest.raises(ModelError, match=r"the student .*not finite \(model.layers.1.mlp.up_proj"):
        load_model(directory, role="student")


def test_a_run_and_the_doctor_refuse_before_anything_is_written(shell):
    """The same words, exit code 2, and no run directory."""
    teacher = shell.folder / "broken"
    shutil.copytree(shell.teacher, teacher)
    rewritten(teacher, without("layers.1.mlp"))
    broken = ("--set", f"teacher={teacher}")
    said = shell.npd("run", "run.yaml", *broken).complaint(2)
    assert f"the teacher {teacher}: 3 tensors of LlamaForCausalLM are missing" in said
    found = shell.npd("doctor", "run.yaml", *broken)
    assert found.code == 2
    assert "3 tensors of LlamaForCausalLM are missing" in found.out
    assert not shell.layout.root.exists()


def test_a_run_and_the_doctor_refuse_an_architecture_before_anything_is_written(shell):
    student = shell.folder / "older"
    saved("CodeGen", {**REFUSED["CodeGen"][0], "vocab_size": 304}, student)
    for file in [*shell.student.glob("token*"), *shell.student.glob("chat*")]:
        shutil.copy(file, student)
    older = ("--set", f"student={student}")
    said = shell.npd("run", "run.yaml", *older).complaint(2)
    assert f"the student {student}: this architecture (CodeGenForCausalLM) {UNUSED}" in said
    found = shell.npd("doctor", "run.yaml", *older)
    assert found.code == 2
    assert f"(CodeGenForCausalLM) {UNUSED}" in found.out
    assert not shell.layout.root.exists()
