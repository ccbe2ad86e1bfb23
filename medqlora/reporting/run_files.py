"""Read a run folder for a report or a model card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from medqlora.core.files import read_lines
from medqlora.core.json_reading import parse_json
from medqlora.core.run_folder import LOG
from medqlora.evaluation.comparison import compare_predictions
from medqlora.evaluation.metrics import score_predictions
from medqlora.evaluation.predictions import PredictionError, Predictions
from medqlora.reporting.kept import Comparison, Environment, Metrics, Scores, check_kept
from medqlora.reporting.runs import ReportError, Run

# Scores in metrics.json are shown only where they have all of these keys.
SCORE_KEYS = {"n", "accuracy", "accuracy_ci95", "unparsed", "truncated"}
# The report names those of these files that a run folder does not have.
PARTS = (
    "predictions/base.jsonl",
    "predictions/tuned.jsonl",
    LOG,
    "metrics.json",
    "environment.json",
    "config.yaml",
)


def find_predictions(folder: Path) -> list[Path]:
    """Return the prediction files of a run folder.

    Raises:
        ReportError: it is not a folder, or one with neither predictions nor a log.
    """
    if not os.path.isdir(folder):  # Path.is_dir raises where a name is too long.
        raise ReportError(
            f"{folder} is not a folder; expected a run folder, the --output_dir of"
            " recipes/sft_qlora.py"
        )
    paths = sorted((folder / "predictions").glob("*.jsonl"))
    if not paths and not (folder / LOG).is_file():
        raise ReportError(
            f"{folder} holds neither predictions/*.jsonl nor {LOG}; give a run folder, the"
            " --output_dir of recipes/sft_qlora.py"
        )
    return paths


def collect_run(name: str, folder: Path, predictions: dict[Path, Predictions]) -> Run:
    """Read everything that a run folder holds.

    The scores of prediction files that are not there are taken from metrics.json.

    Args:
        name: the run's name in the report.
        folder: the run folder.
        predictions: the rows of its prediction files, by path.

    Raises:
        ReportError: a file is not what a run writes.
    """
    path = folder / "metrics.json"
    metrics = read_tree(path)
    check_kept(path, metrics, Metrics)
    environment = read_tree(folder / "environment.json")
    check_kept(folder / "environment.json", environment, Environment)
    run = Run(
        name,
        metrics=metrics,
        environment=environment,
        config=read_text(folder / "config.yaml"),
    )
    run.rows = {path.stem: rows for path, rows in predictions.items()}
    run.missing = [part for part in PARTS if not (folder / part).is_file()]
    # Lines are counted as read_lines divides them.
    written = sum(bool(line.strip()) for line in read_text(folder / LOG).split("\n"))
    run.log = [row for row in read_lines(folder / LOG) if isinstance(row, dict)]
    run.lost_lines = written - len(run.log)
    for part, where, scores in (("base", "base", metrics.get("base")), ("tuned", "", metrics)):
        if scores and scores.keys() >= SCORE_KEYS:
            run.scores[part] = check_kept(path, scores, Scores, where)
    # Scores of prediction files that are there replace those of metrics.json.
    for part, rows in run.rows.items():
        run.scores[part] = score_predictions(rows)
    if {"base", "tuned"} <= set(run.rows):
        try:
            compared = compare_predictions(run.rows["base"], run.rows["tuned"])
            if run.rows["base"].kind == "open":
                run.open_comparison = compared
            else:
                run.comparison = compared
        except PredictionError as error:
            run.obstacle = str(error)
    elif {"base", "tuned"} <= set(run.scores) and metrics.get("comparison"):
        run.comparison = check_kept(path, metrics["comparison"], Comparison, "comparison")
    return run


def read_text(path: Path) -> str:
    """Return the text of a file, which is empty where there is no file."""
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError):
        raise ReportError(
            f"{path} cannot be read as UTF-8 text; correct it or take it out of the folder"
        ) from None


def read_tree(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file, which is empty where there is no file."""
    try:
        tree = parse_json(read_text(path) or "{}", nan=True)
    except ValueError as error:
        raise ReportError(
            f"{path}: {error}; correct it or take the file out of the folder"
        ) from None
    if is_deep(tree):
        raise ReportError(f"{path}: too deeply nested; correct it or take it out of the folder")
    if not isinstance(tree, dict):
        raise ReportError(
            f"{path}: expected an object, got {type(tree).__name__}; correct it or take it out of"
            " the folder"
        )
    return tree


def is_deep(tree: Any, left: int = 50) -> bool:
    """Whether objects and lists stand in each other more than `left` times."""
    if not isinstance(tree, (dict, list)):
        return False
    values = tree.values() if isinstance(tree, dict) else tree
    return left == 0 or any(is_deep(value, left - 1) for value in values)
