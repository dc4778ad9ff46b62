"""The reference pages, made from the code they describe: `make docs` writes `docs/reference/`.

Promises: the same code gives the same pages, whatever the terminal; `tests/test_docs.py` compares
them with those committed. Nothing is explained here: the words are the code's own docstrings.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from pydantic import BaseModel

import npd
from npd.cli import app
from npd.config import RunConfig
from npd.config.sources import preset_names
from npd.observe.metrics import METRICS
from npd.types import EvalReport, StepReport

REFERENCE = Path(__file__).parent / "reference"
TOUR = Path(__file__).parent / "tour.md"
PACKAGE = Path(npd.__file__).parent
_TREE = re.compile(r"(?<=<!-- tree -->\n).*?(?=<!-- /tree -->)", re.DOTALL)
PRESETS = PACKAGE / "presets"
MADE = "<!-- Made by `make docs` from the code: change the docstrings there, not this page. -->"


def main() -> None:
    """Write every page, and the tour's list of packages."""
    TOUR.write_text(with_tree(TOUR.read_text(encoding="utf-8")), encoding="utf-8")
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")
        sys.stdout.write(f"docs/reference/{name}\n")


# -- tour.md -------------------------------------------------------------------------------------


def with_tree(tour: str) -> str:
    """The tour with its list of packages brought up to date."""
    assert _TREE.search(tour), "docs/tour.md has lost its tree markers"
    return _TREE.sub(lambda _: f"{_table(('where', 'what it is'), list(tree_rows()))}\n", tour)


def tree_rows() -> Iterator[tuple[str, str]]:
    """One row a folder or file of the package: its name and the first sentence of its docstring."""
    for path in sorted(PACKAGE.iterdir(), key=lambda path: (path.is_file(), path)):
        if path.is_dir() and (path / "__init__.py").exists():
            yield f"`{path.name}/`", _first_sentence(_docstring(path / "__init__.py"))
        elif path.suffix == ".py" and path.name != "__init__.py":
            yield f"`{path.name}`", _first_sentence(_docstring(path))


def _docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def _first_sentence(docstring: str) -> str:
    paragraph = docstring.partition("\n\n")[0]
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", paragraph, maxsplit=1)[0].replace("\n", " ")


# -- files.md ------------------------------------------------------------------------------------


def files_page() -> str:
    """Every file of the package with what it is, folder by folder."""
    parts = ["# Files", MADE, "Every file of `src/npd/`, in its own first sentence."]
    folders = sorted({file.parent for file in PACKAGE.rglob("*.py")})
    for folder in folders:
        name = folder.relative_to(PACKAGE).as_posix()
        rows = [
            (f"`{file.name}`", _first_sentence(_docstring(file)))
            for file in sorted(folder.glob("*.py"))
            if file.name != "__init__.py"
        ]
        if name != ".":
            parts += [f"## `{name}/`", _docstring(folder / "__init__.py").partition("\n\n")[0]]
        if rows:
            parts.append(_table(("file", "what it is"), rows))
    return _page(parts)


# -- config.md -----------------------------------------------------------------------------------


def config_page() -> str:
    """Every config value: key, type, default, meaning; then the presets as they are."""
    top = [name for name, field in RunConfig.model_fields.items() if not _is_section(field.default)]
    parts = [
        "# Config",
        MADE,
        "A run is one `RunConfig`: from Python, from a YAML file, or from a preset with overrides "
        "(`--set train.lr=1e-5`). Unknown keys and impossible combinations are refused before "
        "anything starts. `npd config CONFIG` prints the values in force and where each comes "
        "from; a YAML file builds on a preset with `preset: npd`.",
        "## The run",
        _doc(RunConfig),
        _config_table(RunConfig, None, "", top),
        *_sections(RunConfig, None, ""),
        "## Presets",
        "A preset states only what makes the method; everything else is the default above.",
        *(_preset(name) for name in sorted(preset_names())),
    ]
    return _page(parts)


def _sections(model: type[BaseModel], default: Any, prefix: str) -> Iterator[str]:
    """A heading and a table for each section of `model`, those inside it after it."""
    for name, field in model.model_fields.items():
        value = field.default if default is None else getattr(default, name)
        optional = [kind for kind in get_args(field.annotation) if inspect.isclass(kind)]
        value = next((kind() for kind in optional if issubclass(kind, BaseModel)), value)
        if _is_section(value):
            section, path = type(value), f"{prefix}{name}"
            yield f"{'###' if prefix else '##'} `{path}`"
            yield _doc(section)
            plain = [n for n in section.model_fields if not _is_section(getattr(value, n))]
            yield _config_table(section, value, f"{path}.", plain)
            yield from _sections(section, value, f"{path}.")
        elif (section := _section_of_each(field.annotation)) is not None:
            path = f"{prefix}{name}.NAME"
            yield f"{'###' if prefix else '##'} `{path}`"
            yield _doc(section)
            yield _config_table(section, None, f"{path}.", list(section.model_fields))


def _section_of_each(annotation: Any) -> type[BaseModel] | None:
    """The section that a mapping has many of by name, e.g. `teachers`; None of anything else."""
    if get_origin(annotation) is not dict:
        return None
    kind = get_args(get_args(annotation)[1])[:1]  # without what is annotated
    return kind[0] if kind and issubclass(kind[0], BaseModel) else None


