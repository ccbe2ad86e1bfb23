"""What each strategy moves, needs and takes, from 1 to 1,024 GPUs: arithmetic from stated
bandwidths, nothing measured.

    python bench/scaling.py                          # the tables
    python bench/scaling.py --write docs/scaling.md  # put them into the page, between its markers
    python bench/scaling.py --check docs/scaling.md  # exit code 2 if the page holds other tables

One step is one micro-batch of --tokens per GPU, QLoRA with every layer recomputed. Sizes and memory
are medqlora.memory's forecast of the step; the formulas of traffic and time are in the functions
below, each with its reason; docs/scaling.md says what follows from them.
"""

import argparse
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from medqlora.core.command import run_command
from medqlora.core.config_loading import load_config
from medqlora.core.errors import ConfigError
from medqlora.core.files import write_atomic
from medqlora.training.memory.architectures import read_architecture
from medqlora.training.memory.estimate import assume_labelled, make_batch
from medqlora.training.memory.forecast import forecast_step
from medqlora.training.memory.sharding import divide
from medqlora.training.memory.target import CONTEXT, usable
from medqlora.training.memory.tracker import Forecast
from medqlora.training.strategies.launch import Strategy

ROOT = Path(__file__).parents[1]
CUDA = torch.device("cuda")
GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "hsdp")
# MedMCQA's training rows; 97: mean of 3,006 of them, chat prompt and letter, Llama-3's tokenizer
EPOCH_TOKENS = 182_822 * 97
MARKERS = (
    "<!-- tables: python bench/scaling.py --write docs/scaling.md -->",
    "<!-- end of tables -->",
)


@dataclass(frozen=True)
class Shape:
    """A decoder with an adapter of rank 16 on all linear layers. base_bytes: what a sharded base
    gathers of it, without constants of the quantization that stay whole; linear_weights: quantized
    ones; forecast: of the step on one GPU.
    """

    name: str
    linear_weights: int
    base_bytes: int
    forecast: Forecast


def read_shape(name: str, tokens: int) -> Shape:
    """name: of a shape in bench/architectures; tokens: of a micro-batch."""
    config = load_config(
        ROOT / "recipes" / "configs" / "llama3-8b_medmcqa.yaml",
        [
            "--model.base",
            name,
            "--training.gradient_checkpointing",
            "full",
            "--lora.r",
            "16",
            "--training.optimizer",
            "adamw",
        ],
    )
    architecture = read_architecture(name, ROOT / "bench" / "architectures")
    batch = make_batch(config, tokens, assume_labelled(config, tokens), accumulated=False)
    forecast = forecast_step(config, architecture, CUDA, torch.bfloat16, torch.uint8, batch)
    loaded = forecast.at_loading
    return Shape(
        name,
        2 * loaded["quantized weights"],
        loaded["quantized weights"] + loaded["embeddings and head"],
        forecast,
    )


@dataclass(frozen=True)
class Cluster:
    """flops: dense bfloat16 per second and GPU that training reaches; inside, between: bytes per
    second and GPU that a collective reaches within a machine and over the network; latency: seconds
    of one collective's start.
    """

    name: str
    memory: float
    flops: float
    inside: float
    between: float
    latency: float
    per_machine: int = 8


# Peak rates are the makers'; the shares of them that are reached are assumptions, stated here: 45 %
# of the dense bfloat16 rate, 80 % of a link.
H100 = Cluster(
    "H100 80 GB, NVLink, 400 Gbit/s per GPU between machines",
    80e9,
    0.45 * 989e12,
    0.8 * 450e9,
    0.8 * 50e9,
    20e-6,
)
RTX4090 = Cluster(
    "RTX 4090 24 GB, PCIe 4.0, 25 Gbit/s per machine between machines",
    24e9,
    0.45 * 165e12,
    0.8 * 25e9,
    0.8 * 3.1e9 / 8,
    30e-6,
)


