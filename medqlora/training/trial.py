"""Optimizer steps on random rows, through the recipe's own session, for benchmarks."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig

from medqlora.batches.plan import Plan
from medqlora.core.config import Config
from medqlora.model.base import find_layers, unwrap
from medqlora.model.hardware import choose_dtype
from medqlora.prompts.rows import TokenTable
from medqlora.training.session import Session, build, load
from medqlora.training.strategies.launch import Strategy

# Peak rates of dense 16-bit matrix products in FLOP/s, from the manufacturers' data sheets. The
# first key that is a word of the device's name applies, so the longer names stand first.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "T4": 65e12,
}


def draw_lengths(rows: int, longest: int, seed: int) -> np.ndarray:
    """Draw row lengths in tokens that are distributed like MedMCQA's, int64 [rows].

    The log-normal distribution, of mean 97, follows the first 3,006 rows of MedMCQA with a chat
    prompt and the tokenizer of Llama 3. Lengths are cut to the range from 32 to `longest`.
    """
    # The mean of a log-normal distribution is exp(mu + sigma^2 / 2), here exp(4.575) = 97.
    return np.random.default_rng(seed).lognormal(4.45, 0.5, rows).clip(32, longest).astype(np.int64)


def make_table(lengths: np.ndarray, labelled: int, vocabulary: int, seed: int) -> TokenTable:
    """Make a table of random tokens.

    Args:
        lengths: Tokens of each row, int64 [rows].
        labelled: Number of supervised tokens at the end of each row.
        vocabulary: Number of different tokens.
    """
    ids = np.random.default_rng(seed).integers(vocabulary, size=int(lengths.sum()), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])  # int64 [rows + 1]
    # The first token of a row is never supervised. In a packed batch its prediction would come from
    # the row before it.
    prompt_lengths = np.maximum(1, lengths - labelled).astype(np.int32)
    names = [f"row-{number}" for number in range(len(lengths))]
    return TokenTable(ids, offsets, prompt_lengths, names, np.arange(len(names), dtype=np.int32))


@dataclass
class StepTimes:
    """Time and size of one optimizer step.

    Args:
        seconds: Seconds of the whole step.
        data_seconds: Seconds of it in which batches were made.
        tokens: Tokens of the step.
        supervised: Supervised tokens of the step.
        rows: Rows of the step.
        loss: Mean loss per supervised token.
    """

    seconds: float
    data_seconds: float
    tokens: int
    supervised: int
    rows: int
    loss: float


class Trial:
    """The recipe's own session on one process, with timed steps."""

    def __init__(self, config: Config, architecture: PretrainedConfig | None, device: torch.device):
        """Build the model and its session.

        Args:
            architecture: Random weights of this architecture are made; None loads the weights of
                config.model.base.

        Raises:
            ModelError, AttentionError, TrainingError: The model cannot be made (session.load).
        """
        self.device = device
        self.dtype = choose_dtype(config.model.dtype, device)
        loaded = load(config, device, architecture=architecture)
        built = build(loaded, config)
        self.session = Session(built, config, Strategy("one"), device, self.dtype)
        self.compiled = loaded.compiled
        self.backend = built.backend
        self.model = built.model
        self.layers = built.layers
        self.recomputed = built.recomputed
        self.vocabulary = built.vocabulary

    def synchronize(self) -> None:
        """Wait until the GPU has finished all work; do nothing on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self, table: TokenTable, plan: Plan, number: int) -> StepTimes:
        """Take one step of the plan as the recipe does, and time it."""
        # The clock is read only when the GPU has done all earlier work.
        self.synchronize()
        start = time.perf_counter()
        rows = plan.rows_of(number)
        targets = int(table.supervised[rows].sum())
        gradients = self.session.accumulate(table, plan, number, targets)
        # The recipe waits for the loss in every step, so this wait belongs to a step's time.
        total, _ = self.session.sum_over_ranks(gradients.losses)
        self.session.update(self.session.config.training.lr)
        self.synchronize()
        return StepTimes(
            seconds=time.perf_counter() - start,
            data_seconds=gradients.data_seconds,
            tokens=int(table.lengths[rows].sum()),
            supervised=targets,
            rows=len(rows),
            loss=total / targets,
        )


def count_flops(trial: Trial, recomputed: int) -> float:
    """Return the floating-point operations per token of a training step.

    Each weight of the linear maps in the decoder layers, adapters included, takes 2 operations in
    the forward pass, 2 for the gradient of its input, 2 more where the layer is recomputed, and 2
    more for its own gradient where all weights train.
    bench/throughput.py says what this count leaves out.

    Args:
        recomputed: Number of layers that are recomputed.
    """
    total = 0
    for layer in find_layers(unwrap(trial.model)):
        for module in layer.modules():
            # The quantized layers of bitsandbytes are subclasses of Linear. Their weight is packed,
            # so its shape says nothing, but these two numbers hold.
            if isinstance(module, torch.nn.Linear):
                total += module.in_features * module.out_features
    own = 2 if trial.session.config.training.method == "full" else 0
    return (4 + own + 2 * recomputed / trial.layers) * total


def find_peak(
    device: torch.device, dtype: torch.dtype, given: float | None
) -> tuple[float | None, str]:
    """Find the peak rate that utilisation is measured against.

    A GPU's rate stands in its data sheet, for 16-bit dtypes only. A CPU's rate is that of the
    fastest of four matrix products.

    Args:
        dtype: The dtype of computing.
        given: The rate in TFLOP/s from the command line; it is used if it is not None.

    Returns:
        The rate in FLOP/s (None if it is unknown), and where the number comes from.
    """
    if given:
        return given * 1e12, "--peak_tflops"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, rate in PEAK_FLOPS.items():
            if re.search(rf"\b{key}\b", name) and dtype is not torch.float32:
                return rate, "data sheet, dense 16-bit"
        return None, "unknown; give --peak_tflops"
    # The product of two n x n matrices takes 2 n^3 operations. The first of them may be slow.
    matrix = torch.randn(2048, 2048).to(dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds), "matrix product of 2,048 x 2,048, measured"
