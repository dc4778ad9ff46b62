"""Parses the YAML of config files, presets and `--set`: YAML 1.2 numbers, strict, bounded in size.

Promises: `1e-5` is a number; `010`, `1:30` and `2024-01-01` are text, and so is every key. Broken
YAML, a duplicate key, a tag, a second document or an alias that expands without bound raises a
ConfigError with the line and the remedy, in bounded time. Does not know which keys exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from npd.errors import ConfigError
from npd.text import shown

# A config has about 150 values, at most four levels deep; a file beyond these bounds is no config.
_MOST_NODES, _DEEPEST, _LONGEST_NUMBER = 4_000, 32, 400
_CORE = "tag:yaml.org,2002:"
_KINDS = {f"{_CORE}{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_MERGE = f"{_CORE}merge"
# YAML 1.1 reads 010 as octal, 1:30 in base 60, 2024-01-01 as a date, and a lone = specially.
_REPLACED = {f"{_CORE}{kind}" for kind in ("int", "float", "timestamp", "value")}
# Patterns of PyYAML's messages, and the text that replaces each.
_PLAINLY = (
    ("mapping values are not allowed", "an extra colon: check indentation, or quote the text"),
    (r"found character '\\t'", "a tab in the indentation: indent with spaces"),
    ("could not find expected ':'", "a key without a colon: check indentation and colons"),
    (r"expected ',' or '\]'", "a `[` without a `]`: close it, or quote the text"),
    (r"expected ',' or '\}'", "a `{` without a `}`: close it, or quote the text"),
    ("expected <block end>|expected '<document start>'|expected alphabetic or numeric character, "
     "but found ' '", "check indentation and colons"),
    ("another document", "a second document: keep one, without `---`"),
    ("unexpected end of stream|unexpected document", "an unclosed quote: close it"),
    ("undefined alias", "`*name` refers to a missing `&name`: quote the text"),
    ("unknown escape character", "a backslash in double quotes: use single quotes"),
    ("found character '[`@%]'", "text cannot begin with this character: quote the text"),
    ("expected alphabetic or numeric", "a * or & without a name after it: quote the text"),
    ("expected a mapping or list of mappings", "`<<` merges mappings only: leave it out"),
    ("expected the node content", "an unmatched bracket: close it, or quote the text"),
)  # fmt: skip


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers of YAML 1.2 and JSON."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in _REPLACED]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{_CORE}int", re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    f"{_CORE}float",
    re.compile(r"^([-+]?((\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+|\d[\d_]*\.\d*|\.\d+|\.(inf|Inf|INF))"
               r"|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)  # fmt: skip


def parse(text: str, origin: str, *, has_lines: bool = True) -> tuple[Any, dict[str, str]]:
    """Returns the value of `text`, and the location (`run.yaml:3`) of each key by dotted path.

    Without `has_lines` every location is `origin` itself (a `--set`).

    Raises:
        ConfigError: `text` is not YAML or too large, or a key is set twice.
    """
    try:
        _check_size(text, origin, has_lines)
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _Walk(origin, has_lines).check(node)
        value = loader.construct_document(node)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(_plainly(error, text, origin, has_lines)) from error
    return value, dict(_locations(node, origin, has_lines))


def _check_size(text: str, origin: str, has_lines: bool) -> None:
    """Refuse text that is too deep or too long, by its events: composing nodes is recursive."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, _Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST or number > _MOST_NODES:
            raise ConfigError(_too_much(_location(event.start_mark, origin, has_lines)))


def _too_much(location: str) -> str:
    return (
        f"{location}: too deep or too long for a config (at most {_DEEPEST} levels and "
        f"{_MOST_NODES:,} values): shorten it"
    )


class _Walk:
    """Checks nodes before they become values, each node once even if it has many aliases.

    An alias counts with its full expanded size.
    """

    def __init__(self, origin: str, has_lines: bool) -> None:
        self._origin, self._has_lines = origin, has_lines
        self._sizes: dict[int, tuple[int, int]] = {}

    def check(self, node: yaml.Node, path: str = "") -> tuple[int, int]:
        """Returns how many nodes `node` expands to, and its depth. Raises ConfigError."""
        location = _location(node.start_mark, self._origin, self._has_lines)
        known = self._sizes.get(id(node))
        if known is not None:
            if known == (0, 0):  # still open, so it contains itself
                raise ConfigError(
                    f"{location}: an alias refers to a value that contains it: write the value out"
                )
            return known
        self._sizes[id(node)] = (0, 0)
        self._check_kind(node, location)
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node, path)
        inner = [self.check(child, inside) for inside, child in _children(node, path)]
        size = 1 + sum(size for size, _ in inner)
        depth = 1 + max((depth for _, depth in inner), default=0)
        if size > _MOST_NODES or depth > _DEEPEST:
            raise ConfigError(_too_much(location))
        self._sizes[id(node)] = (size, depth)
        return size, depth

    def _check_kind(self, node: yaml.Node, location: str) -> None:
        if node.tag not in _KINDS:
            tag = node.tag.replace(_CORE, "!!")
            raise ConfigError(f"{location}: tag {shown(tag)} is not allowed: write a plain value")
        if node.tag == f"{_CORE}int" and len(node.value) > _LONGEST_NUMBER:
            raise ConfigError(
                f"{location}: a number of {len(node.value):,} digits: write a smaller one"
            )

    def _check_keys(self, node: yaml.MappingNode, path: str) -> None:
        first: dict[str, str] = {}
        for key, _ in node.value:
            location = _location(key.start_mark, self._origin, self._has_lines)
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{location}: a key must be text, not a list or a mapping")
            if key.tag == _MERGE:
                continue
            if not key.value.strip():
                raise ConfigError(f"{location}: a key is empty: name it, or leave it out")
            key.tag = f"{_CORE}str"  # the keys of `on: 1` and `5: 1` are text
            if key.value in first:
                shown_key, at = shown(path + key.value), first[key.value]
                raise ConfigError(f"{location}: {shown_key} is already set at {at}: remove one")
            first[key.value] = location


def _children(node: yaml.Node, path: str) -> Iterator[tuple[str, yaml.Node]]:
    """The child nodes, each with the prefix of its keys' paths."""
    if isinstance(node, yaml.MappingNode):
        yield from ((f"{path}{key.value}.", value) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from ((path, value) for value in node.value)


def _locations(
    node: yaml.Node, origin: str, has_lines: bool, prefix: str = ""
) -> Iterator[tuple[str, str]]:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        path = f"{prefix}{key.value}"
        yield path, _location(key.start_mark, origin, has_lines)
        yield from _locations(value, origin, has_lines, f"{path}.")


def _location(mark: Any, origin: str, has_lines: bool) -> str:
    return f"{origin}:{mark.line + 1}" if has_lines and mark is not None else origin


def _plainly(error: Exception, text: str, origin: str, has_lines: bool) -> str:
    """PyYAML's error in plain words."""
    location = _location(getattr(error, "problem_mark", None), origin, has_lines)
    problem = str(getattr(error, "problem", None) or error).splitlines()[0]
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        location = f"{origin}:{line}" if has_lines else origin
        return (
            f"{location}: not YAML: character {error.character:#04x} is not text: save the file as "
            "UTF-8 text"
        )
    rest = f"{shown(problem, 120)}; check indentation and colons, and quote special text"
    cause = next((words for pattern, words in _PLAINLY if re.search(pattern, problem)), rest)
    return f"{location}: not YAML: {cause}"
