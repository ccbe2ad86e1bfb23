"""The parts of a page that show single questions and what changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medqlora.data.examples import LETTERS
from medqlora.evaluation.metrics import option_probabilities
from medqlora.evaluation.predictions import Predictions, collect_rows, read_rows
from medqlora.reporting.numbers import (
    cut,
    interval,
    interval_points,
    p_text,
    percent,
    points,
    share,
)
from medqlora.reporting.rendering import Table
from medqlora.reporting.runs import Run
from medqlora.reporting.scores import LEVEL

# comparison.describe_outcomes names at most 20 ids, so larger numbers here show no more.
SAMPLES = {"broken": 20, "both_wrong": 20, "fixed": 10}  # questions shown in full, by outcome
SUMMARY = 110  # characters of a question that stand on its folded line

OUTCOMES = {
    "fixed": ("fixed", "the base was wrong, tuned is right"),
    "broken": ("broken", "the base was right, tuned is wrong"),
    "both_wrong": ("both wrong", "neither is right"),
    "both_right": ("both right", "both are right"),
}
LABELS = {"negated": "with a negation (not, except, …)", "plain": "without a negation"}


def show_worst(run: Run, shown: int = 10) -> list[dict[str, Any]]:
    """Return the subjects of the lowest accuracy, and those that got worse."""
    if not run.shown or not run.scores[run.shown[-1]].get("per_subject"):
        return []
    name = run.shown[-1]
    subjects = run.scores[name]["per_subject"]
    # The name breaks ties, so the same run gives the same page.
    lowest = sorted(subjects.items(), key=lambda item: (item[1]["accuracy"], item[0]))[:shown]
    rows = [
        [subject, f"{score['n']:,}", percent(score["accuracy"]), interval(score["accuracy_ci95"])]
        for subject, score in lowest
    ]
    head = ["subject", "n", "accuracy", "95 % interval"]
    parts = [{"table": Table(f"Lowest accuracy of {name}", head, rows), "note": None}]
    changes = (run.comparison or {}).get("per_subject")
    return parts if changes is None else [*parts, show_worse(changes)]


def show_worse(changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the subjects in which tuned answered fewer questions right than the base."""
    worse = [(subject, change) for subject, change in changes.items() if change["difference"] < 0]
    if not worse:
        note = "In no subject did tuned answer fewer questions right than the base."
        return {"table": None, "note": note}
    rows = [
        [
            subject,
            f"{change['n']:,}",
            percent(change["accuracy_a"]),
            percent(change["accuracy_b"]),
            points(change["difference"]),
            interval_points(change["difference_ci95"]),
            p_text(change["holm_p"]).removeprefix("= "),
            "yes" if change["holm_p"] < LEVEL else "no",
        ]
        for subject, change in sorted(worse, key=lambda item: item[1]["difference"])
    ]
    head = ["subject", "n", "base", "tuned", "points", "95 % interval", "p (Holm)", "shown?"]
    note = (
        f"p is corrected for the number of subjects, {len(changes)}; “shown” means below {LEVEL}."
        " The others may be chance."
    )
    return {"table": Table("Subjects that got worse", head, rows), "note": note}


def show_outcomes(run: Run) -> dict[str, Any] | None:
    """Return how many questions were fixed, broken or neither, by kind of question."""
    outcomes = (run.comparison or {}).get("outcomes")
    if outcomes is None:
        return None
    everything = outcomes["all"]
    total = everything["n"]
    shares = [share(outcomes[key]["n"], total) for key in OUTCOMES]
    rows = [["all questions", f"{total:,}", *shares]]
    for group in ("by_negation", "by_numbers", "by_length", "by_choice_type"):
        for name, n in sorted(everything[group].items(), key=rank_group):
            if n == total:
                continue  # A group of all questions says nothing.
            shares = [share(outcomes[key][group].get(name, 0), n) for key in OUTCOMES]
            rows.append([LABELS.get(name, name), f"{n:,}", *shares])
    head = ["", "n", *(label for label, _ in OUTCOMES.values())]
    return {
        "table": Table("Outcomes by kind of question", head, rows),
        "terms": list(OUTCOMES.values()),
    }


def rank_group(item: tuple[str, int]) -> tuple[bool, int, str]:
    """Bring "up to 9 words" before "up to 12 words", and "over …" last."""
    name = item[0]
    return (name.startswith("over"), len(name), name)


