"""A pair of the ladder: what it hands to `peers_run.py`, and how it grades."""

from __future__ import annotations

import json

import pytest
from test_ladder import TINY

import pair
from ladder_setting import SETTINGS, with_values
from task_pair import TaskPair


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    setting = with_values(SETTINGS["sum"], [value for value in TINY if "heldout" not in value])
    return TaskPair(setting, pair.Setting(num_heldout=4), tmp_path_factory.mktemp("pair"))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_responses_are_graded_in_the_order_of_the_held_out_problems(made):
    right = [row["completion"] for row in rows_of(made.heldout())]
    assert len(right) == 4
    assert made.grade(right) == {"wrong": 0.0}
    assert made.grade([right[0], right[1] + "1", right[2], "####"]) == {"wrong": 0.5}
    assert made.grade(right[1:] + right[:1]) == {"wrong": 1.0}


def test_seeds_have_prompts_of_their_own_and_none_is_held_out(made):
    prompts = [{row["prompt"] for row in rows_of(made.prompts(seed, 8))} for seed in (0, 1)]
    assert [len(found) for found in prompts] == [8, 8]
    heldout = {row["prompt"] for row in rows_of(made.heldout())}
    assert not prompts[0] & prompts[1]
    assert not (prompts[0] | prompts[1]) & heldout


def test_the_start_is_the_ladder_s(made):
    preset, values = made.start_run()
    assert preset == "sft"
    assert (values["train.batch_size"], values["schedule.epochs"]) == (6, 1)
    rows = rows_of(values["data.train"])
    assert len(rows) == 12
    assert all(row["completion"] for row in rows)
