"""Does it fit? This command predicts the memory of a training step, without weights, GPU or
network, and measures it beside the prediction.

    # The demonstration.
    python bench/memory.py
    # What a step needs, by category.
    python bench/memory.py --config recipes/configs/llama3-8b_medmcqa.yaml
    # What fits a GPU of 8 GiB, and the YAML for it.
    python bench/memory.py --config recipes/configs/llama3-8b_medmcqa.yaml --fit 8GiB
    # The same on a T4.
    python bench/memory.py --config recipes/configs/llama3-8b_medmcqa.yaml --fit 16GiB \\
        --capability 7.5
    python bench/memory.py --config recipes/configs/llama3-8b_medmcqa.yaml --gpus 8 --strategy fsdp
    # Weights, keys and values for serving.
    python bench/memory.py --config recipes/configs/qwen2.5-3b_8gb.yaml --serve 4096
    # Real steps beside the prediction.
    python bench/memory.py --config recipes/configs/demo.yaml --measure --plot memory.png

Any key of a recipe can be given as --section.key VALUE. For a shape that is not shipped in
bench/architectures, give --model.base a config.json of transformers. medqlora/training/memory holds
the forecast and states its assumptions.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

import numpy as np
import psutil
import yaml
from rich.table import Table

from medqlora.batches.budgets import list_budgets
from medqlora.batches.plan import make_plan
from medqlora.core.command import (
    CommandParser,
    make_console,
    quiet_libraries,
    run_command,
    run_early,
    whole,
)
from medqlora.core.config import Config
from medqlora.core.config_loading import change, load_config
from medqlora.core.environment import describe_environment, name_command, prefer_expandable_segments
from medqlora.core.errors import ConfigError
from medqlora.core.files import check_new, check_picture, write_json

DEMO = Path(__file__).parent.parent / "recipes" / "configs" / "demo.yaml"
# The keys are the values of --strategy, and the values are the names in accelerate_configs/.
STRATEGIES = {"ddp": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "fsdp": "fsdp2"}


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Read and check the command line; the list holds the overrides of the recipe's keys."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, default=DEMO, help="recipe YAML (default: the demonstration)"
    )
    add_hardware_flags(parser)
    add_mode_flags(parser)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--plot",
        type=Path,
        help="with --measure: picture of memory over time (.png or .svg; needs matplotlib)",
    )
    # A measurement calls this script again and names the file for its figures here.
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    # Flags that are not known here are keys of the recipe, which load_config checks.
    arguments, overrides = parser.parse_known_args()
    load_config(arguments.config, overrides)
    check_arguments(arguments)
    return arguments, overrides


def add_hardware_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        help=(
            "device of the step; this machine need not have it (default: cuda; with --measure,"
            " the device of this machine)"
        ),
    )
    parser.add_argument(
        "--capability",
        metavar="X.Y",
        help=(
            "compute capability of a GPU that is not here, e.g. 7.5 for a T4 (default: this"
            " machine's, else 8.0)"
        ),
    )
    parser.add_argument(
        "--gpus", type=whole(1), default=1, help="processes that train together (default 1)"
    )
    parser.add_argument(
        "--strategy",
        choices=list(STRATEGIES),
        help="with --gpus: how the processes share the model (default ddp)",
    )


def add_mode_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--supervised",
        type=whole(1),
        help=(
            "supervised tokens of a micro-batch (default: assumed from data.completion; the output"
            " says so)"
        ),
    )
    parser.add_argument(
        "--fit",
        metavar="SIZE",
        help="memory of the GPU, e.g. 8GiB: search what fits and print the YAML to use",
    )
    parser.add_argument(
        "--serve",
        type=whole(1),
        metavar="TOKENS",
        help="forecast of serving: weights, and keys and values of sequences this long",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="train real steps (random weights where the base's are not in a folder) and compare",
    )
    parser.add_argument(
        "--steps", type=whole(1), default=3, help="with --measure: optimizer steps (default 3)"
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    check_new(arguments.json, "--json")
    check_picture(arguments.plot)
    for flag in ("gpus", "steps", "supervised", "serve"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} {value}: expected 1 or more")
    if arguments.strategy and arguments.gpus == 1:
        raise ConfigError(f"--strategy {arguments.strategy} is for several processes; give --gpus")
    if arguments.measure and (arguments.gpus > 1 or arguments.fit is not None or arguments.serve):
        raise ConfigError(
            "--measure is for one process and a given step; leave out --gpus, --fit and --serve"
        )
    if arguments.plot and not arguments.measure:
        raise ConfigError("--plot shows measured memory; give --measure")


if __name__ == "__main__":
    # Importing torch takes seconds, so mistakes are reported before. torch reads the allocator's
    # variable when it is imported.
    ARGUMENTS, OVERRIDES = run_early(parse_arguments)
    prefer_expandable_segments(os.environ)

import huggingface_hub
import torch
from transformers import AutoConfig, PretrainedConfig

from medqlora.model.base import check_length
from medqlora.model.base_weights import check_quantizable
from medqlora.model.hardware import choose_dtype, default_device
from medqlora.training.memory.allocator import segments_expand
from medqlora.training.memory.architectures import forecast_serving, read_architecture
from medqlora.training.memory.estimate import assume_labelled, forecast_plan, make_batch
from medqlora.training.memory.longest import least_memory, longest_sequence
from medqlora.training.memory.planner import cost_of_attention, plan_step
from medqlora.training.memory.target import (
    CONTEXT,
    KERNELS,
    MARGIN,
    StepPlan,
    TargetHardware,
    parse_size,
    usable,
)
from medqlora.training.memory.tracker import GIB, ForecastError
from medqlora.training.methods import choose_method
from medqlora.training.strategies.launch import Strategy, check_strategy, choose_storage
from medqlora.training.trial import Trial, make_table

ARCHITECTURES = Path(__file__).parent / "architectures"
DISPLAY = "0.3 to 1 GiB"  # We assume this for a desktop with a browser.
SEQUENCES = 32  # The forecast for serving assumes so many sequences side by side.

console = make_console(soft_wrap=True)


@dataclass(frozen=True)
class Case:
    """What a forecast is made for.

    Args:
        given: supervised tokens of a micro-batch; None: they are assumed from data.completion.
    """

    config: Config
    architecture: PretrainedConfig
    target: TargetHardware
    given: int | None

    def supervised(self, tokens: int) -> int:
        """Supervised tokens of a micro-batch of so many tokens."""
        return self.given or assume_labelled(self.config, tokens)


def main() -> None:
    arguments = ARGUMENTS
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    huggingface_hub.utils.logging.set_verbosity_error()
    config = load_config(arguments.config, OVERRIDES)
    if arguments.worker:
        write_json(arguments.worker, measure_here(config, arguments))
        return
    began = time.perf_counter()
    architecture = read_architecture(config.model.base, ARCHITECTURES, config.model.revision)
    target = choose_target(config, arguments)
    # A row beyond the model's positions is refused before any forecast is made.
    check_length(architecture, config.data.max_length)
    # A forecast needs no network, so only a folder is looked into.
    if Path(config.model.base).expanduser().is_dir():
        check_quantizable(config.model, architecture)
    case = Case(config, architecture, target, arguments.supervised)
    if arguments.serve:
        check_length(architecture, arguments.serve, "--serve")
        figures = serve(case, arguments.serve)
    elif arguments.fit is not None:
        figures = fit(case, arguments.fit)
    else:
        figures = predict(case)
    figures["model"] = config.model.base
    figures["seconds"] = time.perf_counter() - began
    preview = choose_method(config).preview(architecture, config)
    figures["base_parameters"] = preview.base_parameters
    if kept := preview.describe_kept(config.model, target.dtype):
        console.print(kept)
    console.print(f"{figures['seconds']:.1f} s")
    if arguments.measure:
        figures |= measure(figures, arguments)
    if arguments.json:
        figures["command"] = name_command("bench/memory.py", sys.argv[1:])
        figures["environment"] = describe_environment()
        write_json(arguments.json, figures)
    if arguments.plot:
        draw(figures["timeline"], figures["predicted_peak_bytes"], arguments.plot)


# ---- prediction ----------------------------------------------------------------------------------


def choose_target(config: Config, arguments: argparse.Namespace) -> TargetHardware:
    """The hardware that the flags describe; without --fit its memory has no bound."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    # A forecast is about a GPU unless --device says otherwise; a measurement runs on what is here.
    device = torch.device(arguments.device or (here if arguments.measure else "cuda"))
    if arguments.measure and device.type != here:
        raise ConfigError(
            f"--measure --device {device}: this machine trains on {here}; leave out --device, or"
            " --measure"
        )
    if arguments.capability and (device.type == "cpu" or arguments.measure):
        raise ConfigError(
            "--capability is for a forecast of a GPU that is not here; leave out --device cpu and"
            " --measure"
        )
    capability = parse_capability(arguments.capability)
    # The meaning of auto depends on the capability: a T4 computes in float16.
    dtype = choose_dtype(config.model.dtype, device, capability)
    name = STRATEGIES[arguments.strategy or "ddp"] if arguments.gpus > 1 else "one"
    strategy = Strategy(name, arguments.gpus)
    check_strategy(strategy, config, dtype, {})
    memory = usable(parse_size(arguments.fit), device) if arguments.fit is not None else sys.maxsize
    if memory <= 0:
        raise ForecastError(
            f"--fit {arguments.fit}: {(CONTEXT + KERNELS) / GIB:.2f} GiB go to the CUDA context and"
            " kernels alone; give the memory of a GPU, e.g. 8GiB"
        )
    storage = choose_storage(strategy, config.model.quantization, dtype)
    return TargetHardware(
        device,
        dtype,
        storage,
        strategy,
        memory,
        capability=capability,
        expandable=segments_expand(),
    )


