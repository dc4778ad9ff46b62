"""The documentation says what the code does: reference pages, commands, keys, links, errors."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import typer
from pydantic import BaseModel

from npd.config import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
MAX_UNEXPLAINED = 0
"""Config values that have no docstring yet. It only goes down."""


def names(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


every_page = pytest.mark.parametrize("page", PAGES, ids=names(PAGES))


@cache
def make():
    """docs/make.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def config_keys() -> frozenset[str]:
    """Every dotted path of a config, sections included."""

    def walk(model, prefix):
        for name, field in model.model_fields.items():
            yield f"{prefix}{name}"
            kinds = (type(field.default), *get_args(field.annotation))
            for kind in filter(inspect.isclass, kinds):
                if issubclass(kind, BaseModel):
                    yield from walk(kind, f"{prefix}{name}.")

    return frozenset(walk(RunConfig, ""))


@cache
def targets() -> frozenset[str]:
    """The targets of the Makefile."""
    return frozenset(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def spans(text: str) -> list[str]:
    """Inline code, outside of fenced blocks."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside)]


def commands(text: str) -> list[str]:
    """Shell commands: lines of fenced sh blocks, and inline code."""
    blocks = re.findall(r"^```(?:sh|bash|shell|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").partition(" #")[0].strip() for line in lines] + spans(text)


@pytest.mark.parametrize("name", sorted(make().PAGES))
def test_reference_pages_are_current(name):
    committed = (ROOT / "docs" / "reference" / name).read_text()
    assert committed == make().PAGES[name](), "run `make docs` and commit the result"


def test_the_tours_list_of_rooms_is_current():
    tour = (ROOT / "docs" / "tour.md").read_text()
    assert tour == make().with_tree(tour), "run `make docs` and commit the result"


def test_the_readme_is_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_config_values_are_explained():
    rows = [line.split(" | ") for line in make().config_page().splitlines()]
    gaps = [row[0].strip("| `") for row in rows if len(row) == 4 and row[3].strip("| ") == ""]
    assert len(gaps) <= MAX_UNEXPLAINED, gaps


@every_page
def test_make_targets_exist(page):
    found = [line.split() for line in commands(page.read_text()) if line.startswith("make ")]
    assert {words[1] for words in found} <= targets()


@every_page
def test_npd_commands_exist(page):
    root = typer.main.get_command(__import__("npd.cli", fromlist=["app"]).app)
    for line in commands(page.read_text()):
        words = shlex.split(line.replace("[", "").replace("]", "")) if line[:4] == "npd " else []
        if not words or not words[1].islower():
            continue
        assert words[1] in root.commands, line
        options = {o for p in root.commands[words[1]].params for o in p.opts} | {
            "--help",
            "--debug",
        }
        assert {word for word in words if word.startswith("--")} <= options, line


@every_page
def test_config_keys_exist(page):
    sections = "|".join(key for key in config_keys() if f"{key}." in "".join(config_keys()))
    text = page.read_text()
    keys = [re.match(rf"((?:{sections})\.[a-z_.]+[a-z_])(?![\w/.])", span) for span in spans(text)]
    keys = [match[1] for match in keys if match and not match[1].endswith((".py", ".md"))]
    overrides = re.findall(r"--set ([a-z_.]+)=", text)
    assert {*keys, *overrides} - {"a.b"} <= config_keys()


@every_page
def test_named_files_exist(page):
    if page.name == "log.md":  # entries stay as they were written
        return
    words = [word for span in spans(page.read_text()) for word in span.split()]
    found = [re.match(r"([\w./-]+\.(?:py|sh))(?::\w.*)?$", word) for word in words]
    roots = (ROOT, ROOT / "src" / "npd", ROOT / "benchmarks", ROOT / "examples" / "demo")
    names = {match[1] for match in found if match}
    names |= {word for word in words if re.match(r"(examples|benchmarks|tests|docs)/\w", word)}
    missing = {name for name in names if not any((root / name).exists() for root in roots)}
    assert not {name for name in missing if not list((ROOT / "src" / "npd").rglob(name))}


@every_page
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [link.partition("#")[0] for link in links if not link.startswith(("http", "#"))]
    assert not [link for link in local if not (page.parent / link).exists()]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"\[(.+?)\]\(.+?\)|`", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@every_page
def test_links_lead_to_headings(page):
    links = re.findall(r"\]\(((?!http)[^)\s]*)#([^)\s]+)\)", page.read_text())
    missing = [
        f"{to}#{name}"
        for to, name in links
        if name not in anchors(page.parent / to if to else page)
    ]
    assert not missing


@cache
def templates() -> frozenset[str]:
    """Every string of the source, with … for what is filled in."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.add("".join(parts))
    return frozenset(found)


def test_error_lines_of_the_troubleshooting_page_exist():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    tables = re.findall(r"^\| the line says.*?\n\n", text, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^\| `([^`]+)` \|", "".join(tables), re.MULTILINE)
    assert len(lines) > 30
    parts = {line: [part.strip() for part in line.split("…") if part.strip()] for line in lines}
    assert not [
        line
        for line, wanted in parts.items()
        if not any(all(part in template for part in wanted) for template in templates())
    ]
