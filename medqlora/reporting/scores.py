"""The parts of a page that show scores: verdict, groups, confidence, positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from medqlora.core.run_folder import LOG
from medqlora.evaluation.comparison import find_doubt
from medqlora.evaluation.metrics import NEAR_TIE
from medqlora.evaluation.predictions import Predictions
from medqlora.evaluation.statistics import wilson_interval
from medqlora.reporting.charts import BarChart, Line, bar_chart, line_chart
from medqlora.reporting.numbers import (
    interval,
    number,
    p_text,
    percent,
    percent_short,
    points,
)
from medqlora.reporting.rendering import Table
from medqlora.reporting.runs import Run
from medqlora.reporting.subjects import fold_small, merge_accuracies

LEVEL = 0.05  # A two-sided test below this level counts as shown.


@dataclass(frozen=True)
class Verdict:
    """What a run showed; kind is better, worse, even or open."""

    kind: str
    label: str
    sentence: str


def judge(run: Run) -> Verdict:
    """Say in one sentence whether the tuned model is better than the base.

    A difference counts as shown only where both its 95 % interval leaves out 0 and the exact test
    is below 0.05. It is one of knowledge only where both models answer in the form that is scored.
    """
    comparison = run.comparison
    if comparison is None and run.open_comparison is not None:
        return judge_open(run.open_comparison)
    if comparison is None:
        return Verdict("open", "Nothing compared", describe_single(run))
    low, high = comparison["difference_ci95"]
    figures = (
        f"{percent(comparison['accuracy_b'])} of {comparison['n']:,} questions right, the base"
        f" {percent(comparison['accuracy_a'])}: {points(comparison['difference'])} points (95 %"
        f" interval {points(low)} to {points(high)}, exact McNemar p"
        f" {p_text(comparison['mcnemar_p'])})."
    )
    # The interval comes from scores and the test is exact, so near the level they may disagree.
    if not is_shown(low, high, comparison["mcnemar_p"]):
        sentence = f"No difference was shown: tuned answers {figures}"
        return Verdict("even", "No difference shown", sentence)
    doubt = None
    if {"base", "tuned"} <= set(run.scores):
        doubt = find_doubt(run.scores["base"], run.scores["tuned"])
    if doubt is not None:
        sentence = (
            f"Not a comparison of knowledge: tuned answers {figures} But {doubt}. Ask both in a"
            " form that both know, as with --scoring generate or --num_fewshot."
        )
        return Verdict("open", "Not comparable", sentence)
    if comparison["difference"] < 0:
        return Verdict("worse", "Worse", f"Tuned got worse: it answers {figures}")
    return Verdict("better", "Better", f"Tuned answers {figures}")


def is_shown(low: float, high: float, p: float) -> bool:
    """Whether an interval of a difference leaves out 0 and its test is below the level too."""
    return (low > 0 or high < 0) and p < LEVEL


def judge_open(comparison: dict[str, Any]) -> Verdict:
    """Say in one sentence whether the tuned model's open answers are nearer to the right ones.

    F1 decides. It measures words in common, so it says nothing about whether an answer is true.
    """
    f1 = comparison["f1"]
    low, high = f1["difference_ci95"]
    figures = (
        f"F1 {percent(f1['b'])} on {f1['n']:,} open questions, the base {percent(f1['a'])}:"
        f" {points(f1['difference'])} points (95 % interval {points(low)} to {points(high)}, paired"
        f" permutation p {p_text(f1['p'])}). F1 counts words in common with the right answer, not"
        " whether an answer is true."
    )
    if not is_shown(low, high, f1["p"]):
        return Verdict(
            "even", "No difference shown", f"No difference was shown: tuned has {figures}"
        )
    if f1["difference"] < 0:
        return Verdict("worse", "Worse", f"Tuned got worse: it has {figures}")
    return Verdict("better", "Better", f"Tuned has {figures}")


def describe_single(run: Run) -> str:
    """Say what is known where base and tuned are not compared."""
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
            "Base and tuned are not both there to be compared; the scores stand below."
        )
    else:
        sentences.append(
            "There are no predictions, so nothing is known about right and wrong answers; only the"
            " training is shown."
        )
    return " ".join(sentences)


# Every file that eval/report.py looks for (PARTS) must have an entry here.
LOST = {
    "predictions/base.jsonl": "the base is not scored here",
    "predictions/tuned.jsonl": "the tuned model is not scored here",
    "train_log.jsonl": "no curves of loss, memory and speed",
    "metrics.json": "no memory before and after training",
    "environment.json": "no versions, hardware, commit, seed or hashes",
    "config.yaml": "no configuration",
}


@dataclass(frozen=True)
class Note:
    """A remark about one file of the run folder; the text follows the file's name."""

    file: str
    text: str


