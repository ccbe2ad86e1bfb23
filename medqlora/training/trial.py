"""Optimizer steps on made-up rows, with the recipe's own modules: what benchmarks time and
measure.
"""

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
from medqlora.prompts.encoding import TokenTable
from medqlora.training.session import Session, build, load
from medqlora.training.strategies.launch import Strategy

# Dense 16-bit tensor rates of the makers' data sheets, in FLOP/s; the first of these words that the
# device's name holds.
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
    """Row lengths like MedMCQA's with a chat prompt and Llama-3's tokenizer: log-normal, mean about
    97 tokens (its first 3,006 rows), int64 [rows]."""
    return np.random.default_rng(seed).lognormal(4.45, 0.5, rows).clip(32, longest).astype(np.int64)


def make_table(lengths: np.ndarray, labelled: int, vocabulary: int, seed: int) -> TokenTable:
    """Rows of random tokens, the last `labelled` of each supervised."""
    ids = np.random.default_rng(seed).integers(vocabulary, size=int(lengths.sum()), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenTable(
        ids,
        offsets,
        np.maximum(1, lengths - labelled).astype(np.int32),
        [f"row-{i}" for i in range(len(lengths))],
    )


@dataclass
class StepTimes:
    """Seconds of one optimizer step: all of it, and what went into making batches; its tokens."""

    seconds: float
    data_seconds: float
    tokens: int
    supervised: int
    rows: int
    loss: float


class Trial:
    """The recipe's own session on made-up rows, with its steps timed."""

    def __init__(self, config: Config, architecture: PretrainedConfig | None, device: torch.device):
        """architecture: random weights of this shape; None: the weights of config.model.base."""
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
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self, table: TokenTable, plan: Plan, number: int) -> StepTimes:
        """One step of the plan, as the recipe takes it."""
        self.synchronize()
        began = time.perf_counter()
        rows = plan.rows_of(number)
        targets = int(table.supervised[rows].sum())
        gradients = self.session.accumulate(table, plan, number, targets)
        total, _ = self.session.sum_over_ranks(gradients.losses)
        self.session.update(self.session.config.training.lr)
        self.synchronize()
        return StepTimes(
            seconds=time.perf_counter() - began,
            data_seconds=gradients.data_seconds,
            tokens=int(table.lengths[rows].sum()),
            supervised=targets,
            rows=len(rows),
            loss=total / targets,
        )


def count_flops(trial: Trial, recomputed: int) -> float:
    """Floating-point operations per token of a step: (4 + 2 x recomputed layers / layers) for each
    weight of the decoder layers' linear maps, adapters included; see bench/throughput.py."""
    total = 0
    for layer in find_layers(unwrap(trial.model)):
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                total += module.in_features * module.out_features
    return (4 + 2 * recomputed / trial.layers) * total


def find_peak(
    device: torch.device, dtype: torch.dtype, given: float | None
) -> tuple[float | None, str]:
    """FLOP/s that utilisation is measured against, and where the number is from."""
    if given:
        return given * 1e12, "--peak_tflops"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next(
            (rate for key, rate in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None
        )
        return (
            (known, "data sheet, dense 16-bit")
            if known and dtype is not torch.float32
            else (None, "unknown; give --peak_tflops")
        )
    a = torch.randn(2048, 2048).to(dtype)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times), "matrix product of 2,048 x 2,048, measured"
