"""What lies in a model directory beside its weights: refused before the start, or kept."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from prepare import prune_depth
from safetensors.torch import load_file, save_file

from npd.config.sections import LossConfig, TrainConfig
from npd.control.preflight import prepare
from npd.data.chat_tokenizer import ChatTokenizer
from npd.errors import ModelError, RunError
from npd.export import export_model
from npd.models.files import copy_beside_weights, rows_of
from npd.models.loading import load_model
from npd.models.saving import save_pretrained
from npd.train.trainer import Trainer
from tiny_model import save_model
from tiny_run import tiny_config, write_prompts


@pytest.fixture
def pair(tmp_path, tiny_model_dir, tiny_teacher_dir):
    """A student and a teacher of one's own, to break."""
    return [
        Path(shutil.copytree(source, tmp_path / name))
        for name, source in (("student", tiny_model_dir), ("teacher", tiny_teacher_dir))
    ]


@pytest.fixture
def prepared(tmp_path, pair):
    """Prepares a run of the pair; nothing is loaded and nothing is written."""
    prompts = write_prompts(tmp_path / "prompts.jsonl")

    def run(**sections):
        return prepare(tiny_config(*pair, prompts, tmp_path / "run", **sections))

    return run


def change(file: Path, **values) -> None:
    """Set keys of a JSON file; a value of None takes the key out."""
    found = {**(json.loads(file.read_text()) if file.exists() else {}), **values}
    file.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


# ---------------------------------------------------------------- sizes, ids, kinds of files


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("config.json", {"hidden_size": "large"}, 'hidden_size "large"'),
        ("config.json", {"num_attention_heads": 0}, "num_attention_heads 0"),
        ("config.json", {"vocab_size": -5}, "vocab_size -5"),
        ("config.json", {"num_hidden_layers": 10_000_000}, "num_hidden_layers 10000000"),
        ("config.json", {"num_hidden_layers": 2.5}, "num_hidden_layers 2.5"),
        ("config.json", {"text_config": {"hidden_size": 0}}, "text_config.hidden_size 0"),
        ("config.json", {"intermediate_size": True}, "intermediate_size true"),
        ("config.json", {"quantization_config": "fp8"}, "quantization_config"),
        ("config.json", {"eos_token_id": "<|im_end|>"}, "eos_token_id"),
        ("config.json", {"eos_token_id": [2, "x"]}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": "2"}, 'eos_token_id "2"'),
        ("generation_config.json", {"eos_token_id": [True]}, "eos_token_id"),
        ("generation_config.json", {"temperature": "hot", "do_sample": True}, 'temperature "hot"'),
        ("generation_config.json", {"num_return_sequences": 3}, "generating"),
    ],
)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_values_that_no_model_can_have(pair, prepared, role, file, values, says):
    path = pair[role == "teacher"] / file
    change(path, **values)
    with pytest.raises(ModelError) as refused:
        prepared()
    assert says in str(refused.value)
    assert f"the {role}'s {path}" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[1]", "a list where a JSON object belongs"),
        ("config.json", "[" * 200_000, "not valid JSON"),
        ("generation_config.json", "temperature: 1", "not valid JSON"),
        ("generation_config.json", '"x"', "a text where a JSON object belongs"),
        ("tokenizer.json", "{}", "cannot load the tokenizer of the student"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type"', "cannot load the tokenizer"),
        ("tokenizer.json", "no json", "cannot load the tokenizer"),
        ("tokenizer.json", "null", "cannot load the tokenizer"),
        ("tokenizer_config.json", "[]", "cannot load the tokenizer"),
        ("model.safetensors", "", "model.safetensors is damaged"),
        ("model.safetensors", "no tensors", "model.safetensors is damaged"),
    ],
)
def test_files_that_are_broken(pair, prepared, file, text, says):
    (pair[0] / file).write_text(text)
    with pytest.raises(ModelError, match=says) as refused:
        prepared()
    assert "student" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rms_norm_eps": "small"}, "field 'rms_norm_eps'"),
        ({"hidden_size": 33}, "33"),
        ({"layer_types": ["x"]}, "layer_types"),
        ({"model_type": "no_such_family"}, "no_such_family"),
    ],
)
def test_what_transformers_says_of_a_config_is_told(pair, prepared, values, says):
    change(pair[0] / "config.json", **values)
    with pytest.raises(ModelError, match=r"the student .* has no usable config.json") as refused:
        prepared()
    assert says in str(refused.value)
    assert ":;" not in str(refused.value)