def _is_section(value: Any) -> bool:
    return isinstance(value, BaseModel)


def _config_table(model: type[BaseModel], default: Any, prefix: str, names: Sequence[str]) -> str:
    schema = model.model_json_schema()["properties"]
    rows = [
        (
            f"`{prefix}{name}`",
            type_text(schema[name]),
            _default_text(model, default, name),
            schema[name].get("description", ""),
        )
        for name in names
    ]
    return _table(("key", "type", "default", "meaning"), rows)


def type_text(schema: dict[str, Any]) -> str:
    """A JSON schema in words: `int ≥ 1 or null`, `"error" or "drop"`, `float in (0, 1]`."""
    if "$ref" in schema:
        return "section"
    if "anyOf" in schema:
        return " or ".join(type_text(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array" and "prefixItems" in schema:
        return "[" + ", ".join(type_text(item) for item in schema["prefixItems"]) + "]"
    if kind == "array":
        return f"list of {type_text(schema['items'])}"
    if kind == "object":
        inner = schema["additionalProperties"]
        return f"mapping of text to {type_text(inner) if isinstance(inner, dict) else 'any value'}"
    if kind == "string":
        return "path" if schema.get("format") == "path" else "text"
    names = {"integer": "int", "number": "float", "boolean": "bool", "null": "null"}
    return names[kind] + _range_text(schema)


def _range_text(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if (low, above) != (None, None) and (high, below) != (None, None):
        left = f"[{low:g}" if above is None else f"({above:g}"
        right = f"{high:g}]" if below is None else f"{below:g})"
        return f" in {left}, {right}"
    if low is not None:
        return f" ≥ {low:g}"
    return "" if above is None else f" > {above:g}"


def _default_text(model: type[BaseModel], default: Any, name: str) -> str:
    field = model.model_fields[name]
    if field.is_required():
        return "required"
    value = (
        field.get_default(call_default_factory=True) if default is None else getattr(default, name)
    )
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _preset(name: str) -> str:
    return f"### `{name}`\n\n```yaml\n{(PRESETS / f'{name}.yaml').read_text().strip()}\n```"


# -- metrics.md ----------------------------------------------------------------------------------


def metrics_page() -> str:
    """The table of metrics, by what they are measured on."""
    step = {field.name for field in fields(StepReport)}
    evaluation = {field.name for field in fields(EvalReport)}
    groups = (
        ("One optimiser step", "Lines of kind `train`.", step),
        (
            "One held-out evaluation",
            "Lines of kind `eval`. With several teachers there is also `kl/NAME`, on the prompts "
            "of each.",
            evaluation,
        ),
        (
            "The run as a whole",
            "Lines of kind `run`, one a segment, and `score`, one a scored shard. A name may carry "
            "the stage, worker or teacher it belongs to: `tokens_per_second/train`.",
            set(METRICS) - step - evaluation,
        ),
    )
    parts = [
        "# Metrics",
        MADE,
        "Every number a run measures has its name, unit and meaning in one table of the code. "
        "`metrics.jsonl` of a run directory holds one JSON object a line with `step`, `kind`, "
        "`time` (unix seconds) and the values; trackers get the same numbers.",
    ]
    for title, text, names in groups:
        rows = [(f"`{n}`", m.unit, m.meaning) for n, m in METRICS.items() if n in names]
        parts += [f"## {title}", text, _table(("name", "unit", "meaning"), rows)]
    return _page(parts)


# -- cli.md --------------------------------------------------------------------------------------


def cli_page() -> str:
    """Every command with its arguments and options."""
    root: Any = typer.main.get_command(app)
    parts = ["# Command line", MADE, root.help, root.epilog]
    for name, command in root.commands.items():
        parts += [f"## `npd {name}`", command.help, f"```\n{_usage(name, command.params)}\n```"]
        rows = [(f"`{_call(p)}`", _parameter_text(p)) for p in command.params]
        if rows:
            parts.append(_table(("argument or option", "meaning"), rows))
    return _page(parts)


def _usage(name: str, params: Sequence[Any]) -> str:
    words = [_call(p) if p.required else f"[{_call(p)}]" for p in params]
    return " ".join(("npd", name, *words))


def _call(param: Any) -> str:
    """How a parameter is written: `CONFIG`, `--resume`, `--set KEY=VALUE`."""
    metavar = param.metavar or param.name.upper()
    if param.param_type_name == "argument":
        return str(metavar)
    return param.opts[0] if param.is_flag else f"{param.opts[0]} {metavar}"


def _parameter_text(param: Any) -> str:
    has_default = param.default not in (None, False)
    return (param.help or "") + (f" Default: {param.default}." if has_default else "")


# -- Markdown ------------------------------------------------------------------------------------


def _doc(model: type[BaseModel]) -> str:
    return inspect.cleandoc(model.__doc__ or "").replace("\n", " ")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def _page(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "config.md": config_page,
    "metrics.md": metrics_page,
    "cli.md": cli_page,
    "files.md": files_page,
}


if __name__ == "__main__":
    main()
