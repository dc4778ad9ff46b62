"""LoRA students: what is trained and what stays, what is written, and that all readers agree."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import npd
from npd.config import GenerateConfig, LoraConfig, TrainConfig
from npd.config.load import load_config
from npd.errors import ConfigError, ModelError, StoreError
from npd.export import export_model
from npd.generate.in_process import TransformersGenerator
from npd.models.loading import decoding, load_model
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.shards import read_rollouts
from test_checkpoint import ROWS, segments
from test_packed_models import PACKABLE, family_dir
from test_run import Interrupting, QuietView, check_books, make, weights
from test_trainer import (
    make_rollouts,
    make_trainer,
    moments_of,
    own,
    replace_config,
    response_logprobs,
    segment_of,
    weights_of,
)
from tiny_model import make_tokenizer, save_model

__all__ = ["make"]  # the fixture

IDS = torch.arange(3, 40)[None]
LORA = {"rank": 4, "alpha": 8}


def config(dtype="float32", **lora) -> TrainConfig:
    return replace_config(dtype=dtype, lora=LoraConfig(**{**LORA, **lora}))


def trained(directory, dtype="float32", *, steps=8, **lora):
    """A trainer whose adapters have moved."""
    rollouts = make_rollouts()
    trainer = make_trainer(directory, rollouts, config(dtype, **lora))
    trainer.train(segment_of(rollouts, ROWS, lr=1e-2, steps=steps))
    return trainer


def with_peft(snapshot, base) -> torch.nn.Module:
    """Base and adapter as peft puts them together itself, not merged."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(snapshot)).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.float()


@pytest.fixture(scope="session")
def base_of(tmp_path_factory):
    """Makes the directory of a random model of a family, once."""
    root = tmp_path_factory.mktemp("families")

    def build(family):
        settings = {**PACKABLE[family], "vocab_size": 304}
        exists = (root / family).is_dir()
        return root / family if exists else family_dir(family, settings, root / family, 0.2)

    return build


