"""Let people rate answers from 1 to 5 without knowing which model gave them.

    python eval/rate.py sheet base.jsonl tuned.jsonl --output sheet.csv --key key.json
    python eval/rate.py agreement anna.csv ben.csv --key key.json --output agreement.json

The first command draws a sheet from files of eval/predict.py. Every rater gets a copy of it and
fills in accuracy, completeness, relevance, fluency and safety, from 1 (worst) to 5 (best). The key
says which answer is whose and stays with you. The second command reads the sheets that came back.
It prints how far the raters agree, the mean of each model, and their paired differences.
"""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from rich.table import Table

from medqlora.core.command import CommandParser, make_console, run_command, whole
from medqlora.core.files import check_new, write_atomic, write_json
from medqlora.evaluation.predictions import read_predictions
from medqlora.evaluation.rating_sheet import RatingError, draw_sheet, read_key, read_sheet
from medqlora.evaluation.ratings import summarise_ratings

SHOWN = 5  # So many items are named on the terminal.

console = make_console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def make_sheet(arguments: argparse.Namespace) -> None:
    """Draw a sheet and its key, and write both."""
    for path, flag in ((arguments.output, "--output"), (arguments.key, "--key")):
        check_new(path, flag)
    if os.path.realpath(arguments.output) == os.path.realpath(arguments.key):
        raise RatingError(f"--output and --key both name {arguments.key}; give two files")
    check_distinct(arguments.files)
    files = [read_predictions(path, labelled=False) for path in arguments.files]
    sheet = draw_sheet(files, arguments.seed, arguments.limit)
    # A sheet without its key is of no use, so the key comes first.
    write_json(arguments.key, sheet.key.model_dump())
    write_atomic(arguments.output, sheet.text)
    console.print(
        f"{len(sheet.key.items)} answers in {arguments.output}; keep {arguments.key} from the"
        " raters, it names the models"
    )
    warn(sheet.telling, "name a model, by which raters may know it: change the texts of")
    warn(sheet.cut, "are longer than a cell and were cut:")


def check_distinct(paths: list[Path]) -> None:
    """Refuse a file that is given twice."""
    seen = set()
    for path in paths:
        # Path.resolve raises where a link leads to itself.
        place = os.path.realpath(path)
        if place in seen:
            raise RatingError(f"{path} is given twice; give each file once")
        seen.add(place)


def warn(items: list[str], what: str) -> None:
    """Print a warning that names some items, where there are any."""
    if items:
        named = ", ".join(items[:SHOWN]) + (", …" if len(items) > SHOWN else "")
        console.print(f"warning: {len(items)} answers {what} {named}", style="yellow")


def show_agreement(arguments: argparse.Namespace) -> None:
    """Read the sheets of all raters, and print and write what they say."""
    check_new(arguments.output)
    check_distinct(arguments.files)
    key = read_key(arguments.key)
    summary = summarise_ratings([read_sheet(path, key) for path in arguments.files], key)
    summary["sheets"] = [str(path) for path in arguments.files]
    title = f"{summary['raters']} rater(s), {summary['questions']} questions"
    agreement = Table(title=f"agreement of {title}", title_justify="left")
    means = Table(title="mean rating, 1 to 5", title_justify="left")
    differences = Table(title="paired differences", title_justify="left")
    for table, headings in (
        (agreement, ["criterion", "alpha", "95 % interval"]),
        (means, ["criterion", "answers of", "mean", "95 % interval"]),
        (differences, ["criterion", "answers of", "less those of", "difference", "95 % interval"]),
    ):
        for heading in headings:
            table.add_column(heading)
    for name, criterion in summary["criteria"].items():
        agreement.add_row(name, number(criterion["alpha"]), bounds(criterion["alpha_ci95"]))
        for file, mean in criterion["per_file"].items():
            means.add_row(name, file, number(mean["mean"]), bounds(mean["mean_ci95"]))
        for pair in criterion["differences"]:
            figures = [f"{pair['difference']:+.2f}", bounds(pair["difference_ci95"])]
            differences.add_row(name, pair["b"], pair["a"], *figures)
    for table in (agreement, means, differences):
        if table.row_count:
            console.print(table)
    if arguments.output:
        write_json(arguments.output, summary)


def number(value: float | None) -> str:
    """Return a number with two decimals, or a dash."""
    return "–" if value is None else f"{value:.2f}"


def bounds(interval: list[float] | None) -> str:
    """Return an interval with two decimals, or a dash."""
    return "–" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(description=__doc__, formatter_class=formatter)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="sheet|agreement")
    sheet = tasks.add_parser("sheet", help="draw a sheet from files of predictions")
    sheet.set_defaults(run=make_sheet)
    sheet.add_argument("files", type=Path, nargs="+", help="files of eval/predict.py")
    sheet.add_argument("--output", type=Path, required=True, help="sheet to write (.csv)")
    sheet.add_argument("--key", type=Path, required=True, help="key to write (.json)")
    sheet.add_argument("--seed", type=whole(0), default=0, help="seed of the order (default 0)")
    sheet.add_argument("--limit", type=whole(1), help="draw so many questions (default all)")
    agreement = tasks.add_parser("agreement", help="summarise the sheets that raters filled in")
    agreement.set_defaults(run=show_agreement)
    agreement.add_argument("files", type=Path, nargs="+", help="a sheet of each rater")
    agreement.add_argument("--key", type=Path, required=True, help="key of the sheet")
    agreement.add_argument("--output", type=Path, help="summary to write (.json)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.run(arguments)


if __name__ == "__main__":
    run_command(main)
