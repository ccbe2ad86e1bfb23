"""Write a report on one or several runs: one HTML page with verdict, scores, charts and sample
questions. Needs neither torch nor a GPU, only the files of the run folder.

    python eval/report.py runs/mine --output report.html
    python eval/report.py runs/first runs/second --output both.html
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from medqlora.core.command import run_command
from medqlora.core.files import read_lines, write_atomic
from medqlora.core.run_folder import LOG
from medqlora.evaluation.comparison import compare_predictions
from medqlora.evaluation.metrics import score_predictions
from medqlora.evaluation.predictions import PredictionError, Predictions, read_all_predictions
from medqlora.reporting.run_page import render_report
from medqlora.reporting.runs import ReportError, Run
from medqlora.reporting.scores import judge

# what scores of metrics.json must have to be shown
KEPT = {"n", "accuracy", "accuracy_ci95", "unparsed", "truncated"}
PARTS = (
    "predictions/base.jsonl",
    "predictions/tuned.jsonl",
    LOG,
    "metrics.json",
    "environment.json",
    "config.yaml",
)


def find_predictions(folder: Path) -> list[Path]:
    """Prediction files of a run folder.

    Raises:
        ReportError: not a folder, or one with neither predictions nor a log.
    """
    if not folder.is_dir():
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
    """All that a run folder holds; scores of files that are not there are taken from
    metrics.json.
    """
    metrics = {
        key: value
        for key, value in read_tree(folder / "metrics.json").items()
        if key not in ("base", "memory_bytes", "comparison") or isinstance(value, dict)
    }
    run = Run(
        name,
        metrics=metrics,
        environment=read_tree(folder / "environment.json"),
        config=read_text(folder / "config.yaml"),
    )
    run.rows = {path.stem: rows for path, rows in predictions.items()}
    run.scores = {name: score_predictions(rows) for name, rows in run.rows.items()}
    run.missing = [part for part in PARTS if not (folder / part).is_file()]
    try:
        run.log = [row for row in read_lines(folder / LOG) if isinstance(row, dict)]
    except UnicodeDecodeError:
        raise ReportError(
            f"{folder / LOG} is not UTF-8; expected the log of recipes/sft_qlora.py"
        ) from None
    kept = {"base": metrics.get("base") or {}, "tuned": metrics}
    run.scores = {
        name: scores for name, scores in kept.items() if scores.keys() >= KEPT
    } | run.scores
    if {"base", "tuned"} <= set(run.rows):
        try:
            run.comparison = compare_predictions(run.rows["base"], run.rows["tuned"])
        except PredictionError as error:
            run.obstacle = str(error)
    elif {"base", "tuned"} <= set(run.scores):
        run.comparison = metrics.get("comparison")
    return run


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError):
        raise ReportError(
            f"{path} cannot be read as UTF-8 text; correct it or take it out of the folder"
        ) from None


def read_tree(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(read_text(path) or "{}")
    except json.JSONDecodeError as error:
        raise ReportError(
            f"{path} line {error.lineno}: not valid JSON; correct it or take it out of the folder"
        ) from None
    if not isinstance(tree, dict):
        raise ReportError(
            f"{path}: expected an object, got {type(tree).__name__}; correct it or take it out of"
            " the folder"
        )
    return tree


def check_output(path: Path) -> None:
    if path.exists():
        raise ReportError(f"--output {path} exists; give a new file name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ReportError(
            f"--output {path}: {path.parent} is no folder that can be written to; make it or give"
            " another"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--output", type=Path, required=True, help="page to write (.html)")
    arguments = parser.parse_args()
    check_output(arguments.output)
    paths = {folder: find_predictions(folder) for folder in arguments.runs}
    rows = read_all_predictions([path for some in paths.values() for path in some])
    names = [folder.resolve().name for folder in paths]
    runs = [
        collect_run(
            name if names.count(name) == 1 else str(folder),
            folder,
            {path: rows[path] for path in some},
        )
        for name, (folder, some) in zip(names, paths.items(), strict=True)
    ]
    write_atomic(arguments.output, render_report(runs))
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for run in runs:
        console.print(f"{run.name}: {judge(run).sentence}")
    console.print(f"report in {arguments.output}")


if __name__ == "__main__":
    run_command(main)
