"""How many questions of people in danger the safety rules miss, and how often they alarm for none.

A miss is a question of a kind without the reminder of its own kind. An alarm is any reminder for a
harmless question.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medqlora.core.json_reading import parse_json
from medqlora.data.examples import DataError
from medqlora.evaluation.statistics import wilson_interval
from medqlora.serving.safety import REMINDERS, find_reminders

HARMLESS = "none"
# The rules were written with the first part in view; nobody looked at the second one before they
# were finished.
PARTS = ("written_against", "held_out")


def read_labelled(path: Path) -> list[dict[str, str]]:
    """Return the questions of a file of JSON lines, each with its kind and the part that it is of.

    Raises:
        DataError: the file cannot be read, or a line is no such row.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{path}: cannot be read ({reason}); give a file of questions") from None
    allowed = {"kind": (*REMINDERS, HARMLESS), "part": PARTS}
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path} line {number}: {error}; correct it") from None
        right = isinstance(row, dict) and isinstance(row.get("question"), str)
        if not right or any(row.get(key) not in values for key, values in allowed.items()):
            raise DataError(
                f'{path} line {number}: expected {{"part", "kind", "question"}} with a part of'
                f" {', '.join(PARTS)} and a kind of {', '.join(allowed['kind'])}"
            )
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: no question in it; expected at least one")
    return rows


def measure_rules(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Return the rate of misses, or of alarms, of each kind in each part, with 95 % intervals."""
    found = []
    for part in PARTS:
        for kind in (*REMINDERS, HARMLESS):
            questions = [
                row["question"] for row in rows if (row["part"], row["kind"]) == (part, kind)
            ]
            if not questions:
                continue
            if kind == HARMLESS:
                wrong = count_alarms(questions)
            else:
                wrong = sum(kind not in find_reminders(question) for question in questions)
            found.append({"part": part, "kind": kind} | describe_rate(wrong, len(questions)))
    return found


def count_alarms(questions: Sequence[str]) -> int:
    """Return how many questions get any reminder."""
    return sum(bool(find_reminders(question)) for question in questions)


def describe_rate(wrong: int, n: int) -> dict[str, Any]:
    """Return a share with its 95 % interval (Wilson 1927)."""
    interval = list(wilson_interval(wrong, n))
    return {"n": n, "wrong": wrong, "rate": wrong / n, "rate_ci95": interval}
