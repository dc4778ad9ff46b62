"""One whole tiny run by an npd installed as users install it: from a wheel, without extras.

`PYTHON tests/whole_run.py`, with the interpreter that npd is installed for. Makes two tiny models
of random weights and some prompts, then types what a user would: `npd doctor`, `npd run` (workers
as processes), `npd show`, `npd export`; loads what was exported with plain transformers, and chats
with it. Prints the versions it ran with, and a closing line of what passed; ends with 1 where
anything did not. Needs nothing but npd's own dependencies.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tiny_model import save_model
from tiny_run import tiny_settings, write_prompts

SHOWN = ("torch", "transformers", "tokenizers", "safetensors", "pyarrow", "pydantic", "numpy")
SHOWN += ("typer", "rich", "httpx", "fsspec", "jinja2", "PyYAML")


def main() -> int:
    """Run every step; returns the exit code."""
    import npd

    assert "site-packages" in npd.__file__, f"not an installed npd: {npd.__file__}"
    print("python", platform.python_version(), *(f"{name} {_version(name)}" for name in SHOWN))
    passed = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_inputs()
        for step in (doctor, run, export, chat):
            step()
            passed += 1
            print(f"ok: {step.__doc__}")
    print(f"{passed} passed, 0 failed")
    return 0


def make_inputs() -> None:
    """Two tiny models, prompts and a config, made as the tests make theirs."""
    save_model(Path("student"), seed=0)
    save_model(Path("teacher"), seed=1, layers=3)
    prompts = write_prompts(Path("prompts.jsonl"))
    paths = (Path("student"), Path("teacher"), prompts, Path("run"))
    settings = tiny_settings(*paths, runtime={"kind": "local"})
    Path("run.yaml").write_text(json.dumps(settings))  # JSON is YAML


def doctor() -> None:
    """npd doctor finds nothing that fails"""
    found = json.loads(npd("doctor", "run.yaml", "--json"))
    for check in found["checks"]:
        if check["status"] != "ok":
            print(f"{check['status']}: {check['what']}: {check['says']}")
    assert not found["failed"]


def run() -> None:
    """npd run ends with a student, and npd show says so"""
    npd("run", "run.yaml")
    assert Path("run/student/model.safetensors").exists()
    print(npd("show", "run"), end="")


def export() -> None:
    """npd export writes a directory"""
    npd("export", "run", "mine")


def chat() -> None:
    """plain transformers loads it, and it answers"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("mine")
    model = AutoModelForCausalLM.from_pretrained("mine")
    turns = [{"role": "user", "content": "what is moon number 3?"}]
    ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    answer = out[0, ids["input_ids"].shape[1] :]
    assert len(answer) >= 1
    print(repr(tokenizer.decode(answer)))


def npd(*arguments: str) -> str:
    """The command as a user types it; returns what it printed."""
    command = [str(Path(sys.executable).parent / "npd"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


if __name__ == "__main__":
    sys.exit(main())
