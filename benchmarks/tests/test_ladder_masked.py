"""Which tokens a mask leaves out, that rows are cut to the others, and the command when tiny."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from test_ladder import TINY

import ladder_masked
import tasks
from ladder_bench import Bench
from ladder_setting import SETTINGS, with_values
from npd.data.chat_tokenizer import ChatTokenizer
from npd.train import batch
from npd.train.batch import build_row
from npd.types import FinishReason, Message, Prompt, Rollout, Scored

PROMPT, TEXT = "31245:sr", "s=12354,r>45321####45321"


@pytest.fixture
def chat(tmp_path):
    tasks.make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return ChatTokenizer.load(tmp_path / "tokenizer")


def sample(chat, sample_id=0):
    [prompt] = chat.encode_all([Prompt(0, (Message("user", PROMPT),))])
    ids = np.array([*chat.tokenizer(TEXT, add_special_tokens=False).input_ids, chat.end_id])
    ids, size = ids.astype(np.int32), len(ids)
    own = np.full(size, -0.1, np.float32)
    rollout = Rollout(sample_id, 0, 0, prompt.prompt_ids, ids[:0], ids, own, FinishReason.STOP, 0)
    support = np.stack([ids, ids], axis=1)
    return Scored(rollout, support, np.log(np.full((size, 2), 0.4, np.float32)), own, 1.0)


def test_inside_is_what_follows_a_wrong_character_in_its_part(chat):
    keep = ladder_masked.keeper("inside", "list", chat)
    assert np.flatnonzero(~keep(sample(chat))).tolist() == [TEXT.index("54") + 1]


def test_as_many_are_left_out_at_random_and_of_a_sample_always_the_same(chat):
    keep = ladder_masked.keeper("random", "list", chat)
    places = [np.flatnonzero(~keep(sample(chat, i))).tolist() for i in range(20)]
    assert {len(found) for found in places} == {1}
    assert len({found[0] for found in places}) > 5
    assert places == [np.flatnonzero(~keep(sample(chat, i))).tolist() for i in range(20)]


def test_trainers_get_rows_without_what_is_left_out(chat):
    samples = [sample(chat, 0), sample(chat, 1)]
    plain = build_row(samples, version=0, device="cpu")
    with ladder_masked.masking(ladder_masked.keeper("inside", "list", chat)) as tokens:
        row = batch.build_row(samples, version=0, device="cpu")
    assert batch.build_row is build_row
    assert tokens == [len(plain.labels_N), 2]
    assert row.packed.cu_seqlens == plain.packed.cu_seqlens
    kept = np.delete(np.arange(tokens[0]), [6, 6 + tokens[0] // 2])
    for name in ("positions_N", "labels_N", "topk_ids_NK", "topk_logprobs_NK", "behavior_N"):
        assert getattr(row, name).tolist() == getattr(plain, name)[kept].tolist()


def test_the_command_compares_with_the_rungs_that_were_run(tmp_path, monkeypatch, capsys):
    setting = with_values(SETTINGS["list"], TINY)
    command = ["ladder_masked.py", "--folder", tmp_path, "--task", "list", "--rungs", "npd"]
    command += ["--masks", "random", "--out", tmp_path / "page.md", "--set", *TINY]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    monkeypatch.setattr(ladder_masked, "one_thread", lambda: None)
    with pytest.raises(SystemExit, match="none of npd: run these rungs with ladder"):
        ladder_masked.main()
    Bench(setting, tmp_path).seed(0, ["npd"])
    assert ladder_masked.main() == 0
    page = (tmp_path / "page.md").read_text()
    assert "| npd | none | 1 | 0.0 |" in page
    assert set(json.loads((tmp_path / "page.json").read_text())["cells"]) == {"none", "random"}
    assert "| npd | random | 1 | 0.0 | +0.0 | 0 of 1 | +0.0 |" in page
    # Teacher and start are not trained again, nor the rung once it is there.
    assert capsys.readouterr().err.count("seed 0 start") == 1
    assert ladder_masked.main() == 0
    assert "seed 0" not in capsys.readouterr().err
