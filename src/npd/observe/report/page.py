"""The HTML page: elements, cards, tables, captions, and the format of numbers.

Promises: one self-contained document that loads nothing (its content security policy allows only
its own scripts), is readable on a phone and on paper, and follows the reader's light or dark
setting. Every plain string that becomes an attribute or a child is escaped. Knows no metric and no
chart.
"""

from __future__ import annotations

import hashlib
import math
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import TypeAlias

from npd.terminal import printable

_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
"""Control characters -> their visible symbols."""
_VOID = frozenset({"meta", "br"})


# -- elements ------------------------------------------------------------------------------------


class Html(str):
    """Markup that is already safe; a plain `str` never is."""

    __slots__ = ()


Child: TypeAlias = "Html | str | None"
Attribute: TypeAlias = "str | int | bool | None"


def clean(value: str) -> str:
    """`value` with control characters, lone surrogates and bidirectional marks made visible."""
    shown = printable(value.encode("utf-8", "replace").decode("utf-8").translate(_VISIBLE))
    return shown.replace("\ufffe", "\ufffd").replace("\uffff", "\ufffd")


def text(value: str) -> Html:
    """`value` cleaned and escaped."""
    return Html(escape(clean(value)))


def el(name: str, /, *children: Child, **attributes: Attribute) -> Html:
    """An element. `class_` becomes `class`, `aria_label` `aria-label`; None is left out.

    Example: `el("p", "a < b", class_="note")` is `<p class="note">a &lt; b</p>`.
    """
    pairs = "".join(_attribute(key, value) for key, value in attributes.items())
    inside = join(*children)
    if name in _VOID and not inside:
        return Html(f"<{name}{pairs}/>")
    return Html(f"<{name}{pairs}>{inside}</{name}>")


def join(*children: Child) -> Html:
    """The children concatenated; plain strings are escaped, None is left out."""
    safe = (c if isinstance(c, Html) else text(c) for c in children if c is not None)
    return Html("".join(safe))


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    return f' {key.rstrip("_").replace("_", "-")}="{text(str(value))}"'


# -- the document --------------------------------------------------------------------------------


def page(title: str, header: Html, body: Html, footer: str, scripts: Sequence[str] = ()) -> str:
    """The whole document; `scripts` run in order after the page is parsed."""
    made = [_script(source) for source in scripts]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_policy(made)),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", Html(files(__package__).joinpath("page.css").read_text("utf-8"))),
    )
    run = (el("script", Html(source)) for source in made)
    parts = el("body", el("header", header), el("main", body), el("footer", footer), *run)
    drawn = ' data-charts="drawn"' if scripts else ""
    return f'<!DOCTYPE html>\n<html lang="en"{drawn}>{head}{parts}</html>\n'


def _script(source: str) -> str:
    """JavaScript that cannot close its element early, with the line ends that browsers hash."""
    lines = source.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"</(script)", r"<\\/\1", lines, flags=re.IGNORECASE).replace("<!--", "<\\!--")


def _policy(scripts: Sequence[str]) -> str:
    """A content security policy: nothing is loaded, and only these scripts run, without `eval`."""
    digests = (b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )


# -- parts of the page ---------------------------------------------------------------------------


def section(anchor: str, title: str, intro: str, *children: Html | None) -> Html:
    """A section of the page, with the link target `#anchor`."""
    return el(
        "section",
        el("h2", title, id=anchor),
        el("p", intro, class_="intro"),
        *children,
    )


def grid(*children: Html | None) -> Html:
    """Children side by side if the page is wide enough."""
    return el("div", *children, class_="grid")


def note(sentence: str) -> Html:
    """A sentence in place of missing content."""
    return el("p", sentence, class_="note")


def figure(
    title: str,
    drawing: Html,
    *,
    keys: Sequence[tuple[str, str, str]] = (),
    caption: str | None = None,
) -> Html:
    """A chart with its title, its legend `(name, colour, value)` and a caption."""
    return el(
        "figure",
        el("h3", title),
        el("div", *(_key(*key) for key in keys), class_="legend") if keys else None,
        drawing,
        None if caption is None else el("figcaption", caption),
    )


def _key(name: str, color: str, value: str) -> Html:
    swatch = el("i", class_=color)
    return el("span", swatch, name, *((" ", el("b", value)) if value else ()))


def tile(name: str, value: str, unit: str = "", detail: str = "") -> Html:
    """One number with its name and unit."""
    shown = el("b", value, *((" ", el("i", unit)) if unit else ()))
    small = el("small", detail) if detail else None
    return el("div", el("span", name), shown, small, class_="card tile")


def table(head: Sequence[str], rows: Sequence[Sequence[Html | str]], css: str = "") -> Html:
    """A table; a column whose heading starts with `>` is right-aligned."""
    sides = ["num" if name.startswith(">") else None for name in head]
    titles = (
        el("th", name.removeprefix(">"), class_=side)
        for name, side in zip(head, sides, strict=True)
    )
    lines = (
        el("tr", *(_cell(cell, side) for cell, side in zip(row, sides, strict=True)))
        for row in rows
    )
    body = join(el("thead", el("tr", *titles)), el("tbody", *lines))
    return el("div", el("table", body, class_=css or None), class_="scroll")


def _cell(cell: Html | str, side: str | None) -> Html:
    is_cell = isinstance(cell, Html) and cell.startswith("<td")
    return Html(cell) if is_cell else el("td", cell, class_=side)


def flat(config: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, value), in order."""
    rows: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            rows.extend(flat(value, f"{prefix}{key}."))
        else:
            rows.append((f"{prefix}{key}", "none" if value is None else str(value)))
    return rows


# -- numbers -------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """`value` to `digits` significant digits with a thousands separator: 0.0421, 3.14, 12,345; None
    is –."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    if decimals > 8:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{value:,.{max(0, decimals)}f}".replace("-", "−")


def percent(share: float | None) -> str:
    """A share as `71.4 %`."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """`0.8 s`, `42 s`, `12 min 5 s`, `3 h 7 min`; smaller units are dropped."""
    if seconds < 10:
        return f"{number(seconds, 2)} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    big, small, names = (whole // 60, whole % 60, ("min", "s"))
    if whole >= 3600:
        big, small, names = (whole // 3600, whole % 3600 // 60, ("h", "min"))
    return f"{big} {names[0]}" + (f" {small} {names[1]}" if small else "")
