"""HTML that is escaped by default, and the page around it."""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
    """Text that is markup already. All other text is escaped when it becomes part of an element."""


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element; class_ stands for class, aria_label for aria-label."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Any) -> Html:
    return Html(
        "".join(child if isinstance(child, Html) else html.escape(str(child)) for child in children)
    )


def section(id: str, title: str, level: int, *children: Html, class_: str = "part") -> Html:
    return tag(
        "section",
        tag(f"h{level}", title, id=f"{id}-title"),
        *children,
        id=id,
        class_=class_,
        aria_labelledby=f"{id}-title",
    )


def table(label: str, head: Sequence[str], rows: Iterable[Sequence[Any]], texts: int = 1) -> Html:
    """A table that scrolls by itself where the window is narrow; `texts`: how many columns at its
    left are no numbers.
    """
    of = ["text" if i < texts else "" for i in range(len(head))]
    cells = [
        tag("th", name, scope="col", **({"class_": kind} if kind else {})) if name else tag("td")
        for name, kind in zip(head, of, strict=True)
    ]
    lines = []
    for row in rows:
        rest = [
            tag("td", cell, **({"class_": kind} if kind else {}))
            for cell, kind in zip(row[1:], of[1:], strict=True)
        ]
        lines.append(tag("tr", tag("th", row[0], scope="row", class_="text"), *rest))
    inside = tag("table", tag("thead", tag("tr", *cells)), tag("tbody", *lines))
    return tag(
        "div", inside, class_="scroll", role="region", tabindex=0, aria_label=f"Table: {label}"
    )


def definitions(facts: Iterable[tuple[str, Any]]) -> Html:
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts))


def caption(text: str) -> Html:
    return tag("p", tag("strong", text), class_="caption")


def fold(summary: str, *children: Html) -> Html:
    return tag("details", tag("summary", summary), *children)


# The policy forbids the page every request and every script, whatever stands in the data.
TEMPLATES = importlib.resources.files("medqlora.reporting") / "templates"
PAGE = (TEMPLATES / "page.html").read_text(encoding="utf-8")
STYLE = (TEMPLATES / "style.css").read_text(encoding="utf-8")
