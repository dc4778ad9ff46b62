"""Values that have no effect beside the others are said, with their place; presets are quiet."""

from __future__ import annotations

import logging

import pytest

from npd.config.load import dump_config, load_config, preset_names
from npd.config.no_effect import idle_values
from npd.data.inputs import length_notes

MODELS = ("student=s", "teacher=t", "data.train=d.jsonl")
IDLE = {
    "filter.high=0.5 filter.name=none": "filter.high has no effect, as filter.name is none",
    "filter.high=0.5 filter.bounds=quantile": "filter.high has no effect, as filter.bounds is",
    "filter.low_quantile=0.2": "filter.low_quantile has no effect, as filter.bounds is fixed",
    "filter.deviations=2": "filter.deviations has no effect, as filter.name is delta_ifd",
    "filter.history=9": "filter.history has no effect",
    "filter.ratio=ppl filter.name=random filter.keep=0.5": "filter.keep sets the share",
    "loss.beta=0.1": "loss.beta has no effect, as loss.divergence is forward",
    "loss.temperature=2 loss.kd_weight=0": "loss.temperature has no effect, as loss.kd_weight is 0",
    "loss.skip_tokens=9": "loss.skip_tokens has no effect, as loss.skip_after is 0",
    "loss.chunk=64 loss.impl=reference": "loss.chunk has no effect, as loss.impl is reference",
    "generate.temperature=0 generate.top_p=0.9": "generate.top_p has no effect",
    "generate.shards_in_flight=2": "generate.shards_in_flight has no effect, as generate.engine",
    "generate.seeded=true": "generate.seeded has no effect, as generate.engine is transformers",
    "generate.request_timeout=9": "generate.request_timeout has no effect, as generate.engine is",
    "score.head_chunk=9 score.engine=vllm score.urls=[http://a:1]": (
        "score.head_chunk has no effect, as score.engine is vllm"
    ),
    "score.compile=true score.engine=vllm score.urls=[http://a:1]": (
        "score.compile has no effect, as score.engine is vllm"
    ),
    "score.api_key_env=K": "score.api_key_env has no effect, as score.engine is transformers",
    "schedule.refresh.min_steps=5": "schedule.refresh.min_steps has no effect",
    "schedule.refresh=never schedule.max_lag=3": "schedule.max_lag has no effect",
    "eval.source=none eval.every_steps=5": "eval.every_steps has no effect, as eval.source is",
    "data.heldout_size=0 eval.every_steps=5": "eval.every_steps has no effect, as data.heldout",
    "data.heldout=h.jsonl data.heldout_size=9": "data.heldout_size has no effect",
    "data.heldout_split=dev": "data.heldout_split has no effect, as data.heldout is not set",
    (
        "schedule.refresh.in_flight=mix runtime.share=phases generate.engine=vllm "
        "generate.urls=[http://a:1]"
    ): "schedule.refresh.in_flight has no effect, as runtime.share is phases",
    "runtime.ray.address=auto": "runtime.ray.address has no effect, as runtime.kind is local",
    "data.split=dev": "data.split has no effect, as data.train is a file",
    "generate.temperature=0": "generate.temperature 0 is greedy decoding",
    "loss.kd_weight=0": "loss.kd_weight 0 trains the student on its own text without",
    "train.warmup=1.0": "train.warmup 1 is the whole run",
    "train.deterministic=true": "train.deterministic cannot decide which samples a step gets",
    "loss.kd_weight=0 filter.name=none eval.source=none": "teacher has no effect, as nothing in",
}


@pytest.mark.parametrize("sets", IDLE)
def test_a_value_set_in_vain_is_said(sets, caplog):
    load_config("npd", [*MODELS, *sets.split()])
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("note: --set ") and IDLE[sets] in line for line in said), said


@pytest.mark.parametrize("name", preset_names())
def test_presets_say_nothing(name, caplog):
    load_config(name, MODELS)
    assert not caplog.records


def test_a_value_of_a_preset_is_not_the_users(caplog):
    load_config("npd_adaptive", [*MODELS, "filter.name=none"])
    assert not [record for record in caplog.records if "filter." in record.getMessage()]


def test_a_note_names_the_line_of_a_file(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("preset: npd\nstudent: s\nteacher: t\nloss:\n  beta: 0.1\n")
    load_config("run.yaml")
    (record,) = caplog.records
    assert record.getMessage().startswith("note: run.yaml:5: loss.beta has no effect")
    assert record.levelno == logging.WARNING


def test_every_key_that_may_be_idle_exists():
    config = load_config("npd", MODELS).config
    assert idle_values(config) == {}
    for name in ("none", "outlier"):
        other = load_config("npd_adaptive", [*MODELS, f"filter.name={name}"]).config
        for key in idle_values(other):
            section, _, leaf = key.partition(".")
            assert leaf in dump_config(other)[section]


@pytest.mark.parametrize(
    ("sets", "prompts", "says"),
    [
        ("eval.every_steps=500", 64, "eval.every_steps (500) is as long as the run, which has abo"),
        ("schedule.refresh.every_steps=9 schedule.steps=9", 99, "schedule.refresh.every_steps (9)"),
        (
            "train.batch_size=128",
            64,
            "train.batch_size (128) is more than the 64 samples there are",
        ),
        ("eval.every_steps=5", 64, None),
        ("train.batch_size=128 generate.samples_per_prompt=2", 64, None),
    ],
)
def test_what_a_run_is_too_short_for_is_said(sets, prompts, says):
    config = load_config("npd", [*MODELS, *sets.split()]).config
    notes = list(length_notes(config, prompts))
    if says is None:
        assert not notes
    else:
        assert any(note.startswith(says) for note in notes), notes
