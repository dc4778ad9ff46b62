"""Loads a config in layers: defaults, then a preset, then a YAML file, then `--set`.

Promises: the origin of each value is known; an unknown key, a wrong value or broken YAML raises a
ConfigError with the location (file and line, or the `--set`) and the remedy. Does not validate
across sections (`npd.config.checks`), and does not read data or models.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import isclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from npd.config import RunConfig
from npd.config.length import RULES, following
from npd.config.no_effect import doubts, idle_values
from npd.config.other_names import other_hint, other_names, value_hint
from npd.config.sources import (
    FOLLOWS,
    ConfigSource,
    flat,
    mapping_layer,
    overlap,
    override_layer,
    plain,
    preset_names,
    preset_summaries,
    source_layers,
)
from npd.errors import ConfigError
from npd.redaction import learn
from npd.text import counted, shown, shown_path

# Values that exclude each other: a layer that sets one unsets the others in lower layers.
_ALTERNATIVES = (
    ("schedule.epochs", "schedule.steps"),
    tuple(f"schedule.refresh.{rule}" for rule in RULES),
)
_DEFAULT = "default"
_log = logging.getLogger(__name__)
# The most errors that are listed.
_MOST_PROBLEMS = 8
# The most keys of a section that are listed.
_MOST_KEYS = 18
# The similarity (difflib's ratio) from which one name is taken for a misspelling of another.
_NEAR = 0.78
_NUMBER = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?|true|false|null")
_KEYS = ": the keys of "
_INDEXED = re.compile(r"(\w+)\[-?\d*\]")

# The expected value in a message, by pydantic's type of error.
_WANTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "finite_number": "a finite number",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "dict_type": "a mapping, like {{name: value}}",
    "missing": "a list with more values",
    "too_short": "a list of {min_length} or more values",
    "too_long": "a list of {max_length} values",
    "string_too_short": "text, and not empty",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
}

# Reminders for settings whose unit is easily mistaken.
_ASIDES = {"train.warmup": ": it is a share of the run, not a number of steps"}

__all__ = [
    "Settings",
    "dump_config",
    "explain",
    "load_config",
    "plain",
    "preset_names",
    "presets",
]


@dataclass(frozen=True, slots=True)
class Settings:
    """A config, and the origin of each of its values by dotted path.

    An origin is `default`, `preset npd`, the YAML file's path or `--set`. A value implied by the
    length of the run has the origin `follows schedule.steps`; `notes` describe those values.
    """

    config: RunConfig
    origins: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Schema:
    """The dotted paths of RunConfig: its values, its sections, and its free-form mappings."""

    values: tuple[str, ...]
    sections: tuple[str, ...]
    mappings: tuple[str, ...]

    def knows(self, path: str) -> bool:
        free = any(path.startswith(f"{mapping}.") for mapping in self.mappings)
        return free or path in self.values or path in self.sections


def load_config(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    values: Mapping[str, Any] | None = None,
) -> Settings:
    """Resolve a YAML file, a preset's name or a mapping, with `a.b=c` overrides on top.

    A file or mapping may name the preset it builds on (`preset: npd`). Overrides are `a.b=c` texts,
    parsed as YAML (for a repeated key the last one counts), or a mapping, nested or by dotted path.
    `values` are a layer above the source and below the overrides. A layer that sets one of several
    alternatives (`schedule.steps` or `schedule.epochs`; a refresh rule) unsets the others in lower
    layers. A layer that sets the length of the run also sets the values that follow from it.

    Raises:
        ConfigError: a file is missing, YAML is broken, a key is unknown or a value is not allowed.
    """
    schema = _schema()
    given = () if values is None else (mapping_layer(values),)
    layers = [_defaults(), *source_layers(source), *given]
    if isinstance(overrides, Mapping):
        layers.append(mapping_layer(overrides))
    else:
        layers.append(override_layer([overrides] if isinstance(overrides, str) else overrides))
    for layer in layers:
        learn(nested(layer.values))  # before a secret can get into a message
    for layer in layers:
        _check_known(layer, schema)
    found, setters = _merged(layers, schema)
    locations = {path: layer.location(path) for path, layer in setters.items()}
    name = "the mapping" if isinstance(source, Mapping) else shown_path(source)
    config = RunConfig.model_validate(
        nested(found), context={"locations": locations, "source": name}
    )
    origins = {path: layer.origin for path, layer in setters.items()}
    leaves = (path for path, _ in flat(dump_config(config)))
    known = {path: _lookup(path, origins, _DEFAULT) for path in leaves}
    for note in _idle(config, setters):
        _log.warning(note)
    return Settings(config, known, tuple(_notes(found, setters)))


def presets() -> dict[str, str]:
    """The presets that come with npd: a summary of each, by name.

    `npd.run(preset="npd", ...)` and `npd.RunConfig.from_preset("npd", ...)` take these names.
    """
    return preset_summaries()


def dump_config(config: RunConfig) -> dict[str, Any]:
    """The complete config as plain JSON values; `RunConfig.model_validate` reads it back."""
    return config.model_dump(mode="json")


def _schema() -> _Schema:
    values: list[str] = []
    sections: list[str] = []
    mappings: list[str] = []
    for path, annotation in _fields(RunConfig, ""):
        # An optional section counts as a value too, because null and {} differ.
        (sections if _is_section(annotation) else values).append(path)
        if get_origin(annotation) is dict:
            mappings.append(path)
    return _Schema(tuple(values), tuple(sections), tuple(mappings))


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        annotation: Any = field.annotation
        yield prefix + name, annotation
        # An optional section (`LaunchConfig | None`) has keys even where its value is None.
        for inner in filter(_is_section, (annotation, *get_args(annotation))):
            yield from _fields(inner, f"{prefix}{name}.")


def _is_section(annotation: Any) -> bool:
    return isclass(annotation) and issubclass(annotation, BaseModel)


def _defaults() -> ConfigSource:
    values: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        if not field.is_required():
            default = field.get_default(call_default_factory=True)
            values[name] = default.model_dump() if isinstance(default, BaseModel) else default
    return ConfigSource(_DEFAULT, dict(flat(values)), {})


def _check_known(layer: ConfigSource, schema: _Schema) -> None:
    unknown = dict.fromkeys(
        _unknown_part(path, schema) for path in layer.values if not schema.knows(path)
    )
    problems: list[str] = []
    given: set[str] = set()
    for path in list(unknown)[:_MOST_PROBLEMS]:
        hint = _hint(path, schema)
        # The keys of a section are listed only once.
        is_repeated = hint in given and hint.startswith(_KEYS)
        problems.append(
            f"{layer.location(path)}: unknown key {shown(path, 40)}{'' if is_repeated else hint}"
        )
        given.add(hint)
    if len(unknown) > _MOST_PROBLEMS:
        rest = counted(len(unknown) - _MOST_PROBLEMS, "more unknown key")
        problems.append(
            f"{layer.origin}: and {rest}: `npd config npd --set student=DIR --set teacher=DIR` "
            "prints all keys"
        )
    if problems:
        raise ConfigError(*problems)


def _unknown_part(path: str, schema: _Schema) -> str:
    """The outermost unknown section if another program has it, else the path itself."""
    parts = path.split(".")
    starts = (".".join(parts[:n]) for n in range(1, len(parts)))
    first = next((start for start in starts if not schema.knows(start)), path)
    return first if other_hint(first) else path


def _hint(path: str, schema: _Schema) -> str:
    """The remedy for an unknown key: npd's name for it, or the keys of its section."""
    if path.partition(".")[0] == "preset":
        return ": give the preset's name instead of a config file, or set `preset:` in the file"
    parent, _, name = path.rpartition(".")
    known = (*schema.values, *schema.sections)
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    if parent in schema.values and not siblings:
        return f": did you mean {parent}?"
    indexed = _INDEXED.fullmatch(name)
    if indexed is not None and indexed[1] in siblings:
        return f": did you mean {siblings[indexed[1]]}? A list is set as a whole"
    if (hint := other_hint(name)) is not None:
        return f": {hint}"
    near = [key for key in known if key.rpartition(".")[2] == name]
    near = near or [siblings[key] for key in get_close_matches(name, siblings, 1, _NEAR)]
    best = get_close_matches(name, [key.rpartition(".")[2] for key in known], 1, _NEAR)
    near = near or [key for key in known if key.rpartition(".")[2] in best]
    if near:
        return f": did you mean {' or '.join(near)}?"
    for other in get_close_matches(name, other_names(), 1, _NEAR):
        return f": {other_hint(other)}"
    keys = [*(siblings or [key for key in known if "." not in key])]
    where, more = parent if siblings and parent else "a config", len(keys) - _MOST_KEYS
    rest = f" and {more} more" if more > 1 else ""
    return f"{_KEYS}{where} are {', '.join(keys[:_MOST_KEYS] if rest else keys)}{rest}"


