"""The hardware that a forecast is for, and the memory of it that a training may use."""

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

# The CUDA context of one process lies outside the allocator. This is an assumption of its size.
CONTEXT = 512 * MIB
# Kernels and libraries are loaded when they are first used, after the free memory was read. This is
# an assumption of their size.
KERNELS = 256 * MIB
MARGIN = 0.05  # A plan leaves this fraction of a GPU's memory free, for fragmentation.
# Tensors on a CPU may take this fraction of a machine's free memory. The C library keeps freed
# blocks, which can take as much memory again.
HEAP = 0.5


@dataclass(frozen=True)
class TargetHardware:
    """The hardware that a step runs on.

    Args:
        dtype: The dtype of computing.
        storage: The dtype that 4-bit weights are packed in.
        memory: Bytes that one process may use; the margin is already subtracted.
        host: Bytes of host memory that one process may pin for offloaded layer inputs.
        capability: Compute capability of a GPU that is not in this machine; None takes the one of
            this machine's GPU.
        expandable: Whether the allocator has expandable segments.
    """

    device: torch.device
    dtype: torch.dtype
    storage: torch.dtype
    strategy: Strategy
    memory: int
    host: int = sys.maxsize
    capability: tuple[int, int] | None = None
    expandable: bool = True

    def needs(self, forecast: Forecast, short: bool = False) -> int:
        """Return the bytes that a step takes of `memory`.

        On a GPU they are what the allocator reserves, and with `short` what it reserves when memory
        runs out (see Reserve).
        """
        if self.device.type == "cpu":
            return forecast.peak
        reserved = forecast.reserved if self.expandable else forecast.reserved_fixed
        return reserved.short if short else reserved.plenty

    def holds(self, forecast: Forecast, short: bool = False) -> bool:
        """Say whether a step fits the memory of the GPU or CPU, and of the host."""
        return self.needs(forecast, short) <= self.memory and forecast.host <= self.host

    def choose_attention(self, config: Config, architecture: PretrainedConfig) -> Choice:
        """Choose the attention backend of a forecast; it raises as check_attention does."""
        return check_attention(
            config.model.attention, self.device, self.dtype, architecture, self.capability
        )


@dataclass(frozen=True)
class StepPlan:
    """Micro-batch and recomputation of a step, and its forecast.

    Args:
        tokens: Tokens of a micro-batch of one process.
        checkpointing: Value of training.gradient_checkpointing, not `auto`.
        forecast: The memory of one process.
        short: Whether the step fits only because the allocator returns what it can
            (allocator.Reserve).
    """

    tokens: int
    checkpointing: str
    forecast: Forecast
    short: bool = False


def usable(total: int, device: torch.device) -> int:
    """Return the bytes of a memory of `total` bytes that tensors may use.

    On a GPU, MARGIN, CONTEXT and KERNELS are subtracted. In host memory it is the fraction HEAP.
    """
    if device.type == "cuda":
        return int(total * (1 - MARGIN)) - CONTEXT - KERNELS
    return int(total * HEAP)


def available_memory(device: torch.device, processes: int = 1) -> int:
    """Return the bytes that one process may use for training.

    On a GPU they are the free memory of this process's GPU less MARGIN and KERNELS; on a CPU, its
    share of the usable free memory of the machine.

    Args:
        processes: Number of training processes on this machine.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * (1 - MARGIN)) - KERNELS
    return usable(psutil.virtual_memory().available // processes, device)


def available_host(processes: int = 1) -> int:
    """Return the bytes of host memory that one of `processes` processes of this machine may pin."""
    return usable(psutil.virtual_memory().available // processes, torch.device("cpu"))


def parse_size(text: str) -> int:
    """Read a size such as "8GiB", "24 GB", or a plain number of bytes; return bytes.

    Raises:
        ForecastError: The text is no size, or the size is 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise ForecastError(
            f"size {text!r}: expected a number and a unit, such as 8GiB or 24GB, above 0"
        )
    number, prefix, binary = match.groups()
    factor = 1024 if binary else 1000
    return int(float(number) * factor ** " KMGT".index(prefix.upper() or " "))
