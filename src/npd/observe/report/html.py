"""A few lines to write HTML and SVG that cannot be ill-formed or carry unescaped text.

Promises: every plain string that becomes an attribute or a child is escaped, control characters
are made visible, and the output parses as XML. Knows no page and no chart.
"""

from __future__ import annotations

from html import escape
from typing import TypeAlias

_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VOID = frozenset({"meta", "line", "rect", "path", "circle", "br"})


class Html(str):
    """Markup that is already safe; a plain `str` never is."""

    __slots__ = ()


Child: TypeAlias = "Html | str | None"
Attribute: TypeAlias = "str | float | bool | None"


def text(value: str) -> Html:
    """`value` escaped, with control characters and lone surrogates made visible."""
    clean = value.encode("utf-8", "replace").decode("utf-8").translate(_VISIBLE)
    return Html(escape(clean.replace("\ufffe", "\ufffd").replace("\uffff", "\ufffd")))


def el(name: str, /, *children: Child, **attributes: Attribute) -> Html:
    """An element. `class_` becomes `class`, `stroke_width` `stroke-width`; None is left out.

    Example: `el("p", "a < b", class_="note")` is `<p class="note">a &lt; b</p>`.
    """
    pairs = "".join(_attribute(key, value) for key, value in attributes.items())
    inside = join(*children)
    if name in _VOID and not inside:
        return Html(f"<{name}{pairs}/>")
    return Html(f"<{name}{pairs}>{inside}</{name}>")


def join(*children: Child) -> Html:
    """Children one after the other; plain strings are escaped, None is left out."""
    safe = (c if isinstance(c, Html) else text(c) for c in children if c is not None)
    return Html("".join(safe))


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f' {name}="{text(_number(value))}"'


def _number(value: Attribute) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
