"""The comparison of two models on open questions, for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from medqlora.evaluation.open_answers import OPEN_SCORES
from medqlora.reporting.numbers import interval, interval_points, p_text, p_value, points
from medqlora.reporting.subjects import FEW

NAMES = {"exact_match": "exact match", "f1": "F1", "rouge_l": "ROUGE-L"}
assert NAMES.keys() == OPEN_SCORES.keys()


def tabulate_means(title: str, comparison: dict[str, Any], models: tuple[str, str]) -> Table:
    """Make a table of the scores of two models with their intervals, which fits 80 columns.

    Args:
        title: the title of the table.
        comparison: what compare_predictions returns for open questions.
        models: names of the two models.
    """
    table = Table(title=Text(title), title_justify="left")
    for column in ("", "n", models[0], "95 % interval", models[1], "95 % interval"):
        table.add_column(column, justify="right" if column else "left")
    for name, part in list_parts(comparison):
        table.add_row(Text(name), *show_means(part))
    return table


def tabulate_differences(title: str, comparison: dict[str, Any]) -> Table:
    """Make a table of the scores of two files and their differences; see tabulate_means."""
    table = Table(title=Text(title), title_justify="left")
    table.add_column("score")
    for column in ("n", "A", "95 % interval", "B", "95 % interval"):
        table.add_column(column, justify="right")
    for column in ("difference", "95 % interval", "p", "Holm p"):
        table.add_column(column, justify="right")
    for name, part in list_parts(comparison):
        differences = ["–"] * 4
        if part is not None:
            differences = [
                points(part["difference"]),
                interval_points(part["difference_ci95"]),
                p_value(part["p"]),
                # Only subjects are corrected for their number.
                p_value(part["holm_p"]) if "holm_p" in part else "",
            ]
        table.add_row(Text(name), *show_means(part), *differences)
    return table


def list_parts(comparison: dict[str, Any]) -> list[tuple[str, dict[str, Any] | None]]:
    """Return each score with its name, then F1 of each subject that has enough questions."""
    parts = [(name, comparison[score]) for score, name in NAMES.items()]
    subjects = comparison["per_subject"]
    # A single subject is everything there is.
    if len(subjects) > 1:
        large = {name: part for name, part in subjects.items() if part["n"] >= FEW}
        parts += [(f"F1, {name}", part["f1"]) for name, part in large.items()]
    return parts


def show_means(part: dict[str, Any] | None) -> list[str | Text]:
    """Return the cells of number, means and intervals; None is a score that no answer has."""
    if part is None:
        return ["0", *["–"] * 4]
    return [
        f"{part['n']:,}",
        f"{part['a']:.1%}",
        f"{interval(part['a_ci95'])} %",
        Text(f"{part['b']:.1%}", style="bold"),
        f"{interval(part['b_ci95'])} %",
    ]


def describe_differences(comparison: dict[str, Any]) -> Text:
    """Say the difference of each score, one line each."""
    lines = []
    for score, name in NAMES.items():
        part = comparison[score]
        if part is not None:
            lines.append(
                f"difference in {name} {points(part['difference'])} points (95 % interval"
                f" {interval_points(part['difference_ci95'])}), p {p_text(part['p'])}"
            )
    return Text("\n".join(lines))


def describe_method(comparison: dict[str, Any]) -> Text:
    """Say how the intervals and p-values are computed, and which subjects are not shown."""
    method = comparison["method"]
    few = sum(part["n"] < FEW for part in comparison["per_subject"].values())
    left_out = ""
    if few and len(comparison["per_subject"]) > 1:
        left_out = f"; {few} subject{'s' * (few > 1)} under {FEW} questions not shown"
    return Text(
        f"F1 and ROUGE-L: {method['interval']}, p by {method['test']} ({method['resamples']:,}"
        f" resamples, seed {method['seed']}); exact match: {method['exact_match']}{left_out}"
    )