@pytest.mark.parametrize("values", [{}, {"train": {"lora": {"rank": 2}}}])
def test_a_config_that_no_model_can_be_made_of(pair, prepared, values):
    change(pair[0] / "config.json", hidden_act="no_such_function")
    with pytest.raises(ModelError, match="no model can be built from its config"):
        prepared(**values)


def test_an_attention_that_is_not_installed_does_not_keep_adapters_from_being_counted(
    pair, prepared
):
    change(pair[0] / "config.json", _attn_implementation="flash_attention_2")
    with pytest.raises(ModelError, match="not a linear layer"):
        prepared(train={"lora": {"targets": ["q_nope"]}})


def test_a_token_id_far_beyond_all_others_is_not_counted_up_to(pair, prepared):
    file = pair[0] / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["zzzz"] = 2**31
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="token id 2,147,483,648, more than any model has"):
        prepared()


def test_a_long_number_in_a_token_is_no_id(pair, prepared):
    for directory in pair:
        add_tokens(directory, '": 123456789012"')
    assert prepared().prompts


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "tokenizer.json", "notes", "additional_chat_templates/rag.jinja"],
)
def test_a_pipe_among_the_files_is_not_waited_for(pair, prepared, name):
    (pair[1] / name).parent.mkdir(exist_ok=True)
    (pair[1] / name).unlink(missing_ok=True)
    os.mkfifo(pair[1] / name)
    with pytest.raises(ModelError, match=f"the teacher's .*{name} is a pipe"):
        prepared()


def test_a_device_among_the_files_is_not_read(pair, prepared):
    (pair[0] / "model.safetensors").unlink()
    (pair[0] / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="is a pipe, socket or device"):
        prepared()


def test_a_link_to_nothing_is_named(pair, prepared):
    (pair[0] / "tokenizer.json").unlink()
    (pair[0] / "tokenizer.json").symlink_to("gone")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read \(No such file"):
        prepared()


# ---------------------------------------------------------------- code of its own


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}},
        ),
    ],
)
def test_code_of_its_own_needs_the_setting(pair, prepared, role, file, values):
    directory = pair[role == "teacher"]
    change(directory / file, **values)
    with pytest.raises(ModelError) as refused:
        prepared()
    said = str(refused.value)
    assert f"the {role} {directory} has custom code (auto_map in its {file})" in said
    assert "trust_remote_code: true" in said


def test_code_that_is_trusted_and_broken_is_named(pair, prepared):
    change(pair[0] / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (pair[0] / "mine.py").write_text("import no_such_package\n")
    with pytest.raises(ModelError, match="no_such_package"):
        prepared(trust_remote_code=True)


def test_code_that_is_not_needed_is_not_asked_about(pair, prepared):
    change(pair[0] / "config.json", auto_map={"AutoConfig": "old.Config"})
    assert prepared().prompts


# ---------------------------------------------------------------- quantised models

BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}


