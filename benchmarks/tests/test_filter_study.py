"""The filter study: what is planted, its measures against values by hand, its page."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from test_ladder import TINY

import filter_arms
import filter_page
import filter_rules as fr
import filter_study
import noise
import tasks
from ladder_setting import with_values
from npd.types import FinishReason, SampleStats

CLEAN = [
    (f"{n}+38+{n}", f"{n}+38={n + 38},{n + 38}+{n}={2 * n + 38}####{2 * n + 38}")
    for n in range(10, 50)
]
HOT = {prompt: f"7{prompt}=3" for prompt, _ in CLEAN}


def planted(seed=0, share=0.3, clean=CLEAN, texts=noise.WORKING):
    return noise.plant(clean, HOT, texts, share=share, seed=seed)


def sample(sample_id=0, kind="", is_right=True, **scores):
    nlls = {"nll_teacher": 1.0, "nll_teacher_alone": 2.0, "nll_student": 1.0}
    stats = SampleStats(
        sample_id=sample_id,
        prompt_index=sample_id,
        version=0,
        prompt_tokens=8,
        response_tokens=20,
        finish=FinishReason.STOP,
        repeat=0.0,
        **{**nlls, "nll_student_alone": 2.0, "overlap": 0.5, **scores},
    )
    return fr.Labelled(stats, kind, is_right, worst=stats.nll_teacher)


# -- Planting ----------------------------------------------------------------------------------


def test_planting_belongs_to_the_seed():
    assert planted() == planted()
    assert planted(1) != planted()


def test_the_share_is_planted_in_equal_parts_and_the_rest_left():
    found = planted()
    assert [response.prompt for response in found] == [prompt for prompt, _ in CLEAN]
    assert [sum(r.kind == kind for r in found) for kind in noise.KINDS] == [3, 3, 3, 3]
    for (_, text), response in zip(CLEAN, found, strict=True):
        assert (response.text == text) == (response.kind == "")
    assert all(not response.kind for response in planted(share=0.0))


def test_each_kind_does_what_it_says():
    texts = dict(CLEAN)
    others = set(texts.values())
    for response in planted(share=1.0):
        own = texts[response.prompt]
        parts = sorted(noise.sum_parts(response.text))
        assert {
            "truncated": own.startswith(response.text) and len(response.text) < len(own),
            "shuffled": parts == sorted(noise.sum_parts(own)) and ",####" not in response.text,
            "off_topic": response.text in others - {own},
            "hot": response.text == HOT[response.prompt],
        }[response.kind]


def test_prose_comes_apart_at_words():
    clean = [(prompt, f"The {i} apples are\nred.") for i, (prompt, _) in enumerate(CLEAN)]
    for response in planted(share=1.0, clean=clean, texts=noise.PROSE):
        own = dict(clean)[response.prompt]
        if response.kind == "truncated":
            assert own.startswith(response.text)
            assert response.text.split() == own.split()[: len(response.text.split())]
        if response.kind == "shuffled":
            assert sorted(response.text.split()) == sorted(own.split())


def test_what_no_kind_can_change_is_left_or_refused():
    one_part = [("a", "1"), ("b", "2"), *CLEAN[:2]]
    kinds = {r.prompt: r.kind for r in planted(share=0.5, clean=one_part)}
    assert {kinds["a"], kinds["b"]} <= {"", "off_topic", "hot"}
    with pytest.raises(ValueError, match="truncated changes none"):
        planted(share=0.5, clean=[("a", "1"), ("b", "2")])


# -- Measures ----------------------------------------------------------------------------------


def test_measures_by_hand():
    samples = [
        sample(0, "hot"), sample(1, "hot"), sample(2, "truncated"), sample(3),
        sample(4), sample(5), sample(6), sample(7, is_right=False),
    ]  # fmt: skip
    found = fr.measure(samples, [True, False, True, True, False, False, False, True])
    assert found["cut"] == 0.5
    assert found["recall"] == pytest.approx(2 / 3)
    assert (found["hot"], found["truncated"], found["shuffled"]) == (0.5, 1.0, None)
    assert found["precision"] == 0.5
    assert (found["good_cut"], found["wrong_cut"]) == (0.25, 1.0)
    assert fr.measure(samples, [False] * 8)["precision"] is None


def test_auc_by_hand():
    samples = [sample(0, "hot"), sample(1, "hot"), sample(2), sample(3), sample(4, is_right=False)]
    # Of the four pairs of a noisy and a good one: above, tied, above, above.
    assert fr.auc(samples, [2.0, 3.0, 1.0, 2.0, 9.0]) == pytest.approx(3.5 / 4)
    assert fr.auc(samples, [2.0, 3.0, 1.0, 2.0, 9.0], "hot") == pytest.approx(3.5 / 4)
    assert math.isnan(fr.auc(samples, [2.0, 3.0, 1.0, 2.0, 9.0], "shuffled"))
    assert fr.auc(samples, [1.0, 1.0, 1.0, 1.0, 1.0]) == 0.5


def test_every_control_cuts_the_same_share():
    samples = [
        sample(i, nll_teacher=0.1 + i % 7, nll_student=1 + i % 3, overlap=i / 100)
        for i in range(100)
    ]
    for rule in fr.controls(0.3):
        assert sum(rule.cut(samples, seed=1)) == 30, rule.label


def test_rules_of_npd_are_judged_as_npd_does():
    # Δ-IFD -0.01, 0 and 1: to the letter the first is cut too.
    samples = [
        sample(0, nll_teacher=0.98), sample(1), sample(2, nll_teacher=3.0), sample(3),
    ]  # fmt: skip
    letter, default = fr.NAMED[:2]
    assert letter.cut(samples) == [True, False, True, False]
    assert default.cut(samples) == [False, False, True, False]


def test_a_limit_and_a_share_cut_the_highest():
    samples = [sample(i, nll_teacher=float(i)) for i in range(4)]
    assert fr.Rule("", statistic="teacher NLL", limit=1.5).cut(samples) == [
        False,
        False,
        True,
        True,
    ]
    assert fr.Rule("", statistic="NLL gap", top=0.25).cut(samples) == [False, False, False, True]
    outlier = fr.Rule("", statistic="teacher NLL", spread=1.0)
    # Median 1.5, median deviation 1.
    assert outlier.cut(samples) == [False, False, False, True]
    assert not any(replace(outlier, least=3.0).cut(samples))
    assert fr.highest([1.0, 2.0, 2.0], 1) == [False, True, False]


def test_the_rule_chosen_finds_most_without_cutting_good_ones():
    noisy = [sample(i, "hot", nll_teacher=5.0 + i) for i in range(4)]
    good = [sample(i, nll_teacher=1.0 + i / 100) for i in range(4, 104)]
    rules = [
        fr.Rule(f"{limit}", statistic="teacher NLL", limit=limit) for limit in (7.5, 4.0, 2.0, 0.0)
    ]
    figures = [(rule, fr.summary(rule, {0: [*noisy, *good]})) for rule in rules]
    assert figures[0][1] == (0.25, 0.0)
    assert fr.choose(figures).label == "4.0"


def test_one_rule_is_chosen_for_all_kinds_of_text_on_the_first_seeds():
    def text(usual, seeds):
        good = [sample(i, nll_student=usual * (1 + i / 40)) for i in range(20)]
        noisy = [sample(i, "hot", nll_student=usual * 9) for i in range(20, 26)]
        return {seed: [*good, *noisy] for seed in range(seeds)}

    found = filter_study.detect({"sum": text(0.3, 3), "real": text(2.0, 2)})
    assert (found["sum"]["chosen_on"], found["real"]["chosen_on"]) == ([0, 1], [0])
    both = found["sum"]["chosen"]["both"]
    assert both == found["real"]["chosen"]["both"]
    # A fixed limit that parts good from noisy in one kind does not in the other.
    assert both["spread"] is not None
    assert found["sum"]["sweep"][both["label"]] == {"chosen_on": (1.0, 0.0), "others": (1.0, 0.0)}
    assert [seed["recall"] for seed in found["real"]["rules"]["outlier"]] == [1.0, 1.0]


# -- The page ----------------------------------------------------------------------------------


def made_up():
    samples = {seed: [sample(i, "hot" if i < 3 else "") for i in range(12)] for seed in range(2)}
    rules = {
        rule.label: [fr.measure(s, rule.cut(s)) for s in samples.values()] for rule in fr.NAMED
    }
    found = {
        "what": "sum",
        "num_seeds": 2,
        "chosen_on": [0],
        "chosen": {"npd": {"label": fr.NAMED[1].label}},
        "counts": 2 * [
            {"responses": {"": 9, "hot": 4}, "prefiltered": [["hot", "truncated", 1]],
             "scored": 12, "clean_right": 0.75},
        ],
        "rules": rules,
        "unplanted": rules,
        "same_share": {"random": 2 * [fr.measure(samples[0], [True] * 6 + [False] * 6)]},
        "auc": {},
        "sweep": {"nll: x": {"chosen_on": [0.5, 0.01], "others": [0.4, 0.03]}},
    }  # fmt: skip
    accuracies = {"none": 0.5, "random": 0.45, "oracle": 0.75, "best both": 0.7, "clean none": 0.8}
    cells = [
        {"rung": rung, "seed": seed, "accuracy": accuracy + seed / 10, "kl": 0.2, "asked": 13,
         "rejected": {"truncated": 1}, "commit": "abc",
         "rule": "NLL > 2" if rung == "best both" else None}
        for rung, accuracy in accuracies.items()
        for seed in range(2)
    ]  # fmt: skip
    return {
        "share": 0.3, "hot": 2.0, "setting": {"task": "sum"}, "sum": found, "real": found,
        "cells": cells, "command": "x", "commit": "abc",
        "machine": {"cpu": "c", "cores": 2, "memory_gib": 1}, "versions": {"python": "3"},
    }  # fmt: skip


def test_the_page_says_what_was_measured():
    text = filter_page.page(made_up())
    assert "hot truncated 1.0" in text
    assert "| nll: x | 50.0 | 1.0 | 40.0 | 3.0 |" in text
    # Paired by seed: 25 points over no filter and 30 over chance, in both seeds.
    assert "+25.0 ± 0.0 | +30.0 ± 0.0" in text
    assert "| best rule for both kinds of text (NLL > 2) | 2 |" in text
    assert "## Training on the clean texts" in text
    assert "## Detection: real text" in text


def test_the_recorded_page_is_what_the_code_makes_of_its_record():
    home = Path(filter_page.__file__).parent / "results" / "filter"
    record = json.loads((home / "filter.json").read_text())
    assert (home / "filter.md").read_text() == filter_page.page(record)


# -- Trainings ---------------------------------------------------------------------------------


def test_a_training_is_kept_apart_for_each_rule_and_only_the_chosen_one_counts(tmp_path):
    rules = [fr.Rule(f"NLL > {x}", statistic="teacher NLL", limit=x) for x in (1.0, 2.0)]
    folders = [filter_arms.arm_folder("best both, long", rule) for rule in rules]
    assert len({*folders, filter_arms.arm_folder("best both, long", replace(rules[0]))}) == 2
    bench = filter_arms.Arms(filter_arms.SETTING, tmp_path)
    for name, rule in [("none", None), *(("best both", rule) for rule in rules)]:
        home = bench.folder / "seed-0" / filter_arms.arm_folder(name, rule)
        home.mkdir(parents=True)
        cell = {"rung": name, "rule": rule.label if rule else None}
        (home / "cell.json").write_text(json.dumps(cell))
    found = bench.arms({"both": asdict(rules[1])})
    assert sorted((cell["rung"], cell["rule"]) for cell in found) == [
        ("best both", "NLL > 2.0"), ("none", None),
    ]  # fmt: skip


def test_arms_train_on_new_prompts_texts_with_noise_in_them(tmp_path):
    setting = with_values(filter_arms.SETTING, TINY)
    bench = filter_arms.Arms(setting, tmp_path)
    made = bench.data(0, "noisy")
    home = bench.folder / "seed-0"
    started_on, new = (
        {row["prompt"] for row in tasks.read_problems(home / name)}
        for name in ("start.jsonl", "train.jsonl")
    )
    written = {json.loads(line)["prompt"] for line in made.path.read_text().splitlines()}
    assert written <= new - started_on
    assert any(sample.kind for sample in made.samples)
    chosen = {"both": asdict(fr.Rule("NLL > 9", statistic="teacher NLL", limit=9.0))}
    arms = bench._arms(0, chosen)
    bench._train(0, "outlier", arms["outlier"])
    (cell,) = bench.arms(chosen)
    assert cell["rung"] == "outlier"
    assert "workings" in cell


# -- The command line --------------------------------------------------------------------------


def run_study(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["filter_study.py", *map(str, words)])
    return filter_study.main()


@pytest.mark.parametrize(
    ("lines", "words", "told"),
    [
        (None, [], "No such file or directory: name a JSONL file"),
        (['{"question": "Why?"}', "Why?"], [], "is not JSONL"),
        (['{"question": "Why?"}', '{"query": "Why?"}'], [], ":2: no text in column 'question'"),
        (['{"query": "Why?"}'] * 100, ["--column", "query"], "has 100 questions, 3 seeds take 240"),
        (['{"question": "Why?"}'] * 240, ["--teacher", "none"], "--teacher none: no model there"),
    ],
)
def test_what_real_text_needs_is_asked_for_before_anything_runs(
    tmp_path, monkeypatch, capsys, lines, words, told
):
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    model.mkdir()
    (model / "config.json").write_text("{}")
    if lines is not None:
        data.write_text("\n".join(lines) + "\n")
    runs = tmp_path / "runs"
    models = ["--student", model, "--teacher", model]
    assert run_study(monkeypatch, "--data", data, "--folder", runs, *models, *words) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not runs.exists()


@pytest.mark.parametrize("words", [("--seeds", 0), ("--real-seeds", 1), ("--trained", -1)])
def test_too_few_seeds_are_refused(monkeypatch, words):
    with pytest.raises(SystemExit) as ended:
        run_study(monkeypatch, *words)
    assert ended.value.code == 2
