"""One stage of a check on real hardware.

Results are written to disk after each of them, so that a process that dies loses none.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig

from medqlora.core.config import Config, Data, Lora, Model, Training
from medqlora.core.files import write_json
from medqlora.model.hardware import choose_dtype
from medqlora.training.memory.architectures import read_architecture
from medqlora.training.memory.estimate import with_layers

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}


class Stage:
    """Collects checks, which pass or fail, and figures, which are only recorded.

    Attributes:
        device: The device that is checked.
        small: Whether the stage is rehearsed on a CPU, with small shapes.
        dtype: The dtype that training computes in on this device.
        memory: Bytes of the GPU's memory; 0 on a CPU.
    """

    def __init__(self, device: torch.device, output: Path):
        self.device = device
        self.small = device.type == "cpu"
        self.output = output
        self.dtype = torch.float32 if self.small else choose_dtype("auto", device)
        self.memory = 0 if self.small else torch.cuda.get_device_properties(device).total_memory
        self.checks: list[dict[str, Any]] = []
        self.figures: dict[str, Any] = {}

    @classmethod
    def from_arguments(cls, arguments: list[str], description: str | None) -> Stage:
        """Make a stage from the options `--device` and `--output`."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument(
            "--device",
            choices=["cuda", "cpu"],
            default="cuda",
            help="the device to check; cpu rehearses the stage with small shapes (default cuda)",
        )
        parser.add_argument(
            "--output",
            type=Path,
            required=True,
            help="JSON file of the results, written again after each result",
        )
        chosen = parser.parse_args(arguments)
        return cls(torch.device(chosen.device), chosen.output)

    def check(self, name: str, value: float, limit: float) -> None:
        """Record a number that must not exceed its limit; NaN fails."""
        self.checks.append(
            # The comparison must be this way round: `not value > limit` would let NaN pass.
            {"name": name, "value": float(value), "limit": limit, "ok": bool(value <= limit)}
        )
        self.save()

    def figure(self, name: str, value: Any) -> None:
        """Record a number or text that has no limit."""
        self.figures[name] = value
        self.save()

    def save(self) -> None:
        """Write all results so far to the output file."""
        write_json(self.output, {"checks": self.checks, "figures": self.figures})

    def finish(self) -> int:
        """Write the results and return the exit code: 0 if all checks passed, else 1."""
        self.save()
        return 0 if all(check["ok"] for check in self.checks) else 1

    # ---- models and batches ----------------------------------------------------------------------

    def choose_shape(self, architectures: Path, layers: int) -> PretrainedConfig:
        """Return the architecture of the first `layers` layers of Llama-3-8B.

        On a CPU it is a small Llama of three layers. `architectures` is the folder of the
        configuration files that need no download.
        """
        if self.small:
            return LlamaConfig(**SMALL)
        return with_layers(read_architecture("llama3-8b", architectures), layers)

    def choose_lengths(self, tokens: int) -> tuple[int, ...]:
        """Return the row lengths of one packed batch: `tokens // 512` rows of 512 tokens.

        On a CPU these are eight rows of 60 tokens.
        """
        return (60,) * 8 if self.small else (512,) * (tokens // 512)

    def make_config(
        self,
        lengths: tuple[int, ...],
        packs: int = 1,
        mode: str = "none",
        dropout: float = 0.0,
        quantization: str = "nf4",
    ) -> Config:
        """Return the configuration of a training on random weights.

        Args:
            lengths: Tokens of each row of one micro-batch.
            packs: Micro-batches per optimizer step.
            mode: Value of training.gradient_checkpointing.
            dropout: Value of lora.dropout.
            quantization: Value of model.quantization.
        """
        tokens = sum(lengths)
        return Config(
            model=Model(
                # Nothing is loaded by this name: random weights of an architecture are made.
                base="random",
                quantization=quantization,
                dtype=str(self.dtype).removeprefix("torch."),
            ),
            lora=Lora(dropout=dropout),
            # The rows of choose_lengths are all equally long.
            data=Data(max_length=lengths[0]),
            training=Training(
                max_tokens_per_batch=tokens,
                global_batch_tokens=packs * tokens,
                gradient_checkpointing=mode,
            ),
        )

    # ---- measuring -------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Wait until the GPU has finished all work; do nothing on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, function: Callable[[], Any], repeats: int = 10) -> float:
        """Return the median seconds of one call of `function`, after two warm-up calls."""
        seconds = []
        for number in range(repeats + 2):
            # A GPU works behind the program, so the clock is read only when all its work is done.
            self.synchronize()
            start = time.perf_counter()
            function()
            self.synchronize()
            # The first calls may compile kernels and reserve memory.
            if number >= 2:
                seconds.append(time.perf_counter() - start)
        return sorted(seconds)[len(seconds) // 2]


def relative_error(measured: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |measured - expected| / |expected|, Euclidean norms of flattened float64 vectors.

    The result is infinite where `measured` has an entry that is not finite.
    """
    measured = measured.detach().double().flatten()  # float64 [entries]
    expected = expected.detach().double().flatten()  # float64 [entries]
    if not torch.isfinite(measured).all():
        return math.inf
    difference = torch.linalg.vector_norm(measured - expected)
    # Without the lower bound, a right result of zeros would be 0 / 0, and NaN fails a check.
    return float(difference / torch.linalg.vector_norm(expected).clamp(min=1e-30))