# Training.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", PACKABLE)
def test_a_fresh_adapter_changes_no_bit_of_the_loss(family, dtype, base_of):
    rollouts, losses = make_rollouts(), []
    for settings in (replace_config(dtype=dtype), config(dtype)):
        trainer = make_trainer(base_of(family), rollouts, settings)
        losses.append(trainer.train(segment_of(rollouts, ROWS)).steps[0].loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_adapters_move(tiny_model_dir, dtype):
    rollouts = make_rollouts()
    trainer = make_trainer(tiny_model_dir, rollouts, config(dtype))
    before = weights_of(trainer)
    steps = trainer.train(segment_of(rollouts, ROWS, lr=1e-2, steps=30)).steps
    assert steps[-1].ce < 0.5 * steps[0].ce
    stored = load_file(tiny_model_dir / "model.safetensors")
    for name, weight in weights_of(trainer).items():
        is_adapter = ".lora_" in name
        assert torch.equal(weight, before[name]) != is_adapter, name
        if is_adapter:
            assert weight.dtype == torch.float32
        else:
            original = stored[name.replace(".base_layer", "")]
            assert torch.equal(weight, original.to(weight.dtype)), name
    narrow = {n for n, p in trainer.model.named_parameters() if p.dtype == torch.bfloat16}
    assert bool(narrow) == (dtype == "bfloat16")
    assert all(name.endswith("proj.base_layer.weight") for name in narrow)
    in_optimizer = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert in_optimizer == sum(".lora_" in name for name in before) == 2 * 2 * 7


def test_adapters_start_from_the_seed(tiny_model_dir):
    torch.manual_seed(9)
    expected = torch.rand(2)
    torch.manual_seed(9)
    one, same, other = (
        weights_of(make_trainer(tiny_model_dir, make_rollouts(), config(), seed=seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.rand(2), expected), "the caller's random numbers are left alone"
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_targets_by_name(tiny_model_dir):
    trainer = make_trainer(
        tiny_model_dir, make_rollouts(), config(targets=("q_proj", "1.mlp.up_proj"))
    )
    adapted = {n.partition(".lora_")[0] for n in weights_of(trainer) if ".lora_" in n}
    layers = "model.layers"
    assert adapted == {
        f"{layers}.0.self_attn.q_proj",
        f"{layers}.1.self_attn.q_proj",
        f"{layers}.1.mlp.up_proj",
    }


@pytest.mark.parametrize("name", ["q_prj", "lm_head", "embed_tokens", "norm", "mlp"])
def test_a_target_that_is_no_linear_layer_is_named(tiny_model_dir, name):
    with pytest.raises(ModelError, match=rf"train\.lora\.targets names '{name}'.*down_proj") as e:
        make_trainer(tiny_model_dir, make_rollouts(), config(targets=("v_proj", name)))
    assert ("did you mean q_proj?" in str(e.value)) == (name == "q_prj")


def test_activation_checkpointing_changes_no_number(tiny_model_dir):
    rollouts, runs = make_rollouts(), []
    for is_on in (False, True):
        settings = config(dropout=0.3).model_copy(update={"activation_checkpointing": is_on})
        trainer = make_trainer(tiny_model_dir, rollouts, settings)
        report = trainer.train(segment_of(rollouts, ROWS, steps=3))
        runs.append([step.loss for step in report.steps])
    assert runs[0] == runs[1]


def test_the_live_model_decodes_with_its_adapter(tiny_model_dir, tmp_path):
    trainer = trained(tiny_model_dir)
    trainer.save_snapshot(tmp_path / "s", dtype="float32")
    with decoding(trainer.model) as model:
        torch.testing.assert_close(logits(model), logits(load_model(tmp_path / "s", packed=False)))
    assert trainer.model.training


# Checkpoints.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_going_on_from_a_checkpoint_repeats_an_uninterrupted_run(tiny_model_dir, tmp_path, dtype):
    rollouts = make_rollouts()
    head, tail = segments(rollouts, 2)
    straight = make_trainer(tiny_model_dir, rollouts, config(dtype, dropout=0.3))
    straight.train(head)
    straight.save_checkpoint(tmp_path / "c")
    expected = straight.train(tail)
    resumed = make_trainer(tiny_model_dir, rollouts, config(dtype, dropout=0.3))
    assert resumed.load_checkpoint(tmp_path / "c") == 1
    got = resumed.train(tail)
    assert [(s.loss, s.grad_norm) for s in got.steps] == [
        (s.loss, s.grad_norm) for s in expected.steps
    ]
    assert all(torch.equal(weights_of(straight)[n], w) for n, w in weights_of(resumed).items())
    assert all(torch.equal(moments_of(straight)[n], m) for n, m in moments_of(resumed).items())


def test_a_checkpoint_holds_adapters_only_and_fits_no_other_shape(tiny_model_dir, tmp_path):
    trained(tiny_model_dir).save_checkpoint(tmp_path / "c")
    assert all(".lora_" in name for name in load_file(tmp_path / "c" / "model.safetensors"))
    for settings in (replace_config(), config(rank=5), config(targets=("q_proj",))):
        other = make_trainer(tiny_model_dir, make_rollouts(), settings)
        with pytest.raises(StoreError, match="is not of this model"):
            other.load_checkpoint(tmp_path / "c")


# Snapshots and their readers.


def test_a_snapshot_is_a_small_adapter_that_names_its_base(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_model_dir.parent)
    trainer = trained(tiny_model_dir.name)
    for name in ("one", "two"):
        trainer.save_snapshot(tmp_path / name)
    files = {path.name: path.stat().st_size for path in (tmp_path / "one").iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    numel = sum(p.numel() for n, p in trainer.model.named_parameters() if ".lora_" in n)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert files["adapter_model.safetensors"] < 2 * numel + 200 * len(tensors)
    written = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tiny_model_dir.resolve())
    assert (written["r"], written["lora_alpha"], written["modules_to_save"]) == (4, 8, None)
    assert written["target_modules"] == sorted(written["target_modules"])
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("family", PACKABLE)
def test_all_readers_of_a_snapshot_agree_with_peft(family, tmp_path, base_of):
    base = base_of(family)
    trainer = trained(base, steps=3)
    trainer.save_snapshot(tmp_path / "s")
    expected = logits(with_peft(tmp_path / "s", base))
    start = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert (expected - start).abs().max() > 0.1, "the adapter does something"
    merged = load_model(tmp_path / "s", packed=False)
    torch.testing.assert_close(logits(merged), expected, atol=2e-4, rtol=1e-3)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    assert all(parameter.requires_grad for parameter in merged.parameters())

    trainer.save_pretrained(tmp_path / "exact", dtype="float32")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", dtype="auto")
    torch.testing.assert_close(
        logits(exact), logits(with_peft(tmp_path / "exact" / "adapter", base)), atol=2e-4, rtol=1e-3
    )
    # Merged in float32 and then cast: to the bit what is exported.
    trainer.save_pretrained(tmp_path / "out")
    narrow = load_model(tmp_path / "s", dtype="bfloat16", packed=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    merged = dict(narrow.named_parameters())
    assert merged.keys() & stored.keys()
    for name, parameter in merged.items():
        assert parameter.dtype == torch.bfloat16
        assert name not in stored or torch.equal(stored[name], parameter), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert torch.equal(logits(narrow), logits(again))


def test_the_export_needs_no_peft(tiny_model_dir, tmp_path):
    trained(tiny_model_dir).save_pretrained(tmp_path / "out")
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from transformers import AutoModelForCausalLM as A, AutoTokenizer as T\n"
        f"T.from_pretrained({str(tmp_path / 'out')!r})\n"
        f"print(A.from_pretrained({str(tmp_path / 'out')!r}, dtype='auto').dtype)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.bfloat16"


def test_a_refreshed_generator_writes_what_the_new_adapter_does(tiny_model_dir, tmp_path):
    from test_generate import make_requests, responses

    trainer = trained(tiny_model_dir, steps=1)
    trainer.save_snapshot(tmp_path / "v1")
    trainer.train(segment_of(make_rollouts(), ROWS, lr=1e-2, steps=8))
    trainer.save_snapshot(tmp_path / "v2")
    trainer.save_pretrained(tmp_path / "whole")
    settings = GenerateConfig(max_new_tokens=8, dtype="float32", temperature=0.0)

    def build():
        return TransformersGenerator(settings, stop_ids=[2], pad_id=0, vocab_size=304)

    one, requests = build(), make_requests()
    written = []
    for version, name in enumerate(("v1", "v2", "whole", "v1", "v2")):
        one.load(tmp_path / name, version)
        fresh = build()
        fresh.load(tmp_path / name, version)
        written.append(responses(one.generate(requests)))
        assert written[-1] == responses(fresh.generate(requests)), name
    assert written[0] != written[1]
    assert (written[0], written[1]) == (written[3], written[4])


# What is refused.


@pytest.fixture
def adapter(tiny_model_dir, tmp_path):
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    trained(base, steps=1).save_snapshot(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_never_unpickled(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load_model(adapter)


def test_an_adapter_without_its_base_or_of_another_one(adapter, tmp_path):
    save_model(tmp_path / "other", hidden=48)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ModelError, match=r"is an adapter of .*base, which is missing"):
        load_model(adapter)
    (tmp_path / "other").rename(tmp_path / "base")
    with pytest.raises(ModelError, match="does not fit its base"):
        load_model(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "of kind IA3"),
        ({"base_model_name_or_path": None}, "an unnamed model"),
        ({"base_model_name_or_path": 5}, "of kind LORA for 5"),
        (None, "is damaged"),
    ],
)
def test_an_adapter_that_cannot_be_merged(adapter, change, message):
    file = adapter / "adapter_config.json"
    file.write_text(
        "{" if change is None else json.dumps({**json.loads(file.read_text()), **change})
    )
    with pytest.raises(ModelError, match=message):
        load_model(adapter)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda name: name, ""),
        (lambda name: "" if "layers.0" in name else name, r"\d+ tensors are missing, such as"),
        (lambda name: f"module.{name}", "tensors are missing"),
        (lambda name: [name, name.replace("layers.0", "layers.7")], "tensors are not of any layer"),
    ],
)
def test_tensors_of_an_adapter_that_its_base_has_no_place_for_are_named(adapter, change, says):
    """Peft only warns, and merges what is left."""
    file = adapter / "adapter_model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        names = change(name)
        for new in filter(None, [names] if isinstance(names, str) else names):
            tensors[new] = tensor.clone()
    save_file(tensors, file)
    if not says:
        load_model(adapter, packed=False)
        return
    with pytest.raises(ModelError, match=f"does not fit its base .*{says}"):
        load_model(adapter, packed=False)


