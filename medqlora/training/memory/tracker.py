"""A tracker of every tensor storage of a step, while the modules run on the meta device."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medqlora.core.errors import UserError
from medqlora.training.memory.allocator import BLOCK, MIB, Reserve

GIB = 2**30
# Forward and backward run in different threads, and each has a cuBLAS workspace. Its size is 32 MiB
# on Hopper and later, and 8.1 MiB before (aten/src/ATen/cuda/CublasHandlePool.cpp).
CUBLAS_WORKSPACES = 2 * 32 * MIB
META = torch.device("meta")
CATEGORIES = (
    "quantized weights",
    "quantization state",
    "other base weights",
    "embeddings and head",
    "adapters",
    "trained weights",
    "master weights",
    "gradients",
    "optimizer",
    "inputs",
    "activations",
    "recomputation",
    "activation gradients",
    "logits and loss",
    "dequantization",
    "workspace",
)


class ForecastError(UserError):
    """Nothing fits the memory, or no forecast can be made of the input."""


class UnknownForecast(ForecastError):
    """The forecast cannot follow this configuration, which may still train."""


@dataclass(frozen=True)
class Batch:
    """The micro-batch of a forecast.

    Args:
        lengths: Tokens of each packed row.
        labelled: Number of supervised tokens.
        accumulated: Whether gradients of earlier micro-batches are there.
    """

    lengths: tuple[int, ...]
    labelled: int
    accumulated: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of the whole micro-batch."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Forecast:
    """The memory of one training process, in bytes.

    Args:
        peak: Highest sum of live tensors.
        by_category: The tensors at the moment of the peak.
        by_phase: Highest sum of each phase of the step.
        reserved: What CUDA's caching allocator reserves with expandable segments.
        reserved_fixed: What it reserves without expandable segments.
        at_loading: Base and adapter before the first step, by category.
        trainable: Number of trainable parameters.
        full: Whether they are the weights of the base (training.method full).
        unavoidable: Bytes of trained weights, their masters, gradients and optimizer states, which
            no micro-batch and no recomputation makes fewer.
        layers: Number of decoder layers.
        recomputed: Number of layers whose activations are computed again.
        largest: Bytes of the largest part that a sharded base gathers at once.
        host: Pinned host memory for offloaded layer inputs.
    """

    peak: int
    by_category: dict[str, int]
    by_phase: dict[str, int]
    reserved: Reserve
    reserved_fixed: Reserve
    at_loading: dict[str, int]
    trainable: int
    layers: int
    recomputed: int
    largest: int = 0
    host: int = 0
    full: bool = False
    unavoidable: int = 0

    @property
    def loaded(self) -> int:
        """Bytes of base and adapter before the first step."""
        return sum(self.at_loading.values())


def sum_unavoidable(parts: dict[str, int], gradients: int) -> int:
    """Return Forecast.unavoidable.

    Args:
        parts: Bytes by category in a step.
        gradients: Bytes of all gradients, of which a peak need not hold all.
    """
    names = ("adapters", "trained weights", "master weights", "optimizer")
    return gradients + sum(parts.get(name, 0) for name in names)


class Tracker(TorchDispatchMode):
    """Counts the bytes of all live storages by category, and their highest sum in each phase.

    Attributes:
        phase: Name of the present phase of the step, which the caller sets.
        now: Bytes of the live storages by category.
        total: Bytes of all live storages.
        peaks: For each phase, the highest total and the bytes by category at that moment.
        events: Number and bytes of each storage that was made, and number and 0 of each that was
            freed, in order; replay_allocator takes them.
    """

    def __init__(self, vocabulary: int, place: torch.device = META):
        """Make a tracker of the tensors on one device.

        Args:
            vocabulary: Tensors whose last dimension has this size are logits.
            place: The device whose tensors are followed.
        """
        super().__init__()
        self.vocabulary = vocabulary
        self.place = place
        self.phase = "loading"
        # address of the storage -> weak reference to it, category, bytes
        self.alive: dict[int, tuple[weakref.ref, str, int]] = {}
        self.now: Counter[str] = Counter()
        self.total = 0
        self.peaks: dict[str, tuple[int, dict[str, int]]] = {}
        self.events: list[tuple[int, int]] = []
        # address of a live storage -> its number in `events`, because addresses are used again
        self.serial: dict[int, int] = {}

    def follow(self, tensor: torch.Tensor, category: str) -> None:
        """Count the storage of a tensor under a category, or move it there if it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        if not size:
            return
        if key in self.alive:
            reference, old_category, old_size = self.alive[key]
            self.now[old_category] -= old_size
            self.now[category] += old_size
            self.alive[key] = (reference, category, old_size)
            return
        number = len(self.events)
        self.serial[key] = number
        self.alive[key] = (weakref.ref(storage, lambda _: self.forget(key, number)), category, size)
        self.events.append((number, size))
        self.now[category] += size
        self.total += size
        if self.total > self.peaks.get(self.phase, (0, {}))[0]:
            self.peaks[self.phase] = (self.total, dict(self.now))

    def forget(self, key: int, number: int) -> None:
        """Take a storage that was freed out of the count."""
        if self.serial.get(key) == number:
            _, category, size = self.alive.pop(key)
            del self.serial[key]
            self.now[category] -= size
            self.total -= size
            self.events.append((number, 0))

    def classify(self, tensor: torch.Tensor) -> str:
        """Return the category of a tensor that an operator made in the present phase."""
        has_vocabulary = tensor.dim() > 0 and tensor.shape[-1] == self.vocabulary
        if has_vocabulary and tensor.numel() > self.vocabulary:
            return "logits and loss"
        if self.phase != "backward":
            return "activations"
        # In the backward pass, only recomputed forward operators run with gradients enabled.
        return "recomputation" if torch.is_grad_enabled() else "activation gradients"

    def see(self, result: Any, category: str | None = None) -> None:
        """Count those tensors of an operator's result whose storages are new."""
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.device == self.place
                and tensor.untyped_storage()._cdata not in self.alive
            ):
                self.follow(tensor, category or self.classify(tensor))

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name()
        keywords = keywords or {}
        # The kernel's temporary tensors live until its result has been counted.
        temporary = []
        for shape, dtype, category in list_inside(name, arguments, keywords):
            temporary.append(self.make(shape, dtype, category))
        result = function(*arguments, **keywords)
        self.see(result, "dequantization" if name.startswith("bitsandbytes::dequantize") else None)
        del temporary
        return result

    def make(self, shape: tuple[int, ...], dtype: torch.dtype, category: str) -> torch.Tensor:
        """Make a tensor without content and count it."""
        tensor = torch.empty(shape, dtype=dtype, device=META)
        self.follow(tensor, category)
        return tensor


