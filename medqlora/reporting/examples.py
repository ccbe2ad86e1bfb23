"""The parts of a page that show single questions and what changed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medqlora.data.examples import LETTERS
from medqlora.evaluation.journal import hash_id
from medqlora.evaluation.metrics import option_probabilities
from medqlora.evaluation.open_answers import token_f1
from medqlora.evaluation.predictions import Predictions, collect_rows, read_rows
from medqlora.reporting.numbers import (
    cut,
    interval,
    interval_points,
    p_value,
    percent,
    points,
    share,
)
from medqlora.reporting.rendering import Table
from medqlora.reporting.runs import Run
from medqlora.reporting.scores import LEVEL
from medqlora.reporting.subjects import FEW, fold_small, merge_accuracies, merge_changes

# comparison.describe_outcomes names at most 20 ids, so larger numbers here show no more.
SAMPLES = {"broken": 20, "both_wrong": 20, "fixed": 10}  # questions shown in full, by outcome
OPEN_SAMPLES = 10  # open answers shown in full, of each file
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
    every = run.scores[name]["per_subject"]
    (subjects,) = fold_small([every], merge_accuracies)
    # The name breaks ties, so the same run gives the same page.
    ranked = sorted(subjects.items(), key=lambda item: (item[1]["accuracy"], item[0]))
    lowest = [item for item in ranked if item[0] in every][:shown]
    # The row of several small subjects says what the others leave out.
    lowest += [item for item in ranked if item[0] not in every]
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
    (folded,) = fold_small([changes], merge_changes)
    worse = [(subject, change) for subject, change in folded.items() if change["difference"] < 0]
    if not worse:
        which = "In no subject"
        if any(change["difference"] < 0 for change in changes.values()):
            which += f" of {FEW} questions or more, nor in the smaller ones together,"
        note = f"{which} did tuned answer fewer questions right than the base."
        return {"table": None, "note": note}
    rows = [
        [
            subject,
            f"{change['n']:,}",
            percent(change["accuracy_a"]),
            percent(change["accuracy_b"]),
            points(change["difference"]),
            interval_points(change["difference_ci95"]),
            # A row of several subjects together has no corrected p.
            p_value(change["holm_p"]) if "holm_p" in change else "–",
            "yes" if change.get("holm_p", 1) < LEVEL else "no",
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


def rank_group(item: tuple[str, int]) -> tuple[int, str]:
    """Bring "up to 9 words" before "10 to 12 words", and "over 12 words" last."""
    first = re.search(r"\d+", item[0])
    return (int(first[0]) if first else 0, item[0])


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


def show_open_samples(run: Run) -> list[dict[str, Any]]:
    """Return whole open questions with what was written; a hash of the id draws them."""
    files = [name for name, rows in run.rows.items() if rows.kind == "open"]
    together = ["base", "tuned"]
    groups = [[name] for name in files]
    # Base and tuned are shown side by side where they answered the same questions.
    if set(together) <= set(files) and run.rows["base"].ids == run.rows["tuned"].ids:
        groups = [together, *([name] for name in files if name not in together)]
    shown = []
    for names in groups:
        ids = sorted(run.rows[names[0]].ids, key=hash_id)[:OPEN_SAMPLES]
        whole = {name: read_by_id(run.rows[name], ids) for name in names}
        title = f"Open answers of {' and '.join(names)}"
        total = len(run.rows[names[0]])
        shown.append(
            {
                "heading": f"{title}: {len(ids):,} of {total:,} shown",
                "meaning": "They are drawn by lot, the same ones in every report.",
                "questions": [
                    show_open_sample([(name, whole[name][id]) for name in names]) for id in ids
                ],
            }
        )
    return shown


def show_open_sample(answers: list[tuple[str, dict[str, Any]]]) -> Sample:
    """Return one open question with what each model wrote; answers: (model, row)."""
    first = answers[0][1]
    texts = []
    unread = []
    for name, row in answers:
        text = row["prediction"] or ""
        if text.strip():
            overlap = percent(token_f1(text, first["gold"]))
            texts.append((f"{name} (F1 of words {overlap})", cut(text)))
        else:
            unread.append(name)
    summary, whole = summarise_question(first)
    return Sample(
        id=first["id"],
        summary=summary,
        whole=whole,
        models=[name for name, _ in answers],
        options=[],
        gold=cut(first["gold"]),
        texts=texts,
        unread=unread,
        missing="wrote nothing",
        origin=describe_origin(first),
    )


def read_by_id(rows: Predictions, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return whole rows by id."""
    wanted = set(ids)
    offsets = [rows.offsets[number] for number, id in enumerate(rows.ids) if id in wanted]
    return {row["id"]: row for row in read_rows(rows.path, offsets)}


def find_rows(
    rows: Predictions, ids: Sequence[str]
) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    """Return whole rows and their options' probabilities, by id."""
    if not ids:
        return {}
    # These rows stand in the file's order, so the result is looked up by id.
    whole = read_by_id(rows, ids)
    # float64 [rows, options]; the columns are those of the longest of these rows only
    chances = option_probabilities(collect_rows(whole.values()))
    return {id: (row, chance) for (id, row), chance in zip(whole.items(), chances, strict=True)}


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
        unread: models that named no option, or wrote nothing.
        missing: what those models did.
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
    missing: str
    origin: str


def show_sample(answers: list[tuple[str, dict[str, Any], np.ndarray]]) -> Sample:
    """Return one question with what each model answered.

    answers: (model, prediction row, probabilities of the options) of each model.
    """
    first = answers[0][1]
    summary, whole = summarise_question(first)
    texts = first.get("options") or [""] * len(first.get("option_logprobs") or {})
    options = []
    # LETTERS has more entries than a question has options.
    for position, (letter, text) in enumerate(zip(LETTERS, texts, strict=False)):
        shown = [show_answer(row, chances, position) for _, row, chances in answers]
        options.append(ShownOption(letter, cut(text), letter == first["gold"], shown))
    return Sample(
        id=first["id"],
        summary=summary,
        whole=whole,
        models=[name for name, _, _ in answers],
        options=options,
        gold=cut(first["gold"]),
        texts=[(name, cut(row["text"])) for name, row, _ in answers if row.get("text")],
        unread=[name for name, row, _ in answers if row["prediction"] is None],
        missing="named no option",
        origin=describe_origin(first),
    )


def summarise_question(row: dict[str, Any]) -> tuple[str, str | None]:
    """Return a question's folded line, and its whole text where that is longer."""
    question = str(row.get("question") or "the file holds no question text")
    if len(question) <= SUMMARY:
        return question, None
    return question[:SUMMARY].rsplit(" ", 1)[0] + " …", cut(question)


def describe_origin(row: dict[str, Any]) -> str:
    """Return subject, topic and id of a question."""
    return " · ".join(str(row[key]) for key in ("subject", "topic", "id") if row.get(key))


def show_answer(row: dict[str, Any], chances: np.ndarray, position: int) -> ShownAnswer:
    """Return whether the option at this position was chosen, and its probability if known."""
    chosen = row["prediction"] == LETTERS[position]
    if position < len(chances) and not np.isnan(chances[position]):
        return ShownAnswer(chosen, percent(chances[position]))
    return ShownAnswer(chosen, "" if chosen else "–")
