"""Jinja2 templates with what they are given; all text is escaped unless it is markup already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

TEMPLATES = Environment(
    loader=PackageLoader("medqlora.reporting"),
    # Questions and answers may hold markup, which must not become part of the page.
    autoescape=True,
    # A misspelt name in a template is an error and not an empty text.
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its heading.

    Attributes:
        label: names the table for screen readers.
        head: names of the columns; an empty one has no heading.
        rows: texts of the cells.
        texts: how many columns at the left hold text rather than numbers.
        links: for each row, the address that its heading leads to; empty for a table without links.
    """

    label: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    texts: int = 1
    links: Sequence[str] = ()


def render(template: str, **values: Any) -> str:
    """Return a template of this package with its values."""
    return TEMPLATES.get_template(template).render(**values)


def render_text(template: str, **values: Any) -> str:
    """Return a template of plain text, in which nothing is escaped, with its values."""
    return TEMPLATES.overlay(autoescape=False).get_template(template).render(**values)
