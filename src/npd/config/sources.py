"""Reads config files, presets and `--set` as layers: values by dotted path, each with its location.

Also writes the commands that start and resume a run, from the origins of its values. Promises:
broken YAML, a duplicate key, or a missing or huge file raises a ConfigError with file, line and
remedy. Does not know which keys exist (`npd.config.load` does).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from npd.config.paths import why_no_path, why_unreadable
from npd.config.strict_yaml import parse
from npd.errors import ConfigError
from npd.redaction import HIDDEN, masked
from npd.text import shown, shown_path

_LARGEST = 2**20  # bytes of a config file: about 10,000 times a usual one

FOLLOWS = "follows "
"""Prefix of the origin of a value that the length of the run implies."""
SMOKE = "--smoke"
"""The origin of a value that a smoke run changes."""
PYTHON = "Python"
"""The origin of a value given in a Python call, which no command line can repeat."""


@dataclass(frozen=True, slots=True)
class ConfigSource:
    """One layer: values by dotted path, and the location of each (`run.yaml:3`)."""

    origin: str
    values: dict[str, Any]
    locations: dict[str, str]

    def location(self, path: str) -> str:
        """The location where the layer sets `path`: the line if known, else the origin."""
        return self.locations.get(path, self.origin)


def preset_names() -> list[str]:
    """Names of the presets that come with npd, sorted."""
    found = (files("npd") / "presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in found if file.name.endswith(".yaml"))


def preset_summaries() -> dict[str, str]:
    """The summary of each preset, by name: the first sentence of its file."""
    return {name: _first_sentence(_preset_text(name)) for name in preset_names()}


def _first_sentence(text: str) -> str:
    comment = " ".join(line.removeprefix("# ") for line in text.splitlines() if line[:1] == "#")
    return comment.partition(". ")[0].rstrip(".") + "."


def source_layers(source: str | Path | Mapping[str, Any]) -> list[ConfigSource]:
    """The layers of a preset, a YAML file or a mapping, lowest first.

    A preset's name means the preset; `./npd` or a Path means a file.
    """
    if isinstance(source, Mapping):
        return _on_preset(mapping_layer(source))
    if source in preset_names():
        return [_preset_layer(str(source))]
    text = _read(source)
    return _on_preset(_parse(text, shown_path(source)))


def mapping_layer(values: Mapping[str, Any]) -> ConfigSource:
    """Values given in Python, nested or by dotted path, as one layer."""
    return ConfigSource(PYTHON, dict(flat(plain(values))), {})


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values given in Python as a YAML file has them: sections as mappings, paths as text.

    `data` may be the path of the training file.
    """
    return {str(key): _plain(value) for key, value in _expanded(values).items()}


