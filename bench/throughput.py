"""How long will it take? Tokens per second of real optimizer steps, for one setting or a sweep of
them.

    # The demonstration.
    python bench/throughput.py
    python bench/throughput.py --config recipes/configs/llama3-8b_medmcqa.yaml --lengths full \\
        --sweep data.max_length=512,1024 --sweep training.gradient_checkpointing=none,full \\
        --json found.json --plot found.png

Each case of the sweep runs in a process of its own on made-up rows. The weights are random where
--model.base names no folder with weights, which changes neither speed nor memory. Loading and the
first steps, with their compilation and tuning, are timed apart and left out. A case that fails is
kept with its reason, and the others go on.

    model FLOPs per token = (4 + 2 x recomputed layers / layers) x N

N counts the weights of the decoder layers' linear maps, adapters included. Forward and the gradient
of the input take 2 N each, recomputation 2 N more. Frozen weights need no gradient of their own,
which takes 2 N in full training, hence the usual 6 N. Attention's products, the head at labelled
positions and dequantization are left out.

    utilisation = model FLOPs per second / peak FLOPs of the device

The peak of a known GPU is the maker's dense rate for this dtype; --peak_tflops is for other GPUs.
On a CPU it is the rate of a large matrix product, measured in the same process.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

import numpy as np
from rich.table import Table

from medqlora.batches.budgets import list_budgets
from medqlora.batches.plan import Plan, make_plan
from medqlora.core.command import (
    CommandParser,
    above_zero,
    make_console,
    quiet_libraries,
    run_command,
    run_early,
    whole,
)
from medqlora.core.config import Config
from medqlora.core.config_loading import change, load_config
from medqlora.core.environment import (
    MemoryMeter,
    describe_environment,
    name_command,
    prefer_expandable_segments,
)
from medqlora.core.errors import ConfigError
from medqlora.core.files import check_new, check_picture, write_json
from medqlora.prompts.rows import TokenTable

DEMO = Path(__file__).parent.parent / "recipes" / "configs" / "demo.yaml"


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Read and check the command line; the list holds the overrides of the recipe's keys."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=DEMO,
        help=(
            "recipe YAML (default: the demonstration); any key can be given as --section.key VALUE"
        ),
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="values of a key to try; several sweeps are combined",
    )
    parser.add_argument(
        "--lengths",
        choices=["medmcqa", "full"],
        default="medmcqa",
        help="rows like MedMCQA's, or all of data.max_length (default medmcqa)",
    )
    parser.add_argument(
        "--steps", type=whole(1), default=10, help="optimizer steps that are timed (default 10)"
    )
    parser.add_argument(
        "--warm_up", type=whole(0), default=2, help="steps before them that are not (default 2)"
    )
    parser.add_argument(
        "--peak_tflops", type=above_zero, help="the device's dense rate, where it is not known here"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, after each case")
    parser.add_argument(
        "--plot", type=Path, help="picture of rates and step times (.png or .svg; needs matplotlib)"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    check_arguments(arguments)
    # All cases are read before the first one runs, so a wrong value does not end a long sweep.
    for flags in list_cases(arguments.sweep):
        config = load_config(arguments.config, [*overrides, *to_flags(flags)])
        list_budgets(config.training, config.data.max_length, 1)
    return arguments, overrides


def check_arguments(arguments: argparse.Namespace) -> None:
    check_new(arguments.json, "--json")
    check_picture(arguments.plot)


def list_cases(sweeps: list[str]) -> list[dict[str, str]]:
    """Every combination of the swept values, as values by key."""
    swept = []
    for text in sweeps:
        key, equals, values = text.partition("=")
        if not equals or "." not in key or not all(values.split(",")):
            raise ConfigError(f"--sweep {text}: expected section.key=value,value")
        swept.append([(key, value) for value in values.split(",")])
    # Without sweeps this is one empty case.
    return [dict(case) for case in itertools.product(*swept)]


def to_flags(case: dict[str, str]) -> list[str]:
    return [f"--{key}={value}" for key, value in case.items()]


if __name__ == "__main__":
    # Importing torch takes seconds, so mistakes are reported before. torch reads the allocator's
    # variable when it is imported.
    ARGUMENTS, OVERRIDES = run_early(parse_arguments)
    prefer_expandable_segments(os.environ)

import huggingface_hub
import torch
from transformers import PretrainedConfig

from medqlora.model.hardware import choose_dtype, default_device
from medqlora.training.memory.allocator import segments_expand
from medqlora.training.memory.architectures import read_architecture
from medqlora.training.memory.estimate import assume_labelled
from medqlora.training.memory.planner import plan_step
from medqlora.training.memory.target import TargetHardware, available_host, available_memory
from medqlora.training.strategies.launch import Strategy, choose_storage
from medqlora.training.trial import (
    StepTimes,
    Trial,
    count_flops,
    draw_lengths,
    find_peak,
    make_table,
)

ARCHITECTURES = Path(__file__).parent / "architectures"
SUPERVISED_PER_ROW = 2  # a letter and the end token

console = make_console(soft_wrap=True)


def main() -> None:
    arguments = ARGUMENTS
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    huggingface_hub.utils.logging.set_verbosity_error()
    if arguments.worker:
        write_json(arguments.worker, run_case(load_config(arguments.config, OVERRIDES), arguments))
        return
    cases = list_cases(arguments.sweep)
    for case in cases:
        model = load_config(arguments.config, [*OVERRIDES, *to_flags(case)]).model
        # An unknown model is reported before the first case runs.
        read_architecture(model.base, ARCHITECTURES, model.revision)
    results = []
    try:
        for case in cases:
            results.append(start_case(arguments, case))
            report(results[-1])
            if arguments.json:
                figures = {
                    "command": name_command("bench/throughput.py", sys.argv[1:]),
                    "environment": describe_environment(),
                    "cases": results,
                }
                write_json(arguments.json, figures)
    finally:  # The table of an interrupted sweep is shown too.
        if results:
            show(results)
    measured = [result for result in results if "error" not in result]
    if not measured:
        raise ConfigError(f"no case could be measured; the first: {results[0]['error']}")
    if arguments.plot:
        draw(measured, arguments.plot)


def start_case(arguments: argparse.Namespace, case: dict[str, str]) -> dict:
    """Run one case in a process of its own. Where it runs out of memory, the others go on."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        flags = [
            f"--config={arguments.config}",
            f"--lengths={arguments.lengths}",
            f"--steps={arguments.steps}",
            f"--warm_up={arguments.warm_up}",
            f"--worker={output}",
        ]
        if arguments.peak_tflops:
            flags.append(f"--peak_tflops={arguments.peak_tflops}")
        # The last of equal flags wins, so a swept value stands behind the one for all cases.
        command = [sys.executable, __file__, *flags, *OVERRIDES, *to_flags(case)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0 and output.is_file():
            return {"case": case} | json.loads(output.read_text(encoding="utf-8"))
        lines = done.stderr.strip().splitlines()
        # The system kills a process that fills the memory, which leaves no text on stderr.
        reason = lines[-1] if lines else f"killed by signal {-done.returncode}; out of memory?"
        return {"case": case, "error": reason[:300]}


def run_case(config: Config, arguments: argparse.Namespace) -> dict:
    """Load, train, and return the figures of the timed steps."""
    device = default_device()
    meter = MemoryMeter(cuda=device.type == "cuda")
    # On a CPU the libraries are already resident. On a GPU only tensors count, and there are none.
    before = 0 if device.type == "cuda" else meter.now()
    began = time.perf_counter()
    architecture = read_architecture(config.model.base, ARCHITECTURES, config.model.revision)
    config = resolve_auto(config, architecture, device)
    folder = Path(config.model.base).expanduser()
    has_weights = folder.is_dir() and any(folder.glob("*.safetensors"))
    trial = Trial(config, None if has_weights else architecture, device)
    load_seconds = time.perf_counter() - began
    table, plan = make_rows(config, arguments, trial.vocabulary)
    began = time.perf_counter()
    # The timed steps continue the plan where the warm-up ends, so no row is seen twice.
    for step in range(arguments.warm_up):
        trial.step(table, plan, step)
    warm_up_seconds = time.perf_counter() - began
    steps = [trial.step(table, plan, arguments.warm_up + step) for step in range(arguments.steps)]
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(trial.dtype).removeprefix("torch."),
        "attention": trial.backend,
        "compiled": trial.compiled,
        "max_tokens_per_batch": config.training.max_tokens_per_batch,
        "gradient_checkpointing": config.training.gradient_checkpointing,
        "recomputed_layers": trial.recomputed,
        "layers": trial.layers,
        "packing": config.data.packing,
        "rows": arguments.lengths,
        "random_weights": not has_weights,
        **summarize(steps, trial, arguments.peak_tflops),
        "load_seconds": load_seconds,
        "warm_up_seconds": warm_up_seconds,
        # The peak counts from the start of the process, so loading is part of it.
        "peak_memory_bytes": meter.read_peak() - before,
        "loss": steps[-1].loss,
    }