def count_traffic(
    shape: Shape, strategy: str, gpus: int, per_machine: int
) -> tuple[float, float, int]:
    """(bytes sent per GPU within the machine, over the network, collectives) of one step of one
    micro-batch.

    A ring moves (n - 1) / n of a buffer per GPU for a gather or a reduce-scatter, twice that for an
    all-reduce (Patarasuk and Yuan, 2009). Gradients and updated adapters are float32. A sharded
    base is gathered twice: for the forward pass, and for the backward pass with its recomputation.
    hsdp shards within a machine and averages gradients between machines. A ring over several
    machines crosses each machine's network once, at the whole machine's rate; hsdp has a ring per
    GPU, each with its share.
    """
    if gpus == 1:
        return 0.0, 0.0, 0
    share = (gpus - 1) / gpus
    gradient = 4.0 * shape.forecast.trainable
    layers = shape.forecast.layers
    local = min(gpus, per_machine)
    if strategy == "ddp":
        sent = 2 * share * gradient
        calls = -(-int(gradient) // (25 * 2**20))  # torch's buckets of 25 MiB
    elif strategy in ("zero1", "zero2"):
        sent = 2 * share * gradient
        calls = 2  # reduce to the owner, gather the updated adapter
    elif strategy in ("zero3", "fsdp2"):
        sent = share * (2 * shape.base_bytes + 3 * gradient)
        calls = 3 * layers + 4
    else:
        inside = (local - 1) / local * (2 * shape.base_bytes + 3 * gradient)
        machines = gpus // local
        between = 2 * (machines - 1) / machines * gradient / local
        return inside, between, 3 * layers + 4 + (layers if machines > 1 else 0)
    return (sent, 0.0, calls) if gpus <= per_machine else (0.0, sent, calls)


def predict_seconds(shape: Shape, cluster: Cluster, strategy: str, gpus: int, tokens: int) -> float:
    """Step time: gathers run beside the computation, what they take longer is waited for; gradients
    of an unsharded base overlap with the backward pass (two thirds of the computation) but for the
    last bucket, ZeRO-1/2's gather with nothing.
    """
    compute = 6 * shape.linear_weights * tokens / cluster.flops
    inside, between, calls = count_traffic(shape, strategy, gpus, cluster.per_machine)
    # a ring crosses once, hsdp's eight side by side
    network = cluster.between * (1 if strategy == "hsdp" else cluster.per_machine)
    moving = inside / cluster.inside + between / network + calls * cluster.latency
    if strategy == "ddp":
        last = min(1.0, 25 * 2**20 / max(1.0, inside + between)) * moving
        return compute + max(last, moving - compute * 2 / 3)
    if strategy in ("zero1", "zero2"):
        return compute + moving / 2 + max(0.0, moving / 2 - compute * 2 / 3)
    return max(compute, moving)


def predict_memory(shape: Shape, strategy: str, gpus: int, per_machine: int) -> int:
    """Highest bytes per GPU, in training or while the base is loaded, which every GPU does whole;
    hsdp divides within a machine.
    """
    name, ranks = ("fsdp2", min(gpus, per_machine)) if strategy == "hsdp" else (strategy, gpus)
    return divide(shape.forecast, Strategy(name, ranks)).peak + CONTEXT


def render(tokens: int) -> Iterator[str]:
    """The page's tables, as markdown lines."""
    for shape in (read_shape("llama3-8b", tokens), read_shape("llama3-70b", tokens)):
        trained = shape.forecast.trainable
        yield (
            f"### {shape.name}: {shape.linear_weights / 1e9:.2f} G linear weights, adapter r=16 of"
            f" {trained / 1e6:.1f} M"
        )
        yield ""
        yield (
            f"Sent per GPU and step (one micro-batch of {tokens:,} tokens), all of it; gradients of"
            f" the adapter are {4 * trained / 1e6:.0f} MB,"
        )
        yield f"the quantized base {shape.base_bytes / 1e9:.1f} GB."
        yield ""
        yield "| GPUs | " + " | ".join(STRATEGIES) + " |"
        yield "|---|" + "---|" * len(STRATEGIES)
        for gpus in GPUS[1:]:
            cells = [sum(count_traffic(shape, strategy, gpus, 8)[:2]) for strategy in STRATEGIES]
            yield f"| {gpus:,} | " + " | ".join(f"{sent / 1e9:.2f} GB" for sent in cells) + " |"
        yield ""
        for cluster in (H100, RTX4090):
            yield (
                f"Step time in seconds, and highest memory of a GPU, on {cluster.name}."
                " *Predicted.*"
            )
            yield ""
            yield "| GPUs | " + " | ".join(STRATEGIES) + " |"
            yield "|---|" + "---|" * len(STRATEGIES)
            for gpus in GPUS:
                cells = [
                    describe(shape, cluster, strategy, gpus, tokens) for strategy in STRATEGIES
                ]
                yield f"| {gpus:,} | " + " | ".join(cells) + " |"
            yield ""


def render_epoch(tokens: int) -> Iterator[str]:
    """How far one epoch of MedMCQA goes."""
    yield (
        f"### One epoch of MedMCQA, {EPOCH_TOKENS / 1e6:.0f} M tokens, {tokens:,} per GPU and step"
    )
    yield ""
    yield "| GPUs | tokens per step | steps in an epoch |"
    yield "|---|---|---|"
    for gpus in GPUS:
        yield f"| {gpus:,} | {gpus * tokens:,} | {EPOCH_TOKENS / (gpus * tokens):,.1f} |"


def describe(shape: Shape, cluster: Cluster, strategy: str, gpus: int, tokens: int) -> str:
    memory = predict_memory(shape, strategy, gpus, cluster.per_machine)
    if memory - CONTEXT > usable(int(cluster.memory), CUDA):
        return f"– (needs {memory / 1e9:.0f} GB)"
    return f"{predict_seconds(shape, cluster, strategy, gpus, tokens):.2f} s, {memory / 1e9:.0f} GB"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=int, default=8192, help="of a micro-batch; default %(default)s"
    )
    parser.add_argument("--write", type=Path, help="page whose tables are replaced")
    parser.add_argument("--check", type=Path, help="page whose tables must be these")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.tokens < 1:
        raise ConfigError(f"--tokens {arguments.tokens}: expected 1 or more")
    warnings.simplefilter("ignore", FutureWarning)  # Libraries warn each other.
    page = arguments.write or arguments.check
    if page is None:
        print(tabulate(arguments.tokens))
        return
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{page}: {error.strerror}; give the scaling page") from None
    pattern = re.compile(f"{re.escape(MARKERS[0])}.*{re.escape(MARKERS[1])}", re.DOTALL)
    if not pattern.search(text):
        raise ConfigError(f"{page}: no lines {MARKERS[0]} and {MARKERS[1]}; give the scaling page")
    tables = tabulate(arguments.tokens)
    new = pattern.sub(lambda found: f"{MARKERS[0]}\n{tables}\n{MARKERS[1]}", text)
    if arguments.check and new != text:
        raise ConfigError(
            f"{page}: its tables are not those of this script; run it with --write {page}"
        )
    if arguments.write:
        write_atomic(page, new)


def tabulate(tokens: int) -> str:
    return "\n".join([*render(tokens), *render_epoch(tokens)])


if __name__ == "__main__":
    run_command(main)
