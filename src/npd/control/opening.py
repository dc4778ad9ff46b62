"""Before a run starts: everything that can be found wrong without loading a model, and its record.

Checks the vocabularies, the models' context, the data, and the run directory; writes config.json.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from npd import __version__
from npd.chat import Chat, check_same_vocabulary
from npd.config import RunConfig
from npd.data import encode_prompts, load_prompts
from npd.errors import ConfigError, DataError, ModelError
from npd.modeling import check_context
from npd.settings import dump_config
from npd.store.files import read_json, write_json
from npd.store.layout import RunLayout
from npd.types import EncodedPrompt

_PACKAGES = ("npd", "torch", "transformers", "safetensors", "pyarrow", "numpy")
# What may differ when a run is resumed: where it runs and what it leaves, not what it is.
_FREE = ("runtime.", "observe.", "checkpoint.", "run_dir", "name")


@dataclass(frozen=True, slots=True)
class Prepared:
    """The prompts of a run as token ids, and how many records were dropped for which reason."""

    prompts: list[EncodedPrompt]
    heldout: list[EncodedPrompt]
    dropped: dict[str, int]

    @property
    def fingerprint(self) -> str:
        """A checksum of all prompts, to notice that the data changed under a run."""
        digest = hashlib.sha256()
        for prompt in (*self.prompts, *self.heldout):
            digest.update(prompt.prompt_ids.tobytes())
        return digest.hexdigest()


def prepare(config: RunConfig) -> Prepared:
    """Check models and data, and tokenise the prompts.

    Raises:
        InputError: a model or the data cannot be used.
    """
    trust = config.trust_remote_code
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        if model is not None:
            check_model(role, model, config)
    chat = Chat.load(config.student, system=config.data.system, trust_remote_code=trust)
    if config.teacher is not None and config.needs_teacher:
        check_same_vocabulary(config.teacher, config.student, trust_remote_code=trust)
    found = load_prompts(config.data)
    prompts, dropped = encode_prompts(found.train, chat, config.data)
    heldout, dropped_heldout = encode_prompts(found.heldout, chat, config.data)
    if config.generate.source == "dataset":
        _check_completions(prompts, "generate.source dataset")
    if config.eval.source == "completion":
        _check_completions(heldout, "eval.source completion")
    if not prompts:
        raise DataError(
            "no training prompt is left after dropping: see data.on_long_prompt and "
            f"data.max_prompt_tokens ({config.data.max_prompt_tokens})"
        )
    for model in filter(None, (config.student, config.teacher)):
        check_weights(model)
    counts = [found.dropped, dropped, dropped_heldout]
    reasons = sorted({reason for count in counts for reason in count})
    return Prepared(prompts, heldout, {r: sum(c.get(r, 0) for c in counts) for r in reasons})


def check_model(role: str, model: str, config: RunConfig) -> None:
    """Check that a model is there and its context long enough, reading its config only.

    `role` is the name of the setting or option it comes from, for the message.

    Raises:
        ModelError: it cannot be used. A path is never taken for a hub's name.
    """
    if _is_path(model) and not Path(model).is_dir():
        raise ModelError(
            f"no model directory at {model} (looked from {Path.cwd()}): correct `{role}`, or make "
            "the directory with npd prepare"
        )
    check_context(model, config.max_sample_tokens, trust_remote_code=config.trust_remote_code)


def check_weights(model: str) -> None:
    """Check that a directory's weights are there and whole, reading their headers only.

    Raises:
        ModelError: there are none, or a file is damaged.
    """
    if not Path(model).is_dir():
        return  # a hub's name: what is downloaded is checked when it is loaded
    files = sorted(Path(model).glob("*.safetensors"))
    if not files:
        raise ModelError(f"{model} holds no .safetensors weights: save the model in that format")
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{file} is damaged or cut short ({error}): copy or make the model again"
            ) from error


def _is_path(model: str) -> bool:
    """Whether `model` can only mean a directory; a hub's names are `name` and `owner/name`."""
    owner, _, name = model.partition("/")
    return model.startswith(("/", ".")) or "/" in name or (bool(name) and Path(owner).is_dir())


def open_directory(
    config: RunConfig, prepared: Prepared, *, resume: bool, origins: Mapping[str, str]
) -> RunLayout:
    """The run directory, new with its config.json, or checked to be the one to go on with.

    Raises:
        ConfigError: it holds a run already, or (resuming) none or another one.
    """
    layout = RunLayout(config.directory)
    if layout.config_json.exists():
        if not resume:
            raise ConfigError(
                f"{layout.root} holds a run already: go on with it (--resume), or choose another "
                "place (--set name=... or --set run_dir=...)"
            )
        _check_same(config, prepared, layout)
        layout.create()
        return layout
    if resume:
        raise ConfigError(f"{layout.root} holds no run to resume: start it without --resume")
    if layout.root.exists() and any(layout.root.iterdir()):
        raise ConfigError(f"{layout.root} is not empty and not a run: choose another run_dir")
    record = {
        "config": dump_config(config),
        "origins": dict(origins),
        "versions": versions(),
        "num_prompts": len(prepared.prompts),
        "dropped": prepared.dropped,
        "fingerprint": prepared.fingerprint,
    }
    # First, so that a disk that is full already leaves nothing that could not be gone on with.
    write_json(layout.config_json, record)
    layout.create()
    return layout


def load_run(layout: RunLayout) -> RunConfig:
    """The config a run directory was made with."""
    if not layout.config_json.exists():
        raise ConfigError(
            f"{layout.root} is not a run directory (it has no config.json): give the directory "
            "that npd run wrote, e.g. runs/npd"
        )
    record = read_json(layout.config_json)
    try:
        config = RunConfig.model_validate(record["config"])
    except (KeyError, TypeError, ValidationError) as error:
        raise ConfigError(
            f"{layout.config_json} is not what npd run writes: give a run directory, made by this "
            f"version of npd ({__version__})"
        ) from error
    return config.model_copy(update={"run_dir": layout.root})


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, the machine, and the commit if there is one."""
    found = {"python": platform.python_version(), "machine": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = _commit()
    return found if commit is None else found | {"commit": commit}


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _check_completions(prompts: Sequence[EncodedPrompt], needed_by: str) -> None:
    missing = [prompt.index for prompt in prompts if prompt.completion_ids is None]
    if missing:
        raise DataError(
            f"{needed_by} needs a completion for every prompt, but prompt {missing[0]} (and "
            f"{len(missing) - 1} more) has none: add a `completion` column, or name yours in "
            "data.columns"
        )


def _check_same(config: RunConfig, prepared: Prepared, layout: RunLayout) -> None:
    old, new = _decisive(load_run(layout)), _decisive(config)
    changed = [key for key in new if new[key] != old.get(key)]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{layout.root} was started with {key}={old.get(key)!r}, now it is {new[key]!r}: "
            f"resume with the same config (--set {key}={json.dumps(old.get(key))}), or start a new "
            "run (--set name=...)"
        )
    if read_json(layout.config_json)["fingerprint"] != prepared.fingerprint:
        raise DataError(
            f"the prompts are not those {layout.root} was started with: restore the data, or start "
            "a new run (--set name=...)"
        )


def _decisive(config: RunConfig) -> dict[str, Any]:
    """The values that decide what a run does, by dotted path."""
    values = _flat(dump_config(config))
    # `auto` depends on runtime.kind, which may change; what it comes to may not.
    values["schedule.overlap"] = config.is_overlapped
    return {key: value for key, value in values.items() if not key.startswith(_FREE)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
