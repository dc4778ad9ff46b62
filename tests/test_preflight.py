"""The preflight: `npd run` raises its first failure, `npd doctor` prints every check once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli_fixture import Shell
from npd.config.load import load_config
from npd.control.preflight import Preflight, Start, prepare
from npd.errors import ConfigError, InputError, ModelError
from npd.types import Check
from tiny_model import make_tokenizer

SERVED = ["score.engine=vllm", "score.launch.command=[sh]"]
DATASET = [
    "generate.source=dataset",
    "loss.kd_weight=0",
    "filter.name=none",
    "eval.source=none",
    "schedule.refresh=never",
]


@pytest.fixture
def shell(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys, monkeypatch):
    """Models of one's own, to break."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    student = shutil.copytree(tiny_model_dir, tmp_path / "student")
    teacher = shutil.copytree(tiny_teacher_dir, tmp_path / "teacher")
    made = Shell(tmp_path, Path(student), Path(teacher), capsys)
    made.write()
    return made


def other_words(model: Path) -> None:
    make_tokenizer(["some other words in here than there"] * 9).save_pretrained(model)


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


# What is broken, the settings, the check that fails first, and what its error names.
BAD: list[tuple[Callable[[Shell], object] | None, list[str], str, str]] = [
    (None, [*SERVED, "score.launch.env={HF_TOKEN: '***'}"], "secrets", "score.launch.env"),
    (None, ["run_dir=run.yaml/run"], "run directory", "run_dir"),
    (None, ["run_dir=student/run"], "run directory", "student"),
    (None, ["runtime.shared=nope://bucket"], "shared files", "nope://bucket"),
    (None, ["runtime.device=cuda:99"], "device", "runtime.device"),
    (None, ["runtime.device=npu"], "device", "torch here knows no such kind of device"),
    (None, ["runtime.device=xpu"], "device", "no device of kind xpu that torch can use"),
    (None, ["student=./nowhere"], "student", "./nowhere"),
    (None, ["student=./nowhere", "teacher=./neither", "data.train=no.jsonl"], "student", "nowhere"),
    (lambda s: cut(s.student / "config.json"), [], "student", "config.json"),
    (lambda s: cut(s.teacher / "config.json"), [], "teacher", "config.json"),
    (lambda s: cut(s.teacher / "config.json"), SERVED, "teacher", "config.json"),
    (lambda s: change(s.teacher / "config.json", hidden_size="wide"), [], "teacher", "hidden_size"),
    (lambda s: (s.student / "model.safetensors").unlink(), [], "weights: student",
     ".safetensors"),
    (lambda s: cut(s.teacher / "model.safetensors"), [], "weights: teacher", "the teacher"),
    (lambda s: change(s.teacher / "config.json", num_hidden_layers=9), [], "weights: teacher",
     "LlamaForCausalLM"),
    (None, ["generate.max_new_tokens=600", "train.row_tokens=2048", "score.row_tokens=2048"],
     "student", "512"),
    (None, ["train.lora={targets: [w_nope]}"], "lora", "w_nope"),
    (None, ["score.ranks=3", "runtime.kind=local"], "score.ranks", "score.ranks"),
    (None, [*SERVED, "score.api_key_env=BAD_KEY"], "score.api_key_env", "$BAD_KEY"),
    (None, [SERVED[0], "score.launch.command=[no-such]"], "score.launch", "no-such"),
    (None, [SERVED[0], "score.launch.venv=nowhere"], "score.launch", "nowhere"),
    (None, ["teacher=student"], "pair", "`teacher`"),
    (lambda s: (s.student / "tokenizer.json").write_text("null"), [], "tokenizer",
     "student"),
    (None, ["score.top_k=100000"], "score.top_k", "score.top_k"),
    (lambda s: other_words(s.teacher), [], "vocabulary: teacher",
     "vocabulary"),
    (lambda s: other_words(s.teacher), ["data.train=no.jsonl"], "vocabulary: teacher",
     "vocabulary"),
    (None, ["generate.stop_ids=[9999]"], "end tokens", "9999"),
    (None, ["data.train=no.jsonl"], "data", "no.jsonl"),
    (None, ["data.heldout_size=100"], "data", "data.heldout_size"),
    (None, ["data.max_prompt_tokens=4"], "data", "data.max_prompt_tokens"),
    (None, [*DATASET, "data.max_completion_tokens=2"], "data", "data.max_completion_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "sets", "what", "named"), BAD)
def test_a_run_raises_what_doctor_prints_first(shell, monkeypatch, spoil, sets, what, named):
    monkeypatch.setenv("BAD_KEY", "a key\nof two lines")
    if spoil is not None:
        spoil(shell)
    arguments = ["run.yaml", *(word for value in sets for word in ("--set", value))]
    doctor = shell.npd("doctor", *arguments, "--json")
    assert doctor.code == 2
    failed = [c for c in json.loads(doctor.out)["checks"] if c["status"] == "FAIL"]
    assert failed[0]["what"] == what
    assert named in failed[0]["says"]
    assert shell.npd("run", *arguments).complaint(2) == f"error: {failed[0]['says']}"
    assert not shell.layout.root.exists()


def found(config, **options) -> list[Check]:
    return list(Preflight(config, **options).checks())


GOOD: list[list[str]] = [
    [],
    ["teacher=null", "teachers={math: teacher, code: teacher}", "data.train=both.jsonl"],
    ["generate.source=teacher", "schedule.refresh=never"],
    ["score.ranks=2", "runtime.kind=local", "train.compile=true"],
    ["train.lora={rank: 2}", "runtime.shared=file:///{here}/shared"],
    ["generate.engine=vllm", "generate.launch.command=[sh]", *SERVED, "runtime.kind=local"],
    ["loss.kd_weight=0", "filter.name=none", "eval.source=none", "teacher=null"],
]


@pytest.mark.parametrize("sets", GOOD)
def test_every_check_is_made_once(shell, sets):
    both = Path("both.jsonl")
    lines = [json.loads(line) for line in Path("prompts.jsonl").read_text().splitlines()]
    names = ["math", "code"]
    both.write_text("".join(json.dumps({**r, "teacher": names[i % 2]}) + "\n"
                            for i, r in enumerate(lines)))  # fmt: skip
    sets = [value.replace("/{here}", str(shell.folder)) for value in sets]
    config = load_config("run.yaml", sets).config
    checks = found(config, start=Start())
    assert {check.status for check in checks} == {"ok"}, checks
    assert not [what for what, count in Counter(c.what for c in checks).items() if count > 1]
    assert all(check.says and check.error is None for check in checks)
    assert prepare(config, start=Start(resume=False)).prompts


def test_checks_are_made_as_they_are_asked_for(shell):
    """A run goes no further than its first failure."""
    preflight = Preflight(load_config("run.yaml", ["student=./nowhere"]).config)
    names = [check.what for check in _until_failure(preflight.checks())]
    assert names == ["secrets", "run directory", "student"]
    assert preflight.failed == {"student"}
    assert preflight.inputs is None


def _until_failure(checks: Iterator[Check]) -> Iterator[Check]:
    for check in checks:
        yield check
        if check.status == "FAIL":
            return


def test_what_needs_a_failed_check_is_skipped(shell):
    config = load_config("run.yaml", ["teacher=./nowhere"]).config
    preflight = Preflight(config)
    checks = list(preflight.checks())
    assert [c.what for c in checks if c.status == "FAIL"] == ["teacher"]
    skipped = {"pair", "vocabulary: teacher", "end tokens", "weights: teacher"}
    assert preflight.failed == {"teacher", *skipped}
    assert preflight.inputs is not None, "the data does not need the teacher"


def test_the_error_is_the_very_one_that_was_raised(shell):
    config = load_config("run.yaml", ["student=./nowhere"]).config
    (failed,) = (c for c in found(config) if c.what == "student")
    assert isinstance(failed.error, ModelError)
    assert failed.says == str(failed.error)
    with pytest.raises(ModelError, match="nowhere"):
        prepare(config)


@pytest.fixture
def config(shell):
    return load_config("run.yaml").config


def test_a_new_run_needs_a_free_directory_before_its_data_is_read(shell, config):
    shell.layout.root.mkdir()
    (shell.layout.root / "notes.txt").touch()
    Path("prompts.jsonl").unlink()
    with pytest.raises(ConfigError, match="run_dir"):
        prepare(config, start=Start(resume=False))
    (shell.layout.root / "notes.txt").unlink()
    with pytest.raises(ConfigError, match="--resume"):
        prepare(config, start=Start(resume=True))
    with pytest.raises(InputError, match=r"prompts\.jsonl"):
        prepare(config, start=Start(resume=False))


def test_a_stage_alone_needs_no_place(shell, config):
    shell.layout.root.mkdir()
    (shell.layout.root / "notes.txt").touch()
    shared = load_config("run.yaml", ["runtime.shared=nope://bucket"]).config
    assert prepare(config).prompts
    assert "shared files" not in [check.what for check in found(shared)]


def test_where_the_start_is_not_known_a_used_directory_is_a_warning(shell, config):
    shell.layout.root.mkdir()
    (shell.layout.root / "notes.txt").touch()
    (check,) = (c for c in found(config, start=Start()) if c.what == "run directory")
    assert check.status == "warn"
    assert "--resume" in check.says
