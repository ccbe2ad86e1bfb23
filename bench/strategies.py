"""The same experiment under every strategy: losses, gradient norms, memory and speed side by side,
compared with one process.

    python bench/strategies.py --json bench/results/cpu-2-cores/strategies_demo.json
    python bench/strategies.py --config recipes/configs/NAME.yaml --processes 8 --steps 30 \\
        [--section.key VALUE ...]

Runs recipes/sft_qlora.py under the files of accelerate_configs/, one after the other, on the GPUs
of this machine, or on its CPU where there is none. Speeds are ratios to one process of the same
run; on a CPU, processes share its cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

import numpy as np
from rich.table import Table

from medqlora.core.command import CommandParser, make_console, run_command, whole
from medqlora.core.config_loading import load_config
from medqlora.core.environment import describe_environment
from medqlora.core.errors import UserError
from medqlora.core.files import check_new, write_json

ROOT = Path(__file__).parent.parent
STRATEGIES = ("one", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")


class StrategyRunError(UserError):
    """A strategy whose training failed."""


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "recipes" / "configs" / "demo.yaml",
        help="recipe YAML; default %(default)s",
    )
    parser.add_argument(
        "--strategies",
        nargs="+",
        choices=STRATEGIES,
        default=list(STRATEGIES),
        help="strategies to run; default: all",
    )
    parser.add_argument(
        "--processes",
        type=whole(2),
        default=2,
        help="processes of every strategy but one; default %(default)s",
    )
    parser.add_argument(
        "--steps", type=whole(1), default=30, help="optimizer steps; default %(default)s"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments, overrides = parser.parse_known_args()
    check_new(arguments.json, "--json")
    # A wrong key is reported here and not after the first trainings.
    load_config(arguments.config, overrides)
    return arguments, overrides


def main() -> None:
    arguments, overrides = parse_arguments()
    if arguments.config.stem == "demo":
        # Several micro-batches in each step, without rounding to 16 bits.
        overrides = [
            "--training.global_batch_tokens=2048",
            "--training.max_tokens_per_batch=512",
            "--model.dtype=float32",
            *overrides,
        ]
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        # One process always runs, because the others are compared with it.
        for strategy in dict.fromkeys(["one", *arguments.strategies]):
            print(f"{strategy} …", file=sys.stderr)
            runs[strategy] = run(strategy, arguments, overrides, Path(folder))
    rows = {strategy: compare(result, runs["one"]) for strategy, result in runs.items()}
    show(rows, arguments)
    if arguments.json:
        command = " ".join(["python", "bench/strategies.py", *sys.argv[1:]])
        report = {"command": command, "processes": arguments.processes, "rows": rows}
        write_json(arguments.json, report | describe_environment())


def run(
    strategy: str, arguments: argparse.Namespace, overrides: list[str], folder: Path
) -> dict[str, Any]:
    """Train once -> the rows of the steps, environment.json and metrics.json."""
    output = folder / strategy
    command = [sys.executable]
    if strategy != "one":
        command += [
            "-m",
            "accelerate.commands.launch",
            f"--config_file={ROOT / 'accelerate_configs' / f'{strategy}.yaml'}",
            f"--num_processes={arguments.processes}",
            # With port 0 the launcher looks for a free one.
            "--main_process_port=0",
        ]
    command += [
        str(ROOT / "recipes" / "sft_qlora.py"),
        f"--config={arguments.config}",
        f"--output_dir={output}",
        "--data.test=[]",
        f"--data.cache_dir={folder / 'cache'}",
        f"--training.max_steps={arguments.steps}",
        # The number of steps ends a training, and the data must not run out before.
        "--training.epochs=1000",
        *overrides,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StrategyRunError(f"{strategy} failed:\n{done.stderr[-1500:]}")
    rows = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return {
        # Rows without a loss are those of evaluations.
        "steps": [row for row in rows if "loss" in row],
        "environment": json.loads((output / "environment.json").read_text()),
        "metrics": json.loads((output / "metrics.json").read_text()),
    }


def compare(run: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """A strategy's largest relative differences to one process, its start-up check, memory and
    speed.
    """
    metrics = run["metrics"]
    return {
        "loss_difference": largest_difference(run["steps"], one["steps"], "loss"),
        "grad_norm_difference": largest_difference(run["steps"], one["steps"], "grad_norm"),
        "gradient_check": run["environment"].get("gradient_check"),
        "memory_bytes": metrics["memory_bytes"],
        "peak_memory_bytes_per_rank": metrics["peak_memory_bytes_per_rank"],
        "speed": median_speed(run["steps"]) / median_speed(one["steps"]),
        "losses": [row["loss"] for row in run["steps"]],
    }


def largest_difference(rows: list[dict], others: list[dict], key: str) -> float:
    # Step by step the rows are the same, whatever the number of processes. Any difference comes
    # from the strategy.
    pairs = zip(rows, others, strict=True)
    # Python's max() would pass over NaN.
    return float(np.max([abs(row[key] - other[key]) / other[key] for row, other in pairs]))


def median_speed(rows: list[dict]) -> float:
    # The median is not moved by the few steps that compile or save.
    return sorted(row["tokens_per_second"] for row in rows)[len(rows) // 2]


def show(rows: dict[str, dict], arguments: argparse.Namespace) -> None:
    title = (
        f"{arguments.config.stem}, {arguments.steps} steps, {arguments.processes} processes"
        " against one"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("strategy")
    columns = ("loss differs by", "grad norm by", "check, s", "peak memory of a rank", "tokens/s")
    for column in columns:
        table.add_column(column, justify="right")
    for strategy, row in rows.items():
        # One process divides nothing and has no such check.
        check = row["gradient_check"]
        peak = max(row["peak_memory_bytes_per_rank"]) / 2**20
        table.add_row(
            strategy,
            f"{row['loss_difference']:.0e}",
            f"{row['grad_norm_difference']:.0e}",
            f"{check['seconds']:.1f}" if check else "–",
            f"{peak:,.0f} MiB",
            f"{row['speed']:.2f} x",
        )
    make_console().print(table)


if __name__ == "__main__":
    run_command(main)
