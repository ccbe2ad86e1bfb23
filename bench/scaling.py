"""What each strategy sends, needs and takes, from 1 to 1,024 GPUs. This is arithmetic from stated
bandwidths; nothing is measured.

    # Print the tables.
    python bench/scaling.py
    # Put them into the page, between its markers.
    python bench/scaling.py --write docs/scaling.md
    # End with exit code 2 if the page holds other tables.
    python bench/scaling.py --check docs/scaling.md

One step is one micro-batch of --tokens per GPU, QLoRA with every layer recomputed. Sizes and memory
are the forecast of the step (medqlora/training/memory). The functions below hold the formulas of
traffic and time, each with its reason; docs/scaling.md says what follows from them.
"""

import argparse
import math
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from medqlora.core.command import CommandParser, run_command, run_early, whole
from medqlora.core.config_loading import load_config
from medqlora.core.errors import ConfigError
from medqlora.core.files import write_atomic

MARKERS = (
    "<!-- tables: python bench/scaling.py --write docs/scaling.md -->",
    "<!-- end of tables -->",
)
TABLES = re.compile(f"{re.escape(MARKERS[0])}.*{re.escape(MARKERS[1])}", re.DOTALL)


def parse_arguments() -> tuple[argparse.Namespace, str]:
    """Read and check the command line; the text is that of the page, if one is given."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens",
        type=whole(1),
        default=8192,
        help="tokens of a micro-batch (default %(default)s)",
    )
    parser.add_argument("--write", type=Path, help="page whose tables are replaced")
    parser.add_argument("--check", type=Path, help="page whose tables must be these")
    arguments = parser.parse_args()
    page = arguments.write or arguments.check
    if page is None:
        return arguments, ""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{page}: {error.strerror}; give the scaling page") from None
    if not TABLES.search(text):
        raise ConfigError(f"{page}: no lines {MARKERS[0]} and {MARKERS[1]}; give the scaling page")
    return arguments, text


if __name__ == "__main__":
    # Importing torch takes seconds, so mistakes are reported before.
    ARGUMENTS, TEXT = run_early(parse_arguments)

import torch

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
# MedMCQA has 182,822 training rows. Its first 3,006 have 97 tokens on average, with a chat prompt,
# the letter and Llama-3's tokenizer.
EPOCH_TOKENS = 182_822 * 97
BUCKET = 25 * 2**20  # bytes of the buckets in which torch's DDP averages gradients


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)  # Libraries warn each other.
    tables = "\n".join([*render(ARGUMENTS.tokens), *render_epoch(ARGUMENTS.tokens)])
    page = ARGUMENTS.write or ARGUMENTS.check
    if page is None:
        print(tables)
        return
    # A function as replacement keeps re from reading backslashes in the tables.
    new = TABLES.sub(lambda _: f"{MARKERS[0]}\n{tables}\n{MARKERS[1]}", TEXT)
    if ARGUMENTS.check and new != TEXT:
        raise ConfigError(
            f"{page}: its tables are not those of this script; run it with --write {page}"
        )
    if ARGUMENTS.write:
        write_atomic(page, new)


# ---- the model and the machines ------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A decoder with an adapter of rank 16 on all linear layers.

    Args:
        linear_weights: number of quantized weights.
        base_bytes: bytes that a GPU gathers of a sharded base; the constants of the quantization
            are not among them, because every GPU keeps them whole.
        forecast: forecast of the step on one GPU.
    """

    name: str
    linear_weights: int
    base_bytes: int
    forecast: Forecast


def read_shape(name: str, tokens: int) -> Shape:
    """Forecast a shape of bench/architectures with micro-batches of so many tokens."""
    config = load_config(
        ROOT / "recipes" / "configs" / "llama3-8b_medmcqa.yaml",
        [
            f"--model.base={name}",
            "--training.gradient_checkpointing=full",
            "--lora.r=16",
            "--training.optimizer=adamw",
        ],
    )
    architecture = read_architecture(name, ROOT / "bench" / "architectures")
    batch = make_batch(config, tokens, assume_labelled(config, tokens), accumulated=False)
    forecast = forecast_step(config, architecture, CUDA, torch.bfloat16, torch.uint8, batch)
    quantized = forecast.at_loading["quantized weights"]
    base_bytes = quantized + forecast.at_loading["embeddings and head"]
    return Shape(name, 2 * quantized, base_bytes, forecast)  # A byte holds two 4-bit weights.


@dataclass(frozen=True)
class Cluster:
    """Machines with GPUs of one kind. All rates are per GPU and second, as far as training reaches
    them.

    Args:
        memory: bytes of a GPU.
        flops: dense bfloat16 operations.
        inside: bytes of a collective within a machine.
        between: bytes of a collective over the network.
        latency: seconds that a collective takes to start.
    """

    name: str
    memory: float
    flops: float
    inside: float
    between: float
    latency: float
    per_machine: int = 8


# Peak rates are the makers'. We assume that training reaches 45 % of the dense bfloat16 rate and
# 80 % of a link.
H100 = Cluster(
    name="H100 80 GB, NVLink, 400 Gbit/s per GPU between machines",
    memory=80e9,
    flops=0.45 * 989e12,
    inside=0.8 * 450e9,
    between=0.8 * 50e9,
    latency=20e-6,
)
RTX4090 = Cluster(
    name="RTX 4090 24 GB, PCIe 4.0, 25 Gbit/s per machine between machines",
    memory=24e9,
    flops=0.45 * 165e12,
    inside=0.8 * 25e9,
    between=0.8 * 3.1e9 / 8,
    latency=30e-6,
)


