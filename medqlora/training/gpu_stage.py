"""One stage of a check on real hardware: what it found is on disk after every finding, whatever
becomes of the process.
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
    """Collects checks, which pass or fail, and figures, which are kept.

    device: what is tried; small: shapes for a CPU, which rehearses the stage; dtype: what training
    computes in there.
    """

    def __init__(self, device: torch.device, output: Path):
        self.device = device
        self.small = device.type == "cpu"
        self.output = output
        self.dtype = torch.float32 if self.small else choose_dtype("auto", device)
        # bytes
        self.memory = 0 if self.small else torch.cuda.get_device_properties(device).total_memory
        self.checks: list[dict[str, Any]] = []
        self.figures: dict[str, Any] = {}

    @classmethod
    def from_arguments(cls, arguments: list[str], description: str | None) -> Stage:
        """Read --device and --output."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument(
            "--device", choices=["cuda", "cpu"], default="cuda", help="what is tried (default cuda)"
        )
        parser.add_argument(
            "--output",
            type=Path,
            required=True,
            help="JSON file of what is found, written after every finding",
        )
        chosen = parser.parse_args(arguments)
        return cls(torch.device(chosen.device), chosen.output)

    def check(self, name: str, value: float, limit: float) -> None:
        """A number that may not be over its limit; NaN is."""
        self.checks.append(
            {"name": name, "value": float(value), "limit": limit, "ok": bool(value <= limit)}
        )
        self.save()

    def figure(self, name: str, value: Any) -> None:
        self.figures[name] = value
        self.save()

    def save(self) -> None:
        write_json(self.output, {"checks": self.checks, "figures": self.figures})

    def finish(self) -> int:
        """Exit code: 0 if all checks passed."""
        self.save()
        return 0 if all(check["ok"] for check in self.checks) else 1

    # ---- what is trained -------------------------------------------------------------------------

    def choose_shape(self, architectures: Path, layers: int) -> PretrainedConfig:
        """So many layers of Llama-3-8B; on a CPU a small Llama. architectures: folder of shapes."""
        return (
            LlamaConfig(**SMALL)
            if self.small
            else with_layers(read_architecture("llama3-8b", architectures), layers)
        )

    def choose_lengths(self, tokens: int) -> tuple[int, ...]:
        """Rows of a pack: of 512 tokens; on a CPU eight of 60."""
        return (60,) * 8 if self.small else (512,) * (tokens // 512)

    def make_config(
        self,
        lengths: tuple[int, ...],
        packs: int = 1,
        mode: str = "none",
        dropout: float = 0.0,
        quantization: str = "nf4",
    ) -> Config:
        """A training on random weights in micro-batches of these rows; packs: micro-batches of a
        step; mode: of recomputation.
        """
        tokens = sum(lengths)
        return Config(
            model=Model(
                base="random",
                quantization=quantization,
                dtype=str(self.dtype).removeprefix("torch."),
            ),
            lora=Lora(dropout=dropout),
            data=Data(max_length=lengths[0]),
            training=Training(
                max_tokens_per_batch=tokens,
                global_batch_tokens=packs * tokens,
                gradient_checkpointing=mode,
            ),
        )

    # ---- measuring -------------------------------------------------------------------------------

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, function: Callable[[], Any], repeats: int = 10) -> float:
        """Median seconds of a call, after two that are not counted."""
        seconds = []
        for number in range(repeats + 2):
            self.synchronize()
            began = time.perf_counter()
            function()
            self.synchronize()
            if number >= 2:
                seconds.append(time.perf_counter() - began)
        return sorted(seconds)[len(seconds) // 2]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, as vectors in float64; infinite where something is not
    finite.
    """
    found = found.detach().double().flatten()
    expected = expected.detach().double().flatten()
    if not torch.isfinite(found).all():
        return math.inf
    return float(
        torch.linalg.vector_norm(found - expected)
        / torch.linalg.vector_norm(expected).clamp(min=1e-30)
    )
