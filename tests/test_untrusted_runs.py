"""A run directory that came from somebody else: reading it runs nothing that lies in it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import npd
from cli_fixture import Shell
from npd.control.run_record import load_run
from npd.errors import InputError, ModelError, StoreError
from npd.export import export_model
from npd.store.layout import RunLayout
from npd.store.snapshots import MANIFEST, publish
from test_run import QuietView
from tiny_run import tiny_config, write_prompts

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir, tiny_teacher_dir):
    """A finished run, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    prompts = write_prompts(folder / "prompts.jsonl")
    sections = {"schedule": {"epochs": None, "steps": 2, "refresh": "never"}}
    config = tiny_config(tiny_model_dir, tiny_teacher_dir, prompts, folder / "run", **sections)
    npd.run(config, view=QuietView())
    return folder / "run"


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "was-run"


@pytest.fixture
def foreign(tmp_path, finished, marker):
    """The run as an enemy would hand it over: its record trusts the code of its models."""
    root = tmp_path / "foreign"
    shutil.copytree(finished, root)
    rewrite(root / "student", marker)
    rewrite(root / "base", marker)
    record = json.loads((root / "config.json").read_text())
    record["config"] |= {"trust_remote_code": True, "student": str(root / "base")}
    (root / "config.json").write_text(json.dumps(record))
    return root


def rewrite(folder: Path, marker: Path) -> None:
    """The model in `folder` with code of its own, and a manifest that fits."""
    source = folder if folder.exists() else folder.with_name("student")

    def write(into: Path) -> None:
        shutil.copytree(source, into, dirs_exist_ok=True)
        (into / MANIFEST).unlink()
        (into / "evil.py").write_text(CODE.format(marker=str(marker)))
        settings = json.loads((into / "config.json").read_text())
        classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
        settings |= {"model_type": "evil", "auto_map": classes}
        (into / "config.json").write_text(json.dumps(settings))
        tokenizer = json.loads((into / "tokenizer_config.json").read_text())
        tokenizer["auto_map"] = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
        (into / "tokenizer_config.json").write_text(json.dumps(tokenizer))

    new = folder.with_name("rewritten")
    publish(new, write)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


@pytest.fixture
def shell(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys)


def test_show_runs_no_code_of_the_directory(shell, foreign, marker):
    for command in (["show", "foreign"], ["show", "foreign", "--report"]):
        done = shell.npd(*command)
        assert done.code == 0, done.err
        assert "tiny: 2 steps" in done.out
    assert not marker.exists()


def test_show_imports_no_model_code(shell, foreign):
    script = (
        "import sys; from npd.__main__ import run; assert run(['show', 'foreign']) == 0; "
        "sys.exit(' '.join({'torch', 'transformers'} & {*sys.modules}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_export_runs_its_code_only_where_that_is_asked_for(shell, foreign, marker):
    said = shell.npd("export", "foreign", "out").complaint(2)
    assert "Python code of its own" in said
    assert "--trust-remote-code" in said
    with pytest.raises(InputError, match="trust_remote_code=True"):
        export_model(foreign, Path("out"))
    assert not marker.exists()
    assert not Path("out").exists()
    # In a process of its own: transformers keeps what it was given to run.
    environment = {**os.environ, "HF_MODULES_CACHE": str(shell.folder / "modules")}
    done = shell.process("export", "foreign", "out", "--trust-remote-code", env=environment)
    assert done.code == 0, done.err
    assert marker.exists()
    assert Path("out/evil.py").exists()


def test_a_loaded_record_trusts_nothing(foreign):
    config = load_run(RunLayout(foreign))
    assert config.student == str(foreign / "base")
    assert not config.trust_remote_code


def test_the_record_does_not_decide_for_who_resumes(foreign, marker):
    config = load_run(RunLayout(foreign))
    with pytest.raises(ModelError):
        npd.run(config, resume=True, view=QuietView())
    assert not marker.exists()


def test_files_that_the_manifest_does_not_name_are_not_copied(shell, foreign, finished, tmp_path):
    (tmp_path / "secret").write_text("mine")
    root = shutil.copytree(finished, tmp_path / "linked")
    (root / "student" / "notes.txt").symlink_to(tmp_path / "secret")
    (root / "student" / "pytorch_model.bin").write_bytes(b"a pickle")
    assert shell.npd("export", "linked", "out").code == 0
    assert not {"notes.txt", "pytorch_model.bin"} & {path.name for path in Path("out").iterdir()}


def test_a_manifest_names_nothing_elsewhere(shell, finished, tmp_path):
    root = shutil.copytree(finished, tmp_path / "elsewhere")
    manifest = json.loads((root / "student" / MANIFEST).read_text())
    (root / "student" / MANIFEST).unlink()
    (root / "secret").write_text("mine")
    publish(root / "published", lambda into: shutil.copyfile(root / "secret", into / "x"))
    told = json.loads((root / "published" / MANIFEST).read_text())["files"]["x"]
    manifest["files"]["../secret"] = told
    listed = json.dumps(manifest["files"], sort_keys=True).encode()
    manifest["checksum"] = hashlib.sha256(listed).hexdigest()
    (root / "student" / MANIFEST).write_text(json.dumps(manifest))
    assert "is damaged" in shell.npd("export", "elsewhere", "out").complaint(1)
    with pytest.raises(StoreError, match="names files outside"):
        export_model(root / "student", Path("out"))


@pytest.mark.parametrize(
    "change", ["payload = '{}'", "kind = 'Popen', payload = '{\"digest\": 1}'", "payload = '[1]'"]
)
def test_a_ledger_of_other_contents_is_one_line(shell, foreign, change):
    with closing(sqlite3.connect(foreign / "ledger.db")) as db, db:
        db.execute(f"UPDATE events SET {change}")
    said = shell.npd("show", "foreign").complaint(1)
    assert f"event 1 of {Path('foreign/ledger.db')} is not" in said


@pytest.mark.parametrize("change", [{"seed": "x"}, {"no": 1}, {"schedule": {"steps": 0}}])
def test_a_record_that_is_no_config_is_one_line(shell, foreign, change):
    record = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(record | {"config": record["config"] | change}))
    assert "is not what npd run writes" in shell.npd("show", "foreign").complaint(2)
