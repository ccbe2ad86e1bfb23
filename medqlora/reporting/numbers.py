"""Numbers as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LONGEST = 2000  # characters of a question or answer shown; pages stay under a megabyte


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def percent_short(value: float) -> str:
    return f"{100 * value:.0f} %"


def points(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "−")  # + 0.0 turns -0.0 into 0.0


def interval(bounds: Sequence[float]) -> str:
    return f"{100 * bounds[0]:.1f} – {100 * bounds[1]:.1f}"


def interval_points(bounds: Sequence[float]) -> str:
    return f"{points(bounds[0])} to {points(bounds[1])}"


def p_text(p: float) -> str:
    return "< 1e-12" if p < 1e-12 else f"= {p:.2g}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.3f}"


def share(part: int, whole: int) -> str:
    return f"{part:,} ({percent(part / whole)})"


def short(value: float) -> str:
    """A tick's label: 1500 -> 1500, 20000 -> 20k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:.6g}"


def cut(text: Any) -> str:
    text = str(text)
    return text if len(text) <= LONGEST else text[:LONGEST] + " … (cut)"
