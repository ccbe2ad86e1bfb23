"""Score prediction files: accuracy with 95 % Wilson interval, per subject, calibration, position
bias; text scores for open answers. Needs neither torch nor a GPU.

    python eval/score.py predictions.jsonl [MORE.jsonl] --output metrics.json
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medqlora.core.command import run_command
from medqlora.core.files import check_new, write_atomic, write_json
from medqlora.data.examples import LETTERS
from medqlora.evaluation.metrics import NEAR_TIE, score_predictions
from medqlora.evaluation.predictions import PredictionError, read_all_predictions, read_predictions


def show(path: Path, metrics: dict, console: Console) -> None:
    if "perplexity" in metrics:
        console.print(
            f"{path}: perplexity {metrics['perplexity']:.4f} over {metrics['tokens']} tokens of"
            f" {metrics['n']} texts"
        )
        return
    names = ("exact_match", "f1", "rouge_l") if "f1" in metrics else ("accuracy",)
    table = Table(title=escape(str(path)), title_justify="left")
    for column in ("subject", "n", *names, *(["95 % interval"] if names == ("accuracy",) else [])):
        table.add_column(
            column.replace("_", " "), justify="left" if column == "subject" else "right"
        )
    for name, scores in [("all", metrics), *metrics["per_subject"].items()]:
        cells = [f"{scores[key]:.1%}" for key in names]
        if names == ("accuracy",):
            low, high = scores["accuracy_ci95"]
            cells.append(f"{low:.1%} – {high:.1%}")
        table.add_row(escape(name), str(scores["n"]), *cells)
    console.print(table)
    console.print(", ".join(describe(metrics)))


def describe(metrics: dict) -> list[str]:
    facts = [f"unparsed {metrics['unparsed']}"]
    if metrics["truncated"]:
        facts.append(f"prompts cut to fit {metrics['truncated']}")
    for key, name in (
        ("letter_mass", "letter mass"),
        ("ece", "calibration error"),
        ("brier", "Brier score"),
    ):
        if metrics.get(key) is not None:
            facts.append(f"{name} {metrics[key]:.3f}")
    if metrics.get("near_ties"):
        facts.append(f"answers within {NEAR_TIE} nats of another {metrics['near_ties']}")
    if "flip_rate" in metrics.get("position_bias", {}):
        facts.append(
            "answers that change with the order of options"
            f" {metrics['position_bias']['flip_rate']:.1%}"
        )
    return facts


def write_submission(path: Path, predictions: Path) -> None:
    """MedMCQA's form for its hidden test: id and the number of the option, from 1."""
    rows = read_predictions(predictions, labelled=False)
    if rows.kind != "choice" or None in rows.prediction:
        raise PredictionError(
            f"{predictions}: a submission needs an option for every question;"
            f" {rows.prediction.count(None)} have none"
        )
    lines = [
        f"{id},{LETTERS.index(letter) + 1}"
        for id, letter in zip(rows.ids, rows.prediction, strict=True)
    ]
    write_atomic(path, "\n".join(["id,Prediction (correct option)", *lines]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
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
        help="write a MedMCQA test submission (.csv) of the one file given instead of scoring",
    )
    arguments = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    if arguments.submission:
        if len(arguments.predictions) > 1:
            raise PredictionError(
                f"--submission {arguments.submission}: expected one predictions file, got"
                f" {len(arguments.predictions)}"
            )
        check_new(arguments.submission, "--submission")
        write_submission(arguments.submission, arguments.predictions[0])
        console.print(f"submission for {arguments.predictions[0]} in {arguments.submission}")
        return
    check_new(arguments.output)
    metrics = {
        str(path): score_predictions(rows)
        for path, rows in read_all_predictions(arguments.predictions).items()
    }
    for path in arguments.predictions:
        show(path, metrics[str(path)], console)
    if arguments.output:
        write_json(arguments.output, metrics if len(metrics) > 1 else next(iter(metrics.values())))


if __name__ == "__main__":
    run_command(main)
