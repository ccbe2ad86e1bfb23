"""The parts of a page that show scores: verdict, groups, confidence, positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from medqlora.evaluation.metrics import NEAR_TIE
from medqlora.evaluation.predictions import Predictions
from medqlora.evaluation.statistics import wilson_interval
from medqlora.reporting.charts import Line, bar_chart, line_chart
from medqlora.reporting.markup import Html, definitions, fold, table, tag
from medqlora.reporting.numbers import (
    interval,
    number,
    p_text,
    percent,
    percent_short,
    points,
)
from medqlora.reporting.runs import Run

LEVEL = 0.05  # of the two-sided test


def judge(run: Run) -> tuple[str, str, str]:
    """(kind, label, sentence): kind is better, worse, even or open.

    A difference counts as shown where its 95 % interval leaves out 0 and the exact test is below
    0.05, both.
    """
    found = run.comparison
    if found is None:
        return "open", "Nothing compared", describe_single(run)
    low, high = found["difference_ci95"]
    facts = (
        f"{percent(found['accuracy_b'])} of {found['n']:,} questions right, the base"
        f" {percent(found['accuracy_a'])}: {points(found['difference'])} points (95 % interval"
        f" {points(low)} to {points(high)}, exact McNemar p {p_text(found['mcnemar_p'])})."
    )
    if not (low > 0 or high < 0) or found["mcnemar_p"] >= LEVEL:
        return "even", "No difference shown", f"No difference was shown: tuned answers {facts}"
    if found["difference"] < 0:
        return "worse", "Worse", f"Tuned got worse: it answers {facts}"
    return "better", "Better", f"Tuned answers {facts}"


def describe_single(run: Run) -> str:
    sentences = []
    for name in run.shown:
        low, high = run.scores[name]["accuracy_ci95"]
        interval = f"(95 % interval {percent(low)} to {percent(high)})"
        sentences.append(
            f"{name.capitalize()} answers {percent(run.scores[name]['accuracy'])} of"
            f" {run.scores[name]['n']:,} questions right {interval}."
        )
    if run.obstacle:
        sentences.append(f"Base and tuned are not compared (eval/compare.py: {run.obstacle}).")
    elif run.shown:
        sentences.append(
            "With nothing to hold it against, this does not say what training changed."
        )
    elif run.scores:
        sentences.append(
            "There is no paired test for these kinds of answers; the scores stand below."
        )
    else:
        sentences.append(
            "There are no predictions, so nothing is known about right and wrong answers; only the"
            " training is shown."
        )
    return " ".join(sentences)


LOST = {
    "predictions/base.jsonl": "the base is not scored here",
    "predictions/tuned.jsonl": "the tuned model is not scored here",
    "train_log.jsonl": "no curves of loss, memory and speed",
    "metrics.json": "no memory before and after training",
    "environment.json": "no versions, hardware, commit, seed or hashes",
    "config.yaml": "no configuration",
}


def describe_missing(run: Run) -> list[Html]:
    """What the folder lacks, and where its files contradict each other."""
    notes = []
    for name in run.missing:
        stem = name.removeprefix("predictions/").removesuffix(".jsonl")
        lost = (
            "its scores are those kept in metrics.json, without sample questions"
            if stem in run.scores
            else LOST[name]
        )
        notes.append(tag("li", tag("code", name), f" is missing: {lost}."))
    kept = run.metrics.get("accuracy")
    found = run.scores.get("tuned", {}).get("accuracy")
    if isinstance(kept, float) and found is not None and abs(kept - found) > 1e-9:
        facts = (
            f" says {percent(kept)} for the tuned model, its predictions give {percent(found)};"
            " this page shows the predictions."
        )
        notes.append(tag("li", tag("code", "metrics.json"), facts))
    return [tag("ul", *notes, class_="note")] if notes else []


MEASURES: list[tuple[str, Callable[[dict], Any], str]] = [
    ("questions", lambda s: f"{s['n']:,}", ""),
    (
        "accuracy",
        lambda s: percent(s["accuracy"]),
        "share of right answers; an answer that cannot be read is wrong",
    ),
    ("95 % interval", lambda s: interval(s["accuracy_ci95"]), "Wilson score interval"),
    ("unreadable answers", lambda s: f"{s['unparsed']:,}", "answers that name no option"),
    ("shortened prompts", lambda s: f"{s['truncated']:,}", "cut to fit the model"),
    (
        "letter mass",
        lambda s: number(s.get("letter_mass")),
        "probability that goes to the letters at all; near 1 where the model knows the form",
    ),
    (
        "calibration error",
        lambda s: number(s.get("ece")),
        "mean gap between stated confidence and accuracy (ECE); lower is better",
    ),
    (
        "Brier score",
        lambda s: number(s.get("brier")),
        "squared error of the probabilities, 0 to 2; lower is better",
    ),
    (
        "risk over coverage",
        lambda s: number((s.get("selective") or {}).get("area_under_risk_coverage")),
        "mean error over all coverages; lower is better",
    ),
    (
        "near ties",
        lambda s: "–" if s.get("near_ties") is None else f"{s['near_ties']:,}",
        f"two best options within {NEAR_TIE} nats: rounding may turn them over",
    ),
]


def show_scores(run: Run) -> list[Html]:
    if not run.shown:
        return []
    scores = [run.scores[name] for name in run.shown]
    rows = [[label, *map(measure, scores)] for label, measure, _ in MEASURES]
    rows.insert(3, ["by guessing", *(percent(guessing(run.rows.get(name))) for name in run.shown)])
    meanings = [(label, meaning) for label, _, meaning in MEASURES if meaning]
    meanings.insert(2, ("by guessing", "accuracy of answers drawn by lot"))
    return [
        table("Scores", ["", *run.shown], rows),
        fold("What these measures are", definitions(meanings)),
    ]


def guessing(rows: Predictions | None) -> float | None:
    """Accuracy of a random choice among each question's options."""
    if rows is None or not rows.logprobs.shape[1]:
        return None
    options = (~np.isnan(rows.logprobs)).sum(1)
    return float((1 / options).mean()) if options.all() else None


