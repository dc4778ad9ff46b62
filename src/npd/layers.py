"""Config files, presets and `--set` as layers: values by dotted path, each with its place.

Promises: broken YAML, a key written twice and a file that is missing are a ConfigError with file
and line and the remedy. Does not know which keys exist (that is `npd.settings`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from npd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Layer:
    """Values by dotted path, and where each was written (`run.yaml:3`)."""

    origin: str
    values: dict[str, Any]
    places: dict[str, str]

    def place(self, path: str) -> str:
        """Where the layer sets a path, as exactly as is known."""
        return self.places.get(path, self.origin)


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-5` is a number, as people expect, and not text, as YAML 1.1 has it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def preset_names() -> list[str]:
    """The presets that come with npd, sorted."""
    found = (files("npd") / "presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in found if file.name.endswith(".yaml"))


def source_layers(source: str | Path) -> list[Layer]:
    """The layers of a preset's name or of a YAML file, lowest first.

    Text that is a preset's name means the preset; `./npd` or a Path means the file of that name.
    """
    if source in preset_names():
        return [_preset_layer(str(source))]
    path = Path(source).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 text ({error}): save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(
            f"{source} is no config file that can be read ({error.strerror}) and no preset"
            f"{_did_you_mean(str(source), preset_names())}: give a YAML file, or one of "
            f"{', '.join(preset_names())}"
        ) from error
    own = _parse(text, str(source))
    preset = own.values.pop("preset", None)
    if preset is None:
        return [own]
    if preset not in preset_names():
        raise ConfigError(
            f"{own.place('preset')}: no preset {preset!r}"
            f"{_did_you_mean(str(preset), preset_names())}: use one of {', '.join(preset_names())}"
        )
    return [_preset_layer(preset), own]


def _preset_layer(name: str) -> Layer:
    text = (files("npd") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    return _parse(text, f"preset {name}")


def _parse(text: str, origin: str) -> Layer:
    """A YAML mapping as a layer; ConfigError with file and line if it is none."""
    try:
        node = yaml.compose(text, _Loader)
        values = yaml.load(text, _Loader) or {}
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = origin if mark is None else f"{origin}:{mark.line + 1}"
        raise ConfigError(_yaml_problem(error, where)) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} must hold `key: value` lines, not {values!r:.40}")
    return Layer(origin, dict(flat(values)), _places(node, origin))


def _yaml_problem(error: Exception, where: str) -> str:
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{where}: not YAML: {problem}; check indentation and colons, and quote special text"


def _places(node: yaml.Node | None, origin: str, prefix: str = "") -> dict[str, str]:
    """File and line of each key; ConfigError where one is written twice."""
    found: dict[str, str] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        path, place = f"{prefix}{key.value}", f"{origin}:{key.start_mark.line + 1}"
        if path in found:
            raise ConfigError(f"{place}: {path} is set already at {found[path]}: remove one")
        found[path] = place
        found |= _places(value, origin, f"{path}.")
    return found


def override_layer(overrides: Sequence[str]) -> Layer:
    """`a.b=c` overrides as one layer; the last one of a key counts."""
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key, place = key.strip(), f"--set {override}"
        if not equals or not key:
            raise ConfigError(f"{place}: write it as KEY=VALUE, e.g. --set train.lr=1e-5")
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(_yaml_problem(error, place)) from error
        for path, leaf in flat({key: value}):
            values = {other: v for other, v in values.items() if not overlap(other, path)}
            values[path], places[path] = leaf, place
    return Layer("--set", values, places)


def overlap(path: str, other: str) -> bool:
    """Whether one dotted path is, or lies within, the other."""
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
