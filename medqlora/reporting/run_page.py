"""Scores and logs of runs become one HTML page that stands alone.

The page has no script, font or image and asks nothing of a network. evaluation/metrics.py computes
the numbers, charts.py the charts; this module chooses what is said about a run. It needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medqlora import __version__
from medqlora.evaluation.comparison import compare_predictions
from medqlora.evaluation.predictions import PredictionError
from medqlora.reporting.examples import show_open_samples, show_outcomes, show_samples, show_worst
from medqlora.reporting.mistakes import show_mistakes
from medqlora.reporting.numbers import (
    interval,
    interval_points,
    number,
    p_text,
    p_value,
    percent,
    points,
)
from medqlora.reporting.open_tables import list_parts
from medqlora.reporting.rendering import Table, render
from medqlora.reporting.runs import Run, flatten, shorten
from medqlora.reporting.scores import (
    Note,
    Verdict,
    describe_missing,
    judge,
    show_confidence,
    show_groups,
    show_positions,
    show_scores,
)
from medqlora.reporting.training import best_loss, show_training, speed


@dataclass(frozen=True)
class PageSection:
    """A section; the macro named by `key` in templates/sections.html shows its content."""

    key: str
    id: str
    title: str
    content: Any


@dataclass(frozen=True)
class RunPage:
    """What the page says about one run."""

    id: str
    title: str
    verdict: Verdict
    notes: list[Note]
    sections: list[PageSection]


def render_report(runs: Sequence[Run]) -> str:
    """Return the page of one run, or of several with a table of them before.

    The same runs give the same bytes.
    """
    # Nothing about the time or the machine of rendering may stand on the page, or its bytes would
    # change.
    several = len(runs) > 1
    pages = []
    for position, run in enumerate(runs, 1):
        pages.append(describe_run(run, f"run-{position}", several))
    return render(
        "page.html",
        title=f"{len(runs)} runs compared" if several else runs[0].name,
        overview=overview(runs) if several else None,
        pages=pages,
        version=__version__,
    )


def describe_run(run: Run, id: str, several: bool) -> RunPage:
    """Return verdict and sections of a run; a section that has nothing to show is left out."""
    contents = [
        ("scores", "Base against tuned" if len(run.shown) == 2 else "Scores", show_scores(run)),
        ("subjects", "Accuracy by subject", show_groups(run)),
        ("confidence", "Calibration and confidence", show_confidence(run)),
        ("positions", "Position bias", show_positions(run)),
        ("training", "Training", show_training(run)),
        ("worst", "Weakest subjects", show_worst(run)),
        ("outcomes", "What changed", show_outcomes(run)),
        ("mistakes", "Kinds of mistakes", show_mistakes(run)),
        ("samples", "Sample questions", show_samples(run) + show_open_samples(run)),
        ("files", "All prediction files", show_files(run) + show_open_changes(run)),
        ("environment", "How it was made", show_environment(run)),
    ]
    prefix = f"{id}-" if several else ""  # Ids must be unique on a page of several runs.
    sections = [
        PageSection(key, prefix + key, title, content)
        for key, title, content in contents
        if content
    ]
    return RunPage(id, run.name, judge(run), describe_missing(run), sections)


def show_files(run: Run) -> list[Table]:
    """Return a table for each kind of predictions file: choices, open answers, texts.

    Choices have one where there are more files than base and tuned.
    """
    choices = []
    answers = []
    texts = []
    for name, scores in run.scores.items():
        # The keys of the scores tell the kind of the file.
        if "accuracy" in scores:
            accuracy = [percent(scores["accuracy"]), interval(scores["accuracy_ci95"])]
            choices.append([name, f"{scores['n']:,}", *accuracy, number(scores.get("ece"))])
        if "exact_match" in scores:
            values = [
                show_mean(scores, "exact_match"),
                show_mean(scores, "f1"),
                show_mean(scores, "rouge_l"),
            ]
            answers.append([name, f"{scores['n']:,}", *values, f"{scores['unparsed']:,}"])
        if "perplexity" in scores:
            keys = ("perplexity", "word_perplexity", "bits_per_byte")
            values = [number(scores[key]) for key in keys]
            texts.append([name, f"{scores['n']:,}", f"{scores['tokens']:,}", *values])
    tables = []
    if len(choices) > len(run.shown):
        head = ["multiple choice", "n", "accuracy", "95 % interval", "calibration error"]
        tables.append(Table("Multiple-choice files", head, choices))
    if answers:
        head = ["open answers", "n", "exact match (95 % interval)", "F1 of words"]
        head.append("ROUGE-L (Latin letters only)")
        tables.append(Table("Open answers", [*head, "empty"], answers))
    if texts:
        head = ["texts", "n", "tokens", "perplexity per token", "per word", "bits per byte"]
        tables.append(Table("Texts", head, texts))
    return tables


def show_open_changes(run: Run) -> list[Table]:
    """Return a table of the differences between base and tuned on open questions."""
    if run.open_comparison is None:
        return []
    rows = []
    for name, part in list_parts(run.open_comparison):
        if part is not None:
            rows.append(
                [
                    name,
                    f"{part['n']:,}",
                    f"{percent(part['a'])} ({interval(part['a_ci95'])})",
                    f"{percent(part['b'])} ({interval(part['b_ci95'])})",
                    f"{points(part['difference'])} ({interval_points(part['difference_ci95'])})",
                    # Subjects are corrected for their number.
                    p_value(part.get("holm_p", part["p"])),
                ]
            )
    head = ["score", "n", "base (95 % interval)", "tuned (95 % interval)"]
    head += ["points (95 % interval)", "p (subjects: Holm)"]
    return [Table("Base against tuned on open questions", head, rows)]


def show_mean(scores: dict[str, Any], key: str) -> str:
    """Return a mean of open answers with its interval, and of how many where not of all."""
    if scores[key] is None:
        return "– (no right answer is in Latin letters)"
    text = f"{percent(scores[key])} ({interval(scores[key + '_ci95'])})"
    if key == "rouge_l" and scores["rouge_l_n"] < scores["n"]:
        text += f" of {scores['rouge_l_n']:,}"
    return text


def show_environment(run: Run) -> dict[str, Any] | None:
    """Return what the run was made with: the main values, the whole list and the configuration."""
    environment = run.environment
    # Any of these keys may be missing in the file of an older version.
    base = environment.get("base") or {}
    main = [
        ("base model", base.get("base")),
        ("quantization", base.get("quantization")),
        ("dtype", base.get("dtype")),
        ("prompt style", base.get("prompt_style")),
        ("completion", base.get("completion")),
        ("seed", environment.get("seed")),
        ("commit", shorten(environment.get("git_commit"))),
        ("hardware", describe_hardware(environment.get("hardware") or {})),
    ]
    # More than one fingerprint shows that the models were asked differently.
    prompts = {digest[:12] for digest in list_values(run, "prompt_sha256")}
    main.append(("prompt fingerprint of the predictions", ", ".join(sorted(prompts))))
    main.append(("answered by engine", ", ".join(sorted(list_values(run, "engine")))))
    known = [(name, value) for name, value in main if value not in (None, "")]
    if not known and not environment and not run.config:
        return None
    everything = None
    if environment:
        everything = Table("Environment", ["fact", "value"], flatten(environment), texts=2)
    return {"main": known, "all": everything, "config": run.config}


def describe_hardware(hardware: dict[str, Any]) -> str | None:
    """Return GPUs and processor in a few words."""
    if not hardware:
        return None
    gpus = ", ".join(str(gpu.get("name")) for gpu in hardware.get("gpus") or [])
    return f"{gpus or 'no GPU'}; {hardware.get('cpu')}, {hardware.get('cores')} cores"


def list_values(run: Run, column: str) -> set[str]:
    """Return what stands in a column of the shown prediction files."""
    return {
        value for name in run.shown if name in run.rows for value in run.rows[name].column(column)
    }


def overview(runs: Sequence[Run]) -> dict[str, Any]:
    """Return a table with a row per run, and why some runs could not be compared.

    Each run's tuned answers are also compared with those of the first run, question by question.
    """
    rows = []
    reasons = []
    for position, run in enumerate(runs):
        against = "–"
        if position > 0:
            against, reason = compare_with_first(runs[0], run)
            if reason:
                reasons.append(f"{run.name} is not compared with {runs[0].name} ({reason}).")
        rows.append(describe_row(run, against))
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
    # These are the ids that render_report gives the runs.
    links = [f"#run-{position}" for position in range(1, len(runs) + 1)]
    return {"table": Table("All runs", head, rows, texts=2, links=links), "reasons": reasons}


def describe_row(run: Run, against: str) -> list[str]:
    """Return a run's cells in the table of all runs."""
    # `shown` holds names of multiple-choice files only, which all have an accuracy.
    accuracy = {name: percent(run.scores[name]["accuracy"]) for name in run.shown}
    tuned = "–"
    if "tuned" in run.shown:
        tuned = interval(run.scores["tuned"]["accuracy_ci95"])
    change = "–"
    n = f"{run.scores[run.shown[-1]]['n']:,}" if run.shown else "–"
    if run.comparison:
        change = show_change(run.comparison)
    elif run.open_comparison:
        f1 = run.open_comparison["f1"]
        accuracy = {"base": f"F1 {percent(f1['a'])}", "tuned": f"F1 {percent(f1['b'])}"}
        n, tuned, change = f"{f1['n']:,}", interval(f1["b_ci95"]), show_change(f1)
    # metrics.json is written last, so a run that did not finish has none.
    peak = (run.metrics.get("memory_bytes") or {}).get("peak")
    return [
        run.name,
        judge(run).label,
        n,
        accuracy.get("base", "–"),
        accuracy.get("tuned", "–"),
        tuned,
        change,
        against,
        best_loss(run) or "–",
        "–" if peak is None else f"{peak / 2**20:,.0f} MiB",
        speed(run) or "–",
    ]


def compare_with_first(first: Run, other: Run) -> tuple[str, str | None]:
    """Return the difference of the two tuned models as text, and why there is none."""
    if "tuned" not in first.rows or "tuned" not in other.rows:
        return "–", "one of them has no predictions/tuned.jsonl"
    try:
        # Runs on other questions or prompts are not comparable; the page then says why.
        comparison = compare_predictions(first.rows["tuned"], other.rows["tuned"])
    except PredictionError as error:
        return "–", f"eval/compare.py: {error}"
    if "f1" in comparison:
        f1 = comparison["f1"]
        return f"F1 {show_change(f1)}, p {p_text(f1['p'])}", None
    return f"{show_change(comparison)}, p {p_text(comparison['mcnemar_p'])}", None


def show_change(compared: dict[str, Any]) -> str:
    """Return a difference with its interval, in points."""
    return f"{points(compared['difference'])} ({interval_points(compared['difference_ci95'])})"
