"""Where a config comes from: defaults, then a preset, then a YAML file, then `--set`, in layers.

Promises: each value's origin is known; an unknown key, a wrong value or broken YAML is a
ConfigError that says where (file and line, or the `--set`) and what to do. Does not decide which
values make sense together (that is `npd.config`) and looks at neither data nor models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import isclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from npd.config import RunConfig
from npd.errors import ConfigError
from npd.layers import Layer, flat, overlap, override_layer, preset_names, source_layers

# What transformers and TRL call a key, and what it is here.
_ELSEWHERE = {
    "learning_rate": "train.lr",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.batch_size train.row_tokens",
    "max_grad_norm": "train.clip",
    "warmup_steps": "train.warmup",
    "warmup_ratio": "train.warmup",
    "gradient_checkpointing": "train.activation_checkpointing",
    "num_train_epochs": "schedule.epochs",
    "max_steps": "schedule.steps",
    "max_completion_length": "generate.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "model_name_or_path": "student",
    "teacher_model_name_or_path": "teacher",
    "output_dir": "run_dir",
    "dataset_name": "data.train",
    "use_vllm": "generate.engine",
}
# Values that exclude each other: setting one in a layer takes the others back from those below.
_ALTERNATIVES = (
    ("schedule.epochs", "schedule.steps"),
    ("schedule.refresh.every_steps", "schedule.refresh.at_epochs", "schedule.refresh.drift"),
)
_DEFAULT = "default"

__all__ = ["Settings", "dump_config", "load_config", "preset_names"]


@dataclass(frozen=True, slots=True)
class Settings:
    """A config, and for each of its values (dotted path) the layer it comes from.

    Origins read `default`, `preset npd`, the YAML file's path, or `--set`.
    """

    config: RunConfig
    origins: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Schema:
    """The dotted paths of RunConfig: its values, its sections, and its free-form mappings."""

    values: tuple[str, ...]
    sections: tuple[str, ...]
    mappings: tuple[str, ...]

    def knows(self, path: str) -> bool:
        free = any(path.startswith(f"{mapping}.") for mapping in self.mappings)
        return free or path in self.values or path in self.sections


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Resolve a YAML file or a preset's name, with `a.b=c` overrides on top.

    A file may name the preset it builds on (`preset: npd`). Overrides are parsed as YAML; the last
    one of a key counts. A layer that sets one of several alternatives (`schedule.steps` for
    `schedule.epochs`, one refresh rule for another) takes back what lower layers say of the others.

    Raises:
        ConfigError: a missing file, broken YAML, an unknown key, or a value that cannot be.
    """
    schema = _schema()
    layers = [_defaults(), *source_layers(source), override_layer(overrides)]
    for layer in layers:
        _check_known(layer, schema)
    values, setters = _merged(layers, schema)
    try:
        config = RunConfig.model_validate(nested(values))
    except ValidationError as error:
        places = {path: layer.place(path) for path, layer in setters.items()}
        raise ConfigError(_explained(error, schema, places, str(source))) from error
    origins = {path: layer.origin for path, layer in setters.items()}
    leaves = (path for path, _ in flat(dump_config(config)))
    return Settings(config, {path: _lookup(path, origins, _DEFAULT) for path in leaves})


def dump_config(config: RunConfig) -> dict[str, Any]:
    """The complete config as plain JSON values; `RunConfig.model_validate` reads it back."""
    return config.model_dump(mode="json")


def _schema() -> _Schema:
    values: list[str] = []
    sections: list[str] = []
    mappings: list[str] = []
    for path, annotation in _fields(RunConfig, ""):
        # What may be null is a value as well: null and {} say something.
        (sections if _is_section(annotation) else values).append(path)
        if get_origin(annotation) is dict:
            mappings.append(path)
    return _Schema(tuple(values), tuple(sections), tuple(mappings))


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        annotation: Any = field.annotation
        yield prefix + name, annotation
        # A section that may be left out (`LaunchConfig | None`) has keys, though its value is None.
        for inner in filter(_is_section, (annotation, *get_args(annotation))):
            yield from _fields(inner, f"{prefix}{name}.")