def _merged(
    layers: Sequence[ConfigSource], schema: _Schema
) -> tuple[dict[str, Any], dict[str, ConfigSource]]:
    """The values of all layers, later ones on top, and the layer that set each."""
    values: dict[str, Any] = {}
    setters: dict[str, ConfigSource] = {}
    for layer in layers:
        below = _schedule_of(values)
        _lay(layer, values, setters, schema)
        _lay(_followers(below, layer), values, setters, schema)
    return values, setters


def _lay(
    layer: ConfigSource, values: dict[str, Any], setters: dict[str, ConfigSource], schema: _Schema
) -> None:
    """Put a layer's values over those of the layers below it."""
    for path, value in layer.values.items():
        if path in schema.sections and value in (None, {}):
            if layer.origin == "--set":
                raise ConfigError(f"{layer.location(path)}: {_is_section_of(path)}")
            continue  # a section whose keys are all commented out
        for other in [o for o in values if _displaces(path, value, o, setters[o] is layer)]:
            del values[other], setters[other]
        values[path], setters[path] = value, layer


def _schedule_of(values: Mapping[str, Any]) -> dict[str, Any]:
    prefix = "schedule."
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _followers(below: Mapping[str, Any], layer: ConfigSource) -> ConfigSource:
    """The values that follow from the length of the run that `layer` sets, unless it sets them."""
    given = _schedule_of(layer.values)
    length = "steps" if given.get("steps") is not None else "epochs"
    found = following(below, given) if below else {}
    values = {f"schedule.{key}": value for key, value in found.items()}
    return ConfigSource(f"{FOLLOWS}schedule.{length}", values, {})


