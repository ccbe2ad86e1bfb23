"""Fill in launch/slurm_train.sbatch for one recipe, and submit it to Slurm.

    python launch/submit.py --accelerate_config accelerate_configs/ddp.yaml \\
        --config recipes/configs/llama3-8b_medmcqa.yaml \\
        --output_dir runs/llama3 --nodes 8 --gpus_per_node 8 --time 12:00:00 --partition gpu \\
        --training.global_batch_tokens 524288 --dry_run

--dry_run prints the script instead of submitting it. Flags such as --training.lr set keys of the
recipe. With --stages STAGES.yaml in the place of --config the job runs recipes/train_stages.py, and
flags have the form --NAME.section.key. Run this command from the root of the checkout, while the
environment that has medqlora is active.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from medqlora.batches.budgets import describe_batch
from medqlora.core.command import CommandParser, run_command, run_early, whole
from medqlora.core.config import Config
from medqlora.core.config_loading import load_config
from medqlora.core.environment import prefer_expandable_segments
from medqlora.core.errors import ConfigError
from medqlora.core.run_folder import check_run
from medqlora.training.stages import read_stages


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--accelerate_config",
        type=Path,
        required=True,
        help="YAML file of the strategy; its numbers of machines and processes are replaced",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="YAML file of the recipe")
    what.add_argument(
        "--stages", type=Path, metavar="STAGES.yaml", help="list for recipes/train_stages.py"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        help="run folder, on a filesystem that all nodes share",
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        help="the training script (default: recipes/sft_qlora.py; with --stages"
        " recipes/train_stages.py)",
    )
    parser.add_argument(
        "--nodes", type=whole(1), default=1, help="number of nodes (default %(default)s)"
    )
    parser.add_argument(
        "--gpus_per_node",
        type=whole(1),
        default=1,
        help="number of processes per node, one per GPU (default %(default)s)",
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="ask for no GPUs; --gpus_per_node is then only a number of processes",
    )
    parser.add_argument(
        "--cpus_per_gpu",
        type=whole(1),
        default=8,
        help="CPU cores per process; not used with --cpu (default %(default)s)",
    )
    parser.add_argument(
        "--time",
        default="24:00:00",
        help=(
            "time limit as [DAYS-]HH:MM:SS; two minutes before it the job requeues itself (default"
            " %(default)s)"
        ),
    )
    parser.add_argument(
        "--job_name", help="name of the job (default: the name of the recipe's YAML file)"
    )
    parser.add_argument("--partition", help="Slurm partition (default: that of the cluster)")
    parser.add_argument("--account", help="Slurm account (default: that of the user)")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="DIRECTIVE",
        help="a further Slurm directive, such as --sbatch=--mem=0; may be repeated",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print the script and submit nothing"
    )
    arguments, overrides = parser.parse_known_args()
    if arguments.stages is not None and arguments.recipe is not None:
        raise ConfigError("--recipe: --stages is for recipes/train_stages.py alone; leave one out")
    name = "sft_qlora.py" if arguments.stages is None else "train_stages.py"
    arguments.recipe = arguments.recipe or Path("recipes") / name
    list_runs(arguments, overrides)
    return arguments, overrides


def list_runs(arguments: argparse.Namespace, overrides: list[str]) -> list[tuple[Path, Config]]:
    """Return the run folder and the configuration of the run, or of each stage.

    Raises:
        UserError: A configuration cannot be used.
    """
    if arguments.stages is None:
        return [(arguments.output_dir, load_config(arguments.config, overrides))]
    stages = read_stages(arguments.stages, overrides, arguments.output_dir)
    return [(stage.folder, stage.config) for stage in stages]


if __name__ == "__main__":
    # The arguments are checked before torch is imported, which takes seconds. The variable of its
    # allocator must be set before, because torch reads it while it is imported.
    ARGUMENTS, OVERRIDES = run_early(parse_arguments)
    prefer_expandable_segments(os.environ)

from medqlora.model.hardware import DTYPES
from medqlora.training.strategies.launch import (
    check_strategy,
    launch_environ,
    read_accelerate_config,
    read_strategy,
)

TEMPLATE = Path(__file__).parent / "slurm_train.sbatch"


def main() -> None:
    arguments = ARGUMENTS
    overrides = OVERRIDES
    # A mistake is refused here, and not after hours in the queue.
    runs = list_runs(arguments, overrides)
    ranks = arguments.nodes * arguments.gpus_per_node
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", arguments.time):
        raise ConfigError(f"--time {arguments.time}: expected [DAYS-]HH:MM:SS")
    for path in (arguments.accelerate_config, arguments.recipe):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; give its path from the root of the checkout")
    check_directives(arguments)
    tree = read_accelerate_config(arguments.accelerate_config)
    # YAML reads a bare NO as false.
    if tree.get("distributed_type") in (None, "NO", False) and ranks > 1:
        raise ConfigError(
            f"--accelerate_config {arguments.accelerate_config} is for one process, but --nodes x"
            f" --gpus_per_node asks for {ranks}; use a ddp, zero or fsdp2 file"
        )
    environ = launch_environ(tree)
    batches = []
    for folder, config in runs:
        # auto means the dtype of the nodes' GPUs, which this machine may not have. It is assumed to
        # be bfloat16.
        dtype = DTYPES.get(config.model.dtype, DTYPES["bfloat16"])
        check_strategy(read_strategy(environ, ranks), config, dtype, environ)
        batches.append(describe_batch(config.training, config.data.max_length, ranks))
        # The job passes --resume, so a run of the same configuration may be there already.
        check_run(folder, config, resume=True)
    note = describe(arguments, ranks, "; then ".join(batches), overrides)
    # The note sets the script's arguments, so it must stand above all that reads them. The template
    # must keep this line, or the arguments would be lost without a word.
    script = fill(arguments).replace("set -euo pipefail\n", f"set -euo pipefail\n{note}", 1)
    if arguments.dry_run:
        print(script, end="")
        return
    try:
        # sbatch takes the script from its standard input, so no file is left behind.
        done = subprocess.run(
            ["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        raise ConfigError(
            "sbatch was not found; submit from a machine of the cluster, or print the script with"
            " --dry_run"
        ) from None
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"sbatch refused the job: {error.stderr.strip()}") from None
    job = done.stdout.strip()
    name = name_job(arguments)
    print(
        f"job {job}: {ranks} processes; its output is {name}-{job}.out, the logs of each rank are"
        f" in {arguments.output_dir}/launch/"
    )


def name_job(arguments: argparse.Namespace) -> str:
    """Return the given name of the job, or that of its YAML file."""
    return arguments.job_name or (arguments.stages or arguments.config).stem


def check_directives(arguments: argparse.Namespace) -> None:
    """Refuse a text that would end its line in the script, where the rest would be a command.

    Raises:
        ConfigError: A directive has a line break, or a name begins with a dash or has a blank.
    """
    names = {
        "--job_name": name_job(arguments),
        "--partition": arguments.partition,
        "--account": arguments.account,
    }
    for flag, name in names.items():
        if name is not None and not re.fullmatch(r"[^\s-]\S*", name):
            raise ConfigError(f"{flag} {name!r}: expected a name without blanks and line breaks")
    for directive in arguments.sbatch:
        if not directive.startswith("-") or not directive.isprintable():
            raise ConfigError(f"--sbatch {directive!r}: expected one directive, such as --mem=0")


def fill(arguments: argparse.Namespace) -> str:
    """Return the template with the directives of this job."""
    # A directive with None is taken out of the template and left to the cluster.
    directives = {
        "job-name": name_job(arguments),
        "nodes": str(arguments.nodes),
        "time": arguments.time,
        "partition": arguments.partition,
        "account": arguments.account,
        "cpus-per-task": None,
        "gpus-per-node": None,
    }
    if not arguments.cpu:
        directives["cpus-per-task"] = str(arguments.gpus_per_node * arguments.cpus_per_gpu)
        directives["gpus-per-node"] = str(arguments.gpus_per_node)
    replaced = tuple(f"#SBATCH --{key}=" for key in directives)
    lines = TEMPLATE.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith(replaced)]
    first = next(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    given = [f"#SBATCH --{key}={value}" for key, value in directives.items() if value is not None]
    lines[first:first] = given
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    # Slurm takes the last of two equal directives, so those of the command line stand last.
    lines[last + 1 : last + 1] = [f"#SBATCH {directive}" for directive in arguments.sbatch]
    return "\n".join(lines) + "\n"


def describe(arguments: argparse.Namespace, ranks: int, batch: str, overrides: list[str]) -> str:
    """Return the lines of the script that say the numbers of the job and set its arguments."""
    script_arguments = [
        str(arguments.accelerate_config),
        str(arguments.recipe),
        *([str(arguments.stages)] if arguments.stages else ["--config", str(arguments.config)]),
        "--output_dir",
        str(arguments.output_dir),
    ]
    # Arguments are quoted for bash, because paths may hold spaces.
    return (
        f"# {ranks} processes = {arguments.nodes} node(s) x {arguments.gpus_per_node}; {batch}\n"
        f"export MEDQLORA_PROCESSES_PER_NODE={arguments.gpus_per_node}\n"
        f"set -- {shlex.join(script_arguments + overrides)}\n"
    )


if __name__ == "__main__":
    run_command(main)
