"""Compare prediction files of the same questions.

The comparison has an exact McNemar test and an interval of the paired difference, both also by
subject with Holm's correction, and the questions that were fixed or broken. Open answers are
compared by exact match, F1 and ROUGE-L, with bootstrap intervals and a permutation test. The
command needs neither torch nor a GPU.

    python eval/compare.py base.jsonl tuned.jsonl --output comparison.json

With a bound the command is a gate, which checks that a merge, another engine or another dtype
answers alike. Every further file is compared with the first:

    python eval/compare.py adapter.jsonl merged.jsonl vllm.jsonl --max_disagreement 0.01 \\
        --max_mean_difference 0.05

The exit code is 1 where a file breaks a bound, and 2 where files cannot be compared.
"""

import argparse
import functools
import math
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from rich.table import Table

from medqlora.core.command import CommandParser, make_console, run_command
from medqlora.core.errors import ConfigError
from medqlora.core.files import check_new, write_json
from medqlora.evaluation.comparison import compare_predictions
from medqlora.evaluation.predictions import read_all_predictions
from medqlora.reporting.numbers import p_value
from medqlora.reporting.open_tables import describe_method, tabulate_differences
from medqlora.reporting.subjects import fold_small, merge_changes

# Where the output is no terminal, rich would take 80 columns and cut the table.
console = make_console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def show(first: Path, second: Path, comparison: dict) -> None:
    """Print the comparison of two files."""
    title = f"A {first}\nB {second}"
    if "f1" in comparison:  # The keys tell open answers from multiple choice.
        console.print(tabulate_differences(title, comparison))
        console.print(describe_method(comparison))
    else:
        show_choices(title, comparison)
    left_out = comparison["too_long_a"], comparison["too_long_b"]
    if any(left_out):
        console.print(
            f"questions that are not compared, because they were left out as too long: A"
            f" {left_out[0]}, B {left_out[1]}",
            style="yellow",
        )


def show_choices(title: str, comparison: dict) -> None:
    """Print the comparison of two files of multiple-choice questions."""
    # rich would take brackets in a file's name for styles.
    table = Table(title=title, title_justify="left")
    table.add_column("subject")
    for heading in (
        "n",
        "A",
        "B",
        "difference",
        "95 % interval",
        "McNemar p",
        "Holm p",
        "only A",
        "only B",
    ):
        table.add_column(heading, justify="right")
    (subjects,) = fold_small([comparison["per_subject"]], merge_changes)
    for name, part in [("all", comparison), *subjects.items()]:
        low, high = part["difference_ci95"]
        table.add_row(
            name,
            str(part["n"]),
            f"{part['accuracy_a']:.1%}",
            f"{part['accuracy_b']:.1%}",
            f"{100 * part['difference']:+.1f}",
            f"{100 * low:+.1f} to {100 * high:+.1f}",
            p_value(part["mcnemar_p"]),
            # Only single subjects are corrected for their number. The first row is one test, and a
            # row of several subjects is one too.
            p_value(part["holm_p"]) if "holm_p" in part else "",
            str(part["only_a_right"]),
            str(part["only_b_right"]),
        )
    console.print(table)
    outcomes = [
        f"{name.replace('_', ' ')} {part['n']}"
        for name, part in comparison["outcomes"].items()
        if name != "all"
    ]
    console.print(", ".join(outcomes))


def check_bounds(first: Path, second: Path, agreement: dict, arguments: argparse.Namespace) -> bool:
    """Print how alike two files are, and return whether they keep the bounds.

    Raises:
        ConfigError: a bound is on log-probabilities, which the files do not have in common.
    """
    differing = 1 - agreement["same_prediction"]
    # Files of generated answers have no log-probabilities, and no distance.
    mean = agreement.get("mean_logprob_difference")
    # Both comparisons are this way round, because NaN must keep no bound.
    broken = arguments.max_disagreement is not None and not differing <= arguments.max_disagreement
    if arguments.max_mean_difference is not None:
        if mean is None:
            raise ConfigError(
                f"--max_mean_difference: {first} and {second} have no option_logprobs in common;"
                " leave it out"
            )
        broken |= not mean <= arguments.max_mean_difference
    distance = ""
    if mean is not None:
        distance = (
            f", log-probabilities {mean:.4f} nats apart on average,"
            f" {agreement['max_logprob_difference']:.4f} at most"
        )
    verdict = "FAILED" if broken else "ok"
    console.print(
        f"{verdict}: {second} answers {differing:.2%} of the questions otherwise than"
        f" {first}{distance}"
    )
    return not broken


def read_bound(text: str, highest: float = math.inf) -> float:
    """Return a bound from 0 to `highest`; NaN and infinite ones would be broken by nothing."""
    bound = float(text)
    if not (math.isfinite(bound) and 0 <= bound <= highest):
        limits = "from 0" if math.isinf(highest) else f"from 0 to {highest}"
        raise argparse.ArgumentTypeError(f"expected a number {limits}, got {text!r}")
    return bound


def main() -> int:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "predictions",
        type=Path,
        nargs="+",
        help="two files of eval/predict.py; with a bound there may be more",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="comparison file to write (.json); with more than two files it holds one object for"
        " each file after the first, by its name",
    )
    parser.add_argument(
        "--common",
        action="store_true",
        help="compare the questions that stand in both files, although others stand in only one",
    )
    parser.add_argument(
        "--any_prompt",
        action="store_true",
        help="compare although the files were made with different prompts",
    )
    parser.add_argument(
        "--max_disagreement",
        type=functools.partial(read_bound, highest=1),
        help="bound: largest share of questions that may be answered otherwise, e.g. 0.01",
    )
    parser.add_argument(
        "--max_mean_difference",
        type=read_bound,
        help="bound: largest mean distance of the options' log-probabilities in nats, e.g. 0.05",
    )
    arguments = parser.parse_args()
    gated = arguments.max_disagreement is not None or arguments.max_mean_difference is not None
    if len(arguments.predictions) < 2 or (len(arguments.predictions) > 2 and not gated):
        raise ConfigError(
            f"got {len(arguments.predictions)} prediction files; expected two, or more together"
            " with --max_disagreement or --max_mean_difference"
        )
    # This is checked before the files are read, which takes nearly all of the time.
    check_new(arguments.output)
    first, *others = arguments.predictions
    rows = read_all_predictions(arguments.predictions)
    comparisons = {}
    passed = True
    for path in others:
        comparison = compare_predictions(
            rows[first], rows[path], arguments.common, arguments.any_prompt
        )
        comparisons[str(path)] = comparison
        if gated:
            # Every file is checked, so that one call names all that fail.
            passed &= check_bounds(first, path, comparison["agreement"], arguments)
        else:
            show(first, path, comparison)
    if arguments.output:
        result = comparisons if len(others) > 1 else comparisons[str(others[0])]
        write_json(arguments.output, result)
    # run_command keeps 2 for files that cannot be compared.
    return 0 if passed else 1


if __name__ == "__main__":
    run_command(main)