def _idle(config: RunConfig, setters: Mapping[str, ConfigSource]) -> Iterator[str]:
    """A line for each value a user set that has no effect, or probably an unintended one."""
    idle = {key: f"has no effect, as {why}" for key, why in idle_values(config).items()}
    for key, what in [*idle.items(), *doubts(config)]:
        layers = [layer for path, layer in setters.items() if overlap(path, key)]
        locations = [layer.location(key) for layer in layers if layer.origin not in _unwritten()]
        if locations:
            yield f"note: {locations[-1]}: {key} {what}"


def _unwritten() -> set[str]:
    """The origins of values that no user set."""
    return {_DEFAULT, *(f"preset {name}" for name in preset_names())}


def _notes(values: Mapping[str, Any], setters: Mapping[str, ConfigSource]) -> Iterator[str]:
    """A sentence for the values that follow from the length of the run."""
    followed = {path for path, layer in setters.items() if layer.origin.startswith(FOLLOWS)}
    for length in ("schedule.steps", "schedule.epochs"):
        own = [path for path in sorted(followed) if setters[path].origin == FOLLOWS + length]
        implied = [f"{path} {values[path]}" for path in own if values[path] is not None]
        moved = [path for path in own if "refresh" in path]
        if moved and all(values[path] is None for path in moved):
            implied.append("schedule.refresh never")
        if implied:
            listed = " and ".join(implied)
            yield f"{length} {values[length]} implies {listed}, unless they are set too"


def _displaces(path: str, value: Any, other: str, is_same_layer: bool) -> bool:
    is_rival = any(path in group and other in group for group in _ALTERNATIVES)
    return overlap(path, other) or (is_rival and value is not None and not is_same_layer)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted path as nested mappings, as in a run.yaml."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, name = path.split(".")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = value
    return tree


def _lookup(path: str, found: Mapping[str, str], otherwise: str) -> str:
    """The entry for a path, or for the nearest path above it."""
    while path and path not in found:
        path = path.rpartition(".")[0]
    return found.get(path, otherwise)


def explain(error: ValidationError, context: Mapping[str, Any] | None) -> ConfigError:
    """Pydantic's errors as a ConfigError with the messages of the command line.

    `context`: `locations` (of each value, by dotted path) and `source` (the name of the config).
    """
    known = context or {}
    locations, source = known.get("locations", {}), known.get("source", "RunConfig")
    return ConfigError(*_explained(error, _schema(), locations, source))


