"""Does it fit? Memory of a training step, predicted without weights, GPU or network, and measured
beside it.

    python bench/memory.py  # the demonstration
    # what a step needs, and for what
    python bench/memory.py --config recipes/configs/llama3-8b_medmcqa.yaml
    # what fits, and the YAML for it
    python bench/memory.py --config recipes/configs/llama3-8b_medmcqa.yaml --fit 8GiB
    # on a T4
    python bench/memory.py --config recipes/configs/llama3-8b_medmcqa.yaml --fit 16GiB \\
        --capability 7.5
    python bench/memory.py --config recipes/configs/llama3-8b_medmcqa.yaml --gpus 8 --strategy fsdp
    # weights and keys/values for serving
    python bench/memory.py --config recipes/configs/qwen2.5-3b_8gb.yaml --serve 4096
    # real steps beside the prediction
    python bench/memory.py --config recipes/configs/demo.yaml --measure --plot memory.png

Any key of a recipe can be given as --section.key VALUE. A shape that is not shipped in
bench/architectures: --model.base FILE, a config.json of transformers. What the forecast follows and
what it assumes stands in medqlora/memory.py.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import yaml
from rich.console import Console
from rich.table import Table

from medqlora.batches.plan import list_budgets, make_plan
from medqlora.core.command import run_command, run_early
from medqlora.core.config import Config
from medqlora.core.config_loading import change, load_config
from medqlora.core.environment import describe_environment, name_command, prefer_expandable_segments
from medqlora.core.errors import ConfigError
from medqlora.core.files import check_new, check_picture, write_json

DEMO = Path(__file__).parent.parent / "recipes" / "configs" / "demo.yaml"
STRATEGIES = {"ddp": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "fsdp": "fsdp2"}


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, default=DEMO, help="recipe YAML (default: the demonstration)"
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        help=(
            "what the step runs on; it need not be here (default: cuda; with --measure, what is"
            " here)"
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
        "--gpus", type=int, default=1, help="processes that train together (default 1)"
    )
    parser.add_argument(
        "--strategy", choices=list(STRATEGIES), help="with --gpus: how they share (default ddp)"
    )
    parser.add_argument(
        "--supervised",
        type=int,
        help="supervised tokens of a micro-batch (default: assumed from data.completion, and said)",
    )
    parser.add_argument(
        "--fit",
        metavar="SIZE",
        help="memory of the card, e.g. 8GiB: search what fits and print the YAML to use",
    )
    parser.add_argument(
        "--serve",
        type=int,
        metavar="TOKENS",
        help="forecast of serving: weights, and keys and values of sequences this long",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="train real steps (random weights where the base's are not in a folder) and compare",
    )
    parser.add_argument(
        "--steps", type=int, default=3, help="with --measure: optimizer steps (default 3)"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--plot",
        type=Path,
        help="with --measure: picture of memory over time (.png or .svg; needs matplotlib)",
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
from transformers import AutoConfig

from medqlora.model.base import check_length
from medqlora.model.hardware import choose_dtype, default_device
from medqlora.model.random_base import count_parameters
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
from medqlora.training.strategies.launch import Strategy, check_strategy, choose_storage
from medqlora.training.trial import Trial, make_table

ARCHITECTURES = Path(__file__).parent / "architectures"


DISPLAY = "0.3 to 1 GiB"  # We assume this for a desktop with a browser.


SEQUENCES = 32  # answered side by side, in the forecast for serving


console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    arguments = ARGUMENTS
    overrides = OVERRIDES
    warnings.simplefilter("ignore", FutureWarning)  # Libraries warn each other.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    config = load_config(arguments.config, overrides)
    if arguments.worker:
        measure_here(config, arguments)
        return
    check_arguments(arguments)
    began = time.perf_counter()
    architecture = read_architecture(config.model.base, ARCHITECTURES, config.model.revision)
    target = read_setting(config, arguments)
    check_length(architecture, config.data.max_length)
    if arguments.serve:
        check_length(architecture, arguments.serve, "--serve")
        found = serve(config, architecture, target, arguments)
    elif arguments.fit:
        found = fit(config, architecture, target, arguments)
    else:
        found = predict(config, architecture, target, arguments)
    found |= {
        "model": config.model.base,
        "seconds": time.perf_counter() - began,
        "base_parameters": count_parameters(architecture, config.lora)[0],
    }
    console.print(f"{found['seconds']:.1f} s")
    if arguments.measure:
        found |= measure(found, arguments, overrides)
    if arguments.json:
        write_json(
            arguments.json,
            found
            | {
                "command": name_command("bench/memory.py", sys.argv[1:]),
                "environment": describe_environment(),
            },
        )
    if arguments.plot:
        draw(found["timeline"], found["predicted_peak_bytes"], arguments.plot)


def check_arguments(arguments: argparse.Namespace) -> None:
    check_new(arguments.json, "--json")
    check_picture(arguments.plot)
    for flag in ("gpus", "steps", "supervised", "serve"):
        if getattr(arguments, flag) is not None and getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag} {getattr(arguments, flag)}: expected 1 or more")
    if arguments.strategy and arguments.gpus == 1:
        raise ConfigError(f"--strategy {arguments.strategy} is for several processes; give --gpus")
    if arguments.measure and (arguments.gpus > 1 or arguments.fit or arguments.serve):
        raise ConfigError(
            "--measure is of one process and a given step; leave out --gpus, --fit and --serve"
        )
    if arguments.plot and not arguments.measure:
        raise ConfigError("--plot shows measured memory; give --measure")


def read_setting(config: Config, arguments: argparse.Namespace) -> TargetHardware:
    """Where the step is to run. Memory: of --fit, else without bound."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
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
    dtype = choose_dtype(config.model.dtype, device, capability)
    strategy = Strategy(
        STRATEGIES[arguments.strategy or "ddp"] if arguments.gpus > 1 else "one", arguments.gpus
    )
    check_strategy(strategy, config, dtype, {})
    memory = usable(parse_size(arguments.fit), device) if arguments.fit else sys.maxsize
    if memory <= 0:
        raise ForecastError(
            f"--fit {arguments.fit}: {(CONTEXT + KERNELS) / GIB:.2f} GiB go to the CUDA context and"
            " kernels alone; give the memory of a card, e.g. 8GiB"
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
    found = re.fullmatch(r"(\d+)\.(\d)", text)
    if not found:
        raise ConfigError(
            f"--capability {text}: expected a major and a minor number, e.g. 7.5 for a T4 or 8.9"
            " for an RTX 4090"
        )
    return int(found[1]), int(found[2])


def labelled_of(config: Config, arguments: argparse.Namespace):
    return lambda tokens: arguments.supervised or assume_labelled(config, tokens)


def predict(
    config: Config, architecture, target: TargetHardware, arguments: argparse.Namespace
) -> dict:
    """The step that the recipe describes; where it says auto and no card is named, with every layer
    recomputed.
    """
    training = config.training
    mode = "full" if training.gradient_checkpointing == "auto" else training.gradient_checkpointing
    tokens = list_budgets(training, config.data.max_length, target.strategy.ranks)[-1]
    plan = forecast_plan(
        config, architecture, target, tokens, mode, labelled_of(config, arguments)(tokens)
    )
    console.print(
        f"[bold]{config.model.base}[/]: {describe(config, architecture, target, plan, arguments)}"
    )
    if "auto" in (training.gradient_checkpointing, training.max_tokens_per_batch):
        console.print(
            "the recipe says auto: here every layer is recomputed; --fit SIZE shows what it would"
            " choose on a card"
        )
    show(plan, target)
    return collect(plan, target)


def describe(
    config: Config,
    architecture,
    target: TargetHardware,
    plan: StepPlan,
    arguments: argparse.Namespace,
) -> str:
    labelled = labelled_of(config, arguments)(plan.tokens)
    assumed = "" if arguments.supervised else " (assumed)"
    share = (
        f", {target.strategy.name} on {target.strategy.ranks} GPUs"
        if target.strategy.ranks > 1
        else ""
    )
    attention = target.choose_attention(config, architecture)
    cost = cost_of_attention(config, architecture, target, plan, labelled)
    more = f", {cost / GIB:+.2f} GiB against the variable-length kernel" if cost is not None else ""
    return (
        f"{config.model.quantization}, {target.dtype}, attention {attention.backend}"
        f" ({attention.reason}{more}), LoRA r={config.lora.r} ({plan.forecast.trainable:,}"
        f" trainable), {config.training.optimizer}; {plan.tokens:,} tokens per micro-batch in rows"
        f" of {config.data.max_length:,}, {labelled:,} supervised{assumed},"
        f" {plan.forecast.recomputed} of {plan.forecast.layers} layers recomputed{share}, on"
        f" {target.device.type}"
    )


def show(plan: StepPlan, target: TargetHardware) -> None:
    forecast = plan.forecast
    table = Table(title="predicted memory of one process at its peak", title_justify="left")
    for column, justify in (("", "left"), ("GiB", "right"), ("share", "right")):
        table.add_column(column, justify=justify)
    for name, value in sorted(forecast.by_category.items(), key=lambda item: -item[1]):
        if value >= 2**20:
            table.add_row(name, f"{value / GIB:.2f}", f"{value / forecast.peak:.0%}")
    table.add_row("[bold]peak", f"[bold]{forecast.peak / GIB:.2f}", "")
    if target.device.type == "cuda":
        table.add_row(
            "reserved by the allocator", f"{target.needs(forecast, plan.short) / GIB:.2f}", ""
        )
        table.add_row("CUDA context and kernels (assumed)", f"{(CONTEXT + KERNELS) / GIB:.2f}", "")
        table.add_row(
            f"GPU that leaves {MARGIN:.0%} free",
            f"{(target.needs(forecast, plan.short) + CONTEXT + KERNELS) / (1 - MARGIN) / GIB:.2f}",
            "",
        )
        if forecast.host:
            table.add_row("pinned in the host's memory", f"{forecast.host / GIB:.2f}", "")
    console.print(table)
    console.print(
        "peak by phase: "
        + ", ".join(f"{phase} {value / GIB:.2f}" for phase, value in forecast.by_phase.items())
        + " GiB"
    )


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


def fit(
    config: Config, architecture, target: TargetHardware, arguments: argparse.Namespace
) -> dict:
    """What a card of --fit can train: the longest row at all, and the fastest way for the recipe's
    own rows.
    """
    config = change(config, "training", max_tokens_per_batch="auto", gradient_checkpointing="auto")
    plan = plan_step(config, architecture, target, labelled_of(config, arguments))
    console.print(
        f"[bold]{config.model.base} on a card of {arguments.fit}[/]:"
        f" {describe(config, architecture, target, plan, arguments)}"
    )
    show(plan, target)
    longest = longest_sequence(config, architecture, target, labelled_of(config, arguments))
    mode = least_memory(target.device)
    if longest:
        console.print(
            f"longest row that fits, alone in its step with gradient_checkpointing {mode}:"
            f" {longest:,} tokens"
        )
    if target.device.type == "cuda":
        console.print(
            f"a screen on the same GPU takes {DISPLAY} of it: give --fit what nvidia-smi shows as"
            " free before training"
        )
    chosen = {
        "data": {"max_length": config.data.max_length},
        "training": {
            "global_batch_tokens": config.training.global_batch_tokens,
            "max_tokens_per_batch": plan.tokens,
            "gradient_checkpointing": plan.checkpointing,
        },
    }
    console.print(
        "\n# for rows as long as the recipe's\n" + yaml.safe_dump(chosen, sort_keys=False), end=""
    )
    if longest:
        step = longest * target.strategy.ranks
        alone = {
            "data": {"max_length": longest},
            "training": {
                "global_batch_tokens": step,
                "max_tokens_per_batch": longest,
                "gradient_checkpointing": mode,
            },
        }
        console.print("\n# for the longest rows\n" + yaml.safe_dump(alone, sort_keys=False), end="")
    return collect(plan, target) | {
        "longest_row": longest,
        "usable_bytes": target.memory,
        "card": arguments.fit,
    }


def serve(
    config: Config, architecture, target: TargetHardware, arguments: argparse.Namespace
) -> dict:
    """Weights as stored and merged, and the keys and values of sequences of --serve tokens."""
    merged = change(config, "model", quantization="none")
    table = Table(
        title=f"serving {config.model.base}, sequences of {arguments.serve:,} tokens",
        title_justify="left",
    )
    for column, justify in (
        ("", "left"),
        ("weights GiB", "right"),
        ("one sequence MiB", "right"),
        (f"{SEQUENCES} sequences GiB", "right"),
        ("fit", "right"),
    ):
        table.add_column(column, justify=justify)
    found = {}
    for name, served in ((config.model.quantization, config), ("merged, 16 bits", merged)):
        facts = forecast_serving(served, architecture, target.dtype, arguments.serve)
        total = facts["weights"] + SEQUENCES * facts["keys_and_values"]
        fits = (
            (target.memory - facts["weights"]) // facts["keys_and_values"]
            if arguments.fit
            else None
        )
        table.add_row(
            name,
            f"{facts['weights'] / GIB:.2f}",
            f"{facts['keys_and_values'] / 2**20:.0f}",
            f"{total / GIB:.2f}",
            "" if fits is None else f"{max(0, fits):,}",
        )
        found[name] = facts | {"sequences_that_fit": fits}
    console.print(table)
    least = found[config.model.quantization]
    return {
        "serving": found,
        "tokens": arguments.serve,
        "predicted_peak_bytes": least["weights"] + least["keys_and_values"],
        "predicted_reserved_bytes": None,
        "by_category": least,
        "measured_peak_bytes": None,
        "relative_error": None,
    }


def measure(found: dict, arguments: argparse.Namespace, overrides: list[str]) -> dict:
    """The same step for real, in a process of its own; -> figures that join the prediction's."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "measured.json"
        given = [
            "--training.max_tokens_per_batch",
            str(found["max_tokens_per_batch"]),
            "--training.gradient_checkpointing",
            found["gradient_checkpointing"],
        ]
        flags = [
            "--config",
            str(arguments.config),
            "--steps",
            str(arguments.steps),
            "--worker",
            str(work),
            *overrides,
            *given,
        ]
        if arguments.supervised:
            flags += ["--supervised", str(arguments.supervised)]
        # glibc would keep freed tensors for itself; like this each goes back to the system, and
        # resident memory is what lives
        environ = os.environ | {
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "131072",
        }
        done = subprocess.run(
            [sys.executable, __file__, *flags], env=environ, stderr=subprocess.PIPE, text=True
        )
        if done.returncode or not work.is_file():
            last = (done.stderr.strip().splitlines() or ["killed, out of memory?"])[-1]
            raise ForecastError(
                f"measurement ended with code {done.returncode}: {last}; take fewer tokens, or"
                " leave out --measure"
            )
        measured = json.loads(work.read_text(encoding="utf-8"))
    error = (found["predicted_peak_bytes"] - measured["peak"]) / measured["peak"]
    what = (
        "allocated on the GPU"
        if measured["device"] == "cuda"
        else "resident, above what the process held before"
    )
    if measured["device"] == "cuda":
        console.print(
            f"measured reserve {measured['reserved'] / GIB:.3f} GiB, predicted"
            f" {found['predicted_reserved_bytes'] / GIB:.3f} GiB"
        )
    console.print(
        f"measured peak {measured['peak'] / GIB:.3f} GiB ({what}), predicted"
        f" {found['predicted_peak_bytes'] / GIB:.3f} GiB: {error:+.1%}"
    )
    return {
        "measured_peak_bytes": measured["peak"],
        "measured_reserved_bytes": measured["reserved"],
        "relative_error": error,
    } | {key: measured[key] for key in ("timeline", "phases", "random_weights")}


def measure_here(config: Config, arguments: argparse.Namespace) -> None:
    """The worker: load, train --steps steps, and write what memory did."""
    device = default_device()
    architecture = read_architecture(config.model.base, ARCHITECTURES, config.model.revision)
    weights = (
        any(Path(config.model.base).expanduser().glob("*.safetensors"))
        if Path(config.model.base).expanduser().is_dir()
        else False
    )
    small = AutoConfig.for_model(
        "llama",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
    )
    # libraries load and make their buffers
    take_steps(Trial(config, small, device), config, 64, 2, 1)
    meter = Timeline(device)
    meter.mark("loading")
    trial = Trial(config, None if weights else architecture, device)
    meter.mark("training")
    tokens = config.training.max_tokens_per_batch
    take_steps(
        trial,
        config,
        tokens,
        arguments.supervised or assume_labelled(config, tokens),
        arguments.steps,
    )
    del trial
    meter.mark("after")
    found = meter.finish() | {"device": device.type, "random_weights": not weights}
    write_json(arguments.worker, found)


def take_steps(trial, config: Config, tokens: int, labelled: int, steps: int) -> None:
    """Optimizer steps on rows as long as they may be, each of as many micro-batches as the
    recipe's.
    """
    training = config.training
    micro = training.global_batch_tokens // training.max_tokens_per_batch
    lengths = np.array(make_batch(config, tokens, 1, True).lengths)
    table = make_table(
        np.tile(lengths, micro),
        max(1, -(-labelled // len(lengths))),
        trial.vocabulary,
        training.seed,
    )
    plan = make_plan(
        table.lengths,
        capacity=tokens,
        global_tokens=tokens * micro,
        epochs=steps,
        seed=training.seed,
        packing=config.data.packing,
    )
    for step in range(steps):
        trial.step(table, plan, step)


class Timeline:
    """Memory of this process over time, sampled by a thread: allocated on a GPU, else resident
    above the beginning's.
    """

    def __init__(self, device: torch.device):
        self.device, self.process, self.began = device, psutil.Process(), time.perf_counter()
        self.start = self.read()
        self.points: list[tuple[float, int]] = []
        self.marks: list[tuple[float, str]] = []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def read(self) -> int:
        return (
            torch.cuda.memory_allocated()
            if self.device.type == "cuda"
            else self.process.memory_info().rss
        )

    def watch(self) -> None:
        while not self.ended.wait(0.002):
            self.points.append((time.perf_counter() - self.began, self.read() - self.start))

    def mark(self, phase: str) -> None:
        if self.device.type == "cuda" and phase == "training":
            torch.cuda.empty_cache()  # Loading leaves blocks that training does not need.
            torch.cuda.reset_peak_memory_stats()
        self.marks.append((time.perf_counter() - self.began, phase))

    def finish(self) -> dict:
        # what stays is seen as well
        time.sleep(max(0.05, 0.1 * (time.perf_counter() - self.began)))
        self.ended.set()
        self.thread.join()
        training = next(at for at, phase in self.marks if phase == "training")
        peak = max(value for at, value in self.points if at >= training)
        reserved = None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            reserved = torch.cuda.max_memory_reserved()  # between two samples too
        phases = {}
        for (at, phase), (until, _) in zip(
            self.marks, [*self.marks[1:], (float("inf"), "")], strict=True
        ):
            phases[phase] = max(
                (value for when, value in self.points if at <= when < until), default=0
            )
        size = max(1, len(self.points) // 400)
        blocks = [self.points[i : i + size] for i in range(0, len(self.points), size)]
        points = [(block[0][0], max(value for _, value in block)) for block in blocks]
        return {
            "peak": peak,
            "reserved": reserved,
            "phases": phases,
            "timeline": {"points": points, "marks": self.marks},
        }


def draw(timeline: dict, predicted: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    axes.fill_between(
        [at for at, _ in timeline["points"]],
        [value / GIB for _, value in timeline["points"]],
        alpha=0.3,
        linewidth=0,
    )
    axes.plot(
        [at for at, _ in timeline["points"]],
        [value / GIB for _, value in timeline["points"]],
        linewidth=1,
    )
    axes.axhline(predicted / GIB, color="black", linestyle="--", linewidth=1)
    top = max(predicted / GIB, *(value / GIB for _, value in timeline["points"])) * 1.25
    axes.annotate(
        "predicted peak",
        (timeline["points"][-1][0] / 2, predicted / GIB * 1.02),
        ha="center",
        va="bottom",
        fontsize=9,
    )
    for place, (at, phase) in enumerate(timeline["marks"]):
        axes.axvline(at, color="grey", linewidth=0.8)
        # one above the other where a phase is short
        axes.annotate(f" {phase}", (at, top * (0.94 - 0.07 * (place % 2))), fontsize=9)
    axes.set(
        xlabel="seconds", ylabel="memory in GiB", ylim=(0, top), xlim=(0, timeline["points"][-1][0])
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_command(main)
