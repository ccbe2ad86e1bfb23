"""The hardware that a forecast is for, and the memory that may be used of it."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

import psutil
import torch
from transformers import PretrainedConfig

from medqlora.core.config import Config
from medqlora.model.attention.backends import Choice
from medqlora.training.memory.allocator import MIB
from medqlora.training.memory.forecast import check_attention
from medqlora.training.memory.tracker import Forecast, ForecastError
from medqlora.training.strategies.launch import Strategy

# We assume this much for the CUDA context of one process; it lies outside the allocator.
CONTEXT = 512 * MIB
# We assume this much for kernels and libraries that load at their first use, after free memory was
# read.
KERNELS = 256 * MIB
MARGIN = 0.05  # of a card's memory that a plan leaves free, for fragmentation
# of a machine's free memory that tensors on a CPU may take: the C library keeps freed blocks, up to
# as much again
HEAP = 0.5


@dataclass(frozen=True)
class TargetHardware:
    """Where a step runs. memory: bytes that one process may use, its margin taken off already;
    host: bytes of the machine's memory that one process may pin for offloaded layer inputs;
    capability: of a GPU that is not here (default: this machine's); expandable: whether the
    allocator's segments grow."""

    device: torch.device
    dtype: torch.dtype
    storage: torch.dtype
    strategy: Strategy
    memory: int
    host: int = sys.maxsize
    capability: tuple[int, int] | None = None
    expandable: bool = True

    def needs(self, forecast: Forecast, short: bool = False) -> int:
        """Bytes that a step takes of `memory`: on a GPU what its allocator reserves; short: what it
        can do with, see Reserve.
        """
        if self.device.type == "cpu":
            return forecast.peak
        reserved = forecast.reserved if self.expandable else forecast.reserved_fixed
        return reserved.short if short else reserved.plenty

    def holds(self, forecast: Forecast, short: bool = False) -> bool:
        return self.needs(forecast, short) <= self.memory and forecast.host <= self.host

    def choose_attention(self, config: Config, architecture: PretrainedConfig) -> Choice:
        return check_attention(
            config.model.attention, self.device, self.dtype, architecture, self.capability
        )


@dataclass(frozen=True)
class StepPlan:
    """training.max_tokens_per_batch and training.gradient_checkpointing decided, and the forecast
    that they rest on. short: it fits where the allocator gives back what it can
    (allocator.Reserve)."""

    tokens: int
    checkpointing: str
    forecast: Forecast
    short: bool = False


def usable(total: int, device: torch.device) -> int:
    """Bytes for tensors on a card of `total` bytes, less MARGIN, CONTEXT and KERNELS, or in a
    machine's memory: HEAP of it.
    """
    return (
        int(total * (1 - MARGIN)) - CONTEXT - KERNELS
        if device.type == "cuda"
        else int(total * HEAP)
    )


def available_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that one of so many processes of this machine may use for training: what is free on its
    GPU, or its share of the machine's free memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * (1 - MARGIN)) - KERNELS
    return usable(psutil.virtual_memory().available // processes, device)


def available_host(processes: int = 1) -> int:
    """Bytes of this machine's memory that one of so many processes may pin."""
    return usable(psutil.virtual_memory().available // processes, torch.device("cpu"))


def parse_size(text: str) -> int:
    """ "8GiB", "24 GB" or a number of bytes -> bytes.

    Raises:
        ForecastError: something else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):  # also a bare 0
        raise ForecastError(f"size {text!r}: expected a number and a unit, e.g. 8GiB or 24GB")
    return int(
        float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
    )
