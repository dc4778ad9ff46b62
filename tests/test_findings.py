"""What a run's numbers advise: each rule at its threshold, and remedies that load."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

import npd
from npd.config.load import dump_config, load_config
from npd.config.sources import SMOKE
from npd.control.preflight import prepare
from npd.doctor.forecast import forecast_checks, length_of
from npd.observe.findings import MOST, RunFacts, findings, usual_lr
from npd.observe.report.advice import advice, facts_of
from test_run import QuietView
from tiny_run import tiny_config, write_prompts

MODELS = ["student=s", "teacher=t", "data.train=d.jsonl"]
SOUND = {
    "steps": 400, "lr_sum": 400 * 2e-4, "parameters": 81_000_000, "context": 8192,
    "generated": 1000, "truncated": 20, "judged": 900, "rejected": 90, "drift": 0.05,
    "mass": 0.97, "kl": (2.0, 1.0), "idle": 0.1, "busiest": "generate", "wall": 3600.0,
}  # fmt: skip
UNSEEN = {"kl": None}


def facts(preset="npd", sets=(), **values):
    config = dump_config(load_config(preset, [*MODELS, *sets]).config.sized(1000))
    return RunFacts(config=config, **(SOUND | values))


# name: (preset, what is set, facts, the key advised first or None, what the line says)
CASES = {
    "a sound run": ("npd", [], {}, None, ""),
    "nothing known": ("npd", [], dict.fromkeys(SOUND, None) | {"wall": 0.0, "generated": 0,
        "truncated": 0, "judged": 0, "rejected": 0}, None, ""),
    "seven steps": ("npd", [], UNSEEN | {"steps": 7}, "train.batch_size",
        "only 7 optimiser steps of train.batch_size 64"),
    "one step of few": ("npd", ["schedule.steps=1"], UNSEEN | {"steps": 1}, "schedule.steps",
        "1 optimiser step, set by"),
    "few steps of small batches": ("npd", ["train.batch_size=4"], UNSEEN | {"steps": 20},
        "schedule.epochs", "more epochs"),
    "three steps": ("npd", [], UNSEEN | {"steps": 3}, "train.batch_size", "train.batch_size=4"),
    "thirty steps": ("npd", [], UNSEEN | {"steps": 30}, None, ""),
    "few steps that were enough": ("npd", [], {"steps": 7, "kl": (2.0, 1.2)}, None, ""),
    "few steps and little gain": ("npd", [], {"steps": 7, "kl": (2.0, 1.9)}, "train.batch_size",
        "7 optimiser steps"),
    "a rate for a larger model": ("npd", [], UNSEEN | {"steps": 60, "lr_sum": 60 * 1e-5},
        "train.lr", "a student of 81 M; 9e-05 is usual"),
    "that rate for a larger model": ("npd", [], UNSEEN | {"steps": 60, "lr_sum": 60 * 1e-5,
        "parameters": 7_600_000_000}, None, ""),
    "adapters at the rate of weights": ("npd", ["train.lora={rank: 8}"], UNSEEN | {"steps": 60,
        "lr_sum": 60 * 1e-5}, "train.lr", "0.0001 is usual"),
    "a student of unknown size": ("npd", [], UNSEEN | {"lr_sum": 1e-9, "parameters": None}, None,
        ""),
    "a third cut off": ("npd", [], {"truncated": 350}, "generate.max_new_tokens",
        "35% of the responses were truncated at generate.max_new_tokens (512)"),
    "a tenth cut off": ("npd", [], {"truncated": 100}, None, ""),
    "cut off by long rows": ("npd", ["generate.max_new_tokens=2048"], {"truncated": 350},
        "generate.max_new_tokens", ""),
    "cut off at the context": ("npd", [], {"truncated": 350, "context": 1600},
        "generate.max_new_tokens", ""),
    "cut off with no more context": ("npd", [], {"truncated": 350, "context": 1536},
        "filter.drop_truncated", ""),
    "drift": ("npd", [], {"drift": 1.4}, "schedule.refresh.drift",
        "drifted 1.40 nats/token from the snapshot that generates (near-policy is up to 0.10)"),
    "drift at the threshold": ("npd", [], {"drift": 0.10}, None, ""),
    "drift of steps": ("npd", ["schedule.steps=900"], {"drift": 0.3}, "schedule.refresh.drift", ""),
    "drift beside a rule that was typed": ("npd", ["schedule.refresh.at_epochs=[5]"],
        {"drift": 0.3}, "schedule.refresh.drift", "--set schedule.refresh.at_epochs=null"),
    "drift of the adaptive": ("npd_adaptive", [], {"drift": 0.3}, "train.lr", ""),
    "drift of tempered samples": ("npd", ["generate.temperature=0.7"], {"drift": 0.3}, "train.lr",
        ""),
    "drift of what others wrote": ("offline_kd", [], {"drift": 0.3}, None, ""),
    "rejecting most": ("npd", [], {"rejected": 700}, "filter.bounds", "rejected 78% of 900"),
    "rejecting most by quantiles": ("npd_adaptive", ["filter.low_quantile=0.5"],
        {"rejected": 700}, "filter.low_quantile", ""),
    "rejecting most as outliers": ("npd", ["filter.name=outlier"], {"rejected": 700},
        "filter.deviations", ""),
    "rejecting most of few": ("npd", [], {"judged": 20, "rejected": 19}, None, ""),
    "rejecting nothing": ("npd", [], {"rejected": 1}, "filter.name", "rejected 1 of 900"),
    "a wide teacher": ("npd", [], {"mass": 0.7}, "loss.target", "top 10 hold 70%"),
    "a wide teacher and its tail": ("npd", ["loss.target=tail"], {"mass": 0.7}, None, ""),
    "waiting for responses": ("npd", [], {"idle": 0.8}, "generate.batch_size",
        "waited 80% of the time, mostly for generate"),
    "waiting for scores": ("npd", [], {"idle": 0.8, "busiest": "score"}, "score.row_tokens", ""),
    "waiting in a short run": ("npd", [], {"idle": 0.8, "wall": 60.0}, None, ""),
    "worse": ("npd", [], {"kl": (1.0, 1.2), "is_worse": True}, "train.lr",
        "rose from 1.000 to 1.200, beyond noise; train.lr was 1e-05"),
    "worse within noise": ("npd", [], {"kl": (1.0, 1.01)}, None, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_finding_names_its_key_and_a_value_that_loads(name):
    preset, sets, values, key, says = CASES[name]
    found = findings(facts(preset, sets, **values))
    assert [next(iter(f.sets)) for f in found] == ([] if key is None else [key])
    for finding in found:
        text = str(finding)
        assert says in text
        assert "\n" not in text
        words = shlex.split(text.rpartition(": ")[2])
        assert set(words[::2]) == {"--set"}
        load_config(preset, [*MODELS, *sets, *words[1::2]])


def test_one_step_at_a_low_rate_is_one_step_in_both_lines():
    found = findings(facts(sets=["schedule.steps=1"], **UNSEEN, steps=1, lr_sum=1e-5))
    few, low = map(str, found)
    assert few.startswith("1 optimiser step, set by")
    assert low.startswith("train.lr 1e-05 over 1 step hardly")


def test_at_most_four_and_the_gravest_first():
    worst = facts(
        steps=7, lr_sum=7e-5, truncated=500, drift=1.4, mass=0.5, idle=0.9, rejected=800,
        kl=(1.0, 2.0), is_worse=True,
    )  # fmt: skip
    assert len(findings(worst, most=99)) == 8
    found = findings(worst)
    assert len(found) == MOST == 4
    assert [next(iter(f.sets)) for f in found] == [
        "train.lr", "train.batch_size", "train.lr", "generate.max_new_tokens",
    ]  # fmt: skip


def test_the_usual_rate_goes_with_the_size():
    sizes = (100_000, 135_000_000, 1_500_000_000, 7_000_000_000, 70_000_000_000)
    rates = [usual_lr(facts(parameters=size)) for size in sizes]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1e-3
    assert rates[3] == 1e-5


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir, tiny_teacher_dir):
    folder = tmp_path_factory.mktemp("findings")
    prompts = write_prompts(folder / "prompts.jsonl")
    made = {"observe": {"report": True}}
    config = tiny_config(tiny_model_dir, tiny_teacher_dir, prompts, folder / "run", **made)
    return npd.run(config, view=QuietView())


def test_a_run_tells_its_facts_to_the_report(finished):
    data = finished.data
    found = facts_of(data)
    assert found.steps == finished.step
    assert found.parameters > 10_000
    assert found.context == 512
    assert found.generated == len(data.samples)
    assert 0 < found.truncated <= found.generated
    assert found.drift is not None
    assert 0 < found.mass <= 1
    assert found.kl == (data.evals[0]["kl"], data.evals[-1]["kl"])
    assert 0 <= found.idle <= 1
    lines = [str(finding) for finding in advice(data)]
    assert 0 < len(lines) <= 4
    assert any("truncated at generate.max_new_tokens (12)" in line for line in lines)
    page = finished.report.read_text()
    assert page.count('class="advice"') == len(lines)
    assert advice(replace(data, origins={"schedule.steps": SMOKE})) == []
    assert facts_of(replace(data, is_done=False)).steps is None


def test_doctor_says_how_long_a_run_is(tmp_path, tiny_model_dir, tiny_teacher_dir):
    def checks(**sections):
        prompts = write_prompts(tmp_path / "prompts.jsonl", 104)
        config = tiny_config(tiny_model_dir, tiny_teacher_dir, prompts, tmp_path / "r", **sections)

        prepared = prepare(config)
        return length_of(config, prepared), list(forecast_checks(config, prepared))

    length, found = checks(schedule={"epochs": 4, "reuse": 2, "refresh": {"at_epochs": [2]}})
    assert (length.steps, length.samples) == (67, 200)  # 100 prompts, 4 epochs, batches of 6
    assert length.written == 200 * 6
    assert found[0].says.startswith("67 steps of 6 samples, some 1,200 tokens written")
    assert "very roughly" in found[0].says
    assert "GiB of disk" in found[0].says
    assert [check.status for check in found] == ["ok"]
    length, found = checks(
        schedule={"epochs": None, "steps": 10, "refresh": "never"},
        train={"lr": 1e-6, "min_lr": 0.0},
    )
    assert length.steps == 10
    assert [check.what for check in found] == ["forecast", "advice", "advice"]
