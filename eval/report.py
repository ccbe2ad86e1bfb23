"""Write a report on one or several runs.

The report is one HTML page with verdict, scores, charts and sample questions. The command needs
neither torch nor a GPU, only the files of the run folders.

    python eval/report.py runs/mine --output report.html
    python eval/report.py runs/first runs/second --output both.html

--card writes the model card of each run again, with the scores of all files that
eval/predict.py has written into the run's predictions/.
"""

import argparse
import itertools
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from rich.console import Console

from medqlora.core.command import CommandParser, make_console, run_command
from medqlora.core.files import check_new, write_atomic
from medqlora.evaluation.predictions import read_all_predictions
from medqlora.reporting.model_card import write_run_card
from medqlora.reporting.run_files import collect_run, find_predictions
from medqlora.reporting.run_page import render_report
from medqlora.reporting.runs import ReportError
from medqlora.reporting.scores import judge


def write_page(folders: list[Path], output: Path, console: Console) -> None:
    """Write the page of all runs, and print the verdict of each."""
    paths = {folder: find_predictions(folder) for folder in folders}
    # The files of all runs are read together, each in a process of its own.
    rows = read_all_predictions(list(itertools.chain.from_iterable(paths.values())))
    names = [folder.resolve().name for folder in paths]
    runs = []
    for name, (folder, files) in zip(names, paths.items(), strict=True):
        # Folders of one name are told apart by their paths.
        label = name if names.count(name) == 1 else str(folder)
        runs.append(collect_run(label, folder, {path: rows[path] for path in files}))
    write_atomic(output, render_report(runs))
    for run in runs:
        console.print(f"{run.name}: {judge(run).sentence}")
    console.print(f"report in {output}")


def main() -> None:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--output", type=Path, help="page to write (.html)")
    parser.add_argument("--card", action="store_true", help="write the runs' model cards again")
    arguments = parser.parse_args()
    if arguments.output is None and not arguments.card:
        raise ReportError("expected --output FILE.html for a page, or --card for model cards")
    check_new(arguments.output)
    console = make_console(soft_wrap=True)
    if arguments.card:
        for folder in arguments.runs:
            console.print(write_run_card(folder))
    if arguments.output is not None:
        write_page(arguments.runs, arguments.output, console)


if __name__ == "__main__":
    run_command(main)