def _is_section(annotation: Any) -> bool:
    return isclass(annotation) and issubclass(annotation, BaseModel)


def _defaults() -> Layer:
    values: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        if not field.is_required():
            default = field.get_default(call_default_factory=True)
            values[name] = default.model_dump() if isinstance(default, BaseModel) else default
    return Layer(_DEFAULT, dict(flat(values)), {})


def _check_known(layer: Layer, schema: _Schema) -> None:
    problems = [
        f"{layer.place(path)}: unknown key {path}{_hint(path, schema)}"
        for path in layer.values
        if not schema.knows(path)
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _hint(path: str, schema: _Schema) -> str:
    """The nearest known key: called so by others, of that name elsewhere, like it in its section,
    or like it at all."""
    if path == "preset":
        return ": give the preset's name in place of the config file, or `preset:` in the file"
    parent, _, name = path.rpartition(".")
    known = (*schema.values, *schema.sections)
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    near = [parent] if parent in schema.values and not siblings else []
    near = near or [key for key in _ELSEWHERE.get(name, "").split() if key in schema.values]
    near = near or [key for key in known if key.rpartition(".")[2] == name]
    near = near or [siblings[key] for key in get_close_matches(name, siblings, n=1)]
    best = get_close_matches(name, [key.rpartition(".")[2] for key in known], n=1)
    near = near or [key for key in known if key.rpartition(".")[2] in best]
    if near:
        return f": did you mean {' or '.join(near)}?"
    shown = siblings or [key for key in known if "." not in key]
    return f": the keys of {parent if siblings and parent else 'a config'} are {', '.join(shown)}"


def _merged(layers: Sequence[Layer], schema: _Schema) -> tuple[dict[str, Any], dict[str, Layer]]:
    """All layers' values, the later over the earlier, and which layer set each."""
    values: dict[str, Any] = {}
    setters: dict[str, Layer] = {}
    for layer in layers:
        for path, value in layer.values.items():
            if path in schema.sections and value in (None, {}):
                continue  # a section with all of its keys commented out says nothing
            for other in [o for o in values if _displaces(path, value, o, setters[o] is layer)]:
                del values[other], setters[other]
            values[path], setters[path] = value, layer
    return values, setters


def _displaces(path: str, value: Any, other: str, is_same_layer: bool) -> bool:
    is_rival = any(path in group and other in group for group in _ALTERNATIVES)
    return overlap(path, other) or (is_rival and value is not None and not is_same_layer)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted path as a tree, as a run.yaml has them."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, name = path.split(".")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = value
    return tree


def _lookup(path: str, found: Mapping[str, str], otherwise: str) -> str:
    """What is recorded for a path, or for the nearest path above it."""
    while path and path not in found:
        path = path.rpartition(".")[0]
    return found.get(path, otherwise)


def _explained(
    error: ValidationError, schema: _Schema, places: Mapping[str, str], source: str
) -> str:
    """Pydantic's errors, one line for each value: where, what, and what it must be."""
    problems: dict[str, list[Any]] = {}
    for item in error.errors():
        parts = [str(part) for part in item["loc"]]
        paths = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        problems.setdefault(next(filter(schema.knows, paths), ""), []).append(item)
    lines = (_line(path, items, _lookup(path, places, source)) for path, items in problems.items())
    return "\n".join(lines)


def _line(path: str, items: Sequence[Any], place: str) -> str:
    first = items[0]
    if not path:
        return f"{place}: {first['msg'].removeprefix('Value error, ')}"
    if first["type"] == "missing" and path == first["loc"][-1]:
        return f"{place}: {path} is not set: add `{path}: ...` there, or --set {path}=..."
    if first["type"] == "model_type":
        return f"{place}: {path} is a section: set {path}.<key>, not {path} itself"
    given = f"{first['input']!r:.60}"
    if not first["msg"].startswith("Input should be "):
        return f"{place}: {path}: {first['msg']}, given {given}"
    wanted = [re.sub(r"^Input should be |, unable to .*$", "", item["msg"]) for item in items]
    return f"{place}: {path} must be {' or '.join(wanted)}, not {given}"