def parse_capability(text: str | None) -> tuple[int, int] | None:
    """ "7.5" -> (7, 5)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)\.(\d)", text)
    if not match:
        raise ConfigError(
            f"--capability {text}: expected a major and a minor number, e.g. 7.5 for a T4 or 8.9"
            " for an RTX 4090"
        )
    return int(match[1]), int(match[2])


def predict(case: Case) -> dict:
    """Forecast the recipe's own step. Where it says auto, every layer is recomputed, because no
    memory is given that a plan could be made for.
    """
    training = case.config.training
    mode = "full" if training.gradient_checkpointing == "auto" else training.gradient_checkpointing
    ranks = case.target.strategy.ranks
    # Of the sizes that auto allows, the last one is the smallest.
    tokens = list_budgets(training, case.config.data.max_length, ranks)[-1]
    supervised = case.supervised(tokens)
    plan = forecast_plan(case.config, case.architecture, case.target, tokens, mode, supervised)
    console.print(f"{case.config.model.base}: {describe(case, plan)}")
    if "auto" in (training.gradient_checkpointing, training.max_tokens_per_batch):
        console.print(
            "the recipe says auto: here every layer is recomputed; --fit SIZE shows what auto"
            " would choose on a GPU"
        )
    show(plan, case.target)
    return collect(plan, case.target)


def describe(case: Case, plan: StepPlan) -> str:
    config = case.config
    forecast = plan.forecast
    strategy = case.target.strategy
    supervised = case.supervised(plan.tokens)
    assumed = "" if case.given else " (assumed)"
    share = f", {strategy.name} on {strategy.ranks} GPUs" if strategy.ranks > 1 else ""
    attention = case.target.choose_attention(config, case.architecture)
    cost = cost_of_attention(config, case.architecture, case.target, plan, supervised)
    more = f", {cost / GIB:+.2f} GiB against the variable-length kernel" if cost is not None else ""
    method = "all weights train" if forecast.full else f"LoRA r={config.lora.r}"
    return (
        f"{config.model.quantization}, {case.target.dtype}, attention {attention.backend}"
        f" ({attention.reason}{more}), {method} ({forecast.trainable:,}"
        f" trainable), {config.training.optimizer}; {plan.tokens:,} tokens per micro-batch in rows"
        f" of {config.data.max_length:,}, {supervised:,} supervised{assumed},"
        f" {forecast.recomputed} of {forecast.layers} layers recomputed{share}, on"
        f" {case.target.device.type}"
    )


def show(plan: StepPlan, target: TargetHardware) -> None:
    forecast = plan.forecast
    table = Table(title="predicted memory of one process at its peak", title_justify="left")
    table.add_column("")
    table.add_column("GiB", justify="right")
    table.add_column("share", justify="right")
    for name, value in sorted(forecast.by_category.items(), key=lambda item: -item[1]):
        if value >= 2**20:
            table.add_row(name, f"{value / GIB:.2f}", f"{value / forecast.peak:.0%}")
    table.add_row("peak", f"{forecast.peak / GIB:.2f}", "", style="bold")
    if target.device.type == "cuda":
        reserved = target.needs(forecast, plan.short)  # bytes
        # This is usable() (target.py) solved for the size of the GPU.
        total = (reserved + CONTEXT + KERNELS) / (1 - MARGIN)
        table.add_row("reserved by the allocator", f"{reserved / GIB:.2f}", "")
        table.add_row("CUDA context and kernels (assumed)", f"{(CONTEXT + KERNELS) / GIB:.2f}", "")
        table.add_row(f"GPU that leaves {MARGIN:.0%} free", f"{total / GIB:.2f}", "")
        if forecast.host:
            table.add_row("pinned in the host's memory", f"{forecast.host / GIB:.2f}", "")
    console.print(table)
    phases = ", ".join(f"{phase} {value / GIB:.2f}" for phase, value in forecast.by_phase.items())
    console.print(f"peak by phase: {phases} GiB")


def collect(plan: StepPlan, target: TargetHardware) -> dict:
    forecast = plan.forecast
    return {
        "predicted_peak_bytes": forecast.peak,
        "predicted_reserved_bytes": target.needs(forecast, plan.short),
        "predicted_host_bytes": forecast.host,
        "context_bytes": CONTEXT + KERNELS if target.device.type == "cuda" else 0,
        "by_category": forecast.by_category,
        "by_phase": forecast.by_phase,
        "loaded_bytes": forecast.loaded,
        "trainable_parameters": forecast.trainable,
        "max_tokens_per_batch": plan.tokens,
        "gradient_checkpointing": plan.checkpointing,
        "recomputed_layers": forecast.recomputed,
        "layers": forecast.layers,
        "device": target.device.type,
        "dtype": str(target.dtype).removeprefix("torch."),
        "gpus": target.strategy.ranks,
        "strategy": target.strategy.name,
        "measured_peak_bytes": None,
        "relative_error": None,
    }


def fit(case: Case, size: str) -> dict:
    """Search what a GPU of this size can train: the fastest plan for the recipe's rows, and the
    longest row.
    """
    # What the recipe says for these two keys is searched for instead.
    config = change(
        case.config, "training", max_tokens_per_batch="auto", gradient_checkpointing="auto"
    )
    case = replace(case, config=config)
    target = case.target
    plan = plan_step(config, case.architecture, target, case.supervised)
    console.print(f"{config.model.base} on a GPU of {size}: {describe(case, plan)}")
    show(plan, target)
    longest = longest_sequence(config, case.architecture, target, case.supervised)
    mode = least_memory(target.device)
    if longest:
        console.print(
            f"longest row that fits, alone in its step with gradient_checkpointing {mode}:"
            f" {longest:,} tokens"
        )
    if target.device.type == "cuda":
        console.print(
            f"a screen on the same GPU takes {DISPLAY} of it: give --fit the memory that"
            " nvidia-smi shows as free before training"
        )
    print_recipe(
        "for rows as long as the recipe's",
        config.data.max_length,
        config.training.global_batch_tokens,
        plan.tokens,
        plan.checkpointing,
    )
    if longest:
        # The step of the longest rows consists of one row on each process.
        step = longest * target.strategy.ranks
        print_recipe("for the longest rows", longest, step, longest, mode)
    return collect(plan, target) | {
        "longest_row": longest,
        "usable_bytes": target.memory,
        "card": size,
    }


def print_recipe(
    purpose: str, max_length: int, global_tokens: int, micro_tokens: int, checkpointing: str
) -> None:
    """Print the YAML of a plan, for a recipe."""
    tree = {
        "data": {"max_length": max_length},
        "training": {
            "global_batch_tokens": global_tokens,
            "max_tokens_per_batch": micro_tokens,
            "gradient_checkpointing": checkpointing,
        },
    }
    console.print(f"\n# {purpose}\n" + yaml.safe_dump(tree, sort_keys=False), end="")


def serve(case: Case, tokens: int) -> dict:
    """Forecast the weights, as stored and merged, and the keys and values of so many tokens."""
    config = case.config
    target = case.target
    title = f"serving {config.model.base}, sequences of {tokens:,} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("weights GiB", "one sequence MiB", f"{SEQUENCES} sequences GiB", "fit"):
        table.add_column(column, justify="right")
    merged = change(config, "model", quantization="none")
    serving = {}
    for name, served in ((config.model.quantization, config), ("merged, 16 bits", merged)):
        needs = forecast_serving(served, case.architecture, target.dtype, tokens)
        weights = needs["weights"]
        sequence = needs["keys_and_values"]
        # Without --fit the memory has no bound.
        fits = None if target.memory == sys.maxsize else (target.memory - weights) // sequence
        table.add_row(
            name,
            f"{weights / GIB:.2f}",
            f"{sequence / 2**20:.0f}",
            f"{(weights + SEQUENCES * sequence) / GIB:.2f}",
            "" if fits is None else f"{max(0, fits):,}",
        )
        serving[name] = needs | {"sequences_that_fit": fits}
    console.print(table)
    stored = serving[config.model.quantization]
    return {
        "serving": serving,
        "tokens": tokens,
        "predicted_peak_bytes": stored["weights"] + stored["keys_and_values"],
        "predicted_reserved_bytes": None,
        "by_category": stored,
        "measured_peak_bytes": None,
        "relative_error": None,
    }


# ---- measurement ---------------------------------------------------------------------------------


def measure(figures: dict, arguments: argparse.Namespace) -> dict:
    """Train the predicted step in a process of its own -> figures that join the prediction's."""
    measured = run_worker(figures, arguments)
    predicted = figures["predicted_peak_bytes"]
    # A negative error means that the forecast was too low.
    error = (predicted - measured["peak"]) / measured["peak"]
    meaning = "resident, above what the process held before"
    if measured["device"] == "cuda":
        meaning = "allocated on the GPU"
        console.print(
            f"measured reserve {measured['reserved'] / GIB:.3f} GiB, predicted"
            f" {figures['predicted_reserved_bytes'] / GIB:.3f} GiB"
        )
    console.print(
        f"measured peak {measured['peak'] / GIB:.3f} GiB ({meaning}), predicted"
        f" {predicted / GIB:.3f} GiB: {error:+.1%}"
    )
    return {
        "measured_peak_bytes": measured["peak"],
        "measured_reserved_bytes": measured["reserved"],
        "relative_error": error,
        "timeline": measured["timeline"],
        "phases": measured["phases"],
        "random_weights": measured["random_weights"],
    }


