"""Tables of the kinds of mistakes, for the terminal and for a page."""

from __future__ import annotations

from typing import Any

from medqlora.data.examples import LETTERS
from medqlora.evaluation.mistakes import describe_count, find_mistakes
from medqlora.reporting.numbers import interval, percent
from medqlora.reporting.rendering import Table
from medqlora.reporting.runs import Run
from medqlora.reporting.subjects import fold_small


def show_mistakes(run: Run) -> list[Table]:
    """Return the tables of the tuned model's wrong answers, or of those of the only file."""
    here = [name for name in run.shown if name in run.rows]
    if not here:
        return []
    mistakes = find_mistakes(run.rows[here[-1]])
    if not mistakes["wrong"]:
        return []
    tables = (tabulate_kinds(mistakes), tabulate_subjects(mistakes))
    return [table for table in tables if table is not None]


def tabulate_kinds(mistakes: dict[str, Any]) -> Table:
    """Return a table with a row for each kind of mistake, from what find_mistakes returns."""
    rows = []
    for name, kind in mistakes["kinds"].items():
        if kind["n"] is None:
            rows.append([label(name), f"{kind['meaning']} (the file does not say)", *"–––"])
            continue
        some = f" (known of {kind['known']:,})" if kind["known"] < mistakes["wrong"] else ""
        figures = [f"{kind['n']:,}", percent(kind["share"]), interval(kind["share_ci95"])]
        rows.append([label(name), kind["meaning"] + some, *figures])
    title = f"Kinds of the {mistakes['wrong']:,} wrong answers of {mistakes['n']:,}"
    return Table(title, ["kind", "what it says", "n", "share", "95 % interval"], rows, texts=2)


def tabulate_subjects(mistakes: dict[str, Any]) -> Table | None:
    """Return a table of the kinds by subject, None where there is one subject only.

    Kinds of which the file has no answer have no column.
    """
    if len(mistakes["per_subject"]) < 2:
        return None
    names = [name for name, kind in mistakes["kinds"].items() if kind["n"]]
    (subjects,) = fold_small([mistakes["per_subject"]], merge_mistakes)
    rows = []
    for subject, counts in subjects.items():
        shown = [counts["kinds"][name]["n"] for name in names]
        cells = ["–" if n is None else f"{n:,}" for n in shown]
        rows.append([subject, f"{counts['n']:,}", f"{counts['wrong']:,}", *cells])
    return Table("Wrong answers by subject", ["subject", "n", "wrong", *map(label, names)], rows)


def merge_mistakes(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of several subjects together."""
    kinds = {}
    for name in parts[0]["kinds"]:
        counts = [part["kinds"][name] for part in parts]
        known = sum(count["known"] for count in counts)
        kinds[name] = describe_count(sum(count["n"] or 0 for count in counts), known)
    return {
        "n": sum(part["n"] for part in parts),
        "wrong": sum(part["wrong"] for part in parts),
        "kinds": kinds,
    }


def label(name: str) -> str:
    """Return a kind's name in words."""
    return name.replace("_", " ")


def list_samples(mistakes: dict[str, Any], shown: int) -> list[tuple[str, list[str]]]:
    """Return (kind, its first samples in a line each), for kinds that have some.

    Args:
        mistakes: what find_mistakes returns.
        shown: how many samples of each kind.
    """
    listed = []
    for name, kind in mistakes["kinds"].items():
        lines = [describe_sample(sample) for sample in kind["samples"][:shown]]
        if lines:
            listed.append((label(name), lines))
    return listed


def describe_sample(sample: dict[str, Any]) -> str:
    """Return a wrong answer in a line: id, question, the answer and the right one."""
    question = shorten(sample.get("question", "the file holds no question text"))
    answer = shorten(name_answer(sample, sample.get("prediction")))
    sure = f" ({percent(sample['confidence'])})" if "confidence" in sample else ""
    right = shorten(name_answer(sample, sample["gold"]))
    return f"{sample['id']}: {question} | answered {answer}{sure} | right is {right}"


def name_answer(sample: dict[str, Any], answer: str | None) -> str:
    """Return an answer with the text of the option that it names; without one, what was written."""
    if answer is None:
        return sample.get("text") or "nothing"
    options = sample.get("options")
    return answer if options is None else f"{answer} {options[LETTERS.index(answer)]}"


def shorten(text: str, longest: int = 90) -> str:
    """Return the beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[:longest].rsplit(" ", 1)[0] + " …"
