"""How many questions of people in danger do the safety reminders of eval/ask.py miss?

    python bench/safety.py
    # The alarms for harmless questions of a public dataset, too.
    python bench/safety.py --format medquad --path medquad.jsonl --json found.json

The questions of bench/safety_questions.jsonl were written for this. The rules were written with one
part of them in view; the other part was held out until they were finished.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from rich.table import Table

from medqlora.core.command import CommandParser, make_console, run_command
from medqlora.core.config import DataEntry
from medqlora.core.environment import describe_environment, name_command
from medqlora.core.errors import ConfigError
from medqlora.core.files import check_new, write_json
from medqlora.core.reading import expand_path
from medqlora.data.formats.registry import FILE, find_format
from medqlora.data.reading import read_entry
from medqlora.serving.safety_check import (
    count_alarms,
    describe_rate,
    measure_rules,
    read_labelled,
)

QUESTIONS = Path(__file__).with_name("safety_questions.jsonl")
console = make_console(soft_wrap=True)


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--questions",
        type=Path,
        default=QUESTIONS,
        help="JSON lines with part, kind and question (default: those of bench/)",
    )
    parser.add_argument("--format", help="format of further harmless questions, as medquad")
    parser.add_argument("--path", help="their file")
    parser.add_argument("--json", type=Path, help="file to write the rates to as well")
    arguments = parser.parse_args()
    if (arguments.format is None) != (arguments.path is None):
        raise ConfigError("--format and --path name further questions together; give both")
    if arguments.format is not None:
        find_format(arguments.format, "--format")
    arguments.questions = expand_path(arguments.questions, "--questions")
    check_new(arguments.json, "--json")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    found = measure_rules(read_labelled(arguments.questions))
    if arguments.path is not None:
        entry = DataEntry(format=arguments.format, path=arguments.path)
        examples = read_entry(entry, FILE, drop_invalid=True).examples
        questions = [getattr(example, "question", "") for example in examples]
        rate = describe_rate(count_alarms(questions), len(questions))
        found.append({"part": "public", "kind": arguments.format} | rate)
    table = Table("questions", "kind", "n", "missed, or alarms", "95 % interval")
    for row in found:
        low, high = row["rate_ci95"]
        name = row["part"].replace("_", " ")
        shown = f"{row['wrong']} ({row['rate']:.1%})"
        table.add_row(name, row["kind"], f"{row['n']:,}", shown, f"{low:.1%} to {high:.1%}")
    console.print(table)
    if arguments.json:
        tree = {
            "command": name_command("bench/safety.py", sys.argv[1:]),
            "rates": found,
            "environment": describe_environment(),
        }
        write_json(arguments.json, tree)


if __name__ == "__main__":
    run_command(main)