def describe_missing(run: Run) -> list[Note]:
    """Say what the folder lacks, and where its files contradict each other."""
    notes = []
    for name in run.missing:
        stem = name.removeprefix("predictions/").removesuffix(".jsonl")
        lost = LOST[name]
        if stem in run.scores:
            lost = "its scores are those kept in metrics.json, without sample questions"
        notes.append(Note(name, f" is missing: {lost}."))
    if run.lost_lines:
        text = f" has {run.lost_lines:,} line(s) that are no rows, as a kill leaves one; left out."
        notes.append(Note(LOG, text))
    kept = run.metrics.get("accuracy")
    scored = run.scores.get("tuned", {}).get("accuracy")
    # Both numbers are ratios of the same counts, so the tolerance is for rounding only.
    if isinstance(kept, float) and scored is not None and abs(kept - scored) > 1e-9:
        text = (
            f" says {percent(kept)} for the tuned model, its predictions give {percent(scored)};"
            " this page shows the predictions."
        )
        notes.append(Note("metrics.json", text))
    return notes


MEASURES: list[tuple[str, Callable[[dict], Any], str]] = [
    ("questions", lambda s: f"{s['n']:,}", ""),
    (
        "accuracy",
        lambda s: percent(s["accuracy"]),
        "share of right answers; an answer that cannot be read is wrong",
    ),
    ("95 % interval", lambda s: interval(s["accuracy_ci95"]), "Wilson score interval"),
    ("unreadable answers", lambda s: f"{s['unparsed']:,}", "answers that name no option"),
    (
        "unfinished thoughts",
        # A metrics.json of an earlier version has no such count.
        lambda s: f"{s['unfinished']:,}" if "unfinished" in s else number(None),
        "unreadable because they broke off while thinking",
    ),
    (
        "questions left out",
        lambda s: f"{s['too_long']:,}" if "too_long" in s else number(None),
        "longer than the model can read, and not scored",
    ),
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


def show_scores(run: Run) -> dict[str, Any] | None:
    """Return the table of scores and what its measures mean."""
    if not run.shown:
        return None
    scores = [run.scores[name] for name in run.shown]
    rows = [[label, *map(measure, scores)] for label, measure, _ in MEASURES]
    # Guessing is computed from the rows and not from the scores, so it cannot stand in MEASURES.
    # Its place is after the accuracy and its interval.
    rows.insert(3, ["by guessing", *(percent(guessing(run.rows.get(name))) for name in run.shown)])
    meanings = [(label, meaning) for label, _, meaning in MEASURES if meaning]
    # The number of questions has no meaning here, so the place is one less.
    meanings.insert(2, ("by guessing", "accuracy of answers drawn by lot"))
    return {"table": Table("Scores", ["", *run.shown], rows), "meanings": meanings}


def guessing(rows: Predictions | None) -> float | None:
    """Return the accuracy of a random choice among each question's options."""
    if rows is None or not rows.logprobs.shape[1]:
        return None
    options = (~np.isnan(rows.logprobs)).sum(1)  # int64 [rows], the options that are known
    return float((1 / options).mean()) if options.all() else None


def show_groups(run: Run) -> list[BarChart]:
    """Return bars of each subject, and of each dataset and choice type where there are several."""
    shown = []
    for key, title in (
        ("per_subject", "Subject"),
        ("per_dataset", "Dataset"),
        ("per_choice_type", "Kind of question"),
    ):
        groups = {name: run.scores[name][key] for name in run.shown if run.scores[name].get(key)}
        if groups and (key == "per_subject" or max(map(len, groups.values())) > 1):
            drawn = groups
            if key == "per_subject":
                folded = fold_small(list(groups.values()), merge_accuracies)
                drawn = dict(zip(groups, folded, strict=True))
            # A row that stands for several subjects comes after the single ones.
            merged = set().union(*drawn.values()) - set().union(*groups.values())
            chance = guessing(run.rows.get(run.shown[-1]))
            shown.append(bar_chart(title, drawn, chance, merged))
    return shown


def show_confidence(run: Run) -> dict[str, Any] | None:
    """Return the curves of calibration and of selective answering, with the numbers behind them."""
    known = [
        name
        for name in run.shown
        if run.scores[name].get("reliability") and run.scores[name].get("selective")
    ]
    if not known:
        return None
    calibration = []
    selective = []
    rows = []
    for name in known:
        bins = run.scores[name]["reliability"]
        points = [(b["confidence"], b["accuracy"]) for b in bins]
        # A bin holds its accuracy and n; their product is the number of right answers.
        spread = [
            (b["confidence"], *wilson_interval(round(b["accuracy"] * b["n"]), b["n"])) for b in bins
        ]
        calibration.append(Line(name, points, spread, marks=True))
        selective.append(Line(name, place_coverage(run.scores[name]["selective"]), marks=True))
        for b in bins:
            bounds = name_bin(b["from"], b["to"])
            numbers = [f"{b['n']:,}", percent(b["confidence"]), percent(b["accuracy"])]
            rows.append([bounds, name, *numbers])
    unit = {"x_range": (0, 1), "y_range": (0, 1), "form": percent_short}
    charts = [
        line_chart(
            "Accuracy at each confidence",
            calibration,
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
            selective,
            "share of questions answered",
            **unit,
            note="A useful confidence makes the curve rise to the left.",
        ),
    ]
    head = ["confidence", "model", "n", "mean confidence", "accuracy"]
    return {"charts": charts, "numbers": Table("Calibration", head, rows, texts=2)}


def name_bin(low: float, high: float) -> str:
    """Return the bounds of a bin of confidence; only the last bin holds its upper one."""
    # No line breaks at these spaces.
    text = f"{100 * low:.4g} to {'' if high >= 1 else 'under '}{100 * high:.4g} %"
    return text.replace(" ", "\u00a0")


def place_coverage(selective: dict[str, Any]) -> list[tuple[float, float]]:
    """Return (share of answers that are kept, accuracy).

    Of few answers a tenth is one, which is more than a tenth of them.
    """
    n = selective.get("n")
    points = []
    for name, accuracy in selective["accuracy_at_coverage"].items():
        share = float(name.rstrip("%")) / 100  # The keys are shares in percent, such as "25%".
        points.append((max(1, math.ceil(share * n)) / n if n else share, accuracy))
    # Several shares of few answers are the same answers.
    return list(dict.fromkeys(points))


def show_positions(run: Run) -> dict[str, Any] | None:
    """Return how often each letter is right and answered, and how often the order of the options
    changes the answer.
    """
    biases = {
        name: run.scores[name]["position_bias"]
        for name in run.shown
        if (run.scores[name].get("position_bias") or {}).get("letters")
    }
    if not biases:
        return None
    head = ["letter", "is right"]
    for name in biases:
        head += [f"{name} answers", f"{name} probability"]
    empty = {"gold": 0.0, "predicted": 0.0, "mean_probability": None}
    rows = []
    for letter in sorted({letter for bias in biases.values() for letter in bias["letters"]}):
        counts = [bias["letters"].get(letter, empty) for bias in biases.values()]
        # How often a letter is right depends on the questions, so the first model's count is shown.
        row = [letter, percent(counts[0]["gold"])]
        for count in counts:
            row += [percent(count["predicted"]), percent(count["mean_probability"])]
        rows.append(row)
    flips = [show_flips(name, bias) for name, bias in biases.items() if bias.get("per_position")]
    return {"letters": Table("Letters", head, rows), "flips": flips}


def show_flips(name: str, bias: dict[str, Any]) -> dict[str, Any]:
    """Return how one model's answers depend on the order of the options."""
    sentence = (
        f"{name.capitalize()}: {percent(bias.get('flip_rate'))} of the answers change with the"
        " order of the options."
    )
    rows = [
        [place, f"{score['n']:,}", percent(score["accuracy"]), interval(score["accuracy_ci95"])]
        for place, score in bias["per_position"].items()
    ]
    head = [f"{name}: right option at", "n", "accuracy", "95 % interval"]
    return {"sentence": sentence, "table": Table(f"Accuracy of {name} by position", head, rows)}