def list_inside(
    name: str, arguments: tuple, keywords: dict[str, Any]
) -> Iterator[tuple[tuple[int, ...], torch.dtype, str]]:
    """List the temporary tensors that a kernel allocates while it runs.

    The dispatcher sees only the operator, not what its kernel allocates. The sizes are therefore
    taken from the sources of the kernels, which are named beside them.

    Args:
        name: Name of the operator.
        arguments: Its positional arguments.
        keywords: Its keyword arguments.

    Yields:
        Shape, dtype and category of each tensor.
    """
    # bitsandbytes 0.50, backends/cuda/ops.py, _dequant_linear_fallback
    if name == "bitsandbytes::gemm_4bit":
        constants = keywords.get("absmax_8bit", arguments[7] if len(arguments) > 7 else None)
        if constants is not None:
            yield constants.shape, torch.float32, "dequantization"
            yield constants.shape, torch.float32, "dequantization"
        yield tuple(arguments[2]), arguments[0].dtype, "dequantization"
    # flash attention 2, csrc/flash_attn/flash_api.cpp, mha_varlen_bwd
    elif name == "torch_attn::_varlen_attn_backward":
        query = arguments[1]
        key = arguments[2]
        documents = arguments[6].numel() - 1
        tokens, heads, width = query.shape
        multiple = 32 if width <= 128 else 64
        padded = tokens + 128 * documents
        rounded = -(-width // multiple) * multiple
        # The gradient of the query is accumulated in float32.
        yield (padded, heads, rounded), torch.float32, "workspace"
        yield (heads, padded), torch.float32, "workspace"
        # Key and value first have a gradient for every query head. These are summed into groups.
        if key.shape[1] != heads:
            yield (2, tokens, heads, width), query.dtype, "workspace"
    # mem_eff_attention/kernel_backward.h, workspace_size
    elif name == "aten::_scaled_dot_product_efficient_attention_backward":
        query = arguments[1]
        rows, heads, tokens, width = query.shape
        # The gradient of the query is accumulated over blocks of keys.
        yield (rows, heads, tokens, width), torch.float32, "workspace"
        yield (rows, heads, tokens), torch.float32, "workspace"
        # The gradients of key and value fit into registers only up to a width of 64.
        if query.dtype is not torch.float32 and width > 64:
            yield (2, rows, heads, tokens, width), torch.float32, "workspace"
    # bitsandbytes, backends/default/ops.py: the int32 product is scaled to float16 and then cast.
    elif name == "bitsandbytes::int8_scaled_mm":
        rows = arguments[0].shape[0]
        outputs = arguments[1].shape[0]
        yield (rows, outputs), torch.int32, "dequantization"
        yield (rows, outputs), torch.float16, "dequantization"
    # bitsandbytes, backends/cuda/ops.py: the magnitudes of the inputs, and which are outliers.
    elif name == "bitsandbytes::int8_vectorwise_quant":
        yield tuple(arguments[0].shape), torch.float16, "dequantization"
        yield tuple(arguments[0].shape), torch.bool, "dequantization"
