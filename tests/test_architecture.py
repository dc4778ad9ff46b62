"""The shape of the code: who may import whom, how long things get, what stays out of the tree.

Everything is read from the source, so an import inside a function or under TYPE_CHECKING counts.
The lists of exceptions hold what breaks a rule today, each with its reason. They only shrink: an
exception that is no longer needed fails here until it is taken out.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "npd"

NOUNS = {"types", "reports", "errors", "names", "sections", "fields", "served", "rules"}
SHARED = {"store", "observe", "data", "sources", "chat", "attention", "modeling", "settings"}
SHARED |= {"head", "layers", "lora", "probe", "reading", "resuming", "servers", "wording", "world"}
ROOMS = {"generate", "score", "train", "filters", "pack", "evaluate"}
GROUND = NOUNS | {"config"} | SHARED
# What each unit (a file or a folder of npd) may import of the others; a new unit needs a line.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "names": set(),
    "types": {"names"},
    "reports": set(),
    "fields": set(),
    "served": {"fields"},
    "sections": {"fields", "served"},
    "rules": {"sections", "served"},
    "config": NOUNS,
    **dict.fromkeys(SHARED, GROUND),
    **dict.fromkeys(ROOMS, GROUND),
    "runtime": NOUNS | {"config", "world"},
    "workers": GROUND | ROOMS,
    "control": GROUND | ROOMS | {"runtime", "workers", "versions"},
    # On top, beside the command line: stages run alone, and model directories in and out.
    "stages": GROUND | ROOMS | {"control", "workers"},
    "prepare": GROUND,
    "export": GROUND | {"prepare"},
    "show": GROUND,
    "versions": set(),
    "doctor": GROUND | {"control"},
    "cli": GROUND | {"control", "doctor", "stages", "prepare", "export", "show", "versions"},
    "__main__": {"errors", "cli"},
    "npd": GROUND | {"control", "train"},
}
# The heart of the controller: a function of events, so no clock, no I/O, no asyncio, no tensor.
PURE = {
    f"npd.control.{name}"
    for name in ("plan", "flow", "pool", "order", "batches", "events", "codec")
}
PURE |= {"npd.types", "npd.errors", "npd.pack", "npd.filters"}
IMPURE = {"asyncio", "time", "datetime", "os", "io", "shutil", "socket", "sqlite3", "subprocess"}
IMPURE |= {"tempfile", "threading", "torch", "transformers", "pyarrow", "logging", "secrets"}

# Library -> in how many files at most, each time inside a function.
HEAVY = dict.fromkeys(("datasets", "tensorboard", "gguf", "accelerate", "rich", "matplotlib"), 1)
HEAVY |= {"httpx": 1, "fsspec": 1, "peft": 1, "ray": 3, "transformers": 7}
# The only units that import torch as they are imported; everywhere else it waits for a call.
TORCH_AT_IMPORT = {"attention", "head", "lora", "modeling", "reading"}
TORCH_AT_IMPORT |= {"generate", "score", "train", "evaluate"}

MAX_FILE, MAX_FUNCTION, LONG_FUNCTION = 300, 60, 50
LONG_FILES: dict[str, tuple[int, str]] = {}
LONG_FUNCTIONS: dict[str, tuple[int, str]] = {}
# Pairs that import each other, one of them inside a function: a builder beside its own nouns.
LAZY_CYCLES = {
    frozenset({"npd.observe.live", "npd.observe.panel"}),
}


@dataclass(frozen=True)
class Import:
    """One import: `target` (dotted), and whether it happens when the module is imported."""

    source: str
    target: str
    line: int
    is_eager: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


@cache
def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text())


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for name in modules() for found in _imports_of(name))


def _imports_of(name: str) -> Iterator[Import]:
    def walk(node: ast.AST, is_eager: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                for target in _targets(child):
                    yield Import(name, target, child.lineno, is_eager)
            is_later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            )
            yield from walk(child, is_eager and not is_later)

    return walk(tree(name), True)


def _targets(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert not node.level, "npd imports by full name"
    assert node.module is not None
    if node.module == "npd" and node.names[0].name == "__version__":
        return []  # the package itself is there before any of its modules
    inside = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name in modules() else node.module for name in inside]


def unit(module: str) -> str:
    """`npd.control.plan` -> `control`; npd itself is `npd`."""
    return [*module.split("."), "npd"][1]


def own_imports() -> list[Import]:
    return [found for found in imports() if found.target.split(".")[0] == "npd"]


def test_imports_point_one_way():
    wrong = [
        str(found)
        for found in own_imports()
        if unit(found.target) not in MAY_IMPORT[unit(found.source)] | {unit(found.source)}
    ]
    assert not wrong


def test_every_unit_has_its_place():
    assert {unit(name) for name in modules()} == set(MAY_IMPORT)


def test_nouns_import_nothing_but_nouns():
    from_nouns = [found for found in own_imports() if unit(found.source) in NOUNS]
    assert not [str(found) for found in from_nouns if unit(found.target) not in NOUNS]


def test_nothing_imports_itself_in_a_circle():
    edges: dict[str, set[str]] = {name: set() for name in modules()}
    met = set()
    for found in own_imports():
        pair = frozenset({found.source, found.target})
        if pair in LAZY_CYCLES:
            met.add((pair, found.is_eager))
        if not (pair in LAZY_CYCLES and not found.is_eager):
            edges[found.source].add(found.target)
    for pair in LAZY_CYCLES:
        assert {(pair, True), (pair, False)} <= met, f"no circle: {set(pair)}; take it off the list"
    # What imports nothing that is left goes, until only circles are left.
    while done := {name for name, targets in edges.items() if not targets & set(edges)}:
        edges = {name: targets for name, targets in edges.items() if name not in done}
    assert not edges


def test_the_plan_is_pure():
    wrong = [
        str(found)
        for found in imports()
        if found.source in PURE and found.target.split(".")[0] in IMPURE
    ]
    assert not wrong


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_heavy_libraries_wait_in_few_files(library):
    found = [i for i in imports() if library in i.target.split(".")]
    found = [i for i in found if i.target.split(".")[0] != "npd"]
    assert not [str(i) for i in found if i.is_eager]
    assert len({i.source for i in found}) <= HEAVY[library], sorted({i.source for i in found})


def test_torch_is_imported_late_but_where_tensors_are():
    eager = {unit(i.source) for i in imports() if i.is_eager and i.target.split(".")[0] == "torch"}
    assert eager <= TORCH_AT_IMPORT


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("npd", {"torch", "pydantic", "numpy", "transformers"}),
        ("npd.cli", {"torch", "pydantic", "numpy", "transformers"}),
        ("npd.config", {"torch", "numpy", "transformers"}),
        ("npd.settings", {"torch", "numpy", "transformers"}),
        ("npd.control.plan", {"torch", "transformers", "asyncio", "sqlite3"}),
        ("npd.observe.report", {"torch", "transformers", "matplotlib", "rich"}),
        ("npd.runtime.child", {"torch", "numpy", "transformers"}),
    ],
)
def test_imports_are_light(module, absent):
    code = f"import sys, {module}; print(*sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_module_says_what_it_is():
    assert not [name for name in modules() if not ast.get_docstring(tree(name))]


def test_files_are_short():
    lengths = {
        str(path.relative_to(PACKAGE)): len(path.read_text().splitlines())
        for path in modules().values()
    }
    over = {name: count for name, count in lengths.items() if count > MAX_FILE}
    assert set(over) == set(LONG_FILES), "too long, or no longer too long"
    assert not {name: count for name, count in over.items() if count > LONG_FILES[name][0]}
    assert median(lengths.values()) <= 120


def test_functions_are_short():
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [(n, node) for n in modules() for node in ast.walk(tree(n)) if isinstance(node, kinds)]
    sizes = [node.end_lineno - node.lineno + 1 for _, node in found]
    names = [f"{name}.{node.name}" for name, node in found]
    over = {n: s for n, s in zip(names, sizes, strict=True) if s > MAX_FUNCTION}
    assert set(over) == set(LONG_FUNCTIONS), "too long, or no longer too long"
    assert not {name: size for name, size in over.items() if size > LONG_FUNCTIONS[name][0]}
    assert sum(size > LONG_FUNCTION for size in sizes) <= 0.03 * len(sizes)
    assert median(sizes) <= 10


def test_errors_rise():
    handlers = [n for m in modules() for n in ast.walk(tree(m)) if isinstance(n, ast.ExceptHandler)]
    everything = {"Exception", "BaseException"}
    broad = [h for h in handlers if h.type is None or _names(h.type) & everything]
    num_lines = sum(len(path.read_text().splitlines()) for path in modules().values())
    assert len(broad) < num_lines / 1000


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _tree_files() -> Iterator[Path]:
    """What git has or would take in, read without git: an sdist must pass too."""
    skipped = {
        ".git",
        ".venv",
        ".venv-vllm",
        "shared",
        "runs",
        "models",
        "build",
        "dist",
        "__pycache__",
    }
    kinds = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".jsonl", ".txt", ".html", ""}
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if any(p in skipped or p.endswith(("_cache", ".egg-info", ".hypothesis")) for p in parts):
            continue
        if path.is_file() and path.suffix in kinds:
            yield path


def test_the_tree_names_no_machine_and_no_mirror():
    slash = "/"
    places = rf"(?<![\w.~-]){slash}(?:work|root|tmp{slash}w)(?:{slash}|\b)"
    halves = (("artifact", "ory"), ("j", "frog"), ("python", "hosted"), (r"\.org/", "simple"))
    mirrors = "|".join("".join(pair) for pair in halves)
    wrong = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in _tree_files()
        for match in [re.search(f"{places}|{mirrors}", path.read_text(errors="ignore"))]
        if match
    ]
    assert not wrong