def summarize(steps: list[StepTimes], trial: Trial, peak_tflops: float | None) -> dict:
    """Rates of the timed steps, and the utilisation of the device."""
    seconds = np.array([step.seconds for step in steps])  # [steps]
    total = seconds.sum()
    tokens = sum(step.tokens for step in steps)
    # FLOPs per token times tokens per second are FLOPs per second.
    flops = count_flops(trial, trial.recomputed) * tokens / total
    peak, source = find_peak(trial.device, trial.dtype, peak_tflops)
    return {
        # Rows are packed without padding, or run alone, so every computed token is a real one.
        "tokens_per_second": tokens / total,
        "real_tokens_per_second": tokens / total,
        "supervised_tokens_per_second": sum(step.supervised for step in steps) / total,
        "samples_per_second": sum(step.rows for step in steps) / total,
        "step_seconds": {
            "mean": seconds.mean(),
            **{f"p{q}": float(np.percentile(seconds, q)) for q in (50, 90, 99)},
            "all": seconds.tolist(),
        },
        "data_wait_fraction": sum(step.data_seconds for step in steps) / total,
        "model_flops_per_second": flops,
        "peak_flops": peak,
        "peak_source": source,
        "model_flops_utilisation": flops / peak if peak else None,
    }


def resolve_auto(config: Config, architecture: PretrainedConfig, device: torch.device) -> Config:
    """Replace auto by what the recipe's forecast chooses for the memory that is free here."""
    training = config.training
    if "auto" not in (training.max_tokens_per_batch, training.gradient_checkpointing):
        return config
    dtype = choose_dtype(config.model.dtype, device)
    # A case is one process, whatever the recipe is launched with.
    strategy = Strategy("one")
    target = TargetHardware(
        device,
        dtype,
        choose_storage(strategy, config.model.quantization, dtype),
        strategy,
        available_memory(device),
        available_host(),
        expandable=segments_expand(),
    )
    plan = plan_step(config, architecture, target, lambda tokens: assume_labelled(config, tokens))
    return change(
        config,
        "training",
        max_tokens_per_batch=plan.tokens,
        gradient_checkpointing=plan.checkpointing,
    )


