"""Score prediction files.

Multiple-choice questions get the accuracy with its 95 % Wilson interval, also by subject, and
scores of calibration and of position bias. Open questions get text scores, and texts get their
perplexity. The command needs neither torch nor a GPU.

    python eval/score.py predictions.jsonl [MORE.jsonl] --output metrics.json

--by COLUMN also scores the answers in groups: by a column that eval/predict.py --keep kept, or by
subject, dataset, topic or choice_type. --errors sorts the wrong answers by their kinds, with
samples of each.
"""

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from rich.console import Console
from rich.table import Table

from medqlora.core.command import CommandParser, make_console, run_command
from medqlora.core.files import check_new, write_atomic, write_json
from medqlora.data.examples import LETTERS
from medqlora.evaluation.metrics import NEAR_TIE, score_predictions
from medqlora.evaluation.mistakes import find_mistakes
from medqlora.evaluation.open_answers import OPEN_SCORES
from medqlora.evaluation.predictions import (
    PredictionError,
    Predictions,
    read_all_predictions,
    read_predictions,
)
from medqlora.reporting.mistakes import list_samples, tabulate_kinds, tabulate_subjects
from medqlora.reporting.rendering import Table as Cells
from medqlora.reporting.subjects import fold_small, merge_accuracies, merge_open

SHOWN = 2  # So many samples of each kind are printed; the metrics file holds more.


def show(path: Path, metrics: dict, console: Console) -> None:
    """Print the scores of one file."""
    # The keys of the scores tell the kind of the file.
    if "perplexity" in metrics:
        console.print(
            f"{path}: perplexity {metrics['perplexity']:.4f} over {metrics['tokens']} tokens of"
            f" {metrics['n']} texts"
        )
        return
    is_open = "f1" in metrics
    merge = merge_open if is_open else merge_accuracies
    (subjects,) = fold_small([metrics["per_subject"]], merge)
    console.print(tabulate_scores(str(path), "subject", {"all": metrics, **subjects}, is_open))
    # Strata are few and asked for by name, so small ones stand by themselves.
    for column, strata in metrics.get("by", {}).items():
        console.print(tabulate_scores(f"by {column}", column, strata, is_open))
    console.print(", ".join(list_notes(metrics)))
    if "errors" in metrics:
        show_errors(metrics["errors"], console)


def tabulate_scores(title: str, heading: str, groups: dict[str, dict], is_open: bool) -> Table:
    """Make a table with the scores of each group of answers, by the group's name."""
    keys = OPEN_SCORES if is_open else {"accuracy": "accuracy_ci95"}
    table = Table(title=title, title_justify="left")
    table.add_column(heading)
    table.add_column("n", justify="right")
    for key in keys:
        table.add_column(key.replace("_", " "), justify="right")
        table.add_column("95 % interval", justify="right")
    for name, scores in groups.items():
        values = []
        for key, bounds in keys.items():
            values.append("–" if scores[key] is None else f"{scores[key]:.1%}")
            # The row of several small subjects together has no interval of open answers.
            known = scores.get(bounds)
            values.append(f"{known[0]:.1%} – {known[1]:.1%}" if known else "–")
        table.add_row(name, str(scores["n"]), *values)
    return table


def show_errors(errors: dict, console: Console) -> None:
    """Print the kinds of wrong answers, by subject too, and some samples of each."""
    if not errors["wrong"]:
        console.print("no answer is wrong")
        return
    for cells in (tabulate_kinds(errors), tabulate_subjects(errors)):
        if cells is not None:
            console.print(draw(cells))
    for kind, lines in list_samples(errors, SHOWN):
        console.print(f"{kind}:")
        for line in lines:
            console.print(f"  {line}")


def draw(cells: Cells) -> Table:
    """Return a table of the reports as one for the terminal."""
    table = Table(title=cells.label, title_justify="left")
    for number, heading in enumerate(cells.head):
        table.add_column(heading, justify="left" if number < cells.texts else "right")
    for row in cells.rows:
        table.add_row(*row)
    return table


