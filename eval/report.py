"""Write a report on one or several runs.

The report is one HTML page with verdict, scores, charts and sample questions. The command needs
neither torch nor a GPU, only the files of the run folders.

    python eval/report.py runs/mine --output report.html
    python eval/report.py runs/first runs/second --output both.html
"""

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from medqlora.core.command import CommandParser, make_console, run_command
from medqlora.core.files import check_new, read_lines, write_atomic
from medqlora.core.json_reading import parse_json
from medqlora.core.run_folder import LOG
from medqlora.evaluation.comparison import compare_predictions
from medqlora.evaluation.metrics import score_predictions
from medqlora.evaluation.predictions import PredictionError, Predictions, read_all_predictions
from medqlora.reporting.kept import Comparison, Environment, Metrics, Scores, check_kept
from medqlora.reporting.run_page import render_report
from medqlora.reporting.runs import ReportError, Run
from medqlora.reporting.scores import judge

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


def main() -> None:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--output", type=Path, required=True, help="page to write (.html)")
    arguments = parser.parse_args()
    # This is checked before the files are read, which takes nearly all of the time.
    check_new(arguments.output)
    paths = {folder: find_predictions(folder) for folder in arguments.runs}
    # The files of all runs are read together, each in a process of its own.
    rows = read_all_predictions(list(itertools.chain.from_iterable(paths.values())))
    names = [folder.resolve().name for folder in paths]
    runs = []
    for name, (folder, files) in zip(names, paths.items(), strict=True):
        # Folders of one name are told apart by their paths.
        label = name if names.count(name) == 1 else str(folder)
        runs.append(collect_run(label, folder, {path: rows[path] for path in files}))
    write_atomic(arguments.output, render_report(runs))
    console = make_console(soft_wrap=True)
    for run in runs:
        console.print(f"{run.name}: {judge(run).sentence}")
    console.print(f"report in {arguments.output}")


if __name__ == "__main__":
    run_command(main)
