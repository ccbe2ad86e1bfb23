"""Score prediction files.

Multiple-choice questions get the accuracy with its 95 % Wilson interval, also by subject, and
scores of calibration and of position bias. Open questions get text scores, and texts get their
perplexity. The command needs neither torch nor a GPU.

    python eval/score.py predictions.jsonl [MORE.jsonl] --output metrics.json
"""

import argparse
import csv
import io
import sys
from pathlib import Path

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
from medqlora.evaluation.predictions import PredictionError, read_all_predictions, read_predictions
from medqlora.reporting.numbers import interval
from medqlora.reporting.subjects import fold_small, merge_accuracies, merge_open


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
    keys = ["exact_match", "f1", "rouge_l"] if is_open else ["accuracy"]
    headings = [key.replace("_", " ") for key in keys]
    if not is_open:
        headings.append("95 % interval")
    table = Table(title=str(path), title_justify="left")
    table.add_column("subject")
    for heading in ("n", *headings):
        table.add_column(heading, justify="right")
    merge = merge_open if is_open else merge_accuracies
    (subjects,) = fold_small([metrics["per_subject"]], merge)
    for name, scores in [("all", metrics), *subjects.items()]:
        values = ["–" if scores[key] is None else f"{scores[key]:.1%}" for key in keys]
        if not is_open:
            low, high = scores["accuracy_ci95"]
            values.append(f"{low:.1%} – {high:.1%}")
        table.add_row(name, str(scores["n"]), *values)
    console.print(table)
    console.print(", ".join(list_notes(metrics)))


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
    """Return the intervals of the scores of open answers, and what could not be scored."""
    notes = [
        f"{name} 95 % interval {interval(metrics[key + '_ci95'])} %"
        for key, name in (("exact_match", "exact match"), ("f1", "F1"), ("rouge_l", "ROUGE-L"))
        if metrics[key] is not None
    ]
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
        "--submission",
        type=Path,
        help="do not score, but write the one file given as a MedMCQA test submission (.csv)",
    )
    arguments = parser.parse_args()
    console = make_console(soft_wrap=True)
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
        str(path): score_predictions(rows)
        for path, rows in read_all_predictions(arguments.predictions).items()
    }
    for path in arguments.predictions:
        show(path, metrics[str(path)], console)
    if arguments.output:
        # The scores of one file stand at the top level, those of several under the files' names.
        write_json(arguments.output, metrics if len(metrics) > 1 else next(iter(metrics.values())))


if __name__ == "__main__":
    run_command(main)