def _expanded(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Values with `data: FILE` expanded to `data: {train: FILE}`, which keeps other `data` keys."""
    data = values.get("data")
    return {**values, "data": {"train": data}} if _is_file(data) else dict(values)


def _is_file(data: Any) -> bool:
    return isinstance(data, str | Path)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(exclude_unset=True))
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, Path) else value


def _on_preset(own: ConfigSource) -> list[ConfigSource]:
    """A layer, below it the preset that it names."""
    preset = own.values.pop("preset", None)
    if preset is None:
        return [own]
    if preset not in preset_names():
        raise ConfigError(
            f"{own.location('preset')}: there is no preset {shown(repr(preset))}"
            f"{_did_you_mean(str(preset), preset_names())}: use one of {', '.join(preset_names())}"
        )
    return [_preset_layer(preset), own]


def _preset_layer(name: str) -> ConfigSource:
    return _parse(_preset_text(name), f"preset {name}")


def _preset_text(name: str) -> str:
    return (files("npd") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def _read(source: str | Path) -> str:
    """The text of a config file; ConfigError if it cannot be read."""
    path = Path(os.path.expanduser(source))
    if (why := why_no_path(str(source)) or why_unreadable(path)) is not None:
        raise ConfigError(
            f"config {shown_path(str(source) or '``')} {why}, and is not a preset"
            f"{_did_you_mean(str(source), preset_names())}: give a YAML file, or one of "
            f"{', '.join(preset_names())}"
        )
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
    except OSError as error:
        raise ConfigError(
            f"config {shown_path(source)} cannot be read ({error.strerror}): check the disk"
        ) from error
    if len(raw) > _LARGEST:
        raise ConfigError(
            f"{shown_path(source)} is too large for a config (over {_LARGEST:,} bytes): give a "
            "YAML file of `key: value` lines"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{shown_path(source)} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from error


def _parse(text: str, origin: str) -> ConfigSource:
    """A YAML mapping as a layer; ConfigError with file and line if it is not one."""
    values, locations = parse(text, origin)
    if values is None:
        return ConfigSource(origin, {}, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} must hold `key: value` lines, not {shown(repr(values), 40)}")
    short = {"data.train": locations.get("data", origin)} if _is_file(values.get("data")) else {}
    leaves = _once(flat(_expanded(values)), origin, locations)
    return ConfigSource(origin, leaves, locations | short)


def _once(
    leaves: Iterable[tuple[str, Any]], origin: str, locations: Mapping[str, str]
) -> dict[str, Any]:
    """Values by path; ConfigError if a key is set twice, as in `train.lr: 1, train: {lr: 2}`."""
    found: dict[str, Any] = {}
    above: dict[str, str] = {}  # a path on the way to a value -> that value's path
    for path, value in leaves:
        parts = path.split(".")
        ways = [".".join(parts[:n]) for n in range(1, len(parts))]
        both = next((way for way in (path, *ways) if way in found), above.get(path))
        if both is not None:
            location, first = locations.get(path, origin), locations.get(both, origin)
            if both == path:
                raise ConfigError(
                    f"{location}: {shown(path)} is set twice, also by its parts: remove one"
                )
            raise ConfigError(
                f"{location}: {shown(path)} is already set by {shown(both)} at {first}: remove one"
            )
        found[path] = value
        above |= dict.fromkeys(ways, path)
    return found


def override_layer(overrides: Sequence[str]) -> ConfigSource:
    """`a.b=c` overrides as one layer; for a repeated key the last one counts."""
    values: dict[str, Any] = {}
    locations: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key, location = key.strip(), f"--set {shown(override, 40)}"
        if not equals or not all(part.strip() for part in key.split(".")):
            raise ConfigError(f"{location}: write it as KEY=VALUE, e.g. --set train.lr=1e-5")
        value, _ = parse(text, location, has_lines=False)
        for path, leaf in flat(_expanded({key: value})):
            values = {other: v for other, v in values.items() if not overlap(other, path)}
            values[path], locations[path] = leaf, location
    return ConfigSource("--set", values, locations)


def overlap(path: str, other: str) -> bool:
    """Whether one dotted path equals or contains the other."""
    return path == other or path.startswith(f"{other}.") or other.startswith(f"{path}.")


def flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted paths and leaves; an empty mapping is a leaf."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def as_yaml(value: Any) -> str:
    """A value on one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=2**31, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


# Commands that start and resume a run.

_IN_PYTHON = "npd.run(config, {}=True)"
_PRESET = "preset "


def resume_command(config: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """`npd run run.yaml --set train.lr=2e-05 --resume`, or the Python call for a run from Python.

    `config` and `origins` are as in `dump_config` and `Settings`, or as in a run's `config.json`.
    Values that may be secret are left out. A smoke run is not resumed: the command starts it again.
    """
    words = _start_words(config, origins)
    is_smoke = SMOKE in origins.values()
    if words is None:
        return _IN_PYTHON.format("smoke" if is_smoke else "resume")
    return shlex.join([*words, SMOKE if is_smoke else "--resume"])


def start_command(config: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """The command, or the Python call, that starts a run; arguments as in `resume_command`."""
    words = _start_words(config, origins)
    return "npd.run(config)" if words is None else shlex.join(words)


def _start_words(config: Mapping[str, Any], origins: Mapping[str, str]) -> list[str] | None:
    source = _source(set(origins.values()))
    if source is None:
        return None
    public = dict(flat(masked(config)))
    sets = [
        f"{key}={as_yaml(value) if _is_public(public[key], value) else '...'}"
        for key, value in flat(config)
        if origins.get(key) == "--set"
    ]
    return ["npd", "run", source, *(word for each in sets for word in ("--set", each))]


def _is_public(shown: Any, value: Any) -> bool:
    """Whether no part of a value is masked, here or in the `config.json` it was read from."""
    same = list(shown) == list(value) if isinstance(value, list | tuple) else shown == value
    return same and HIDDEN not in str(shown)


def _source(origins: set[str]) -> str | None:
    """The CONFIG argument of the command line: the file if there is one, else the preset."""
    if PYTHON in origins:
        return None
    named = {o for o in origins - {"default", "--set", SMOKE} if not o.startswith(FOLLOWS)}
    files = sorted(origin for origin in named if not origin.startswith(_PRESET))
    presets = sorted(origin.removeprefix(_PRESET) for origin in named - set(files))
    return next(iter([*files, *presets]), None)