def list_notes(metrics: dict) -> list[str]:
    """Return the scores that do not stand in the table, each with its name."""
    notes = [f"unparsed {metrics['unparsed']}"]
    if metrics["unfinished"]:
        notes.append(f"of these, thoughts without an end {metrics['unfinished']}")
    if metrics["reached_limit"]:
        notes.append(f"answers cut at the limit of new tokens {metrics['reached_limit']}")
    if metrics["too_long"]:
        notes.append(f"questions left out as too long {metrics['too_long']}")
    if metrics["truncated"]:
        notes.append(f"prompts cut to fit {metrics['truncated']}")
    if "citations" in metrics:
        cited = metrics["citations"]
        notes.append(
            f"passages shown to {cited['shown']} questions, cited {cited['citations']} times in"
            f" {cited['citing']} answers, {cited['unknown']} citations name none"
        )
    if "f1" in metrics:
        notes += list_open_notes(metrics)
    for key, name in (
        ("letter_mass", "letter mass"),
        ("ece", "calibration error"),
        ("brier", "Brier score"),
    ):
        # A file without log-probabilities has None here.
        if metrics.get(key) is not None:
            notes.append(f"{name} {metrics[key]:.3f}")
    if metrics.get("near_ties"):
        notes.append(f"answers within {NEAR_TIE} nats of another {metrics['near_ties']}")
    if "flip_rate" in metrics.get("position_bias", {}):
        notes.append(
            "answers that change with the order of options"
            f" {metrics['position_bias']['flip_rate']:.1%}"
        )
    return notes


def list_open_notes(metrics: dict) -> list[str]:
    """Return what of the open answers could not be scored."""
    notes = []
    left_out = metrics["n"] - metrics["rouge_l_n"]
    if left_out:
        notes.append(f"no ROUGE-L of {left_out} right answers that are not in Latin letters")
    if metrics["wordless_references"]:
        notes.append(f"right answers without a word {metrics['wordless_references']}")
    return notes


def write_submission(path: Path, predictions: Path) -> None:
    """Write MedMCQA's leaderboard file for its hidden test: ids, and options counted from 1.

    Raises:
        PredictionError: the predictions are not of multiple-choice questions, or a question has no
            predicted option.
    """
    # The hidden test has no labels.
    rows = read_predictions(predictions, labelled=False)
    if rows.kind != "choice":
        raise PredictionError(
            f"{predictions}: a submission needs predictions of kind choice, got {rows.kind}; give a"
            " file of multiple-choice questions"
        )
    without = rows.prediction.count(None) + len(rows.too_long)
    if without:
        raise PredictionError(
            f"{predictions}: a submission needs an option for every question; {without} have none"
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "Prediction (correct option)"])
    for id, letter in zip(rows.ids, rows.prediction, strict=True):
        # MedMCQA's own files count options from 1.
        writer.writerow([id, LETTERS.index(letter) + 1])
    write_atomic(path, text.getvalue())


def score_file(rows: Predictions, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all scores of one file that the command line asks for."""
    scores = score_predictions(rows, arguments.by)
    return scores | {"errors": find_mistakes(rows)} if arguments.errors else scores


def main() -> None:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("predictions", type=Path, nargs="+", help="files of eval/predict.py")
    parser.add_argument(
        "--output",
        type=Path,
        help="metrics file to write (.json); with several files, one object by file name",
    )
    parser.add_argument(
        "--by",
        metavar="COLUMN",
        help="also score each group of answers that have one value in this column",
    )
    parser.add_argument(
        "--errors",
        action="store_true",
        help="also sort the wrong answers by their kinds, with samples of each",
    )
    parser.add_argument(
        "--submission",
        type=Path,
        help="do not score, but write the one file given as a MedMCQA test submission (.csv)",
    )
    arguments = parser.parse_args()
    # Where the output is no terminal, rich would take 80 columns and cut the table.
    console = make_console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    if arguments.submission:
        if len(arguments.predictions) > 1:
            raise PredictionError(
                f"--submission {arguments.submission}: expected one predictions file, got"
                f" {len(arguments.predictions)}"
            )
        check_new(arguments.submission, "--submission")
        write_submission(arguments.submission, arguments.predictions[0])
        told = f"submission for {arguments.predictions[0]} in {arguments.submission}"
        console.print(told)
        return
    # This is checked before the files are read, which takes nearly all of the time.
    check_new(arguments.output)
    metrics = {
        str(path): score_file(rows, arguments)
        for path, rows in read_all_predictions(arguments.predictions).items()
    }
    for path in arguments.predictions:
        show(path, metrics[str(path)], console)
    if arguments.output:
        # The scores of one file stand at the top level, those of several under the files' names.
        write_json(arguments.output, metrics if len(metrics) > 1 else next(iter(metrics.values())))


if __name__ == "__main__":
    run_command(main)
