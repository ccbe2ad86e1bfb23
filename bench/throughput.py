"""How long will it take? Tokens per second of real optimizer steps, for one setting or a sweep of
them.

    python bench/throughput.py                                          # the demonstration
    python bench/throughput.py --config recipes/configs/llama3-8b_medmcqa.yaml --lengths full \\
        --sweep data.max_length=512,1024 --sweep training.gradient_checkpointing=none,full \\
        --json found.json --plot found.png

Each case of the sweep runs in a process of its own on made-up rows; the weights are random where
--model.base names no folder with weights, which changes neither speed nor memory. Loading and the
first steps (compilation, tuning) are timed apart and left out. A case that fails is kept with its
reason, and the others go on.

    model FLOPs per token = (4 + 2 x recomputed layers / layers) x N N: weights of the decoder
        layers' linear maps, adapters included. Forward and the gradient of the input take 2 N each,
        recomputation 2 N more; frozen weights need no gradient of their own (2 N in full training,
        hence the usual 6 N). Left out: attention's products, the head at labelled positions,
        dequantization. utilisation = model FLOPs per second / peak FLOPs of the device: the maker's
        dense rate for this dtype on a known GPU, or --peak_tflops; on a CPU the rate of a large
        matrix product, measured here in the same process.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from medqlora.batches.plan import list_budgets, make_plan
from medqlora.core.command import run_command, run_early
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

DEMO = Path(__file__).parent.parent / "recipes" / "configs" / "demo.yaml"


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
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
        "--steps", type=int, default=10, help="optimizer steps that are timed (default 10)"
    )
    parser.add_argument(
        "--warm_up", type=int, default=2, help="steps before them that are not (default 2)"
    )
    parser.add_argument(
        "--peak_tflops", type=float, help="the device's dense rate, where it is not known here"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, after each case")
    parser.add_argument(
        "--plot", type=Path, help="picture of rates and step times (.png or .svg; needs matplotlib)"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    load_config(arguments.config, overrides)
    return arguments, overrides


if __name__ == "__main__":
    # A mistake is said before torch is imported, which takes seconds. torch reads the allocator's
    # variable when it is imported.
    ARGUMENTS, OVERRIDES = run_early(parse_arguments)
    prefer_expandable_segments(os.environ)

import huggingface_hub
import torch
import transformers

from medqlora.model.hardware import choose_dtype, default_device
from medqlora.training.memory.allocator import segments_expand
from medqlora.training.memory.architectures import read_architecture
from medqlora.training.memory.estimate import assume_labelled
from medqlora.training.memory.planner import plan_step
from medqlora.training.memory.target import TargetHardware, available_host, available_memory
from medqlora.training.strategies.launch import Strategy, choose_storage
from medqlora.training.trial import Trial, count_flops, draw_lengths, find_peak, make_table

ARCHITECTURES = Path(__file__).parent / "architectures"


SUPERVISED_PER_ROW = 2  # a letter and the end token


console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    arguments = ARGUMENTS
    overrides = OVERRIDES
    warnings.simplefilter("ignore", FutureWarning)  # Libraries warn each other.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    if arguments.worker:
        write_json(arguments.worker, run_case(load_config(arguments.config, overrides), arguments))
        return
    cases = check(arguments, overrides)
    results = []
    try:
        for flags in cases:
            results.append(start_case(arguments, overrides, flags))
            say(results[-1])
            if arguments.json:
                write_json(
                    arguments.json,
                    {
                        "command": name_command("bench/throughput.py", sys.argv[1:]),
                        "environment": describe_environment(),
                        "cases": results,
                    },
                )
    finally:  # also of a sweep that is interrupted
        if results:
            show(results)
    if arguments.plot and any("error" not in found for found in results):
        draw(results, arguments.plot)
    if all("error" in found for found in results):
        raise ConfigError(f"no case could be measured; the first: {results[0]['error']}")


def check(arguments: argparse.Namespace, overrides: list[str]) -> list[dict[str, str]]:
    """The cases of the sweep, every one a valid configuration."""
    check_new(arguments.json, "--json")
    check_picture(arguments.plot)
    if arguments.steps < 1 or arguments.warm_up < 0:
        raise ConfigError(
            f"--steps {arguments.steps}, --warm_up {arguments.warm_up}: expected 1 or more, and 0"
            " or more"
        )
    if arguments.peak_tflops is not None and not arguments.peak_tflops > 0:
        raise ConfigError(f"--peak_tflops {arguments.peak_tflops}: expected a number above 0")
    swept = []
    for text in arguments.sweep:
        key, equals, values = text.partition("=")
        if not equals or "." not in key or not all(values.split(",")):
            raise ConfigError(f"--sweep {text}: expected section.key=value,value")
        swept.append([(key, value) for value in values.split(",")])
    cases = [dict(case) for case in itertools.product(*swept)]
    for case in cases:
        config = load_config(arguments.config, [*overrides, *list_flags(case)])
        list_budgets(config.training, config.data.max_length, 1)
        read_architecture(config.model.base, ARCHITECTURES, config.model.revision)
    return cases


def list_flags(case: dict[str, str]) -> list[str]:
    return [part for key, value in case.items() for part in (f"--{key}", value)]


def start_case(arguments: argparse.Namespace, overrides: list[str], case: dict[str, str]) -> dict:
    """One case in a process of its own, which may run out of memory without taking the others
    along.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        flags = [
            "--config",
            str(arguments.config),
            "--lengths",
            arguments.lengths,
            "--steps",
            str(arguments.steps),
            "--warm_up",
            str(arguments.warm_up),
        ]
        flags += ["--peak_tflops", str(arguments.peak_tflops)] if arguments.peak_tflops else []
        done = subprocess.run(
            [
                sys.executable,
                __file__,
                *flags,
                "--worker",
                str(file),
                *overrides,
                *list_flags(case),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode == 0 and file.is_file():
            return {"case": case} | json.loads(file.read_text(encoding="utf-8"))
        reason = (
            done.stderr.strip().splitlines()
            or [f"killed by signal {-done.returncode}; out of memory?"]
        )[-1]
        return {"case": case, "error": reason[:300]}


def run_case(config: Config, arguments: argparse.Namespace) -> dict:
    device = default_device()
    meter = MemoryMeter(cuda=device.type == "cuda")
    before = meter.now()
    began = time.perf_counter()
    architecture = read_architecture(config.model.base, ARCHITECTURES, config.model.revision)
    config = decide(config, architecture, device)
    folder = Path(config.model.base).expanduser()
    weights = folder.is_dir() and any(folder.glob("*.safetensors"))
    trial = Trial(config, None if weights else architecture, device)
    loaded = time.perf_counter() - began
    table, plan = make_rows(config, arguments, trial.vocabulary)
    began = time.perf_counter()
    for step in range(arguments.warm_up):
        trial.step(table, plan, step)
    warm = time.perf_counter() - began
    steps = [trial.step(table, plan, arguments.warm_up + step) for step in range(arguments.steps)]
    seconds = np.array([step.seconds for step in steps])
    total = seconds.sum()
    tokens = sum(step.tokens for step in steps)
    flops = count_flops(trial, trial.recomputed) * tokens / total
    peak, source = find_peak(device, trial.dtype, arguments.peak_tflops)
    # rows are packed without padding, or run alone: every computed token is a real one
    computed = tokens
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
        "random_weights": not weights,
        "tokens_per_second": computed / total,
        "real_tokens_per_second": tokens / total,
        "supervised_tokens_per_second": sum(step.supervised for step in steps) / total,
        "samples_per_second": sum(step.rows for step in steps) / total,
        "step_seconds": {
            "mean": seconds.mean(),
            **{f"p{q}": float(np.percentile(seconds, q)) for q in (50, 90, 99)},
            "all": seconds.tolist(),
        },
        "data_wait_fraction": sum(step.data_seconds for step in steps) / total,
        "load_seconds": loaded,
        "warm_up_seconds": warm,
        "model_flops_per_second": flops,
        "peak_flops": peak,
        "peak_source": source,
        "model_flops_utilisation": flops / peak if peak else None,
        "peak_memory_bytes": meter.read_peak() - (0 if device.type == "cuda" else before),
        "loss": steps[-1].loss,
    }


def decide(
    config: Config, architecture: transformers.PretrainedConfig, device: torch.device
) -> Config:
    """What is auto, decided as the recipe does: by forecast, for the memory that is free here."""
    training = config.training
    dtype = choose_dtype(config.model.dtype, device)
    if "auto" not in (training.max_tokens_per_batch, training.gradient_checkpointing):
        return config
    one = Strategy("one")
    storage = choose_storage(one, config.model.quantization, dtype)
    target = TargetHardware(
        device,
        dtype,
        storage,
        one,
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


def make_rows(config: Config, arguments: argparse.Namespace, vocabulary: int):
    """Rows for all steps, and their plan."""
    training = config.training
    longest = config.data.max_length
    wanted = (arguments.steps + arguments.warm_up + 1) * training.global_batch_tokens
    mean = (
        longest
        if arguments.lengths == "full"
        else draw_lengths(1_000, longest, training.seed).mean()
    )
    count = int(1.2 * wanted / mean) + 1
    lengths = (
        np.full(count, longest)
        if arguments.lengths == "full"
        else draw_lengths(count, longest, training.seed)
    )
    table = make_table(lengths, SUPERVISED_PER_ROW, vocabulary, training.seed)
    settings = {
        "capacity": training.max_tokens_per_batch,
        "global_tokens": training.global_batch_tokens,
        "seed": training.seed,
    }
    return table, make_plan(
        lengths,
        **settings,
        packing=config.data.packing,
        max_steps=arguments.steps + arguments.warm_up,
    )


def name_case(found: dict) -> str:
    return (
        ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in found["case"].items())
        or "as configured"
    )


def say(found: dict) -> None:
    if "error" in found:
        console.print(f"[yellow]{name_case(found)}: {found['error']}")
    else:
        console.print(f"{name_case(found)}: {found['real_tokens_per_second']:,.0f} tokens/s")


def show(results: list[dict]) -> None:
    table = Table(title="training throughput", title_justify="left")
    columns = (
        "case",
        "tokens/s",
        "supervised/s",
        "rows/s",
        "step s (p50, p90)",
        "data",
        "utilisation",
        "peak GiB",
        "layers recomputed",
        "warm-up s",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "case" else "right")
    for found in results:
        if "error" in found:
            table.add_row(name_case(found), "–", *[""] * (len(columns) - 3), "failed")
            continue
        times = found["step_seconds"]
        used = found["model_flops_utilisation"]
        table.add_row(
            name_case(found),
            f"{found['real_tokens_per_second']:,.0f}",
            f"{found['supervised_tokens_per_second']:,.0f}",
            f"{found['samples_per_second']:,.1f}",
            f"{times['p50']:.3f}, {times['p90']:.3f}",
            f"{found['data_wait_fraction']:.1%}",
            "?" if used is None else f"{used:.0%}",
            f"{found['peak_memory_bytes'] / 2**30:.2f}",
            f"{found['recomputed_layers']} of {found['layers']}",
            f"{found['warm_up_seconds']:.1f}",
        )
    Console(highlight=False, width=None if sys.stdout.isatty() else 180).print(table)
    first = next((found for found in results if "error" not in found), None)
    if first:
        where = (
            f"utilisation of {first['peak_flops'] / 1e12:,.2f} TFLOP/s ({first['peak_source']})"
            if first["peak_flops"]
            else first["peak_source"]
        )
        console.print(
            f"{first['device']}, {first['dtype']}, attention {first['attention']}; {where};"
            " formula: --help"
        )


def draw(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [found for found in results if "error" not in found]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.2 + 0.5 * len(good) + 0.8), layout="constrained", sharey=True
    )
    places = np.arange(len(good))
    bars = left.barh(places, [found["real_tokens_per_second"] for found in good], height=0.6)
    left.bar_label(bars, fmt="{:,.0f}", padding=3)
    left.margins(x=0.18)
    right.boxplot(
        [found["step_seconds"]["all"] for found in good],
        positions=places,
        orientation="horizontal",
        widths=0.5,
        manage_ticks=False,
    )
    left.set(
        xlabel="tokens per second", yticks=places, yticklabels=[name_case(found) for found in good]
    )
    left.invert_yaxis()
    right.set(xlabel="seconds of a step (median, quartiles, range)", xlim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_command(main)
