"""Every storage of a step, followed while modules run on the meta device."""

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
# On Hopper and later; 8.1 MiB each before (aten/src/ATen/cuda/CublasHandlePool.cpp). Forward and
# backward run in threads of their own.
CUBLAS_WORKSPACES = 2 * 32 * MIB
META = torch.device("meta")
CATEGORIES = (
    "quantized weights",
    "quantization state",
    "other base weights",
    "embeddings and head",
    "adapters",
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
    """A budget that nothing fits, or input that no forecast can be made of."""


class UnknownForecast(ForecastError):
    """A way to train that the forecast cannot follow; it may still train."""


@dataclass(frozen=True)
class Batch:
    """The micro-batch that a forecast is for.

    lengths: tokens of each packed row; labelled: supervised tokens; accumulated: gradients of
    earlier micro-batches are there.
    """

    lengths: tuple[int, ...]
    labelled: int
    accumulated: bool = True

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Forecast:
    """Bytes of one training process. peak: highest sum of live tensors, by_category: at that
    moment; by_phase: highest of each phase; reserved: what CUDA's caching allocator would hold with
    expandable segments, replayed, reserved_fixed: without them; at_loading: base and adapter before
    the first step; host: pinned memory for layer inputs that are offloaded.
    """

    peak: int
    by_category: dict[str, int]
    by_phase: dict[str, int]
    reserved: Reserve
    reserved_fixed: Reserve
    at_loading: dict[str, int]
    trainable: int
    layers: int
    recomputed: int  # layers
    largest: int = 0  # bytes of the largest part that a sharded base gathers at once
    host: int = 0

    @property
    def loaded(self) -> int:
        return sum(self.at_loading.values())


class Tracker(TorchDispatchMode):
    """Follows storages: bytes alive by category, and their highest sum by phase."""

    def __init__(self, vocabulary: int, place: torch.device = META):
        super().__init__()
        self.vocabulary = vocabulary
        self.place = place
        self.phase = "loading"
        # storage -> (itself, category, bytes)
        self.alive: dict[int, tuple[weakref.ref, str, int]] = {}
        self.now: Counter[str] = Counter()
        self.total = 0
        self.peaks: dict[str, tuple[int, dict[str, int]]] = {}
        # (serial number, bytes or 0 for freed), for the allocator's replay
        self.events: list[tuple[int, int]] = []
        self.serial: dict[int, int] = {}

    def follow(self, tensor: torch.Tensor, category: str) -> None:
        """Count a tensor's storage under a category, or move it there."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        if not size:
            return
        known = self.alive.get(key)
        if known is not None:
            self.now[known[1]] -= known[2]
            self.now[category] += known[2]
            self.alive[key] = (known[0], category, known[2])
            return
        self.serial[key] = number = len(self.events)
        self.alive[key] = (weakref.ref(storage, lambda _: self.forget(key, number)), category, size)
        self.events.append((number, size))
        self.now[category] += size
        self.total += size
        if self.total > self.peaks.get(self.phase, (0, {}))[0]:
            self.peaks[self.phase] = (self.total, dict(self.now))

    def forget(self, key: int, number: int) -> None:
        if self.serial.get(key) == number:
            _, category, size = self.alive.pop(key)
            del self.serial[key]
            self.now[category] -= size
            self.total -= size
            self.events.append((number, 0))

    def classify(self, tensor: torch.Tensor) -> str:
        if (
            tensor.dim()
            and tensor.shape[-1] == self.vocabulary
            and tensor.numel() > self.vocabulary
        ):
            return "logits and loss"
        if self.phase != "backward":
            return "activations"
        return "recomputation" if torch.is_grad_enabled() else "activation gradients"

    def see(self, tree: Any, category: str | None = None) -> None:
        for tensor in tree if isinstance(tree, (tuple, list)) else [tree]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.device == self.place
                and tensor.untyped_storage()._cdata not in self.alive
            ):
                self.follow(tensor, category or self.classify(tensor))

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name()
        inside = [
            self.make(shape, dtype, category)
            for shape, dtype, category in list_inside(name, arguments, keywords or {})
        ]
        result = function(*arguments, **(keywords or {}))
        self.see(result, "dequantization" if name.startswith("bitsandbytes::dequantize") else None)
        del inside
        return result

    def make(self, shape: tuple[int, ...], dtype: torch.dtype, category: str) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=META)
        self.follow(tensor, category)
        return tensor


def list_inside(
    name: str, arguments: tuple, keywords: dict[str, Any]
) -> Iterator[tuple[tuple[int, ...], torch.dtype, str]]:
    """What kernels allocate while they run, as (shape, dtype, category)."""
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
        # the query's gradient, accumulated
        yield (padded, heads, rounded), torch.float32, "workspace"
        yield (heads, padded), torch.float32, "workspace"
        # gradients of key and value of every query head, summed into groups afterwards
        if key.shape[1] != heads:
            yield (2, tokens, heads, width), query.dtype, "workspace"
    # mem_eff_attention/kernel_backward.h, workspace_size
    elif name == "aten::_scaled_dot_product_efficient_attention_backward":
        query = arguments[1]
        rows, heads, tokens, width = query.shape
        # It accumulates the query's gradient by blocks of keys.
        yield (rows, heads, tokens, width), torch.float32, "workspace"
        yield (rows, heads, tokens), torch.float32, "workspace"
        # Wider gradients of key and value do not fit into registers.
        if query.dtype is not torch.float32 and width > 64:
            yield (2, rows, heads, tokens, width), torch.float32, "workspace"
    # backends/default/ops.py: an int32 product, scaled to float16, then cast
    elif name == "bitsandbytes::int8_scaled_mm":
        rows = arguments[0].shape[0]
        outputs = arguments[1].shape[0]
        yield (rows, outputs), torch.int32, "dequantization"
        yield (rows, outputs), torch.float16, "dequantization"
    # backends/cuda/ops.py: where inputs are outliers, and their magnitudes
    elif name == "bitsandbytes::int8_vectorwise_quant":
        yield tuple(arguments[0].shape), torch.float16, "dequantization"
        yield tuple(arguments[0].shape), torch.bool, "dequantization"