def run_worker(figures: dict, arguments: argparse.Namespace) -> dict:
    """What measure_here returns, from another process."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "measured.json"
        flags = [
            f"--config={arguments.config}",
            f"--steps={arguments.steps}",
            f"--worker={output}",
            *OVERRIDES,
            # The last of equal flags wins. So the worker takes exactly the step that was forecast,
            # even where the recipe says auto.
            f"--training.max_tokens_per_batch={figures['max_tokens_per_batch']}",
            f"--training.gradient_checkpointing={figures['gradient_checkpointing']}",
        ]
        if arguments.supervised:
            flags.append(f"--supervised={arguments.supervised}")
        # glibc would keep freed tensors for itself. With these thresholds each goes back to the
        # system, so resident memory is the memory of living tensors.
        environ = os.environ | {
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "131072",
        }
        done = subprocess.run(
            [sys.executable, __file__, *flags], env=environ, stderr=subprocess.PIPE, text=True
        )
        if done.returncode or not output.is_file():
            last = (done.stderr.strip().splitlines() or ["killed, out of memory?"])[-1]
            raise ForecastError(
                f"measurement ended with code {done.returncode}: {last}; take fewer tokens, or"
                " leave out --measure"
            )
        return json.loads(output.read_text(encoding="utf-8"))


def measure_here(config: Config, arguments: argparse.Namespace) -> dict:
    """Load, train --steps steps, and return how memory went."""
    device = default_device()
    architecture = read_architecture(config.model.base, ARCHITECTURES, config.model.revision)
    # Random weights have the same sizes, so the memory of a model that is not here is measured too.
    folder = Path(config.model.base).expanduser()
    has_weights = folder.is_dir() and any(folder.glob("*.safetensors"))
    small = AutoConfig.for_model(
        "llama",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
    )
    # Libraries load their code and make their buffers here, before memory is counted.
    take_steps(Trial(config, small, device), config, 64, 2, 1)
    timeline = Timeline(device)
    timeline.mark("loading")
    trial = Trial(config, None if has_weights else architecture, device)
    timeline.mark("training")
    tokens = config.training.max_tokens_per_batch
    supervised = arguments.supervised or assume_labelled(config, tokens)
    take_steps(trial, config, tokens, supervised, arguments.steps)
    del trial
    # This phase shows what stays when the model is gone.
    timeline.mark("after")
    return timeline.finish() | {"device": device.type, "random_weights": not has_weights}


def take_steps(trial: Trial, config: Config, tokens: int, supervised: int, steps: int) -> None:
    """Take optimizer steps on rows as long as they may be, each of as many micro-batches as the
    recipe's.
    """
    training = config.training
    micro_batches = training.global_batch_tokens // training.max_tokens_per_batch
    lengths = np.array(make_batch(config, tokens, 1, True).lengths)  # int64 [rows]
    table = make_table(
        np.tile(lengths, micro_batches),
        max(1, math.ceil(supervised / len(lengths))),
        trial.vocabulary,
        training.seed,
    )
    # The table holds the rows of one step, so an epoch is a step.
    plan = make_plan(
        table.lengths,
        capacity=tokens,
        global_tokens=tokens * micro_batches,
        epochs=steps,
        seed=training.seed,
        packing=config.data.packing,
    )
    for step in range(steps):
        trial.step(table, plan, step)


class Timeline:
    """Memory of this process over time, sampled by a thread: tensors on a GPU, else resident
    memory, both above their first value.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.process = psutil.Process()
        self.began = time.perf_counter()
        self.start = self.read()  # bytes
        # Both hold seconds since the beginning; points also hold bytes above the start.
        self.points: list[tuple[float, int]] = []
        self.marks: list[tuple[float, str]] = []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated()
        return self.process.memory_info().rss

    def sample(self) -> None:
        # There are 2 ms between samples, so on a CPU a shorter peak can be missed.
        while not self.ended.wait(0.002):
            self.points.append((time.perf_counter() - self.began, self.read() - self.start))

    def mark(self, phase: str) -> None:
        """Note that a phase begins."""
        if self.device.type == "cuda" and phase == "training":
            torch.cuda.empty_cache()  # Loading leaves blocks that training does not need.
            torch.cuda.reset_peak_memory_stats()
        self.marks.append((time.perf_counter() - self.began, phase))

    def finish(self) -> dict:
        # The timeline also shows for a while what stays after training.
        time.sleep(max(0.05, 0.1 * (time.perf_counter() - self.began)))
        self.ended.set()
        self.thread.join()
        training = next(at for at, phase in self.marks if phase == "training")
        peak = max(value for at, value in self.points if at >= training)
        reserved = None
        if self.device.type == "cuda":
            # torch counts its peaks between two samples too.
            peak = torch.cuda.max_memory_allocated()
            reserved = torch.cuda.max_memory_reserved()
        # A phase ends where the next one begins.
        ends = [at for at, _ in self.marks[1:]] + [math.inf]
        phases = {}
        for (began, phase), ended in zip(self.marks, ends, strict=True):
            values = [value for at, value in self.points if began <= at < ended]
            phases[phase] = max(values, default=0)
        return {
            "peak": peak,
            "reserved": reserved,
            "phases": phases,
            "timeline": {"points": self.thin_out(), "marks": self.marks},
        }

    def thin_out(self) -> list[tuple[float, int]]:
        """About 400 points: the highest value of each block of samples, at the block's start."""
        size = max(1, len(self.points) // 400)
        thinned = []
        for first in range(0, len(self.points), size):
            block = self.points[first : first + size]
            thinned.append((block[0][0], max(value for _, value in block)))
        return thinned


def draw(timeline: dict, predicted: int, path: Path) -> None:
    import matplotlib

    # Agg needs no display.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seconds = [at for at, _ in timeline["points"]]
    memory = [value / GIB for _, value in timeline["points"]]
    height = predicted / GIB
    # The names of the phases stand in the space above the curve.
    top = max(height, *memory) * 1.25
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    axes.fill_between(seconds, memory, alpha=0.3, linewidth=0)
    axes.plot(seconds, memory, linewidth=1)
    axes.axhline(height, color="black", linestyle="--", linewidth=1)
    middle = (seconds[-1] / 2, height * 1.02)
    axes.annotate("predicted peak", middle, ha="center", va="bottom", fontsize=9)
    for number, (at, phase) in enumerate(timeline["marks"]):
        axes.axvline(at, color="grey", linewidth=0.8)
        # Names stand at two heights, because a short phase leaves no room beside its own.
        axes.annotate(f" {phase}", (at, top * (0.94 - 0.07 * (number % 2))), fontsize=9)
    axes.set(xlabel="seconds", ylabel="memory in GiB", ylim=(0, top), xlim=(0, seconds[-1]))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_command(main)
