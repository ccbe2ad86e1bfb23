"""The same experiment under every strategy: losses, gradient norms, memory and speed side by side,
against one process.

    python bench/strategies.py --json bench/results/cpu-2-cores/strategies_demo.json
    python bench/strategies.py --config recipes/configs/NAME.yaml --processes 8 --steps 30 \\
        [--section.key VALUE ...]

Runs recipes/sft_qlora.py under the files of accelerate_configs/, one after the other, on the GPUs
of this machine or, without any, on its CPU. Speeds are ratios to one process of the same run; on a
CPU, processes share its cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from medqlora.core.command import run_command
from medqlora.core.environment import describe_environment
from medqlora.core.errors import UserError
from medqlora.core.files import check_new, write_json

ROOT = Path(__file__).parent.parent
STRATEGIES = ("one", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")


class StrategyRunError(UserError):
    """A strategy that did not get through."""


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "recipes" / "configs" / "demo.yaml",
        help="recipe YAML; default %(default)s",
    )
    parser.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="default: all"
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="of every strategy but one; default %(default)s"
    )
    parser.add_argument("--steps", type=int, default=30, help="default %(default)s")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_known_args()


def main() -> None:
    arguments, overrides = parse_arguments()
    check_new(arguments.json, "--json")
    if arguments.config.stem == "demo":
        overrides = [
            "--training.global_batch_tokens",
            "2048",
            "--training.max_tokens_per_batch",
            "512",
            "--model.dtype",
            "float32",
            *overrides,
        ]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for strategy in dict.fromkeys(["one", *arguments.strategies]):
            print(f"{strategy} …", file=sys.stderr)
            found[strategy] = run(strategy, arguments, overrides, Path(folder))
    rows = {strategy: compare(facts, found["one"]) for strategy, facts in found.items()}
    show(rows, arguments)
    if arguments.json:
        command = " ".join(["python", "bench/strategies.py", *sys.argv[1:]])
        write_json(
            arguments.json,
            {"command": command, "processes": arguments.processes, "rows": rows}
            | describe_environment(),
        )


def run(
    strategy: str, arguments: argparse.Namespace, overrides: list[str], folder: Path
) -> dict[str, Any]:
    """Train once; -> log rows and what the run folder says of the strategy."""
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        ROOT / "accelerate_configs" / f"{strategy}.yaml",
        "--num_processes",
        arguments.processes,
        "--main_process_port",
        "0",
    ]
    recipe = [
        ROOT / "recipes" / "sft_qlora.py",
        "--config",
        arguments.config,
        "--output_dir",
        folder / strategy,
        "--data.test",
        "[]",
        "--data.cache_dir",
        folder / "cache",
        "--training.max_steps",
        arguments.steps,
        "--training.epochs",
        "1000",
        *overrides,
    ]
    command = [sys.executable, *recipe] if strategy == "one" else [*launch, *recipe]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise StrategyRunError(f"{strategy} failed:\n{done.stderr[-1500:]}")
    rows = [
        json.loads(line)
        for line in (folder / strategy / "train_log.jsonl").read_text().splitlines()
    ]
    facts = json.loads((folder / strategy / "environment.json").read_text())
    metrics = json.loads((folder / strategy / "metrics.json").read_text())
    return {"steps": [row for row in rows if "loss" in row], "facts": facts, "metrics": metrics}


def compare(run: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """Largest relative differences to one process, the start-up check, highest memory of a rank,
    speed (median step) against one process.
    """
    pairs = list(zip(run["steps"], one["steps"], strict=True))
    speeds = [
        sorted(row["tokens_per_second"] for row in steps)[len(steps) // 2]
        for steps in (run["steps"], one["steps"])
    ]
    return {
        "loss_difference": max(
            abs(row["loss"] - other["loss"]) / other["loss"] for row, other in pairs
        ),
        "grad_norm_difference": max(
            abs(row["grad_norm"] - other["grad_norm"]) / other["grad_norm"] for row, other in pairs
        ),
        "gradient_check": run["facts"].get("gradient_check"),
        "memory_bytes": run["metrics"]["memory_bytes"],
        "peak_memory_bytes_per_rank": run["metrics"]["peak_memory_bytes_per_rank"],
        "speed": speeds[0] / speeds[1],
        "losses": [row["loss"] for row in run["steps"]],
    }


def show(rows: dict[str, dict], arguments: argparse.Namespace) -> None:
    table = Table(
        title=(
            f"{arguments.config.stem}, {arguments.steps} steps, {arguments.processes} processes"
            " against one"
        ),
        title_justify="left",
    )
    for column in (
        "strategy",
        "loss differs by",
        "grad norm by",
        "check, s",
        "peak memory of a rank",
        "tokens/s",
    ):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for strategy, row in rows.items():
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
    Console(highlight=False).print(table)


if __name__ == "__main__":
    run_command(main)
