"""Scores and logs of runs -> one HTML page that stands alone: no script, no font, no image, nothing
from a network.

Numbers come from metrics.py, charts from page.py; this module chooses what is said about a run.
Needs no torch.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from medqlora import __version__
from medqlora.evaluation.comparison import compare_predictions
from medqlora.evaluation.predictions import PredictionError
from medqlora.reporting.examples import show_outcomes, show_samples, show_worst
from medqlora.reporting.markup import (
    PAGE,
    STYLE,
    Html,
    definitions,
    fold,
    join,
    section,
    table,
    tag,
)
from medqlora.reporting.numbers import interval, interval_points, number, p_text, percent, points
from medqlora.reporting.runs import Run, flatten, shorten
from medqlora.reporting.scores import (
    describe_missing,
    judge,
    show_confidence,
    show_groups,
    show_positions,
    show_scores,
)
from medqlora.reporting.training import best_loss, show_training, speed


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
