"""`npd doctor` loads what a run would hold, writes eight tokens and reads them; and versions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from npd.config import RunConfig
from npd.data.chat_tokenizer import ChatTokenizer
from npd.doctor.trial import NUM_TOKENS, _read, _tried, _write, trial_checks
from npd.environment import TESTED, installed, too_old, untested
from npd.errors import ModelError
from npd.types import Prompt
from tiny_run import tiny_settings

NEVER = {"schedule": {"refresh": "never"}}
ROOT = Path(__file__).parents[1]


@pytest.fixture
def make_config(tmp_path, tiny_model_dir, tiny_teacher_dir):
    def make(*, teachers=None, **sections) -> RunConfig:
        places = (tiny_model_dir, tiny_teacher_dir, tmp_path / "prompts.jsonl", tmp_path / "run")
        settings = tiny_settings(*places, **sections)
        if teachers is not None:
            settings |= {"teacher": None, "teachers": teachers}
        return RunConfig.model_validate(settings)

    return make


def says(config) -> dict[str, tuple[str, str]]:
    return {check.what: (check.status, check.says) for check in trial_checks(config)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read_with_the_same_logprobs(make_config, dtype):
    found = says(make_config(generate={"dtype": dtype}, score={"dtype": dtype}))
    assert list(found) == ["trial: generate", "trial: student", "trial: teacher"]
    assert {status for status, _ in found.values()} == {"ok"}
    assert found["trial: generate"][1].startswith("student wrote ")
    assert "of what it wrote them with" in found["trial: student"][1]


def test_each_teacher_writes_and_is_read(make_config, tiny_teacher_dir):
    teachers = {"math": str(tiny_teacher_dir), "code": str(tiny_teacher_dir)}
    found = says(make_config(teachers=teachers, generate={"source": "teacher"}, **NEVER))
    assert [status for status, _ in found.values()] == ["ok"] * 4
    assert found["trial: generate"][1].startswith("teacher wrote ")


def test_where_the_data_are_trained_on_the_student_is_read(make_config):
    config = make_config(
        teachers={}, generate={"source": "dataset"}, loss={"kd_weight": 0.0},
        filter={"name": "none"}, eval={"source": "none"}, **NEVER,
    )  # fmt: skip
    found = says(config)
    assert list(found) == ["trial: student"]
    assert f"read {NUM_TOKENS} tokens" in found["trial: student"][1]


def test_other_logprobs_than_it_wrote_with_are_an_error(make_config):
    config = make_config()
    chat = ChatTokenizer.load(config.student)
    written: list = []
    _write(config, chat, chat.encode(Prompt(0, text="what is it?")), written)
    _read(config, chat, "student", config.student, written[0])
    wrong = replace(written[0], logprobs=written[0].logprobs - 0.5)
    with pytest.raises(Exception, match=r"student .* differ by 0\.5 nats between writing and scor"):
        _read(config, chat, "student", config.student, wrong)


def test_an_error_of_a_library_is_a_failed_check():
    def breaks() -> str:
        raise TypeError("update() got an unexpected keyword argument 'kwargs'\nmore")

    def refuses() -> str:
        raise ModelError("no such model: choose another")

    def overfills() -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    full = _tried("trial: generate", overfills)
    assert full.status == "warn"
    assert "too little memory" in full.says
    check = _tried("trial: generate", breaks)
    assert check.status == "FAIL"
    assert "TypeError: update() got an unexpected keyword argument 'kwargs'): " in check.says
    assert "more" not in check.says.splitlines()
    assert _tried("x", refuses).says == "no such model: choose another"


def test_a_library_newer_than_tested_is_named():
    assert untested({"torch": "2.13.0+cpu", "transformers": f"{TESTED['transformers']}.9"}) == []
    (line,) = untested({"transformers": "99.0.1", "torch": None, "numpy": "2.0"})
    assert line.startswith("transformers 99.0.1 is newer than the version npd was tested with (")
    assert line.endswith(f"pip install 'transformers=={TESTED['transformers']}.*'")


def test_a_library_older_than_needed_is_named():
    assert too_old() == []
    found = too_old({"transformers": "4.57.1", "httpx": None, "numpy": "2.4.0"})
    assert len(found) == 2
    assert found[0].startswith("transformers 4.57.1, but npd needs transformers>=5")
    assert found[1].startswith("httpx is missing, but npd needs httpx>=")


def test_what_tests_are_pinned_to_is_not_newer_than_tested():
    pins = dict(
        line.split(" ")[0].split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    assert not untested({name: pins[name] for name in TESTED})
    assert all(installed(name) for name in TESTED)
