"""Formatting of numbers and of long texts for reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Longer questions and answers are cut to this many characters, to keep a page below a megabyte.
LONGEST = 2000


def percent(value: float | None) -> str:
    """Format a fraction as a percentage with one decimal; a dash stands for None."""
    return "–" if value is None else f"{100 * value:.1f} %"


def percent_short(value: float) -> str:
    """Format a fraction as a whole percentage."""
    return f"{100 * value:.0f} %"


def points(value: float) -> str:
    """Format a difference of fractions as percentage points with a sign."""
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "−")  # + 0.0 turns -0.0 into 0.0


def interval(bounds: Sequence[float]) -> str:
    """Format an interval of fractions in percent, without the unit."""
    return f"{100 * bounds[0]:.1f} – {100 * bounds[1]:.1f}"


def interval_points(bounds: Sequence[float]) -> str:
    """Format an interval of differences as percentage points."""
    return f"{points(bounds[0])} to {points(bounds[1])}"


def p_value(p: float) -> str:
    """Format a p-value for a table; below 1e-12 no digit of it means anything."""
    return "< 1e-12" if p < 1e-12 else f"{p:.2g}"


def p_text(p: float) -> str:
    """Format a p-value with its relation sign, such as "= 0.02"."""
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def number(value: float | None) -> str:
    """Format a number with three decimals; a dash stands for None."""
    return "–" if value is None else f"{value:,.3f}"


def share(part: int, whole: int) -> str:
    """Format a count and its percentage of the whole."""
    return f"{part:,} ({percent(part / whole)})"


def short(value: float) -> str:
    """Format the label of a tick, such as "1500" and "20k"; "k" begins at 10,000."""
    for limit, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / size:g}{unit}"
    return f"{value:.6g}"


def cut(text: Any) -> str:
    """Return a text with at most LONGEST characters, and say so where it was cut."""
    text = str(text)
    return text if len(text) <= LONGEST else text[:LONGEST] + " … (cut)"
