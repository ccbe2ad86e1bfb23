"""The comparison of two models on open questions, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from medqlora.evaluation.open_answers import OPEN_SCORES
from medqlora.reporting.numbers import interval, interval_points, p_value, points
from medqlora.reporting.subjects import FEW

NAMES = {"exact_match": "exact match", "f1": "F1", "rouge_l": "ROUGE-L"}
assert NAMES.keys() == OPEN_SCORES.keys()


def describe_open(
    title: str, comparison: dict[str, Any], models: tuple[str, str]
) -> Iterator[Table | Text]:
    """Show all scores of two models with their difference, then F1 by subject.

    Args:
        title: the title of the table.
        comparison: what compare_predictions returns for open questions.
        models: names of the two models.
    """
    # rich would take brackets in a file's name for styles.
    table = Table(title=Text(title), title_justify="left")
    headings = ["n"]
    for model in models:
        headings += [f"{model} %", "95 % interval"]
    headings += ["difference", "95 % interval", "p", "Holm p"]
    table.add_column("score")
    for heading in headings:
        table.add_column(heading, justify="right")
    for score, name in NAMES.items():
        add_row(table, name, comparison[score])
    subjects = comparison["per_subject"]
    shown = {name: part for name, part in subjects.items() if part["n"] >= FEW}
    # A single subject is everything there is.
    if len(subjects) > 1:
        for name, part in shown.items():
            add_row(table, f"F1, {name}", part["f1"])
    yield table
    few = len(subjects) - len(shown)
    left_out = ""
    if len(subjects) > 1 and few:
        left_out = f"; {few} subject{'s' * (few > 1)} under {FEW} questions not shown"
    method = comparison["method"]
    yield Text(
        f"differences in points; F1 and ROUGE-L: {method['interval']}, p by {method['test']}"
        f" ({method['resamples']:,} resamples, seed {method['seed']}); exact match:"
        f" {method['exact_match']}{left_out}"
    )


def add_row(table: Table, name: str, part: dict[str, Any] | None) -> None:
    """Add the comparison of one score; None stands for a score that no answer has."""
    if part is None:
        table.add_row(Text(name), "0", *["–"] * 8)
        return
    table.add_row(
        Text(name),
        f"{part['n']:,}",
        f"{100 * part['a']:.1f}",
        interval(part["a_ci95"]),
        Text(f"{100 * part['b']:.1f}", style="bold"),
        interval(part["b_ci95"]),
        points(part["difference"]),
        interval_points(part["difference_ci95"]),
        p_value(part["p"]),
        # Only subjects are corrected for their number.
        p_value(part["holm_p"]) if "holm_p" in part else "",
    )
