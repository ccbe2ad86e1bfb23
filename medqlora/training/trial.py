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

from medqlora.batches.collate import collate
from medqlora.batches.plan import Plan
from medqlora.core.config import Config
from medqlora.model.adapter import attach_adapter
from medqlora.model.attention.backends import IMPLEMENTATIONS, choose_backend
from medqlora.model.attention.packed_batch import move_batch
from medqlora.model.base import find_layers, load_base, unwrap
from medqlora.model.compiling import compile_layers
from medqlora.model.hardware import choose_dtype
from medqlora.model.head_loss import AnswerLoss
from medqlora.model.random_base import make_base
from medqlora.model.recomputation import set_checkpointing
from medqlora.prompts.encoding import TokenTable
from medqlora.training.optimizers import make_optimizer
from medqlora.training.strategies.launch import Strategy
from medqlora.training.strategies.wrapping import wrap

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
    """A loaded model with its adapter, wrapped and ready to step."""

    def __init__(self, config: Config, architecture: PretrainedConfig | None, device: torch.device):
        """architecture: random weights of this shape; None: the weights of config.model.base."""
        self.config = config
        self.device = device
        self.dtype = choose_dtype(config.model.dtype, device)
        if architecture is None:
            base, self.backend = load_base(config.model, device)
        else:
            base = make_base(architecture, config.model, device, self.dtype)
            self.backend = choose_backend(
                config.model.attention, device, self.dtype, base.config
            ).backend
            base.set_attn_implementation(IMPLEMENTATIONS[self.backend])
        self.compiled = compile_layers(base, device, config.training.compile)
        self.model = attach_adapter(base, config.lora, config.training.seed)
        self.layers = base.config.get_text_config().num_hidden_layers
        self.recomputed = set_checkpointing(base, config.training.gradient_checkpointing)
        loss_model = AnswerLoss(self.model, config.training.loss_chunk_tokens)
        self.trainer = wrap(
            Strategy("one"),
            loss_model,
            lambda weights: make_optimizer(config.training, weights),
            config.training.max_grad_norm,
            self.dtype,
        )
        self.vocabulary = base.config.get_text_config().vocab_size

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self, table: TokenTable, plan: Plan, number: int) -> StepTimes:
        """One step of the plan, as the recipe takes it."""
        self.synchronize()
        began = time.perf_counter()
        waited = 0.0
        losses = []
        batches = plan.micro_batches(number)
        rows = np.concatenate(batches)
        targets = int(table.supervised[rows].sum())
        self.trainer.module.train()
        for place, chosen in enumerate(batches):
            asked = time.perf_counter()
            batch = move_batch(collate(table, chosen), self.backend, self.device)
            waited += time.perf_counter() - asked
            with self.trainer.accumulate(place == len(batches) - 1):
                loss = self.trainer(**batch)
                self.trainer.backward(loss / targets)
            losses.append(loss.detach())
        loss = torch.stack(losses).sum().item() / targets
        self.trainer.step(self.config.training.lr)
        self.synchronize()
        return StepTimes(
            time.perf_counter() - began,
            waited,
            int(table.lengths[rows].sum()),
            targets,
            len(rows),
            loss,
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