@pytest.mark.parametrize(
    "settings", [FP8, BITSANDBYTES, {"quant_method": "gptq", "bits": 4}, {"quant_method": "odd"}]
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantised_student_is_refused(pair, prepared, settings, key):
    change(pair[0] / "config.json", **{key: settings})
    with pytest.raises(ModelError, match=r"the student .* is quantised .* bfloat16 or float32"):
        prepared()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "pip install optimum gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, "pip install gptqmodel"),
        ({"quant_method": "hqq"}, "pip install hqq"),
        ({"quant_method": "compressed-tensors"}, "pip install compressed-tensors"),
        (BITSANDBYTES, "pip install bitsandbytes"),
        ({"quant_method": "odd"}, "odd"),
        ({"bits": 4}, "unnamed method"),
    ],
)
def test_a_teacher_whose_package_is_missing(pair, prepared, settings, says):
    change(pair[1] / "config.json", quantization_config=settings)
    with pytest.raises(ModelError) as refused:
        prepared()
    said = str(refused.value)
    assert f"the teacher {pair[1]} is quantised" in said
    assert says in said
    assert "score.engine: vllm" in said
    assert "\n" not in said


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_whole_numbers_without_a_scale_are_refused(pair, prepared, role):
    directory = pair[role == "teacher"]
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = (100 * tensors[name]).to(torch.int8)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"the {role} .* stores {name} as I8"):
        prepared()