def test_an_adapter_with_settings_for_generating_but_no_end_tokens(adapter):
    (adapter / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
    assert load_model(adapter, packed=False).generation_config.eos_token_id is not None


def test_a_damaged_adapter_is_a_store_error_for_the_generator(adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    generator = TransformersGenerator(GenerateConfig(), stop_ids=[2], pad_id=0, vocab_size=304)
    with pytest.raises(StoreError, match="damaged"):
        generator.load(adapter, 1)
    with pytest.raises(ModelError, match="it is damaged"):
        export_model(adapter, adapter.with_name("out"))


def test_without_peft_the_remedy_is_named(adapter, make, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"train\.lora needs peft.*pip install 'npd\[lora\]'"):
        npd.run(make(train={"lora": LORA}), view=QuietView())
    assert not make().directory.exists()
    with pytest.raises(ModelError, match=r"adapter in .* needs peft.*npd\[lora\]"):
        load_model(adapter)


def test_a_run_does_not_start_from_an_adapter(adapter, make):
    with pytest.raises(ModelError, match=r"the student .*adapter is a LoRA adapter.*npd export"):
        npd.run(make(student=adapter), view=QuietView())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lora.rank=0", "train.lora.rank must be at least 1, not 0"),
        ("train.lora.dropout=1", "train.lora.dropout must be less than 1, not 1"),
        ("train.lora.targets=q_proj", "train.lora.targets must be 'all-linear' or a list"),
        ("train.lora.targets=[]", "a list of 1 or more values"),
        ("train.lora=16", "train.lora is a section: set train.lora.<key>, not train.lora itself"),
        ("train.lora.rnk=1", "unknown key train.lora.rnk: did you mean train.lora.rank?"),
        ("train.lora.dora=1", "unknown key train.lora.dora"),
    ],
)
def test_settings_that_cannot_be(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config("npd", ["student=s", "teacher=t", override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_section_is_off_on_and_off_again(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: npd\nstudent: s\nteacher: t\ntrain: {lora: {rank: 4}}\n")

    def lora(*overrides, source=file):
        return load_config(source, overrides).config.train.lora

    assert lora("student=s", "teacher=t", source="npd") is None
    assert lora() == LoraConfig(rank=4)
    assert lora("train.lora.alpha=8") == LoraConfig(rank=4, alpha=8)
    assert lora("train.lora={}") == LoraConfig()
    assert lora("train.lora=null") is None
    origins = load_config(file, ["train.lora.alpha=8"]).origins
    assert (origins["train.lora.rank"], origins["train.lora.alpha"]) == (str(file), "--set")


# Whole runs.


def test_a_run_with_a_refresh_writes_what_peft_itself_would(make, tiny_model_dir, tmp_path):
    result = npd.run(
        make(train={"lora": LORA, "lr": 2e-2}, generate={"temperature": 0.0}), view=QuietView()
    )
    layout = RunLayout(result.directory)
    check_books(layout, reuse=2)
    with Ledger.reader(layout.ledger_db) as ledger:
        assert [row.version for row in ledger.snapshots()] == [0, 1]
    snapshot = layout.snapshot(1)
    assert {path.name for path in snapshot.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    }
    model = with_peft(snapshot, tiny_model_dir)
    shards = sorted(layout.rollouts(0).parent.glob("*.arrow"))
    rollouts = [r for path in shards for r in read_rollouts(path) if r.version == 1]
    assert len(rollouts) == 20
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for rollout in rollouts:
        logprobs = response_logprobs(model, rollout)
        # Ids beyond the tokenizer's, padding of the embedding, are never chosen.
        known = logprobs[:, : len(make_tokenizer())]
        assert known.argmax(-1).tolist() == rollout.response_ids.tolist()
        np.testing.assert_allclose(rollout.logprobs, own(model, rollout).logprobs, atol=1e-3)
        assert not np.allclose(rollout.logprobs, own(start, rollout).logprobs, atol=1e-2)

    student = Path(result.student)
    assert (student / "adapter" / "adapter_model.safetensors").is_file()
    export_model(result.directory, tmp_path / "exported")
    export_model(snapshot, tmp_path / "merged")
    for directory, reference in (("exported", student / "adapter"), ("merged", snapshot)):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / directory, dtype="auto")
        expected = load_model(reference, dtype="bfloat16", packed=False)
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(logits(loaded), logits(expected))
        assert (tmp_path / directory / "tokenizer.json").is_file()


def test_the_student_moves_towards_the_teacher(make):
    schedule = {"epochs": 24, "reuse": 4, "refresh": {"at_epochs": [8, 16]}}
    result = npd.run(
        make(schedule=schedule, loss={"target": "tail"}, train={"lora": {}, "lr": 1e-2}),
        view=QuietView(),
    )
    evals = result.data.evals
    assert evals[-1]["kl"] < 0.9 * evals[0]["kl"]


def test_an_interrupted_run_resumes_to_the_same_weights_bit_for_bit(make):
    train = {"lora": {**LORA, "dropout": 0.1}}
    whole = npd.run(make("whole", train=train), view=QuietView())
    cut = npd.run(make("cut", train=train), view=Interrupting())
    assert 0 < cut.step < whole.step
    for other in ({"lora": None}, {"lora": {**LORA, "rank": 5}}):
        with pytest.raises(ConfigError, match=r"started with train\.lora=.*now it is"):
            npd.run(make("cut", train=other), resume=True, view=QuietView())
    resumed = npd.run(make("cut", train=train), resume=True, view=QuietView())
    assert resumed.is_done
    a, b = weights(whole.student), weights(resumed.student)
    assert all(torch.equal(a[name], b[name]) for name in a)
    check_books(RunLayout(resumed.directory), reuse=2)


def test_a_full_run_does_not_go_on_with_adapters(make):
    npd.run(make("cut"), view=Interrupting())
    with pytest.raises(ConfigError, match=r"started with train\.lora=None"):
        npd.run(make("cut", train={"lora": LORA}), resume=True, view=QuietView())


def test_processes_hand_adapters_over_too(make):
    result = npd.run(
        make(runtime={"kind": "local"}, train={"lora": LORA, "dtype": "bfloat16"}),
        view=QuietView(),
    )
    assert result.is_done
    check_books(RunLayout(result.directory), reuse=2)


def test_a_misspelt_target_is_found_before_anything_is_written(tmp_path, make):
    config = make(train={"lora": {"targets": ["q_prj"]}})
    with pytest.raises(ModelError, match=r"did you mean q_proj\?"):
        npd.run(config)
    assert not config.directory.exists()
