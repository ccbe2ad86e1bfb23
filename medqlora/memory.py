"""Config + architecture -> the memory of a training step, without weights and without the hardware.

The recipe's own modules (transformers, PEFT, bitsandbytes, our loss) run on torch's meta device,
where tensors have shapes but no content, under a dispatch mode that follows every storage from its
making to its end. What a kernel allocates inside itself is invisible there and is added: the weight
that a 4-bit product dequantizes, flash attention's backward buffers, cuBLAS's workspace.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, PretrainedConfig

from medqlora.allocator import BLOCK, MIB, Reserve, replay_allocator
from medqlora.attention import Choice, choose_backend, locate_documents
from medqlora.config import Config, UserError, change
from medqlora.layers import outline_kernels, wants_compiling
from medqlora.losses import AnswerLoss
from medqlora.models import (
    ModelError,
    attach_adapter,
    find_arena,
    find_layers,
    list_constants,
    make_base,
    read_model_config,
    set_checkpointing,
)
from medqlora.packing import list_budgets
from medqlora.strategies import Strategy

GIB = 2**30
# On Hopper and later; 8.1 MiB each before (aten/src/ATen/cuda/CublasHandlePool.cpp). Forward and
# backward run in threads of their own.
CUBLAS_WORKSPACES = 2 * 32 * MIB
# We assume this much for the CUDA context of one process; it lies outside the allocator.
CONTEXT = 512 * MIB
# We assume this much for kernels and libraries that load at their first use, after free memory was
# read.
KERNELS = 256 * MIB
MARGIN = 0.05  # of a card's memory that a plan leaves free, for fragmentation
# of a machine's free memory that tensors on a CPU may take: the C library keeps freed blocks, up to
# as much again
HEAP = 0.5
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
OVERHEAD_TOKENS = 250
OFFLOAD_TIME = 0.2  # see time_per_token


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


# ---- one training step ---------------------------------------------------------------------------


def forecast_step(
    config: Config,
    architecture: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    storage: torch.dtype,
    batch: Batch,
    place: torch.device = META,
    backend: str | None = None,
) -> Forecast:
    """Memory of one process that trains on batches like `batch`, on one GPU ("cuda") or on a CPU;
    neither need be there.

    config: with training.gradient_checkpointing decided (not auto); dtype: of computing; storage:
    of packed 4-bit weights; place: the CPU instead of the meta device takes the step for real, with
    random weights, and follows its tensors in the same way; backend: of attention, default what
    model.attention chooses there.

    Raises:
        UnknownForecast: an attention backend or an architecture that cannot be followed.
        AttentionError: an attention backend that the recipe refuses there.
    """
    text = architecture.get_text_config()
    backend = (
        backend or check_attention(config.model.attention, device, dtype, architecture).backend
    )
    tracker = Tracker(text.vocab_size, place)
    base = make_base(architecture, config.model, place, dtype, storage)
    with place:
        model = attach_adapter(base, config.lora, config.training.seed)
    mode = config.training.gradient_checkpointing
    if place.type == "meta" and wants_compiling(device, config.training.compile):
        outline_kernels(base)
    recomputed = set_checkpointing(
        base, "full" if mode == "offload" and device.type == "cpu" else mode
    )
    loss_model = AnswerLoss(model, config.training.loss_chunk_tokens).train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sort_resident(tracker, base, model)
    at_loading = dict(tracker.now)
    tracker.phase = "before the step"
    kept = make_states(config.training.optimizer, device, weights)
    for state in kept:
        tracker.follow(state, "optimizer")
    if device.type == "cuda":
        kept.append(tracker.make((CUBLAS_WORKSPACES,), torch.uint8, "workspace"))
    for weight in weights:
        if batch.accumulated:
            weight.grad = torch.zeros_like(weight)
            tracker.follow(weight.grad, "gradients")
        weight.register_post_accumulate_grad_hook(
            lambda parameter: tracker.follow(parameter.grad, "gradients")
        )
    inputs = make_inputs(batch, device, place, backend)
    for tensor in inputs.values():
        tracker.see(
            (
                tensor
                if torch.is_tensor(tensor)
                else [v for v in vars(tensor).values() if torch.is_tensor(v)]
            ),
            "inputs",
        )
    try:
        with tracker:
            tracker.phase = "forward"
            loss = loss_model(**inputs)
            tracker.phase = "backward"
            loss.backward()
    # code that looks into tensors, or an operator without shapes
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UnknownForecast(
            f"{architecture.model_type} with {config.model.quantization} cannot be forecast"
            f" ({' '.join(str(error).split())[:160]}); set training.gradient_checkpointing and"
            " training.max_tokens_per_batch to values, or measure"
        ) from None
    # in place: AdamW and clipping make nothing of size
    tracker.peaks["optimizer step"] = (tracker.total, dict(tracker.now))
    peak, by_category = max(tracker.peaks.values(), key=lambda found: found[0])
    del kept
    return Forecast(
        peak,
        {name: by_category.get(name, 0) for name in CATEGORIES},
        {phase: total for phase, (total, _) in tracker.peaks.items()},
        replay_allocator(tracker.events, expandable=True),
        replay_allocator(tracker.events),
        at_loading,
        sum(weight.numel() for weight in weights),
        text.num_hidden_layers,
        recomputed,
        measure_units(base),
        find_arena(base).capacity,
    )


def check_attention(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    architecture: PretrainedConfig,
    capability: tuple[int, int] | None = None,
) -> Choice:
    """The backend that a forecast is for. flash, varlen and flex keep the same tensors for the
    backward pass (queries, keys, values, output, one number per row and head) and are forecast
    alike, with the largest buffers, varlen's.

    capability: of a GPU that is not here; default this machine's.

    Raises:
        AttentionError: the recipe refuses it there.
        UnknownForecast: sdpa on a GPU.
    """
    # The machine that trains may have the package, even if this one has not.
    if requested == "flash" and device.type == "cuda":
        return Choice("flash", "model.attention asks for it")
    choice = choose_backend(requested, device, dtype, architecture, capability)
    if device.type == "cuda" and choice.backend == "sdpa":
        raise UnknownForecast(
            "model.attention sdpa: its masks depend on the data and cannot be forecast; use auto,"
            " or measure"
        )
    return choice


def measure_units(base: torch.nn.Module) -> int:
    """Bytes of the largest part that is gathered at once where the base is sharded: a decoder
    layer, the embedding or the head.
    """
    parts = [*find_layers(base), base.get_input_embeddings(), base.get_output_embeddings()]
    return max(
        sum(parameter.untyped_storage().nbytes() for parameter in part.parameters())
        for part in parts
    )


def divide(forecast: Forecast, strategy: Strategy) -> Forecast:
    """The same step on each GPU of a strategy. Exact for what is divided; buffers by this model:
    ddp's buckets are the gradients, from the first step on; zero holds gradients once more while
    they travel, and its float32 part of the adapter; zero3 and fsdp2 hold two gathered units, the
    next one being fetched while one computes. Quantization constants stay whole on each GPU; so
    does everything while loading."""
    ranks = strategy.ranks
    parts = dict(forecast.by_category)
    if ranks == 1:
        return forecast
    gradients = 4 * forecast.trainable
    parts["gradients"] = gradients
    divided = {"ddp": (), "zero1": ("optimizer",), "zero2": ("optimizer", "gradients")}.get(
        strategy.name,
        (
            "optimizer",
            "gradients",
            "adapters",
            "quantized weights",
            "embeddings and head",
            "other base weights",
        ),
    )
    if strategy.name != "ddp":
        parts["workspace"] += gradients + (
            parts["adapters"] // ranks if strategy.name.startswith("zero") else 0
        )
    if strategy.sharded:
        parts["workspace"] += 2 * forecast.largest
    for name in divided:
        parts[name] = -(-parts[name] // ranks)
    peak = sum(parts.values())
    change = peak - forecast.peak
    phases = {
        phase: max(0, total + change) if phase != "loading" else total
        for phase, total in forecast.by_phase.items()
    }
    if forecast.loaded > peak:  # the whole base, before it is divided
        peak = forecast.loaded
        parts = {name: forecast.at_loading.get(name, 0) for name in CATEGORIES}
    reserved, fixed = (
        Reserve(*(max(value + change, peak) for value in replayed))
        for replayed in (forecast.reserved, forecast.reserved_fixed)
    )
    return replace(
        forecast,
        peak=peak,
        reserved=reserved,
        reserved_fixed=fixed,
        by_category=parts,
        by_phase=phases,
    )


def sort_resident(tracker: Tracker, base: torch.nn.Module, model: torch.nn.Module) -> None:
    """Count what lies there before a step."""
    ends = {id(part.weight) for part in (base.get_input_embeddings(), base.get_output_embeddings())}
    for parameter in model.parameters():
        constants = list_constants(parameter)
        for tensor in constants:
            tracker.follow(tensor, "quantization state")
        kind = (
            "adapters"
            if parameter.requires_grad
            else "embeddings and head"
            if id(parameter) in ends
            else "other base weights"
        )
        tracker.follow(parameter.data, "quantized weights" if constants else kind)
    for buffer in model.buffers():
        tracker.follow(buffer, "other base weights")


def make_states(
    optimizer: str, device: torch.device, weights: list[torch.Tensor]
) -> list[torch.Tensor]:
    """What the optimizer keeps on the device: two float32 moments, or two of 8 bits with a float32
    scale per 256 entries for tensors of 4,096 entries and more (bitsandbytes, optim/optimizer.py).
    Paged states lie outside a GPU's allocator and move to the host when memory is short, so they do
    not count on a GPU."""
    made = []
    for weight in weights:
        size = weight.numel()
        if optimizer == "adamw" or size < 4_096:
            made += [torch.empty(size, device=META) for _ in range(2)]
        # smaller ones are not paged
        elif optimizer == "adamw_8bit" or device.type != "cuda" or size < 100_000:
            made += [torch.empty(size, dtype=torch.uint8, device=META) for _ in range(2)]
            made += [torch.empty(-(-size // 256), device=META) for _ in range(2)]
        else:
            made += [torch.empty(-(-size // 256), device=META) for _ in range(2)]
    return made


def make_inputs(
    batch: Batch, device: torch.device, place: torch.device, backend: str
) -> dict[str, Any]:
    """Arguments of AnswerLoss at `place`; where documents lie, as attention on `device` wants
    it.
    """
    tokens = batch.tokens
    cu_seqlens = torch.tensor(
        [0, *torch.tensor(batch.lengths).cumsum(0).tolist()], dtype=torch.int32
    )
    documents = locate_documents(
        cu_seqlens, max(batch.lengths), device if device.type == "cpu" else META, backend
    )
    moved = {
        name: value.to(place) for name, value in vars(documents).items() if torch.is_tensor(value)
    }
    documents = replace(documents, **moved, on_gpu=device.type == "cuda")
    names = {
        "input_ids": (1, tokens),
        "position_ids": (1, tokens),
        "predict_at": (batch.labelled,),
        "targets": (batch.labelled,),
    }
    return {
        name: torch.zeros(shape, dtype=torch.int64, device=place) for name, shape in names.items()
    } | {"documents": documents}


# ---- what fits -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
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


def assume_labelled(config: Config, tokens: int) -> int:
    """Supervised tokens in a micro-batch where the data is not at hand: rows of 64 tokens with a
    letter and its end token, or a quarter of the tokens for a letter with its text, or all."""
    part = {"letter": 2 / 64, "letter_text": 1 / 4}.get(config.data.completion, 1.0)
    if any(entry.format in ("medquad", "qa", "text") for entry in config.data.train):
        part = 1.0
    return max(1, int(part * tokens))


def make_batch(config: Config, tokens: int, labelled: int, accumulated: bool) -> Batch:
    """A full micro-batch of rows as long as they may be; one row where rows are not packed."""
    longest = min(config.data.max_length, tokens)
    lengths = [longest] * (tokens // longest) + [tokens % longest] * bool(tokens % longest)
    lengths = lengths if config.data.packing else [longest]
    return Batch(tuple(lengths), min(labelled, sum(lengths)), accumulated)


def time_per_token(tokens: int, recomputed: float, offloaded: bool = False) -> float:
    """Relative training time per token, of micro-batches of `tokens` with this part of the layers
    recomputed; 1: all recomputed, endless batches. Six operations per weight and token with full
    recomputation, four without (frozen weights need no gradient). Each pass over a micro-batch also
    dequantizes the base: about 2.5 bytes per weight, which takes an H100 as long as computing
    OVERHEAD_TOKENS tokens in three passes (22 % of the time at 1,024 tokens, 5.5 % at 4,096).
    Offloading moves 16 KiB per token and layer of an 8B model over PCIe, at 25 GB/s OFFLOAD_TIME of
    an H100's time. Computed, not measured.
    """
    return (
        (4 + 2 * recomputed) / 6
        + (2 + recomputed) / 3 * OVERHEAD_TOKENS / tokens
        + OFFLOAD_TIME * offloaded
    )


def forecast_plan(
    config: Config,
    architecture: PretrainedConfig,
    setting: Setting,
    tokens: int,
    checkpointing: str,
    labelled: int,
    backend: str | None = None,
) -> StepPlan:
    """The forecast per process of one way to train. backend: of attention, default what the setting
    gets.
    """
    backend = backend or setting.choose_attention(config, architecture).backend
    accumulated = config.training.global_batch_tokens > tokens * setting.strategy.ranks
    batch = make_batch(config, tokens, labelled, accumulated)
    chosen = change(
        config, "training", max_tokens_per_batch=tokens, gradient_checkpointing=checkpointing
    )
    forecast = forecast_step(
        chosen, architecture, setting.device, setting.dtype, setting.storage, batch, backend=backend
    )
    return StepPlan(tokens, checkpointing, divide(forecast, setting.strategy))


def with_layers(architecture: PretrainedConfig, count: int) -> PretrainedConfig:
    """The same architecture with fewer layers."""
    small = copy.deepcopy(architecture)
    text = small.get_text_config()
    text.num_hidden_layers = count
    if isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = (text.layer_types * count)[:count]
    return small


class Estimate:
    """Peak bytes for any micro-batch and number of recomputed layers, from forecasts of 2 and 4
    layers at two sizes: layers are alike (or alternate), and all that a batch needs grows linearly
    with its tokens."""

    def __init__(
        self,
        config: Config,
        architecture: PretrainedConfig,
        setting: Setting,
        sizes: tuple[int, int],
        labelled_of: Callable[[int], int],
    ):
        self.config = config
        self.architecture = architecture
        self.setting = setting
        self.sizes = sizes
        self.labelled_of = labelled_of
        self.layers = architecture.get_text_config().num_hidden_layers
        self.lines: dict[tuple[int, str], tuple[float, float]] = {}
        # The least ratio of reserve to peak that a forecast of all layers had so far.
        self.slack: float | None = None

    def line(self, tokens: int, mode: str) -> tuple[float, float]:
        """Bytes of the ends, and of each layer."""
        if (tokens, mode) not in self.lines:
            two, four = (
                forecast_plan(
                    self.config,
                    with_layers(self.architecture, count),
                    self.setting,
                    tokens,
                    mode,
                    self.labelled_of(tokens),
                ).forecast.peak
                for count in (2, 4)
            )
            self.lines[tokens, mode] = (two - (four - two), (four - two) / 2)
        return self.lines[tokens, mode]

    def needs(self, tokens: int, mode: str) -> float:
        return (self.slack or 1.0) * self.peak(tokens, mode)

    def learn(self, plan: StepPlan) -> None:
        """Take the slack from a forecast of all layers."""
        slack = self.setting.needs(plan.forecast) / plan.forecast.peak
        self.slack = slack if self.slack is None else min(self.slack, slack)

    def peak(self, tokens: int, mode: str) -> float:
        """mode: training.gradient_checkpointing."""
        low, high = (self.peak_at(size, mode) for size in self.sizes)
        return low + (high - low) * (tokens - self.sizes[0]) / max(1, self.sizes[1] - self.sizes[0])

    def peak_at(self, size: int, mode: str) -> float:
        if not mode.startswith("first_"):
            ends, each = self.line(size, mode)
            return ends + self.layers * each
        recomputed = int(mode.removeprefix("first_"))
        (ends, kept), (_, recomputing) = self.line(size, "none"), self.line(size, "full")
        return max(
            ends + (self.layers - recomputed) * kept + recomputed * recomputing,
            self.peak_at(size, "full"),
        )


def plan_step(
    config: Config,
    architecture: PretrainedConfig,
    setting: Setting,
    labelled_of: Callable[[int], int],
) -> StepPlan:
    """Decide what of max_tokens_per_batch and gradient_checkpointing is auto: of what fits, the
    fastest by time_per_token, which is few recomputed layers first, then large micro-batches; on a
    GPU with offloaded layer inputs where that is faster than smaller micro-batches, or alone fits.
    labelled_of: tokens of a micro-batch -> most that are supervised.

    Raises:
        ForecastError: nothing fits (says what would), or the architecture cannot be followed.
        PlanError: the global batch cannot be divided.
    """
    training = config.training
    longest = config.data.max_length
    sizes = list_budgets(training, longest, setting.strategy.ranks)
    if training.gradient_checkpointing != "auto" and training.max_tokens_per_batch != "auto":
        return forecast_plan(
            config,
            architecture,
            setting,
            sizes[0],
            training.gradient_checkpointing,
            labelled_of(sizes[0]),
        )
    modes = (
        list_checkpointing(architecture, setting.device)
        if training.gradient_checkpointing == "auto"
        else {training.gradient_checkpointing: (0.0, False)}
    )
    easiest = forecast_plan(
        config, architecture, setting, sizes[0], next(iter(modes)), labelled_of(sizes[0])
    )
    # the largest micro-batch, nothing recomputed that need not be
    if setting.holds(easiest.forecast):
        return easiest
    if easiest.forecast.loaded > setting.memory:
        raise ForecastError(
            f"memory: the base alone needs {easiest.forecast.loaded / GIB:.2f} GiB,"
            f" {setting.memory / GIB:.2f} GiB may be used; use a smaller model"
        )
    estimate = Estimate(
        config,
        architecture,
        setting,
        (min(sizes[-1], max(1, sizes[0] // 2)), sizes[0]),
        labelled_of,
    )
    options = [
        (time_per_token(size, *costs), size, mode)
        for size in sizes
        for mode, costs in modes.items()
    ]
    fastest = [option[1:] for option in sorted(options, key=lambda option: option[0])]
    passed_over = []
    for size, mode in fastest:
        if len(modes) > 1 and estimate.needs(size, mode) > setting.memory:
            if estimate.peak(size, mode) <= setting.memory:
                passed_over.append((size, mode))
            continue
        plan = forecast_plan(config, architecture, setting, size, mode, labelled_of(size))
        if setting.holds(plan.forecast):
            return plan
        estimate.learn(plan)
    # The slack differs from plan to plan, so one of them may fit after all.
    for size, mode in passed_over:
        plan = forecast_plan(config, architecture, setting, size, mode, labelled_of(size))
        if setting.holds(plan.forecast):
            return plan
    last = forecast_plan(
        config, architecture, setting, sizes[-1], list(modes)[-1], labelled_of(sizes[-1])
    )
    smallest = last.forecast
    if setting.holds(smallest, short=True):
        return replace(last, short=True)
    host = (
        f" and {smallest.host / GIB:.2f} of {setting.host / GIB:.2f} GiB that may be pinned in the"
        " host's memory"
        if smallest.host > setting.host
        else ""
    )
    raise ForecastError(
        f"memory: {sizes[-1]:,} tokens per micro-batch with gradient_checkpointing"
        f" {list(modes)[-1]} need {setting.needs(smallest, short=True) / GIB:.2f} GiB,"
        f" {setting.memory / GIB:.2f} GiB may be used{host};"
        f" {suggest(config, architecture, setting, labelled_of)}"
    )


def cost_of_attention(
    config: Config, architecture: PretrainedConfig, setting: Setting, plan: StepPlan, labelled: int
) -> int | None:
    """Bytes by which the peak of a plan is higher than with torch's variable-length kernel; None
    where that runs, and on a CPU.
    """
    if (
        setting.device.type == "cpu"
        or setting.choose_attention(config, architecture).backend != "grouped"
    ):
        return None
    with_kernel = forecast_plan(
        config, architecture, setting, plan.tokens, plan.checkpointing, labelled, backend="varlen"
    )
    return plan.forecast.peak - with_kernel.forecast.peak


def list_checkpointing(
    architecture: PretrainedConfig, device: torch.device
) -> dict[str, tuple[float, bool]]:
    """Values of training.gradient_checkpointing, most memory first -> part of the layers that is
    recomputed, whether inputs are offloaded. The first layers are recomputed: their turn in the
    backward pass comes when the others' activations are gone.
    """
    layers = architecture.get_text_config().num_hidden_layers
    modes = (
        {"none": (0.0, False)}
        | {f"first_{count}": (count / layers, False) for count in range(1, layers)}
        | {"full": (1.0, False)}
    )
    return modes | ({"offload": (1.0, True)} if least_memory(device) == "offload" else {})


def suggest(
    config: Config,
    architecture: PretrainedConfig,
    setting: Setting,
    labelled_of: Callable[[int], int],
) -> str:
    """What would fit, for an error: other recomputation and micro-batches, else shorter rows."""
    free = change(config, "training", max_tokens_per_batch="auto", gradient_checkpointing="auto")
    tokens = list_budgets(free.training, 1, setting.strategy.ranks)
    mode = least_memory(setting.device)
    hold = [size for size in tokens if size >= config.data.max_length]
    if hold and setting.holds(
        forecast_plan(
            config, architecture, setting, hold[-1], mode, labelled_of(hold[-1])
        ).forecast,
        short=True,
    ):
        return (
            f"{hold[-1]:,} tokens with gradient_checkpointing {mode} would fit: set"
            " training.max_tokens_per_batch and training.gradient_checkpointing to auto"
        )
    length = longest_sequence(config, architecture, setting, labelled_of)
    fitting = [size for size in tokens if size <= (length or 0)]
    if not fitting:
        return (
            "no length fits; use a smaller model, a smaller lora.r or training.optimizer"
            " paged_adamw_8bit"
        )
    return (
        f"rows of {fitting[0]:,} tokens would fit: set data.max_length to {fitting[0]} or less,"
        " training.max_tokens_per_batch and training.gradient_checkpointing to auto"
    )


def least_memory(device: torch.device) -> str:
    """The value of training.gradient_checkpointing that needs the least memory."""
    return "offload" if device.type == "cuda" else "full"


def longest_sequence(
    config: Config,
    architecture: PretrainedConfig,
    setting: Setting,
    labelled_of: Callable[[int], int],
) -> int | None:
    """Tokens of the longest row that fits, alone in its optimizer step on each process, with the
    least memory, where the allocator gives back what it can; a multiple of 16; None: none does."""
    mode = least_memory(setting.device)
    ranks = setting.strategy.ranks
    most = getattr(architecture.get_text_config(), "max_position_embeddings", None)

    def alone(tokens: int) -> Config:
        return change(
            change(config, "data", max_length=tokens),
            "training",
            global_batch_tokens=tokens * ranks,
        )

    def estimate(tokens: int) -> float:
        return Estimate(
            alone(tokens), architecture, setting, (tokens, tokens), labelled_of
        ).peak_at(tokens, mode)

    (before, needed), (length, need) = ((tokens, estimate(tokens)) for tokens in (1024, 2048))
    for _ in range(6):  # all that a row needs grows nearly linearly with it
        guess = length + (setting.memory - need) / max(1.0, (need - needed) / (length - before))
        guess = int(min(guess, most or guess)) // 16 * 16
        if guess < 16 or guess == length:
            break
        (before, needed), (length, need) = (length, need), (guess, estimate(guess))
    length, per_token = min(length, guess), max(1.0, (need - needed) / (length - before))

    def forecast(tokens: int) -> Forecast:
        return forecast_plan(
            alone(tokens), architecture, setting, tokens, mode, labelled_of(tokens)
        ).forecast

    over = None  # This is the shortest row that is known not to fit.
    # from few layers to all of them
    while length >= 16 and not setting.holds(found := forecast(length), short=True):
        over = length
        shorter = length - (setting.needs(found, short=True) - setting.memory) / per_token
        if found.host > setting.host:
            shorter = min(shorter, length * setting.host / found.host)
        length = min(length - 16, int(shorter) // 16 * 16)
    if length < 16:
        return None
    over = over or min(most or sys.maxsize, length + length // 10 + 32)
    # What the allocator reserves grows in steps, so the line may have led too low.
    for _ in range(4):
        middle = (over + length) // 32 * 16
        if middle - length <= length // 100:
            break
        if setting.holds(forecast(middle), short=True):
            length = middle
        else:
            over = middle
    return length


# ---- serving -------------------------------------------------------------------------------------


def forecast_serving(
    config: Config, architecture: PretrainedConfig, dtype: torch.dtype, tokens: int
) -> dict[str, int]:
    """Bytes to serve: weights (of the base as config.model stores it), and the keys and values of
    one sequence of `tokens`. Layers with a sliding window keep at most that many."""
    text = architecture.get_text_config()
    base = make_base(architecture, config.model, META, dtype)
    tracker = Tracker(text.vocab_size)
    sort_resident(tracker, base, base)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    window = getattr(text, "sliding_window", None)
    kinds = (
        getattr(text, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    )
    kept = sum(
        min(tokens, window) if window and kind == "sliding_attention" else tokens for kind in kinds
    )
    return {"weights": tracker.total, "keys_and_values": kept * 2 * heads * width * dtype.itemsize}


# ---- architectures -------------------------------------------------------------------------------


def read_architecture(base: str, shipped: Path, revision: str | None = None) -> PretrainedConfig:
    """A model's shape, without weights: of a folder with config.json, a JSON file, a file in
    `shipped` that names this hub id or is called so, or the hub.

    Raises:
        ForecastError, ModelError: nothing there, or no file that transformers understands.
    """
    place = Path(base).expanduser()
    files = {path.stem: path for path in sorted(shipped.glob("*.json"))}
    if (place / "config.json").is_file():
        return parse_architecture(place / "config.json")
    if place.suffix == ".json":
        return parse_architecture(place)
    for name, path in files.items():
        if base == name or base in json.loads(path.read_text(encoding="utf-8"))["hub_ids"]:
            return parse_architecture(path)
    try:
        return read_model_config(base, revision)
    except ModelError as error:
        raise ForecastError(
            f"{error}; shapes that need no download: {', '.join(files)}, or a folder or file of a"
            " config.json"
        ) from None


def parse_architecture(path: Path) -> PretrainedConfig:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.for_model(
            **{
                key: value
                for key, value in facts.items()
                if key not in ("hub_ids", "quantization_config")
            }
        )
    except OSError as error:
        raise ForecastError(
            f"architecture {path}: {error.strerror}; give a config.json of transformers"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ForecastError(
            f"architecture {path}: not a config.json of transformers:"
            f" {' '.join(str(error).split())[:200]}"
        ) from None