def make_rows(
    config: Config, arguments: argparse.Namespace, vocabulary: int
) -> tuple[TokenTable, Plan]:
    """Rows for all steps, and their plan."""
    training = config.training
    longest = config.data.max_length
    steps = arguments.warm_up + arguments.steps
    full = arguments.lengths == "full"
    # The mean of a thousand draws tells how many rows the steps need.
    mean = longest if full else draw_lengths(1_000, longest, training.seed).mean()
    # The rows' mean differs from the expected one, so more are made than the steps need.
    count = int(1.2 * (steps + 1) * training.global_batch_tokens / mean) + 1
    lengths = np.full(count, longest) if full else draw_lengths(count, longest, training.seed)
    table = make_table(lengths, SUPERVISED_PER_ROW, vocabulary, training.seed)
    plan = make_plan(
        lengths,
        capacity=training.max_tokens_per_batch,
        global_tokens=training.global_batch_tokens,
        seed=training.seed,
        packing=config.data.packing,
        max_steps=steps,
    )
    return table, plan


def name_case(result: dict) -> str:
    settings = [f"{key.rpartition('.')[2]} {value}" for key, value in result["case"].items()]
    return ", ".join(settings) or "as configured"


def report(result: dict) -> None:
    if "error" in result:
        console.print(f"{name_case(result)}: {result['error']}", style="yellow")
    else:
        console.print(f"{name_case(result)}: {result['real_tokens_per_second']:,.0f} tokens/s")


def show(results: list[dict]) -> None:
    table = Table(title="training throughput", title_justify="left")
    table.add_column("case")
    columns = ("tokens/s", "supervised/s", "rows/s", "step s (p50, p90)", "data", "utilisation")
    columns += ("peak GiB", "layers recomputed", "warm-up s")
    for column in columns:
        table.add_column(column, justify="right")
    for result in results:
        if "error" in result:
            table.add_row(name_case(result), "–", *[""] * (len(columns) - 2), "failed")
            continue
        times = result["step_seconds"]
        used = result["model_flops_utilisation"]
        table.add_row(
            name_case(result),
            f"{result['real_tokens_per_second']:,.0f}",
            f"{result['supervised_tokens_per_second']:,.0f}",
            f"{result['samples_per_second']:,.1f}",
            f"{times['p50']:.3f}, {times['p90']:.3f}",
            f"{result['data_wait_fraction']:.1%}",
            "?" if used is None else f"{used:.0%}",
            f"{result['peak_memory_bytes'] / 2**30:.2f}",
            f"{result['recomputed_layers']} of {result['layers']}",
            f"{result['warm_up_seconds']:.1f}",
        )
    # A pipe has no width of its own, so a table gets enough for its columns.
    make_console(width=None if sys.stdout.isatty() else 180).print(table)
    first = next((result for result in results if "error" not in result), None)
    if first:
        peak = first["peak_source"]
        if first["peak_flops"]:
            peak = f"utilisation of {first['peak_flops'] / 1e12:,.2f} TFLOP/s ({peak})"
        console.print(
            f"{first['device']}, {first['dtype']}, attention {first['attention']}; {peak};"
            " formula: --help"
        )


def draw(results: list[dict], path: Path) -> None:
    import matplotlib

    # Agg needs no display.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (11, 2.0 + 0.5 * len(results))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    places = np.arange(len(results))
    rates = [result["real_tokens_per_second"] for result in results]
    bars = left.barh(places, rates, height=0.6)
    left.bar_label(bars, fmt="{:,.0f}", padding=3)
    left.margins(x=0.18)
    names = [name_case(result) for result in results]
    left.set(xlabel="tokens per second", yticks=places, yticklabels=names)
    left.invert_yaxis()
    right.boxplot(
        [result["step_seconds"]["all"] for result in results],
        positions=places,
        orientation="horizontal",
        widths=0.5,
        manage_ticks=False,
    )
    right.set(xlabel="seconds of a step (median, quartiles, range)", xlim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_command(main)
