"""Write a report on one or several runs.

The report is one HTML page with verdict, scores, charts and sample questions. The command needs
neither torch nor a GPU, only the files of the run folders.

    python eval/report.py runs/mine --output report.html
    python eval/report.py runs/first runs/second --output both.html
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()


from medqlora.core.command import CommandParser, make_console, run_command
from medqlora.core.files import read_lines, write_atomic
from medqlora.core.run_folder import LOG
from medqlora.evaluation.comparison import compare_predictions
from medqlora.evaluation.metrics import score_predictions
from medqlora.evaluation.predictions import PredictionError, Predictions, read_all_predictions
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
    """Read everything that a run folder holds.

    The scores of prediction files that are not there are taken from metrics.json.

    Args:
        name: the run's name in the report.
        folder: the run folder.
        predictions: the rows of its prediction files, by path.

    Raises:
        ReportError: a file is not what a run writes.
    """
    metrics = read_tree(folder / "metrics.json")
    # A value of another form, as in a file that was edited, counts as missing.
    for key in ("base", "memory_bytes", "comparison"):
        if not isinstance(metrics.get(key), dict):
            metrics.pop(key, None)
    run = Run(
        name,
        metrics=metrics,
        environment=read_tree(folder / "environment.json"),
        config=read_text(folder / "config.yaml"),
    )
    run.rows = {path.stem: rows for path, rows in predictions.items()}
    run.missing = [part for part in PARTS if not (folder / part).is_file()]
    try:
        run.log = [row for row in read_lines(folder / LOG) if isinstance(row, dict)]
    except UnicodeDecodeError:
        raise ReportError(
            f"{folder / LOG} is not UTF-8; expected the log of recipes/sft_qlora.py"
        ) from None
    for part, scores in (("base", metrics.get("base") or {}), ("tuned", metrics)):
        if scores.keys() >= SCORE_KEYS:
            run.scores[part] = scores
    # Scores of prediction files that are there replace those of metrics.json.
    for part, rows in run.rows.items():
        run.scores[part] = score_predictions(rows)
    if {"base", "tuned"} <= set(run.rows):
        try:
            run.comparison = compare_predictions(run.rows["base"], run.rows["tuned"])
        except PredictionError as error:
            run.obstacle = str(error)
    elif {"base", "tuned"} <= set(run.scores):
        run.comparison = metrics.get("comparison")
    return run


def read_text(path: Path) -> str:
    """Return the text of a file, which is empty where there is no file."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError):
        raise ReportError(
            f"{path} cannot be read as UTF-8 text; correct it or take it out of the folder"
        ) from None


def read_tree(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file, which is empty where there is no file."""
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
    """Raise ReportError where the report cannot be written to a new file."""
    if path.exists():
        raise ReportError(f"--output {path} exists; give a new file name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ReportError(
            f"--output {path}: {path.parent} is no folder that can be written to; make it or give"
            " another"
        )


def main() -> None:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--output", type=Path, required=True, help="page to write (.html)")
    arguments = parser.parse_args()
    # This is checked before the files are read, which takes nearly all of the time.
    check_output(arguments.output)
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