def show_samples(run: Run) -> list[dict[str, Any]]:
    """Return whole questions: a fixed choice of each outcome; of a single file, wrong answers."""
    here = [name for name in run.shown if name in run.rows]
    if not here:
        return []
    outcomes = (run.comparison or {}).get("outcomes")
    chosen = []
    if outcomes and len(here) == 2:
        for key, limit in SAMPLES.items():
            label, meaning = OUTCOMES[key]
            chosen.append((label, meaning, outcomes[key]["ids"][:limit], outcomes[key]["n"]))
    else:
        # Without two files to compare, the wrong answers of one are shown.
        here = here[-1:]
        rows = run.rows[here[0]]
        wrong = np.flatnonzero(~rows.right)
        ids = [rows.ids[i] for i in wrong[: SAMPLES["broken"]]]
        chosen.append(("wrong", f"answers of {here[0]}", ids, len(wrong)))
    shown = []
    for label, meaning, ids, total in chosen:
        by_id = {name: find_rows(run.rows[name], ids) for name in here}
        questions = [show_sample([(name, *by_id[name][id]) for name in here]) for id in ids]
        shown.append(
            {
                "heading": f"{label.capitalize()}: {len(ids):,} of {total:,} shown",
                "meaning": f"{meaning.capitalize()}." if ids else "There are none.",
                "questions": questions,
            }
        )
    return shown


def find_rows(
    rows: Predictions, ids: Sequence[str]
) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    """Return whole rows and their options' probabilities, by id."""
    if not ids:
        return {}
    wanted = set(ids)
    offsets = [rows.offsets[number] for number, id in enumerate(rows.ids) if id in wanted]
    # These rows stand in the file's order, so the result is looked up by id.
    whole = read_rows(rows.path, offsets)
    # float64 [rows, options]; the columns are those of the longest of these rows only
    chances = option_probabilities(collect_rows(whole))
    return {row["id"]: (row, chance) for row, chance in zip(whole, chances, strict=True)}


@dataclass(frozen=True)
class ShownAnswer:
    """What one model did with one option."""

    chosen: bool
    chance: str


@dataclass(frozen=True)
class ShownOption:
    """One option of a question with each model's answer."""

    letter: str
    text: str
    right: bool
    answers: list[ShownAnswer]


@dataclass(frozen=True)
class Sample:
    """One question as templates/sections.html shows it.

    Attributes:
        id: of the question.
        summary: the folded line.
        whole: the question, where it is longer than the summary.
        models: names of the models that answered.
        options: empty where the file holds none.
        gold: the right answer.
        texts: (model, what it wrote).
        unread: models that named no option.
        origin: subject, topic and id.
    """

    id: str
    summary: str
    whole: str | None
    models: list[str]
    options: list[ShownOption]
    gold: str
    texts: list[tuple[str, str]]
    unread: list[str]
    origin: str


def show_sample(answers: list[tuple[str, dict[str, Any], np.ndarray]]) -> Sample:
    """Return one question with what each model answered.

    answers: (model, prediction row, probabilities of the options) of each model.
    """
    first = answers[0][1]
    question = str(first.get("question") or "the file holds no question text")
    summary = question
    if len(question) > SUMMARY:
        summary = question[:SUMMARY].rsplit(" ", 1)[0] + " …"
    texts = first.get("options") or [""] * len(first.get("option_logprobs") or {})
    options = []
    # LETTERS has more entries than a question has options.
    for position, (letter, text) in enumerate(zip(LETTERS, texts, strict=False)):
        shown = [show_answer(row, chances, position) for _, row, chances in answers]
        options.append(ShownOption(letter, cut(text), letter == first["gold"], shown))
    return Sample(
        id=first["id"],
        summary=summary,
        whole=None if summary == question else cut(question),
        models=[name for name, _, _ in answers],
        options=options,
        gold=cut(first["gold"]),
        texts=[(name, cut(row["text"])) for name, row, _ in answers if row.get("text")],
        unread=[name for name, row, _ in answers if row["prediction"] is None],
        origin=" · ".join(str(first[key]) for key in ("subject", "topic", "id") if first.get(key)),
    )


def show_answer(row: dict[str, Any], chances: np.ndarray, position: int) -> ShownAnswer:
    """Return whether the option at this position was chosen, and its probability if known."""
    chosen = row["prediction"] == LETTERS[position]
    if position < len(chances) and not np.isnan(chances[position]):
        return ShownAnswer(chosen, percent(chances[position]))
    return ShownAnswer(chosen, "" if chosen else "–")
