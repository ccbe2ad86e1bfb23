"""The parts of a page that show single questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medqlora.data.examples import LETTERS
from medqlora.evaluation.metrics import option_probabilities
from medqlora.evaluation.predictions import Predictions, collect_rows, read_rows
from medqlora.reporting.markup import Html, caption, definitions, fold, join, table, tag
from medqlora.reporting.numbers import (
    cut,
    interval,
    interval_points,
    p_text,
    percent,
    points,
    share,
)
from medqlora.reporting.runs import Run
from medqlora.reporting.scores import LEVEL

SAMPLES = {"broken": 20, "both_wrong": 20, "fixed": 10}  # questions shown in full, of each outcome


def show_worst(run: Run, shown: int = 10) -> list[Html]:
    """Subjects of the lowest accuracy, and those that got worse."""
    if not run.shown or not run.scores[run.shown[-1]].get("per_subject"):
        return []
    name = run.shown[-1]
    lowest = sorted(
        run.scores[name]["per_subject"].items(), key=lambda item: (item[1]["accuracy"], item[0])
    )[:shown]
    rows = [
        [subject, f"{s['n']:,}", percent(s["accuracy"]), interval(s["accuracy_ci95"])]
        for subject, s in lowest
    ]
    parts = [
        caption(f"Lowest accuracy of {name}"),
        table(f"Lowest accuracy of {name}", ["subject", "n", "accuracy", "95 % interval"], rows),
    ]
    changes = (run.comparison or {}).get("per_subject")
    if changes is None:
        return parts
    worse = sorted(
        ((s, c) for s, c in changes.items() if c["difference"] < 0),
        key=lambda item: item[1]["difference"],
    )
    if not worse:
        return [
            *parts,
            tag("p", "In no subject did tuned answer fewer questions right than the base."),
        ]
    rows = [
        [
            s,
            f"{c['n']:,}",
            percent(c["accuracy_a"]),
            percent(c["accuracy_b"]),
            points(c["difference"]),
            interval_points(c["difference_ci95"]),
            p_text(c["holm_p"]).removeprefix("= "),
            "yes" if c["holm_p"] < LEVEL else "no",
        ]
        for s, c in worse
    ]
    head = ["subject", "n", "base", "tuned", "points", "95 % interval", "p (Holm)", "shown?"]
    note = (
        f"p is corrected for the number of subjects, {len(changes)}; “shown” means below {LEVEL}."
        " The others may be chance."
    )
    return [
        *parts,
        caption("Subjects that got worse"),
        table("Subjects that got worse", head, rows),
        tag("p", note),
    ]


OUTCOMES = {
    "fixed": ("fixed", "the base was wrong, tuned is right"),
    "broken": ("broken", "the base was right, tuned is wrong"),
    "both_wrong": ("both wrong", "neither is right"),
    "both_right": ("both right", "both are right"),
}


def show_outcomes(run: Run) -> list[Html]:
    outcomes = (run.comparison or {}).get("outcomes")
    if outcomes is None:
        return []
    everything = outcomes["all"]
    rows = [
        [
            "all questions",
            f"{everything['n']:,}",
            *(share(outcomes[key]["n"], everything["n"]) for key in OUTCOMES),
        ]
    ]
    for group in ("by_negation", "by_numbers", "by_length", "by_choice_type"):
        for name, n in sorted(
            everything[group].items(),
            key=lambda item: (item[0].startswith("over"), len(item[0]), item[0]),
        ):
            if n < everything["n"]:
                rows.append(
                    [
                        LABELS.get(name, name),
                        f"{n:,}",
                        *(share(outcomes[key][group].get(name, 0), n) for key in OUTCOMES),
                    ]
                )
    terms = [(label, meaning) for label, meaning in OUTCOMES.values()]
    return [
        table(
            "Outcomes by kind of question",
            ["", "n", *(label for label, _ in OUTCOMES.values())],
            rows,
        ),
        definitions(terms),
    ]


LABELS = {"negated": "with a negation (not, except, …)", "plain": "without a negation"}


def show_samples(run: Run, level: int) -> list[Html]:
    """Whole questions, a fixed choice of each outcome; of a single file, wrong answers."""
    here = [name for name in run.shown if name in run.rows]
    if not here:
        return []
    outcomes = (run.comparison or {}).get("outcomes")
    if outcomes and len(here) == 2:
        chosen = [
            (*OUTCOMES[key], outcomes[key]["ids"][:limit], outcomes[key]["n"])
            for key, limit in SAMPLES.items()
        ]
    else:
        here = here[-1:]
        rows = run.rows[here[0]]
        wrong = np.flatnonzero(~rows.right)
        chosen = [
            (
                "wrong",
                f"answers of {here[0]}",
                [rows.ids[i] for i in wrong[: SAMPLES["broken"]]],
                len(wrong),
            )
        ]
    shown = []
    for label, meaning, ids, total in chosen:
        shown.append(tag(f"h{level}", f"{label.capitalize()}: {len(ids):,} of {total:,} shown"))
        shown.append(tag("p", f"{meaning.capitalize()}." if ids else "There are none."))
        found = {name: find_rows(run.rows[name], ids) for name in here}
        shown += [show_sample([(name, *found[name][id]) for name in here]) for id in ids]
    return shown


def find_rows(
    rows: Predictions, ids: Sequence[str]
) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    """Whole rows and their options' probabilities, by id."""
    if not ids:
        return {}
    wanted = set(ids)
    found = read_rows(rows.path, [rows.offsets[i] for i, id in enumerate(rows.ids) if id in wanted])
    chances = option_probabilities(collect_rows(found))
    return {row["id"]: (row, chance) for row, chance in zip(found, chances, strict=True)}


def show_sample(answers: list[tuple[str, dict[str, Any], np.ndarray]]) -> Html:
    """One question with what each model answered; answers: (model, row, probabilities of the
    options).
    """
    first = answers[0][1]
    question = str(first.get("question") or "the file holds no question text")
    lines = []
    options = first.get("options") or [""] * len(first.get("option_logprobs") or {})
    for letter, option in zip(LETTERS, options, strict=False):
        cells = [
            letter,
            join(
                cut(option),
                *([" ", tag("b", "✓ right", class_="right")] if letter == first["gold"] else []),
            ),
        ]
        for _, row, chances in answers:
            at = LETTERS.index(letter)
            known = at < len(chances) and not np.isnan(chances[at])
            chose = (
                [tag("b", "◆ "), tag("span", "chosen ", class_="hidden")]
                if row["prediction"] == letter
                else []
            )
            cells.append(join(*chose, percent(chances[at]) if known else "" if chose else "–"))
        lines.append(cells)
    texts = [
        tag("p", f"{name} wrote: ", tag("q", cut(row["text"])))
        for name, row, _ in answers
        if row.get("text")
    ]
    unread = [
        tag("p", f"{name} named no option.")
        for name, row, _ in answers
        if row["prediction"] is None
    ]
    facts = " · ".join(str(first[key]) for key in ("subject", "topic", "id") if first.get(key))
    head = ["", "option", *(name for name, _, _ in answers)]
    short = question if len(question) <= 110 else question[:110].rsplit(" ", 1)[0] + " …"
    legend = tag("p", f"{facts}. ◆ chosen, with the probability among the options.", class_="small")
    shown = (
        [table(f"Options of {first['id']}", head, lines, texts=2)]
        if lines
        else [tag("p", "right: ", cut(first["gold"]))]
    )
    whole = [tag("p", cut(question))] if short != question else []
    return fold(short, *whole, *shown, *texts, *unread, legend)