def show_groups(run: Run) -> list[Html]:
    """Bars of each subject; of each dataset and choice type too where there are several."""
    shown = []
    for key, title in (
        ("per_subject", "Subject"),
        ("per_dataset", "Dataset"),
        ("per_choice_type", "Kind of question"),
    ):
        groups = {name: run.scores[name][key] for name in run.shown if run.scores[name].get(key)}
        if groups and (key == "per_subject" or max(map(len, groups.values())) > 1):
            shown.append(bar_chart(title, groups, guessing(run.rows.get(run.shown[-1]))))
    return shown


def show_confidence(run: Run) -> list[Html]:
    known = [
        name
        for name in run.shown
        if run.scores[name].get("reliability") and run.scores[name].get("selective")
    ]
    if not known:
        return []
    curves = []
    kept = []
    for name in known:
        bins = run.scores[name]["reliability"]
        spread = [
            (b["confidence"], *wilson_interval(round(b["accuracy"] * b["n"]), b["n"])) for b in bins
        ]
        curves.append(
            Line(name, [(b["confidence"], b["accuracy"]) for b in bins], spread, marks=True)
        )
        shares = run.scores[name]["selective"]["accuracy_at_coverage"]
        kept.append(
            Line(
                name,
                [(float(share.rstrip("%")) / 100, accuracy) for share, accuracy in shares.items()],
                marks=True,
            )
        )
    unit = {"x_range": (0, 1), "y_range": (0, 1), "form": percent_short}
    rows = [
        [
            f"{100 * b['from']:.0f}–{100 * b['to']:.0f}\u00a0%",
            name,
            f"{b['n']:,}",
            percent(b["confidence"]),
            percent(b["accuracy"]),
        ]
        for name in known
        for b in run.scores[name]["reliability"]
    ]
    return [
        tag(
            "div",
            line_chart(
                "Accuracy at each confidence",
                curves,
                "confidence of the answer",
                diagonal=True,
                **unit,
                note=(
                    "On the diagonal, confidence is honest; below it, the model is too sure."
                    " Whiskers: 95 % intervals."
                ),
            ),
            line_chart(
                "Accuracy when only the surest answers are kept",
                kept,
                "share of questions answered",
                **unit,
                note="A useful confidence makes the curve rise to the left.",
            ),
            class_="charts",
        ),
        fold(
            "Numbers of the calibration curve",
            table(
                "Calibration",
                ["confidence", "model", "n", "mean confidence", "accuracy"],
                rows,
                texts=2,
            ),
        ),
    ]


def show_positions(run: Run) -> list[Html]:
    biases = {
        name: run.scores[name]["position_bias"]
        for name in run.shown
        if run.scores[name].get("position_bias", {}).get("letters")
    }
    if not biases:
        return []
    letters = sorted({letter for bias in biases.values() for letter in bias["letters"]})
    empty = {"gold": 0.0, "predicted": 0.0, "mean_probability": None}
    rows = []
    for letter in letters:
        of = [bias["letters"].get(letter, empty) for bias in biases.values()]
        cells = [
            cell
            for facts in of
            for cell in (percent(facts["predicted"]), percent(facts["mean_probability"]))
        ]
        rows.append([letter, percent(of[0]["gold"]), *cells])
    head = [
        "letter",
        "is right",
        *(text for name in biases for text in (f"{name} answers", f"{name} probability")),
    ]
    intro = (
        "A model without bias answers each letter about as often as it is right; probability is the"
        " mean that the letter gets."
    )
    shown = [tag("p", intro), table("Letters", head, rows)]
    for name, bias in biases.items():
        if "flip_rate" in bias:
            shown.append(
                tag(
                    "p",
                    f"{name.capitalize()}: {percent(bias['flip_rate'])} of the answers change with"
                    " the order of the options.",
                )
            )
            rows = [
                [place, f"{s['n']:,}", percent(s["accuracy"]), interval(s["accuracy_ci95"])]
                for place, s in bias["per_position"].items()
            ]
            shown.append(
                table(
                    f"Accuracy of {name} by position",
                    [f"{name}: right option at", "n", "accuracy", "95 % interval"],
                    rows,
                )
            )
    return shown
