"""What each strategy moves, needs and takes, from 1 to 1,024 GPUs: arithmetic from stated bandwidths, nothing measured.

    python bench/scaling.py                          # the tables
    python bench/scaling.py --write docs/scaling.md  # put them into the page, between its markers
    python bench/scaling.py --check docs/scaling.md  # exit code 2 if the page holds other tables

One step is one micro-batch of --tokens per GPU, QLoRA with every layer recomputed. The formulas are in the functions below, each
with its reason; docs/scaling.md says what follows from them.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medqlora.config import ConfigError, UserError
from medqlora.runs import write_atomic

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # per weight: 4 bits, an 8-bit constant per 64 weights, a float32 per 256 constants
TRAINED_BYTES = 4 + 4 + 8  # per adapter parameter in float32: weight, gradient, AdamW's two moments
GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "hsdp")
EPOCH_TOKENS = 182_822 * 97  # MedMCQA's training rows; 97: mean of 3,006 of them, chat prompt and letter, Llama-3's tokenizer
MARKERS = ("<!-- tables: python bench/scaling.py --write docs/scaling.md -->", "<!-- end of tables -->")


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; r: rank of the adapter on all linear layers."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    kv: int  # key heads x head size
    vocabulary: int
    r: int = 16

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the linear weights of a layer."""
        h, m = self.hidden, self.intermediate
        return [(h, h), (h, self.kv), (h, self.kv), (h, h), (h, m), (h, m), (m, h)]

    @property
    def linear_weights(self) -> int:
        return self.layers * sum(a * b for a, b in self.linears)

    @property
    def adapter(self) -> int:
        return self.layers * self.r * sum(a + b for a, b in self.linears)

    @property
    def base_bytes(self) -> float:
        """NF4 linear weights, bfloat16 embedding and head."""
        return NF4_BYTES * self.linear_weights + 2 * 2 * self.vocabulary * self.hidden


@dataclass(frozen=True)
class Cluster:
    """flops: dense bfloat16 per second and GPU that training reaches; inside, between: bytes per second and GPU that a
    collective reaches within a machine and over the network; latency: seconds of one collective's start."""

    name: str
    memory: float
    flops: float
    inside: float
    between: float
    latency: float
    per_machine: int = 8


# Peak rates are the makers'; the shares of them that are reached are assumptions, stated here: 45 % of the dense bfloat16
# rate, 80 % of a link.
H100 = Cluster("H100 80 GB, NVLink, 400 Gbit/s per GPU between machines", 80e9, 0.45 * 989e12, 0.8 * 450e9, 0.8 * 50e9, 20e-6)
RTX4090 = Cluster("RTX 4090 24 GB, PCIe 4.0, 25 Gbit/s per machine between machines", 24e9, 0.45 * 165e12, 0.8 * 25e9, 0.8 * 3.1e9 / 8, 30e-6)
LLAMA_8B = Shape("Llama-3-8B", 32, 4096, 14_336, 1024, 128_256)
LLAMA_70B = Shape("Llama-3-70B", 80, 8192, 28_672, 1024, 128_256)