def _explained(
    error: ValidationError, schema: _Schema, locations: Mapping[str, str], source: str
) -> list[str]:
    """One line for each value with errors: its location, the value, and what it must be."""
    problems: dict[str, list[Any]] = {}
    lines: list[str] = []
    for item in error.errors():
        if not item["loc"]:
            found = item["ctx"]["error"]
            lines += [f"{source}: {line}" for line in getattr(found, "problems", [str(found)])]
            continue
        parts = [str(part) for part in item["loc"] if part != "[key]"]
        if item["type"] == "extra_forbidden":
            unknown = ".".join(parts)
            location = _location_of(unknown, locations, source)
            lines.append(f"{location}: unknown key {shown(unknown)}{_extra_hint(unknown, schema)}")
            continue
        paths = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        problems.setdefault(next(filter(schema.knows, paths)), []).append(item)
    lines += [
        _line(path, items, _location_of(path, locations, source))
        for path, items in problems.items()
    ]
    if len(lines) > _MOST_PROBLEMS:
        rest = counted(len(lines) - _MOST_PROBLEMS, "more problem")
        lines[_MOST_PROBLEMS:] = [f"{source}: and {rest}: correct these first"]
    return lines


def _location_of(path: str, locations: Mapping[str, str], source: str) -> str:
    """The location of a value: its own, else that of its section, else that of one of its keys."""
    parts = (location for inner, location in locations.items() if inner.startswith(f"{path}."))
    return _lookup(path, locations, next(parts, source))


def _extra_hint(path: str, schema: _Schema) -> str:
    """The remedy for an unknown key; a free-form mapping has no keys to suggest."""
    return ": leave it out" if schema.knows(path) else _hint(path, schema)


def _line(path: str, items: Sequence[Any], location: str) -> str:
    """The message for one value: `items` are its errors, one for each type it may have."""
    first, key = items[0], shown(path)
    if first["type"] == "missing" and path.rpartition(".")[2] == first["loc"][-1]:
        there = "" if location in preset_names() else f"add `{key}: ...` there, or "
        return f"{location}: {key} is not set: {there or 'give '}--set {key}=..."
    if first["type"] == "model_type":
        return f"{location}: {_is_section_of(path)}"
    if first["type"] == "value_error":
        return f"{location}: {key} {first['ctx']['error']}"
    if "[key]" in first["loc"]:
        above, _, name = key.rpartition(".")
        return f"{location}: {above} has no key {name!r}: use {_wanted(first)}"
    wanted, value = dict.fromkeys(map(_wanted, items)), first["input"]
    if (hint := value_hint(path, value)) is not None:
        return f"{location}: {key} {_given(value)} is {hint}"
    must = f"{location}: {key} must be {' or '.join(wanted)}, not {_given(value)}"
    if first["type"] == "string_type" and isinstance(value, bool | int | float):
        return f"{must}: {_in_quotes(key, value, location)}"
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return f"{must}: remove the quotes"
    return f"{must}{_ASIDES.get(path, '')}"


def _in_quotes(key: str, value: float, location: str) -> str:
    """How to quote text that YAML would read as another type; a shell strips its own quotes."""
    if not location.startswith("--set "):
        return "put it in quotes"
    text = "..." if isinstance(value, bool | float) else value
    return f"write --set '{key}=\"{text}\"'"


def _is_section_of(path: str) -> str:
    """The message for a section that is set as if it were a value."""
    key, besides = shown(path), {"schedule.refresh": " (except to `never`)"}.get(path, "")
    if path.startswith("teachers."):
        return f"{key} must be a model's directory or name, or a section with {key}.model"
    if path.startswith("data.mix."):
        return f"{key} must be a file or a dataset's name, or a section with {key}.train"
    return f"{key} is a section: set {key}.<key>, not {key} itself{besides}"


def _wanted(item: Any) -> str:
    """The expected value, by pydantic's type of error."""
    limits = {
        name: f"{value:,g}" if isinstance(value, float) and value < 1e6 else f"{value:,.0f}"
        for name, value in item.get("ctx", {}).items()
        if isinstance(value, int | float)
    } | {"expected": item.get("ctx", {}).get("expected")}
    wanted = _WANTED.get(item["type"])
    text = str(item["msg"]).removeprefix("Input should be ") if wanted is None else wanted
    return text.format(**limits) if wanted is not None else text


def _given(value: Any) -> str:
    """A value as the user wrote it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return shown(repr(value), 60)
