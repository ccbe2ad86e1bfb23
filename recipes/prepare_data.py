"""Prepare the data of a recipe without training, to find mistakes early and to fill the cache.

The rows are read, cleaned, separated from the evaluation rows, tokenized, and planned into steps.

    python recipes/prepare_data.py --config recipes/configs/NAME.yaml \\
        [--show 3] [--removed removed.jsonl]
"""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()


from medqlora.batches.budgets import choose_packing, list_budgets
from medqlora.core.command import CommandParser, make_console, run_command, run_early, whole
from medqlora.core.config_loading import change, help_text, load_config
from medqlora.core.environment import prefer_expandable_segments
from medqlora.core.files import check_new, write_json_lines


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = CommandParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="configuration keys:\n" + help_text(),
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(__file__).parent / "configs" / "demo.yaml",
        help="YAML file of the recipe (default: recipes/configs/demo.yaml)",
    )
    parser.add_argument(
        "--processes",
        type=whole(1),
        default=1,
        help="number of training processes to plan for (default 1)",
    )
    parser.add_argument(
        "--show",
        type=whole(0),
        default=1,
        help="number of rows to print, with their supervised part in bold (default 1)",
    )
    parser.add_argument(
        "--removed",
        type=Path,
        help="file (.jsonl) to write every removed row and its reason to (default: none)",
    )
    arguments, overrides = parser.parse_known_args()
    # The result is not kept: this call only refuses mistakes, and main reads the file again.
    load_config(arguments.config, overrides)
    check_new(arguments.removed, "--removed")
    return arguments, overrides


if __name__ == "__main__":
    # The arguments are checked before torch is imported, which takes seconds. The variable of its
    # allocator must be set before, because torch reads it while it is imported.
    ARGUMENTS, OVERRIDES = run_early(parse_arguments)
    prefer_expandable_segments(os.environ)

from medqlora.batches.cache import prepare_plan
from medqlora.batches.pipeline import prepare
from medqlora.model.base import load_tokenizer
from medqlora.prompts.chat_template import make_encoder

console = make_console(soft_wrap=True)


def main() -> None:
    arguments = ARGUMENTS
    overrides = OVERRIDES
    config = load_config(arguments.config, overrides)
    # Rows are tokenized in threads of this package; the tokenizer's own threads would compete.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = load_tokenizer(
        config.model.base, config.model.revision, config.model.trust_remote_code
    )
    data = config.data
    encoder = make_encoder(
        tokenizer, data.prompt_style, data.completion, config.model.template_arguments
    )
    prepared = prepare(config, encoder)
    # Where the micro-batch is auto, no forecast is made here and the largest one is assumed.
    budget = list_budgets(config.training, config.data.max_length, arguments.processes)[0]
    packed = choose_packing(config.training, budget, arguments.processes)
    config = change(config, "training", max_tokens_per_batch=budget)
    # Only a training measures the losses that easy_to_hard sorts by. The number of steps and how
    # full they are do not depend on them by much.
    if data.order == "easy_to_hard":
        console.print("data.order easy_to_hard: the steps below are those of shuffled order")
        config = change(config, "data", order="shuffled")
    plan, _ = prepare_plan(config, prepared, arguments.processes, packed)
    for text in prepared.descriptions:
        console.print(text)
    for source in prepared.mixture:
        console.print(
            f"{source['entry']} {source['format']} {source['path'] or ''}: {source['rows']:,} rows,"
            f" {source['rows_per_epoch']:,} per epoch, {source['row_share']:.1%} of rows,"
            f" {source['token_share']:.1%} of tokens"
        )
    if arguments.removed:
        write_json_lines(arguments.removed, [asdict(removal) for removal in prepared.removals])
    table = prepared.train
    # `plan.bins` holds borders, which are one more than the micro-batches.
    bins = len(plan.bins) - 1
    placed = int(table.lengths[plan.rows].sum())
    supervised = int((table.lengths - table.prompt_lengths).sum())
    console.print(
        f"{len(table.lengths):,} rows of {table.lengths.mean():.0f} tokens (longest"
        f" {table.lengths.max()}), {supervised:,} supervised; {len(plan):,} steps, {bins:,}"
        f" micro-batches, {placed / (bins * budget):.2%} filled"
    )
    for row in range(min(arguments.show, len(table.lengths))):
        ids = table.ids[table.offsets[row] : table.offsets[row + 1]].tolist()
        prompt_length = int(table.prompt_lengths[row])
        console.rule(table.names[row])
        # No line ends between the two parts, just as no token stands between them in the row.
        console.print(tokenizer.decode(ids[:prompt_length]), end="")
        console.print(tokenizer.decode(ids[prompt_length:]), style="bold")


if __name__ == "__main__":
    run_command(main)
