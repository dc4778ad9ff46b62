"""The library as people call it: any source of a run, results, callbacks, types, and its page."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import npd
from npd.api import as_settings
from npd.config import RunConfig
from npd.config.load import dump_config, load_config
from npd.config.run import RunKeywords
from npd.errors import ConfigError
from test_run import QuietView
from tiny_run import tiny_settings, write_prompts

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text()
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SIGNATURES = re.MULTILINE | re.DOTALL
SHOWN = "\n".join(text for language, text in FENCES if not language)
MODELS = {"student": "s", "teacher": "t", "data": "d.jsonl"}


@pytest.fixture
def here(tmp_path, tiny_model_dir, tiny_teacher_dir, monkeypatch):
    """A working directory with `student`, `teacher`, `prompts.jsonl` and a tiny `run.yaml`."""
    monkeypatch.chdir(tmp_path)
    Path("student").symlink_to(tiny_model_dir)
    Path("teacher").symlink_to(tiny_teacher_dir)
    write_prompts(Path("prompts.jsonl"))
    settings = tiny_settings(Path("student"), Path("teacher"), "prompts.jsonl", "run")
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    return settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir, tiny_teacher_dir):
    """A finished tiny run and the view it was shown in."""
    folder = tmp_path_factory.mktemp("api")
    prompts = write_prompts(folder / "prompts.jsonl")
    view = QuietView()
    settings = tiny_settings(tiny_model_dir, tiny_teacher_dir, prompts, folder / "run")
    heard = Heard()
    return npd.run(settings, view=view, callbacks=[heard]), heard


class Heard(npd.Callback):
    """Everything a callback hears, in order."""

    def __init__(self):
        self.calls = []

    def on_start(self, directory):
        self.calls.append(("start", directory))

    def on_step(self, report):
        self.calls.append(("step", report.step))

    def on_eval(self, report):
        self.calls.append(("eval", report.step))

    def on_snapshot(self, version, step):
        self.calls.append(("snapshot", version))

    def on_message(self, text):
        self.calls.append(("message", text))

    def on_end(self, step, *, is_done):
        self.calls.append(("end", step, is_done))


def resolved(config=None, preset=None, overrides=(), **values):
    return as_settings(config, preset, overrides, values).config


def test_every_source_means_the_same_run(here):
    expected = load_config("run.yaml").config
    for source in (
        "run.yaml", Path("run.yaml"), here, expected, load_config("run.yaml"),
        {**here, "student": Path("student")}, dump_config(expected),
    ):  # fmt: skip
        assert resolved(source) == expected, type(source)
    assert resolved(**here) == expected
    assert RunConfig(**here) == expected


def test_a_preset_is_the_one_of_the_command_line():
    sets = ["student=s", "teacher=t", "data.train=d.jsonl"]
    for name in npd.presets():
        expected = load_config(name, sets).config
        assert resolved(preset=name, **MODELS) == expected
        assert resolved({"preset": name, **MODELS}) == expected
        assert RunConfig.from_preset(name, **MODELS) == expected
    assert list(npd.presets())[:2] == ["npd", "npd_adaptive"]
    assert all(meaning.endswith(".") and len(meaning) < 300 for meaning in npd.presets().values())


def test_values_go_over_a_config_and_overrides_over_both(here):
    found = resolved("run.yaml", train={"lr": 3e-3, "clip": 2.0}, overrides=["train.lr=4e-3"])
    assert (found.train.lr, found.train.clip) == (4e-3, 2.0)
    assert found.train.batch_size == 6, "a section is merged"
    assert resolved("run.yaml", overrides="train.lr=5e-3").train.lr == 5e-3
    assert resolved("run.yaml", overrides={"train.lr": 5e-3}).train.lr == 5e-3
    assert resolved("run.yaml", overrides={"train": {"lr": 5e-3}}).train.lr == 5e-3
    assert resolved(RunConfig(**here), schedule={"steps": 8}).schedule.refresh.at_steps == (4,)
    settings = load_config("run.yaml")
    assert resolved(settings, data={"limit": 3}).data.limit == 3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: resolved(7), "int is not a config"),
        (lambda: resolved({"student": "s"}, preset="npd"), "either config or preset"),
        (lambda: resolved(preset="npdd", **MODELS), "did you mean npd?"),
        (lambda: resolved(preset="npd", studnt="s"), "unknown key studnt: did you mean student?"),
        (lambda: resolved(preset="npd", train={"learning_rate": 1}), "did you mean train.lr?"),
        (lambda: resolved(preset="npd", **MODELS, train={"lr": -1}), "must be greater than 0"),
        (lambda: RunConfig(**MODELS, train={"lr": -1}), "RunConfig: train.lr must be greater"),
        (lambda: RunConfig(**MODELS, train={"lrr": 1}), "key train.lrr: did you mean train.lr?"),
        (lambda: RunConfig(teacher="t"), "RunConfig: student is not set"),
        (lambda: RunConfig(**MODELS, loss=3), "loss is a section"),
        (lambda: RunConfig.model_validate({"studnt": 1}), "unknown key studnt: did you mean"),
        (lambda: RunConfig(**MODELS, schedule={"steps": 3, "epochs": 3}), "exactly one of"),
        (lambda: npd.run(preset="npd", smoke=True, resume=True), "leave out either"),
    ],
)
def test_what_is_wrong_is_said_in_the_words_of_the_command_line(make, says):
    with pytest.raises(ConfigError) as caught:
        make()
    assert says in str(caught.value)
    assert "pydantic" not in str(caught.value)
    assert "For further information" not in str(caught.value)


def test_a_result_is_short_and_has_its_numbers(finished):
    result, _ = finished
    text = repr(result)
    assert len(text) < 600
    assert "\n" not in text
    assert str(result.student) in text
    assert f"done after {result.step} steps" in text
    page = result._repr_html_()
    assert page.count("<tr>") == page.count("</tr>") > 3
    assert str(result.student) in page
    steps = [line["step"] for line in result.metrics if line["kind"] == "train"]
    assert steps == list(range(1, result.step + 1))
    assert [e["step"] for e in result.evals] == sorted(e["step"] for e in result.evals)
    assert result.evals[-1]["step"] == result.step
    assert result.evals[0]["kl"] > 0


def test_a_callback_hears_of_everything_once_and_in_order(finished):
    result, heard = finished
    calls = heard.calls
    assert calls[0] == ("start", result.directory)
    assert calls[-1] == ("end", result.step, True)
    assert [c[1] for c in calls if c[0] == "step"] == list(range(1, result.step + 1))
    assert [c[1] for c in calls if c[0] == "eval"] == [e["step"] for e in result.evals]
    assert [c[1] for c in calls if c[0] == "snapshot"] == [0, 1]
    assert ("message", "run started") in calls


def test_an_error_of_a_callback_ends_the_run_and_it_can_be_resumed(here):
    class Broken(npd.Callback):
        def on_eval(self, report):
            if report.step:
                raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        npd.run("run.yaml", progress=False, callbacks=[Broken()])
    heard = Heard()
    result = npd.run("run.yaml", progress=False, resume=True, callbacks=[heard])
    assert result.is_done
    first = next(c[1] for c in heard.calls if c[0] == "step")
    assert first > 1, "what was told before is not told again"


@pytest.mark.parametrize("progress", [True, False])
def test_a_script_shows_progress_unless_it_asks_for_none(here, caplog, capsys, progress):
    caplog.set_level(logging.WARNING, "npd")  # as it is where nobody sets logging up
    npd.run("run.yaml", schedule={"steps": 2}, eval={"source": "none"}, progress=progress)
    said = capsys.readouterr().err
    told = re.search(r"^run started$.*^step 2/2 · 100%", said, re.DOTALL | re.MULTILINE)
    assert bool(told) == progress
    assert bool(said) == progress


def test_interrupting_a_cell_of_a_notebook_saves_the_run(here):
    class Interrupting(QuietView):
        def message(self, text):
            super().message(text)
            if text.startswith("snapshot v1"):
                os.kill(os.getpid(), signal.SIGINT)

    async def cell():
        return npd.run("run.yaml", view=view)

    view, loop = Interrupting(), asyncio.new_event_loop()
    try:
        result = loop.run_until_complete(cell())
    finally:
        loop.close()
    assert not result.is_done
    assert any(m.startswith("stopping: waiting") for m in view.messages)
    assert npd.run("run.yaml", resume=True, view=QuietView()).is_done


def as_shown(parameter: inspect.Parameter) -> str:
    """A parameter without its type: `name`, `name=default` or `**name`."""
    return str(parameter.replace(annotation=inspect.Parameter.empty))


def test_names_are_all_on_their_page_with_their_signature():
    assert dir(npd) == sorted(npd.__all__)
    headings = re.findall(r"^## (\w+)$", PAGE, re.MULTILINE)
    names = {name for name in npd.__all__ if name != "__version__"}
    assert {("run" if name == "Run" else name) for name in headings} == names
    for name, parameters in re.findall(r"^npd\.([\w.]+)\((.*?)\)(?: ->|$)", SHOWN, SIGNATURES):
        found = npd
        for part in name.split("."):
            found = getattr(found, part)
        told = [p.strip() for p in parameters.split(",") if p.strip() not in ("", "*")]
        real = [as_shown(p) for p in inspect.signature(found).parameters.values()]
        if name == "RunConfig":
            real = ["**values"]
        if "**options" in told:
            real = [*real[: len(told) - 1], "**options"]
        assert told == real, name
    for name in names:
        assert (getattr(npd, name).__doc__ or "").strip(), name


def test_the_keywords_are_those_of_a_config():
    assert set(RunKeywords.__annotations__) == set(RunConfig.model_fields)


def blocks(text):
    """The Python of a page, but what is marked as not to be run."""
    found = re.findall(r"(<!-- not run.*?-->\n)?```python\n(.*?)```", text, re.DOTALL)
    return [code for is_skipped, code in found if not is_skipped]


def test_the_page_does_what_it_says(here, capsys):
    space = {}
    for code in blocks(PAGE):
        exec(compile(code, "api.md", "exec"), space)
    out = capsys.readouterr().out
    assert "RunResult(run: run, state: done after 4 steps" in out


@pytest.mark.slow
def test_readme_and_page_are_typed(tmp_path):
    readme = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    whole = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    (tmp_path / "readme.py").write_text("\n".join(readme))
    (tmp_path / "page.py").write_text(whole)
    wrong = "import npd\nnpd.run(preset='npd', studnt='s')\nnpd.run(3)\nnpd.RunConfig(train=3)\n"
    (tmp_path / "wrong.py").write_text(wrong)

    def check(*names):
        command = [sys.executable, "-m", "mypy", "--strict", *(str(tmp_path / n) for n in names)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)

    done = check("readme.py", "page.py")
    assert done.returncode == 0, done.stdout
    lines = [line.split(":")[1] for line in check("wrong.py").stdout.splitlines()[:-1]]
    assert {"2", "3", "4"} <= set(lines)