def count_traffic(shape: Shape, strategy: str, gpus: int, per_machine: int) -> tuple[float, float, int]:
    """(bytes sent per GPU within the machine, over the network, collectives) of one step of one micro-batch.

    A ring moves (n - 1) / n of a buffer per GPU for a gather or a reduce-scatter, twice that for an all-reduce (Patarasuk and
    Yuan, 2009). Gradients and updated adapters are float32. A sharded base is gathered twice: for the forward pass, and for
    the backward pass with its recomputation. hsdp shards within a machine and averages gradients between machines. A ring
    over several machines crosses each machine's network once, at the whole machine's rate; hsdp has a ring per GPU, each with its share.
    """
    if gpus == 1:
        return 0.0, 0.0, 0
    share, gradient = (gpus - 1) / gpus, 4.0 * shape.adapter
    local = min(gpus, per_machine)
    if strategy == "ddp":
        sent, calls = 2 * share * gradient, -(-int(gradient) // (25 * 2**20))  # torch's buckets of 25 MiB
    elif strategy in ("zero1", "zero2"):
        sent, calls = 2 * share * gradient, 2  # reduce to the owner, gather the updated adapter
    elif strategy in ("zero3", "fsdp2"):
        sent, calls = share * (2 * shape.base_bytes + 3 * gradient), 3 * shape.layers + 4
    else:
        inside = (local - 1) / local * (2 * shape.base_bytes + 3 * gradient)
        machines = gpus // local
        between = 2 * (machines - 1) / machines * gradient / local
        return inside, between, 3 * shape.layers + 4 + (shape.layers if machines > 1 else 0)
    return (sent, 0.0, calls) if gpus <= per_machine else (0.0, sent, calls)


def predict_seconds(shape: Shape, cluster: Cluster, strategy: str, gpus: int, tokens: int) -> float:
    """Step time: gathers run beside the computation, what they take longer is waited for; gradients of an unsharded base
    overlap with the backward pass (two thirds of the computation) but for the last bucket, ZeRO-1/2's gather with nothing."""
    compute = 6 * shape.linear_weights * tokens / cluster.flops
    inside, between, calls = count_traffic(shape, strategy, gpus, cluster.per_machine)
    network = cluster.between * (1 if strategy == "hsdp" else cluster.per_machine)  # a ring crosses once, hsdp's eight side by side
    moving = inside / cluster.inside + between / network + calls * cluster.latency
    if strategy == "ddp":
        last = min(1.0, 25 * 2**20 / max(1.0, inside + between)) * moving
        return compute + max(last, moving - compute * 2 / 3)
    if strategy in ("zero1", "zero2"):
        return compute + moving / 2 + max(0.0, moving / 2 - compute * 2 / 3)
    return max(compute, moving)


def predict_memory(shape: Shape, strategy: str, gpus: int, tokens: int, per_machine: int) -> tuple[float, float]:
    """(bytes per GPU in training, while loading). Activations with every layer recomputed: each layer's bfloat16 input, and
    one layer's working set, about 42 bfloat16 values per token and hidden unit; gathered layers: two, quantized; one
    dequantized weight; 1 GB of context and workspace. Every GPU loads the whole base before a strategy divides it."""
    shards = {"ddp": 1, "zero1": 1, "zero2": 1, "hsdp": min(gpus, per_machine)}.get(strategy, gpus)
    trained = shape.adapter * TRAINED_BYTES
    if strategy == "zero1":
        trained = shape.adapter * (8 + 8 / gpus)
    elif strategy == "zero2":
        trained = shape.adapter * (4 + 4 / gpus + 8 / gpus)
    elif shards > 1:
        trained /= shards
    activations = tokens * 2 * (shape.hidden * shape.layers + 42 * shape.hidden)
    gathered = 2 * NF4_BYTES * shape.linear_weights / shape.layers if shards > 1 else 0
    workspace = 2 * shape.hidden * shape.intermediate + 1e9
    constants = (NF4_BYTES - 0.5) * shape.linear_weights  # of the quantization; they stay on every GPU
    return constants + (shape.base_bytes - constants) / shards + trained + activations + gathered + workspace, shape.base_bytes + 1e9


def render(tokens: int) -> Iterator[str]:
    """The page's tables, as markdown lines."""
    for shape in (LLAMA_8B, LLAMA_70B):
        yield f"### {shape.name}: {shape.linear_weights / 1e9:.2f} G linear weights, adapter r={shape.r} of {shape.adapter / 1e6:.1f} M"
        yield ""
        yield f"Sent per GPU and step (one micro-batch of {tokens:,} tokens), all of it; gradients of the adapter are {4 * shape.adapter / 1e6:.0f} MB,"
        yield f"the quantized base {shape.base_bytes / 1e9:.1f} GB."
        yield ""
        yield "| GPUs | " + " | ".join(STRATEGIES) + " |"
        yield "|---|" + "---|" * len(STRATEGIES)
        for gpus in GPUS[1:]:
            cells = [sum(count_traffic(shape, strategy, gpus, 8)[:2]) for strategy in STRATEGIES]
            yield f"| {gpus:,} | " + " | ".join(f"{sent / 1e9:.2f} GB" for sent in cells) + " |"
        yield ""
        for cluster in (H100, RTX4090):
            yield f"Step time in seconds, and memory in training, on {cluster.name}. *Predicted.*"
            yield ""
            yield "| GPUs | " + " | ".join(STRATEGIES) + " |"
            yield "|---|" + "---|" * len(STRATEGIES)
            for gpus in GPUS:
                cells = [describe(shape, cluster, strategy, gpus, tokens) for strategy in STRATEGIES]
                yield f"| {gpus:,} | " + " | ".join(cells) + " |"
            yield ""


def render_epoch(tokens: int) -> Iterator[str]:
    """How far one epoch of MedMCQA goes."""
    yield f"### One epoch of MedMCQA, {EPOCH_TOKENS / 1e6:.0f} M tokens, {tokens:,} per GPU and step"
    yield ""
    yield "| GPUs | tokens per step | steps in an epoch |"
    yield "|---|---|---|"
    for gpus in GPUS:
        yield f"| {gpus:,} | {gpus * tokens:,} | {EPOCH_TOKENS / (gpus * tokens):,.1f} |"


def describe(shape: Shape, cluster: Cluster, strategy: str, gpus: int, tokens: int) -> str:
    memory, loading = predict_memory(shape, strategy, gpus, tokens, cluster.per_machine)
    if max(memory, loading) > 0.95 * cluster.memory:
        what = "loads" if loading > memory else "needs"
        return f"– ({what} {max(memory, loading) / 1e9:.0f} GB)"
    return f"{predict_seconds(shape, cluster, strategy, gpus, tokens):.2f} s, {memory / 1e9:.0f} GB"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch; default %(default)s")
    parser.add_argument("--write", type=Path, help="page whose tables are replaced")
    parser.add_argument("--check", type=Path, help="page whose tables must be these")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.tokens < 1:
        raise ConfigError(f"--tokens {arguments.tokens}: expected 1 or more")
    tables = "\n".join([*render(arguments.tokens), *render_epoch(arguments.tokens)])
    page = arguments.write or arguments.check
    if page is None:
        print(tables)
        return
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{page}: {error.strerror}; give the scaling page") from None
    pattern = re.compile(f"{re.escape(MARKERS[0])}.*{re.escape(MARKERS[1])}", re.DOTALL)
    if not pattern.search(text):
        raise ConfigError(f"{page}: no lines {MARKERS[0]} and {MARKERS[1]}; give the scaling page")
    new = pattern.sub(lambda found: f"{MARKERS[0]}\n{tables}\n{MARKERS[1]}", text)
    if arguments.check and new != text:
        raise ConfigError(f"{page}: its tables are not those of this script; run it with --write {page}")
    if arguments.write:
        write_atomic(page, new)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