# ---- predictions ---------------------------------------------------------------------------------


def count_traffic(
    shape: Shape, strategy: str, gpus: int, per_machine: int
) -> tuple[float, float, int]:
    """What one step of one micro-batch sends: bytes per GPU within the machine, bytes per GPU over
    the network, and the number of collectives.

    A ring moves (n - 1) / n of a buffer per GPU for a gather or a reduce-scatter, and twice that
    for an all-reduce (Patarasuk and Yuan, 2009). Gradients and updated adapters are float32. A
    sharded base is gathered twice: for the forward pass, and for the backward pass with its
    recomputation. hsdp shards within a machine and averages gradients between machines. A ring over
    several machines crosses each machine's network once, at the whole machine's rate; hsdp has a
    ring per GPU, each with its share.
    """
    if gpus == 1:
        return 0.0, 0.0, 0
    share = (gpus - 1) / gpus
    gradient = 4.0 * shape.forecast.trainable  # bytes, in float32
    layers = shape.forecast.layers
    if strategy == "hsdp":
        local = min(gpus, per_machine)
        machines = gpus // local
        inside = (local - 1) / local * (2 * shape.base_bytes + 3 * gradient)
        between = 2 * (machines - 1) / machines * gradient / local
        return inside, between, 3 * layers + 4 + (layers if machines > 1 else 0)
    if strategy == "ddp":
        sent = 2 * share * gradient
        calls = math.ceil(gradient / BUCKET)
    elif strategy in ("zero1", "zero2"):
        sent = 2 * share * gradient
        calls = 2  # reduce to the owner, gather the updated adapter
    else:
        sent = share * (2 * shape.base_bytes + 3 * gradient)
        calls = 3 * layers + 4
    if gpus <= per_machine:
        return sent, 0.0, calls
    return 0.0, sent, calls


def predict_seconds(shape: Shape, cluster: Cluster, strategy: str, gpus: int, tokens: int) -> float:
    """Seconds of a step.

    Gathers of a sharded base run beside the computation, so the longer of the two counts. Gradients
    of an unsharded base overlap with the backward pass, which is two thirds of the computation,
    except for the last bucket. The gather of ZeRO-1 and ZeRO-2 overlaps with nothing.
    """
    # A weight takes 2 operations per token in the forward pass, 2 for the gradient of its input and
    # 2 in the recomputation.
    compute = 6 * shape.linear_weights * tokens / cluster.flops
    inside, between, calls = count_traffic(shape, strategy, gpus, cluster.per_machine)
    # One ring has the whole machine's network; the rings of hsdp share it.
    network = cluster.between * (1 if strategy == "hsdp" else cluster.per_machine)
    moving = inside / cluster.inside + between / network + calls * cluster.latency
    if strategy == "ddp":
        last = min(1.0, BUCKET / max(1.0, inside + between)) * moving
        return compute + max(last, moving - compute * 2 / 3)
    if strategy in ("zero1", "zero2"):
        return compute + moving / 2 + max(0.0, moving / 2 - compute * 2 / 3)
    return max(compute, moving)


def predict_memory(shape: Shape, strategy: str, gpus: int, per_machine: int) -> int:
    """Highest bytes per GPU, in training or while it loads the base. Every GPU loads all of it."""
    if strategy == "hsdp":  # It divides within a machine only.
        division = Strategy("fsdp2", min(gpus, per_machine))
    else:
        division = Strategy(strategy, gpus)
    return divide(shape.forecast, division).peak + CONTEXT


# ---- the page ------------------------------------------------------------------------------------


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
        yield from begin_table()
        for gpus in GPUS[1:]:
            sent = [sum(count_traffic(shape, strategy, gpus, 8)[:2]) for strategy in STRATEGIES]
            yield row(gpus, [f"{total / 1e9:.2f} GB" for total in sent])
        yield ""
        for cluster in (H100, RTX4090):
            yield (
                f"Step time in seconds, and highest memory of a GPU, on {cluster.name}."
                " *Predicted.*"
            )
            yield ""
            yield from begin_table()
            for gpus in GPUS:
                yield row(
                    gpus, [describe(shape, cluster, name, gpus, tokens) for name in STRATEGIES]
                )
            yield ""


def begin_table() -> Iterator[str]:
    yield "| GPUs | " + " | ".join(STRATEGIES) + " |"
    yield "|---|" + "---|" * len(STRATEGIES)


def row(gpus: int, entries: list[str]) -> str:
    return f"| {gpus:,} | " + " | ".join(entries) + " |"


def describe(shape: Shape, cluster: Cluster, strategy: str, gpus: int, tokens: int) -> str:
    memory = predict_memory(shape, strategy, gpus, cluster.per_machine)
    # usable() already leaves out the context, which must not count twice.
    if memory - CONTEXT > usable(int(cluster.memory), CUDA):
        return f"– (needs {memory / 1e9:.0f} GB)"
    return f"{predict_seconds(shape, cluster, strategy, gpus, tokens):.2f} s, {memory / 1e9:.0f} GB"


def render_epoch(tokens: int) -> Iterator[str]:
    """A table of the steps in one epoch of MedMCQA."""
    yield (
        f"### One epoch of MedMCQA, {EPOCH_TOKENS / 1e6:.0f} M tokens, {tokens:,} per GPU and step"
    )
    yield ""
    yield "| GPUs | tokens per step | steps in an epoch |"
    yield "|---|---|---|"
    for gpus in GPUS:
        yield row(gpus, [f"{gpus * tokens:,}", f"{EPOCH_TOKENS / (gpus * tokens):,.1f}"])


if __name__ == "__main__":
    run_command(main)