def fp8(directory: Path) -> dict[str, torch.Tensor]:
    """Store the matrices of a model in FP8 blocks; returns the numbers they stand for."""
    stored, meant = {}, {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        stored[name] = meant[name] = tensor
        if tensor.ndim == 2 and "proj" in name:
            a, b = (size // 16 for size in tensor.shape)
            blocks = tensor.float().reshape(a, 16, b, 16)
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            narrow = (blocks / scale).to(torch.float8_e4m3fn)
            stored[name] = narrow.reshape(tensor.shape)
            stored[f"{name}_scale_inv"] = scale.reshape(a, b)
            meant[name] = (narrow.float() * scale).reshape(tensor.shape)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    change(directory / "config.json", quantization_config={**FP8, "weight_block_size": [16, 16]})
    return meant


@pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies FP8 itself")
def test_an_fp8_teacher_reads_as_the_numbers_it_stands_for(pair, prepared):
    meant = fp8(pair[1])
    assert prepared().prompts
    found = load_model(pair[1]).state_dict()
    for name, tensor in meant.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_quantised_teacher_on_a_server_needs_nothing_here(pair, prepared):
    change(pair[1] / "config.json", quantization_config=BITSANDBYTES)
    served = {"score": {"engine": "vllm", "urls": ["http://127.0.0.1:1"]}}
    assert prepared(**served).prompts


# ---------------------------------------------------------------- what is written is the student


def train_config(**values) -> TrainConfig:
    return TrainConfig(row_tokens=64, dtype="float32", **values)


def trainer_of(student, **values) -> Trainer:
    def read(ref):
        raise AssertionError(ref)

    train = train_config(**values)
    return Trainer(train, LossConfig(), student=student, read=read, device="cpu")


def damaged(save):
    """`save`, and then one tensor of what was written is other numbers."""

    def wrapped(model, directory, **options):
        save(model, directory, **options)
        (file,) = directory.glob("*.safetensors")
        tensors = load_file(file)
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = torch.randn_like(tensors[name].float()).to(tensors[name].dtype)
        save_file(tensors, file, metadata={"format": "pt"})

    return wrapped


class Forgetful(Trainer):
    """A trainer whose library writes one matrix wrongly."""

    def _write(self, model, into, dtype, *, untie=False):
        write = damaged(lambda m, d, **_: Trainer._write(self, m, d, dtype, untie=untie))
        write(model, into)


@pytest.mark.parametrize("what", ["save_snapshot", "save_pretrained"])
def test_a_student_that_was_written_otherwise_is_noticed(tiny_model_dir, tmp_path, what):
    trainer = Forgetful(
        train_config(), LossConfig(), student=tiny_model_dir, read=lambda ref: ref, device="cpu"
    )
    with pytest.raises(RunError) as refused:
        getattr(trainer, what)(tmp_path / "out")
    said = str(refused.value)
    assert "model.layers.0.mlp.up_proj.weight differs by up to" in said
    assert str(tmp_path / "out") in said
    assert str(tiny_model_dir) in said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("untie", [False, True])
def test_a_sound_student_is_not_refused(tiny_model_dir, tmp_path, dtype, untie):
    trainer = trainer_of(tiny_model_dir)
    trainer.save_snapshot(tmp_path / "out", dtype, untie=untie)
    trainer.save_pretrained(tmp_path / "end", dtype)
    assert trainer.model.training
    assert load_model(tmp_path / "out").config.tie_word_embeddings is not untie


def test_a_config_that_says_otherwise_is_noticed(tiny_model_dir, tmp_path):
    trainer = trainer_of(tiny_model_dir)
    trainer.model.config.rope_parameters = {"rope_type": "default", "rope_theta": 2.0}
    with pytest.raises(RunError, match="log-probs of a probe text"):
        trainer.save_snapshot(tmp_path / "out")


# ---------------------------------------------------------------- generation configs

SAMPLING = {"temperature": 0.6, "top_p": 0.9, "top_k": 7}


@pytest.mark.parametrize(
    "values",
    [
        SAMPLING,
        {"do_sample": False, "temperature": 0.0},
        {"output_scores": True, "return_dict_in_generate": False},
        {"do_sample": True, "eos_token_id": [2, 5]},
        {"do_sample": True, "temperature": 0.3, "something_else": {"a": [1]}},
    ],
)
def test_a_generation_config_is_kept_to_the_byte(pair, prepared, tmp_path, values):
    file = pair[0] / "generation_config.json"
    change(file, **values)
    assert prepared().prompts
    trainer_of(pair[0]).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert ChatTokenizer.load(tmp_path / "out").stop_ids == ChatTokenizer.load(pair[0]).stop_ids
    export_model(tmp_path / "out", tmp_path / "exported")


@pytest.mark.parametrize("values", [SAMPLING, {"num_beams": 3, "length_penalty": 0.5}, {}])
def test_settings_for_generating_in_an_old_config_are_kept(pair, prepared, tmp_path, values):
    (pair[0] / "generation_config.json").unlink()
    change(pair[0] / "config.json", eos_token_id=[2, 5], **values)
    assert prepared().prompts
    assert ChatTokenizer.load(pair[0]).stop_ids == {2, 5}
    trainer_of(pair[0]).save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {**values, "eos_token_id": [2, 5]}.items() <= written.items()
    assert ChatTokenizer.load(tmp_path / "out").stop_ids == {2, 5}


def test_pruning_and_merging_take_such_a_config_too(pair, tmp_path):
    for directory in pair:
        change(directory / "generation_config.json", **SAMPLING)
    (pair[0] / "mine.tiktoken").write_text("x")
    prune_depth(pair[1], tmp_path / "short", 2)
    trainer = trainer_of(pair[0], lora={"rank": 2})
    trainer.save_snapshot(tmp_path / "adapter")
    export_model(tmp_path / "adapter", tmp_path / "merged")
    for directory, source in ((tmp_path / "short", pair[1]), (tmp_path / "merged", pair[0])):
        for name in ("generation_config.json", "tokenizer.json"):
            assert (directory / name).read_bytes() == (source / name).read_bytes()
    assert (tmp_path / "merged" / "mine.tiktoken").read_text() == "x"


def test_saving_leaves_the_model_as_it_was(pair, tmp_path):
    change(pair[0] / "generation_config.json", **SAMPLING)
    model = load_model(pair[0])
    config, generation = model.config, model.generation_config
    save_pretrained(model, tmp_path / "out", dtype="float32", source=str(pair[0]))
    assert model.config is config
    assert model.generation_config is generation
    assert generation.top_k == SAMPLING["top_k"]


# ---------------------------------------------------------------- everything but weights


def test_all_but_weights_is_copied(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    kept = [
        *("tokenization_mine.py", "mine.tiktoken", "spiece.model", "preprocessor_config.json"),
        *(
            "additional_chat_templates/rag.jinja",
            "LICENSE",
            "README.pt-BR.md",
            "chat_template.json",
        ),
        *("vocab.txt.gz", "assets/logo.png", "assets/more/notes.txt"),
    ]
    left = [
        *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *("pytorch_model.bin", "model.Q4_K.gguf", "model.onnx", "model.onnx_data", "x.pt"),
        *(".git/config", ".cache/a", "__pycache__/a.pyc", "onnx/model.onnx", "onnx/config.json"),
        *("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "manifest.json"),
        *("config.json", "generation_config.json", "flax_model.msgpack", "tf_model.h5"),
    ]
    for name in (*kept, *left):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.model").write_text("linked")
    (source / "linked.model").symlink_to(tmp_path / "elsewhere" / "linked.model")
    (source / "away").symlink_to(tmp_path / "elsewhere")
    (source / "round").symlink_to(source)
    (source / "gone").symlink_to("nowhere")
    target.mkdir()
    copy_beside_weights(source, target)
    found = {str(p.relative_to(target)) for p in target.rglob("*") if not p.is_dir()}
    assert found == {*kept, "linked.model"}
    assert not (target / "linked.model").is_symlink()
    assert (target / "linked.model").read_text() == "linked"


def test_a_run_inside_of_the_students_directory_is_not_copied(pair, tmp_path):
    out = pair[0] / "runs" / "mine" / "student"
    (pair[0] / "runs" / "notes.txt").parent.mkdir()
    (pair[0] / "runs" / "notes.txt").write_text("mine")
    trainer_of(pair[0]).save_pretrained(out)
    assert (out / "tokenizer.json").is_file()
    assert not (out / "runs").exists()


def with_tokenizer_code(directory: Path) -> None:
    """The same tokenizer, its class in code beside it."""
    (directory / "tokenization_mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\n"
        "class MineTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    mapped = {"AutoTokenizer": [None, "tokenization_mine.MineTokenizer"]}
    change(directory / "tokenizer_config.json", tokenizer_class="MineTokenizer", auto_map=mapped)


def test_a_student_with_tokenizer_code_exports_and_loads(pair, tmp_path):
    with_tokenizer_code(pair[0])
    (pair[0] / "additional_chat_templates").mkdir()
    (pair[0] / "additional_chat_templates" / "rag.jinja").write_text("{{ messages[0]['content'] }}")
    trainer_of(pair[0]).save_pretrained(tmp_path / "trained")
    export_model(tmp_path / "trained", tmp_path / "out", trust_remote_code=True)
    chat = ChatTokenizer.load(tmp_path / "out", trust_remote_code=True)
    turns = [{"role": "user", "content": "hello"}]
    render = chat.tokenizer.apply_chat_template
    assert render(turns, tokenize=False, chat_template="rag") == "hello"
    assert "<|im_start|>user\nhello" in render(turns, tokenize=False)
    load_model(tmp_path / "out")


# ---------------------------------------------------------------- token ids and rows


LED_BY_END = "<end>{% for m in messages %}{{ m['content'] }}{% endfor %}"


def add_tokens(directory: Path, *tokens: str, **values) -> None:
    """Add tokens to a saved tokenizer and leave the model as it is: 304 rows, nearly all used."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([*(f"<extra_{i}>" for i in range(20)), *tokens])
    for name, value in values.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(directory)


def test_tokens_without_a_row_that_nothing_uses_are_harmless(pair, prepared):
    for directory in pair:
        add_tokens(directory, "<pad>", pad_token="<pad>")
    assert prepared().prompts
    chat = ChatTokenizer.load(pair[0])
    assert chat.vocab_size == 304
    assert chat.pad_id == chat.end_id


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"eos_token": "<end>"}, "an end token of the tokenizer"),
        ({"chat_template": LED_BY_END}, "prompt 0"),
    ],
)
def test_a_token_without_a_row_that_is_used(pair, prepared, values, what):
    for directory in pair:
        add_tokens(directory, "<end>", **values)
    with pytest.raises(ModelError) as refused:
        prepared()
    said = str(refused.value)
    assert f"the student {pair[0]} has embeddings for 304 token ids" in said
    assert f"{what} has id" in said
    assert "'<end>'" in said


def test_an_end_token_beyond_the_teachers_rows(pair, prepared):
    change(pair[1] / "generation_config.json", eos_token_id=[2, 999])
    with pytest.raises(ModelError, match=r"the teacher .* 304 token ids.* has id 999"):
        prepared()


def test_a_teacher_with_fewer_rows_than_the_student(pair, prepared):
    for directory in pair:
        add_tokens(directory)
    save_model(pair[0], seed=0, vocab=320)
    add_tokens(pair[0])
    with pytest.raises(ModelError, match=r"the teacher .* the student can write has id 3"):
        prepared()


def test_a_head_with_fewer_rows_than_the_embedding(tmp_path, tiny_model_dir):
    source = shutil.copytree(tiny_model_dir, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][:290].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert rows_of(source) == 290


# ---------------------------------------------------------------- adapters on experts


@pytest.fixture
def experts(pair):
    """The student as a mixture of experts, whose experts are fused and no linear layers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    MixtralForCausalLM(config).save_pretrained(pair[0])
    return pair[0]


def test_experts_that_no_adapter_acts_on_are_counted(experts, prepared):
    (note,) = prepared(train={"lora": {"rank": 2}}).notes
    assert "adapters on 8 linear layers with 6,144 of the student's" in note
    assert "mlp.experts.gate_up_proj (24,576)" in note
    assert "mlp.experts.down_proj (12,288)" in note
    with pytest.raises(ModelError, match="not a linear layer"):
        prepared(train={"lora": {"targets": ["w1"]}})


def test_a_dense_student_has_nothing_to_count(prepared):
    assert not prepared(train={"lora": {"rank": 2}}).notes


@pytest.mark.parametrize("values", [{}, {"lora": {"rank": 2}}])
def test_a_mixture_of_experts_is_written_as_it_is(experts, tmp_path, values):
    trainer = trainer_of(experts, **values)
    trainer.save_snapshot(tmp_path / "snapshot")
    trainer.save_pretrained(tmp_path / "trained")
    export_model(tmp_path / "trained", tmp_path / "out")


# ---------------------------------------------------------------- chat templates


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "5 s"),
        ("{{ messages[0]['content'] * 1000000000 }}", "GiB"),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "endless text"),
        ("{{ messages[2].content }}{{ 'a' * 1000000000 if messages[3].role == 'tool' }}", "GiB"),
    ],
)
def test_a_template_without_end_is_refused(pair, prepared, template, says):
    (pair[0] / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=says) as refused:
        prepared()
    assert f"the chat template of the student {pair[0]} takes" in str(refused.value)


def test_a_template_that_is_no_text(pair, prepared):
    (pair[0] / "chat_template.jinja").unlink()
    change(pair[0] / "tokenizer_config.json", chat_template=5)
    with pytest.raises(ModelError, match="is 5, not text"):
        prepared()


def test_several_templates_need_a_default(pair, prepared):
    named = pair[0] / "additional_chat_templates"
    named.mkdir()
    for name in ("rag", "tool_use"):
        shutil.copy(pair[0] / "chat_template.jinja", named / f"{name}.jinja")
    (pair[0] / "chat_template.jinja").unlink()
    with pytest.raises(ModelError) as refused:
        prepared()
    remedy = f"copy the one to use to {pair[0] / 'chat_template.jinja'}"
    assert f"(rag, tool_use) and no default: {remedy}" in str(refused.value)
    shutil.copy(named / "rag.jinja", pair[0] / "chat_template.jinja")
    assert prepared().prompts
