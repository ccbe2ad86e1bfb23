"""Score prediction files: accuracy with 95 % Wilson interval, per subject, calibration. Needs neither torch nor a GPU.

    python eval/score.py predictions.jsonl [MORE.jsonl] --output metrics.json
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from medqlora.config import UserError
from medqlora.metrics import score_predictions
from medqlora.runs import write_json

REQUIRED = ("id", "gold", "prediction")


class PredictionError(UserError):
    """A predictions file that cannot be scored."""


def read_predictions(path: Path) -> list[dict]:
    """Rows with unique ids and labels."""
    rows, seen = [], {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PredictionError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'}); give a predictions file") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise PredictionError(f"{path} line {number}: not valid JSON; was the file cut short? Run eval/predict.py again") from None
        missing = [key for key in REQUIRED if not isinstance(row, dict) or key not in row]
        if missing:
            raise PredictionError(f'{path} line {number}: no "{missing[0]}"; expected a row of eval/predict.py')
        if row["gold"] is None:
            raise PredictionError(f"{path} line {number}: no label (gold is null); a split with hidden answers cannot be scored")
        if row["id"] in seen:
            raise PredictionError(f"{path} line {number}: id {row['id']} stands on line {seen[row['id']]} too")
        seen[row["id"]] = number
        rows.append(row)
    if not rows:
        raise PredictionError(f"{path} is empty; expected one prediction per line")
    return rows


def show(path: Path, metrics: dict, console: Console) -> None:
    table = Table(title=str(path), title_justify="left")
    for column in ("subject", "n", "accuracy", "95 % interval"):
        table.add_column(column, justify="left" if column == "subject" else "right")
    for name, scores in [("all", metrics), *metrics["per_subject"].items()]:
        low, high = scores["accuracy_ci95"]
        table.add_row(name, str(scores["n"]), f"{scores['accuracy']:.1%}", f"{low:.1%} – {high:.1%}")
    console.print(table)
    facts = [f"unparsed {metrics['unparsed']}"]
    facts += [f"{name} {metrics[key]:.3f}" for key, name in (("letter_mass", "letter mass"), ("ece", "calibration error")) if metrics[key] is not None]
    console.print(", ".join(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", type=Path, nargs="+", help="files of eval/predict.py")
    parser.add_argument("--output", type=Path, help="metrics file to write (.json); with several files, one object by file name")
    arguments = parser.parse_args()
    metrics = {str(path): score_predictions(read_predictions(path)) for path in arguments.predictions}
    console = Console(highlight=False, soft_wrap=True)
    for path in arguments.predictions:
        show(path, metrics[str(path)], console)
    if arguments.output:
        write_json(arguments.output, metrics if len(metrics) > 1 else next(iter(metrics.values())))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
