"""The page around the sections: style, cards, tables, captions.

Promises: one self-contained document that loads nothing, reads on a phone and on paper, and
follows the reader's light or dark setting. Knows no metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from npd.observe.report.html import Html, el, join
from npd.observe.report.style import CSS


def page(title: str, header: Html, body: Html, footer: str) -> str:
    """The whole document."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", Html(CSS)),
    )
    parts = el("body", el("header", header), el("main", body), el("footer", footer))
    return "<!DOCTYPE html>\n" + el("html", head, parts, lang="en") + "\n"


def section(anchor: str, title: str, intro: str, *children: Html | None) -> Html:
    """A part of the page, reachable as `#anchor`."""
    return el(
        "section",
        el("h2", title, id=anchor),
        el("p", intro, class_="intro"),
        *children,
    )


def grid(*children: Html | None) -> Html:
    """Children side by side where the page is wide enough."""
    return el("div", *children, class_="grid")


def note(text: str) -> Html:
    """A sentence in place of what cannot be shown."""
    return el("p", text, class_="note")


def figure(
    title: str,
    drawing: Html,
    *,
    keys: Sequence[tuple[str, str, str]] = (),
    caption: str | None = None,
    is_wide: bool = False,
) -> Html:
    """A chart with its title, its legend `(name, colour, value)` and a caption."""
    return el(
        "figure",
        el("h3", title),
        el("div", *(_key(*key) for key in keys), class_="legend") if keys else None,
        el("div", drawing, class_="scroll"),
        None if caption is None else el("figcaption", caption),
        class_="wide" if is_wide else None,
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
        el("th", name.lstrip(">"), class_=side) for name, side in zip(head, sides, strict=True)
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
    """Nested settings as (dotted key, value) in their own order."""
    rows: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            rows.extend(flat(value, f"{prefix}{key}."))
        else:
            rows.append((f"{prefix}{key}", "none" if value is None else str(value)))
    return rows
