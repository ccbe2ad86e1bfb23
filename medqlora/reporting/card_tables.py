"""The tables of a model card, made of the files of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medqlora.core.config import Config
from medqlora.data.formats.registry import FORMATS
from medqlora.evaluation.metrics import score_predictions
from medqlora.evaluation.predictions import read_predictions
from medqlora.reporting.card_metadata import (
    METRICS,
    describe_license,
    describe_source,
    shorten_path,
)
from medqlora.reporting.kept import Comparison, check_kept
from medqlora.reporting.numbers import interval, interval_points, p_text, percent, points
from medqlora.reporting.runs import Run, flatten
from medqlora.reporting.subjects import fold_small, merge_accuracies

HASHES = ("base_files", "data", "eval", "test", "tokens", "prompt", "tokenizer")
RUN_FILES = ("base", "tuned")  # predictions whose scores stand in metrics.json


def tabulate_results(metrics: dict[str, Any]) -> list[list[str]]:
    """Return a row for each score of metrics.json: base and tuned with their intervals."""
    base = metrics.get("base") or {}
    rows = []
    for key, (bounds, label) in METRICS.items():
        if metrics.get(key) is None:
            continue
        cells = []
        for scores in (base, metrics):
            known = scores.get(key) is not None
            figures = f"{percent(scores[key])} ({interval(scores[bounds])})" if known else "–"
            cells.append(figures)
        rows.append([label, f"{metrics['n']:,}", *cells])
    return rows


def tabulate_subjects(run: Run) -> list[list[str]]:
    """Return a row with base and tuned for each subject; small ones stand together."""
    parts = [run.scores.get(name, {}).get("per_subject") for name in RUN_FILES]
    if not all(parts) or len(parts[1]) < 2 or parts[0].keys() != parts[1].keys():
        return []
    base, tuned = fold_small(parts, merge_accuracies)
    rows = []
    for name, scores in tuned.items():
        cells = [
            f"{percent(some['accuracy'])} ({interval(some['accuracy_ci95'])})"
            for some in (base[name], scores)
        ]
        rows.append([name, f"{scores['n']:,}", *cells])
    return rows


def describe_file(path: Path) -> list[str]:
    """Return name, model, engine, number and scores of a further file of predictions.

    Raises:
        PredictionError: it cannot be scored.
    """
    rows = read_predictions(path)
    scores = score_predictions(rows)
    if "perplexity" in scores:
        figures = f"perplexity {scores['perplexity']:.4g}"
    else:
        figures = ", ".join(
            f"{label} {percent(scores[key])} ({interval(scores[bounds])})"
            for key, (bounds, label) in METRICS.items()
            if scores.get(key) is not None
        )
    # A model and its adapter are joined by a plus; folders of this machine mean nothing elsewhere.
    models = "+".join(str(shorten_path(part)) for part in rows.column("model")[0].split("+"))
    return [path.name, models, rows.column("engine")[0], f"{len(rows):,}", figures]


def list_data(config: Config, environment: dict[str, Any]) -> list[list[str]]:
    """Return role, source, split, rows and licence of each data entry."""
    counted = {part.get("entry"): part for part in environment.get("mixture") or []}
    rows = []
    for role in ("train", "eval", "test"):
        for index, entry in enumerate(getattr(config.data, role)):
            part = counted.get(f"data.{role}[{index}]", {})
            used = "–" if "rows" not in part else f"{part['rows']:,}"
            share = "–" if "row_share" not in part else percent(part["row_share"])
            source = describe_source(entry)
            rows.append([role, source, entry.split or "–", used, share, describe_license(entry)])
    return rows


def list_hashes(config: Config | None, environment: dict[str, Any]) -> list[list[str]]:
    """Return what the hashes of a run are of, and the hashes."""
    rows = []
    for name in HASHES:
        digest = environment.get(f"{name}_sha256")
        # Without data there is a hash of nothing.
        used = name not in ("eval", "test") or (config is not None and getattr(config.data, name))
        if digest and used:
            rows.append([name.replace("_", " "), digest])
    return rows


def list_kinds(config: Config) -> list[str]:
    """Return the kinds of questions that were trained on, choice and open; texts have none."""
    kinds = {"letters": "choice", "generate": "open"}
    scorings = {
        FORMATS[entry.format].scoring for entry in config.data.train if entry.format in FORMATS
    }
    return [kind for scoring, kind in kinds.items() if scoring in scorings]


def list_examples(kinds: Sequence[str], environment: dict[str, Any]) -> list[dict[str, str]]:
    """Return the recorded examples of prompts of some kinds, with a fence that holds their text."""
    shown = []
    recorded = environment.get("prompt_examples") or {}
    for kind, example in recorded.items():
        if kind not in kinds:
            continue
        text = f"{example['prompt']}⟦{example['completion']}⟧"
        # A fence must be longer than any row of backticks inside it.
        longest = max(map(len, re.findall("`+", text)), default=0)
        shown.append({"kind": kind, "text": text, "fence": "`" * max(3, longest + 1)})
    return shown


def list_settings(config: Config) -> list[list[str]]:
    """Return the keys of the configuration that decide the training, with their values."""
    sections = config.model_dump(mode="json", exclude={"data"})
    data = ("prompt_style", "completion", "max_length", "truncate", "deduplicate", "decontaminate")
    sections["data"] = {key: getattr(config.data, key) for key in (*data, "lowercase", "packing")}
    return [[key, str(shorten_path(value))] for key, value in flatten(sections)]


def list_machine(run: Run | None) -> list[list[str]]:
    """Return the versions and the hardware that a run was made with."""
    if run is None:
        return []
    environment = run.environment
    keys = ("versions", "git_commit", "hardware", "strategy", "processes", "attention")
    known = {key: environment[key] for key in keys if key in environment}
    peak = (run.metrics.get("memory_bytes") or {}).get("peak")
    if peak is not None:
        known["peak memory of rank 0"] = f"{peak / 2**30:.2f} GiB"
    return flatten(known)


def describe_change(metrics: dict[str, Any], folder: Path) -> str | None:
    """Return the paired difference of base and tuned in words, None without one."""
    # Open answers are compared by other figures.
    if "mcnemar_p" not in (metrics.get("comparison") or {}):
        return None
    path = folder / "metrics.json"
    change = check_kept(path, metrics["comparison"], Comparison, "comparison")
    return (
        f"{points(change['difference'])} points (95 % interval"
        f" {interval_points(change['difference_ci95'])}; paired exact McNemar p"
        f" {p_text(change['mcnemar_p'])})"
    )


def clean_cell(text: Any) -> str:
    """Return a text for a cell of a Markdown table: on one line, without markup of its own."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", line)
