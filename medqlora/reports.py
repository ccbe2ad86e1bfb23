"""Scores and logs of runs -> one HTML page that stands alone: no script, no font, no image, nothing
from a network.

Numbers come from metrics.py, charts from page.py; this module chooses what is said about a run.
Needs no torch.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medqlora import __version__
from medqlora.config import UserError
from medqlora.examples import LETTERS
from medqlora.metrics import NEAR_TIE, compare_predictions, option_probabilities, wilson_interval
from medqlora.page import (
    PAGE,
    STYLE,
    Html,
    Line,
    bar_chart,
    caption,
    cut,
    definitions,
    fold,
    interval,
    interval_points,
    join,
    line_chart,
    number,
    p_text,
    percent,
    percent_short,
    points,
    section,
    share,
    table,
    tag,
)
from medqlora.predictions import PredictionError, Predictions, collect_rows, read_rows

SAMPLES = {"broken": 20, "both_wrong": 20, "fixed": 10}  # questions shown in full, of each outcome
POINTS = 200  # of a curve; what lies between two of them is drawn as a band from lowest to highest
LEVEL = 0.05  # of the two-sided test


class ReportError(UserError):
    """A run folder or output that no report can be made of."""


@dataclass
class Run:
    """What is known of one run; everything but the name may be missing.

    rows, scores: by the name of the predictions file without its ending (base, tuned, …), scores as
    of score_predictions; comparison: of base and tuned, as of compare_predictions, or the part that
    metrics.json keeps; obstacle: why there is none; log: lines of train_log.jsonl; metrics,
    environment: of the .json files; config: text of config.yaml; missing: file names.
    """

    name: str
    rows: dict[str, Predictions] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None
    obstacle: str | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    missing: list[str] = field(default_factory=list)

    @property
    def shown(self) -> list[str]:
        """Multiple-choice files that the charts show: base and tuned, else the first one there
        is.
        """
        choices = [name for name, scores in self.scores.items() if "accuracy" in scores]
        return [name for name in ("base", "tuned") if name in choices] or choices[:1]


def render_report(runs: Sequence[Run]) -> str:
    """The page for one run, or for several with a table of them before. The same runs give the same
    bytes.
    """
    several = len(runs) > 1
    title = f"{len(runs)} runs compared" if several else runs[0].name
    body = [tag("header", tag("p", "medqlora report", class_="kicker"), tag("h1", title))]
    if several:
        links = [tag("li", tag("a", run.name, href=f"#run-{i}")) for i, run in enumerate(runs, 1)]
        body.append(tag("nav", tag("ul", *links), aria_label="Runs"))
        body.append(section("overview", "All runs", 2, *overview(runs)))
    for i, run in enumerate(runs, 1):
        parts = render_run(run, f"run-{i}-" if several else "", 3 if several else 2)
        body.append(
            section(f"run-{i}", run.name, 2, *parts, class_="run") if several else join(*parts)
        )
    return PAGE.format(
        title=html.escape(f"{title} – medqlora report"),
        style=STYLE,
        body=join(*body),
        version=__version__,
    )


def render_run(run: Run, prefix: str, level: int) -> list[Html]:
    """Verdict and sections of one run; a section that has nothing to show is left out."""
    parts = [
        ("scores", "Base against tuned" if len(run.shown) == 2 else "Scores", show_scores(run)),
        ("subjects", "Accuracy by subject", show_groups(run)),
        ("confidence", "Calibration and confidence", show_confidence(run)),
        ("positions", "Position bias", show_positions(run)),
        ("training", "Training", show_training(run)),
        ("worst", "Weakest subjects", show_worst(run)),
        ("outcomes", "What changed", show_outcomes(run)),
        ("samples", "Sample questions", show_samples(run, level + 1)),
        ("files", "All prediction files", show_files(run)),
        ("environment", "How it was made", show_environment(run)),
    ]
    parts = [(prefix + key, title, content) for key, title, content in parts if content]
    links = [tag("li", tag("a", title, href=f"#{key}")) for key, title, _ in parts]
    kind, label, sentence = judge(run)
    verdict = tag(
        "div",
        tag("p", tag("strong", label), class_="label"),
        tag("p", sentence),
        class_=f"verdict {kind}",
    )
    nav = tag("nav", tag("ul", *links), aria_label=f"Sections of {run.name}")
    return [
        verdict,
        *describe_missing(run),
        nav,
        *(section(key, title, level, *content) for key, title, content in parts),
    ]


# ---- the verdict ---------------------------------------------------------------------------------


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


# ---- sections of a run ---------------------------------------------------------------------------

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


def show_training(run: Run) -> list[Html]:
    charts = [
        line_chart(
            "Loss per supervised token",
            [
                curve("training", run.log, "loss"),
                curve("evaluation", run.log, "eval_loss", marks=True),
            ],
        ),
        line_chart(
            "Peak memory so far, GiB",
            [curve("", run.log, "peak_memory_bytes", 2**-30)],
            from_zero=True,
        ),
        line_chart("Tokens per second", [curve("", run.log, "tokens_per_second")], from_zero=True),
        line_chart("Learning rate", [curve("", run.log, "lr")], from_zero=True),
        line_chart(
            "Gradient norm before clipping", [curve("", run.log, "grad_norm")], from_zero=True
        ),
    ]
    memory = run.metrics.get("memory_bytes") or {}
    last = max((row["step"] for row in run.log if number_in(row, "step")), default=None)
    facts = [
        (name, f"{step:,}")
        for name, step in (("steps", last), ("adapter of step", run.metrics.get("best_step")))
        if step is not None
    ]
    facts += [("lowest evaluation loss", best_loss(run))]
    facts += [("tokens per second, median", speed(run))]
    facts += [(f"memory {name}", f"{value / 2**20:,.0f} MiB") for name, value in memory.items()]
    facts = [(name, value) for name, value in facts if value is not None]
    charts = [chart for chart in charts if chart]
    if not charts and not memory:
        return []
    return [definitions(facts), *([tag("div", *charts, class_="charts")] if charts else [])]


def curve(
    name: str, log: list[dict[str, Any]], key: str, scale: float = 1.0, marks: bool = False
) -> Line:
    """One column of the log over the steps, thinned to at most POINTS means with the range that
    each of them stands for.
    """
    points = [
        (row["step"], row[key] * scale)
        for row in log
        if number_in(row, "step") and number_in(row, key)
    ]
    if len(points) <= POINTS:
        return Line(name, points, marks=marks)
    size = -(-len(points) // POINTS)
    parts = [np.array(points[start : start + size], float) for start in range(0, len(points), size)]
    means = [(part[:, 0].mean(), part[:, 1].mean()) for part in parts]
    return Line(
        name, means, [(part[:, 0].mean(), part[:, 1].min(), part[:, 1].max()) for part in parts]
    )


def number_in(row: dict[str, Any], key: str) -> bool:
    return isinstance(row.get(key), (int, float)) and math.isfinite(row[key])


def best_loss(run: Run) -> str | None:
    losses = [row["eval_loss"] for row in run.log if number_in(row, "eval_loss")]
    return f"{min(losses):.4f}" if losses else None


def speed(run: Run) -> str | None:
    speeds = [row["tokens_per_second"] for row in run.log if number_in(row, "tokens_per_second")]
    return f"{np.median(speeds):,.0f}" if speeds else None


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


def show_files(run: Run) -> list[Html]:
    """A table for each kind of predictions file: multiple choice (beside base and tuned), open
    answers, texts.
    """
    shown = []
    scores = run.scores
    choices = [name for name in scores if "accuracy" in scores[name]]
    if len(choices) > len(run.shown):
        rows = [
            [
                n,
                f"{scores[n]['n']:,}",
                percent(scores[n]["accuracy"]),
                interval(scores[n]["accuracy_ci95"]),
                number(scores[n].get("ece")),
            ]
            for n in choices
        ]
        shown.append(
            table(
                "Multiple-choice files",
                ["multiple choice", "n", "accuracy", "95 % interval", "calibration error"],
                rows,
            )
        )
    rows = [
        [
            n,
            f"{s['n']:,}",
            *(
                f"{percent(s[key])} ({interval(s[key + '_ci95'])})"
                for key in ("exact_match", "f1", "rouge_l")
            ),
            f"{s['unparsed']:,}",
        ]
        for n, s in scores.items()
        if "exact_match" in s
    ]
    if rows:
        shown.append(
            table(
                "Open answers",
                [
                    "open answers",
                    "n",
                    "exact match (95 % interval)",
                    "F1 of words",
                    "ROUGE-L",
                    "empty",
                ],
                rows,
            )
        )
    rows = [
        [
            n,
            f"{s['n']:,}",
            f"{s['tokens']:,}",
            number(s["perplexity"]),
            number(s["word_perplexity"]),
            number(s["bits_per_byte"]),
        ]
        for n, s in scores.items()
        if "perplexity" in s
    ]
    if rows:
        shown.append(
            table(
                "Texts",
                ["texts", "n", "tokens", "perplexity per token", "per word", "bits per byte"],
                rows,
            )
        )
    return shown


def show_environment(run: Run) -> list[Html]:
    facts = run.environment
    base = facts.get("base") or {}
    hardware = facts.get("hardware") or {}
    gpus = [gpu.get("name") for gpu in hardware.get("gpus") or []]
    machine = (
        f"{', '.join(map(str, gpus)) or 'no GPU'}; {hardware.get('cpu')}, {hardware.get('cores')}"
        " cores"
        if hardware
        else None
    )
    first = [
        ("base model", base.get("base")),
        ("quantization", base.get("quantization")),
        ("dtype", base.get("dtype")),
        ("prompt style", base.get("prompt_style")),
        ("completion", base.get("completion")),
        ("seed", facts.get("seed")),
        ("commit", shorten(facts.get("git_commit"))),
        ("hardware", machine),
    ]
    prompts = sorted(
        {
            digest[:12]
            for name in run.shown
            if name in run.rows
            for digest in run.rows[name].column("prompt_sha256")
        }
    )
    engines = sorted(
        {
            engine
            for name in run.shown
            if name in run.rows
            for engine in run.rows[name].column("engine")
        }
    )
    first += [
        ("prompt fingerprint of the predictions", ", ".join(prompts)),
        ("answered by engine", ", ".join(engines)),
    ]
    known = [(name, value) for name, value in first if value not in (None, "")]
    shown = [definitions(known)] if known else []
    if facts:
        shown.append(
            fold(
                "Versions, hardware and hashes",
                table("Environment", ["fact", "value"], flatten(facts), texts=2),
            )
        )
    if run.config:
        code = tag("pre", run.config, tabindex=0, role="region", aria_label="Configuration")
        shown.append(fold("Configuration (config.yaml)", code))
    return shown


def shorten(commit: str | None) -> str | None:
    return commit and commit[:12] + ("-dirty" if str(commit).endswith("-dirty") else "")


def flatten(tree: Any, name: str = "") -> list[list[str]]:
    """Nested facts -> [dotted name, value] rows."""
    entries = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else None
    )
    if not entries:
        return [[name, "–" if tree in (None, [], {}) else str(tree)]]
    return [
        row
        for key, value in entries
        for row in flatten(value, f"{name}.{key}" if name else str(key))
    ]


# ---- several runs --------------------------------------------------------------------------------


def overview(runs: Sequence[Run]) -> list[Html]:
    """A row per run; each run's tuned answers also against those of the first run, question by
    question.
    """
    rows = []
    reasons = []
    for i, run in enumerate(runs, 1):
        against, reason = compare_with_first(runs[0], run) if i > 1 else ("–", None)
        reasons += (
            [tag("li", f"{run.name} is not compared with {runs[0].name} ({reason}).")]
            if reason
            else []
        )
        cells = [
            percent(run.scores[name]["accuracy"]) if name in run.shown else "–"
            for name in ("base", "tuned")
        ]
        interval_tuned = (
            interval(run.scores["tuned"]["accuracy_ci95"]) if "tuned" in run.shown else "–"
        )
        n = f"{run.scores[run.shown[-1]]['n']:,}" if run.shown else "–"
        change = "–"
        if run.comparison:
            change = (
                f"{points(run.comparison['difference'])}"
                f" ({interval_points(run.comparison['difference_ci95'])})"
            )
        peak = (run.metrics.get("memory_bytes") or {}).get("peak")
        memory = "–" if peak is None else f"{peak / 2**20:,.0f} MiB"
        link = tag("a", run.name, href=f"#run-{i}")
        rows.append(
            [
                link,
                judge(run)[1],
                n,
                *cells,
                interval_tuned,
                change,
                against,
                best_loss(run) or "–",
                memory,
                speed(run) or "–",
            ]
        )
    head = [
        "run",
        "verdict",
        "n",
        "base",
        "tuned",
        "95 % interval",
        "points over base (95 % interval)",
        f"tuned against that of {runs[0].name}",
        "evaluation loss",
        "peak memory",
        "tokens/s",
    ]
    return [
        table("All runs", head, rows, texts=2),
        *([tag("ul", *reasons, class_="note")] if reasons else []),
    ]


def compare_with_first(first: Run, other: Run) -> tuple[str, str | None]:
    """(cell, why there is no number)."""
    if "tuned" not in first.rows or "tuned" not in other.rows:
        return "–", "one of them has no predictions/tuned.jsonl"
    try:
        found = compare_predictions(first.rows["tuned"], other.rows["tuned"])
    except PredictionError as error:
        return "–", f"eval/compare.py: {error}"
    return (
        (
            f"{points(found['difference'])} ({interval_points(found['difference_ci95'])}), p"
            f" {p_text(found['mcnemar_p'])}"
        ),
        None,
    )
