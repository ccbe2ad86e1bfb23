"""The memory of one rank when a strategy divides the model."""

from __future__ import annotations

from dataclasses import replace

import torch

from medqlora.model.base import find_layers
from medqlora.model.quantization import list_constants
from medqlora.training.memory.allocator import Reserve
from medqlora.training.memory.tracker import CATEGORIES, Forecast, Tracker
from medqlora.training.strategies.launch import Strategy

ALL_DIVIDED = (
    "optimizer",
    "gradients",
    "adapters",
    "quantized weights",
    "embeddings and head",
    "other base weights",
)
# The categories that each strategy divides over the ranks; zero3 and fsdp2 divide all of the above.
DIVIDED = {"ddp": (), "zero1": ("optimizer",), "zero2": ("optimizer", "gradients")}


def measure_units(base: torch.nn.Module) -> int:
    """Return the bytes of the largest part of a base that is gathered at once where it is sharded.

    A part is a decoder layer, the embedding, or the head.
    """
    parts = [*find_layers(base), base.get_input_embeddings(), base.get_output_embeddings()]
    sizes = []
    for part in parts:
        storages = [parameter.untyped_storage() for parameter in part.parameters()]
        sizes.append(sum(storage.nbytes() for storage in storages))
    return max(sizes)


def divide(forecast: Forecast, strategy: Strategy) -> Forecast:
    """Forecast the step of one process on each GPU of a strategy.

    The tensors that a strategy divides are known exactly. Its buffers are modelled:

    - The buckets of ddp are the gradients themselves, from the first step on.
    - The other strategies hold the gradients once more while they are sent. ZeRO also holds its
      part of a float32 copy of the adapter.
    - zero3 and fsdp2 hold two gathered layers, because the next one is fetched while one computes.

    Quantization constants stay whole on each GPU. Everything is whole while the base is loaded.

    Args:
        forecast: The forecast of one process that has the whole model.
    """
    ranks = strategy.ranks
    parts = dict(forecast.by_category)
    if ranks == 1:
        return forecast
    # Gradients are float32 under every strategy.
    gradients = 4 * forecast.trainable
    parts["gradients"] = gradients
    if strategy.name != "ddp":
        parts["workspace"] += gradients
    if strategy.name.startswith("zero"):
        parts["workspace"] += parts["adapters"] // ranks
    if strategy.sharded:
        parts["workspace"] += 2 * forecast.largest
    for name in DIVIDED.get(strategy.name, ALL_DIVIDED):
        # Division rounds up, because the fullest GPU counts.
        parts[name] = -(-parts[name] // ranks)
    # The parts are those at the undivided step's peak. The divided step is assumed to have its peak
    # at the same moment.
    peak = sum(parts.values())
    change = peak - forecast.peak
    phases = {}
    for phase, total in forecast.by_phase.items():
        phases[phase] = total if phase == "loading" else max(0, total + change)
    if forecast.loaded > peak:  # The whole base is there before it is divided.
        peak = forecast.loaded
        parts = {name: forecast.at_loading.get(name, 0) for name in CATEGORIES}
    return replace(
        forecast,
        peak=peak,
        reserved=shift_reserve(forecast.reserved, change, peak),
        reserved_fixed=shift_reserve(forecast.reserved_fixed, change, peak),
        by_category=parts,
        by_phase=phases,
    )


def shift_reserve(reserve: Reserve, change: int, peak: int) -> Reserve:
    """Return a reserve whose peak has changed, which is at least the new peak."""
    return Reserve(max(reserve.plenty + change, peak), max(reserve.short + change, peak))


def sort_resident(tracker: Tracker, base: torch.nn.Module, model: torch.nn.Module) -> None:
    """Let a tracker count the weights and buffers that are there before a step, by category."""
    ends = {id(part.weight) for part in (base.get_input_embeddings(), base.get_output_embeddings())}
    for parameter in model.parameters():
        constants = list_constants(parameter)
        # The constants are neither parameters nor buffers, so no other loop here meets them.
        for tensor in constants:
            tracker.follow(tensor, "quantization state")
        if constants:
            category = "quantized weights"
        elif parameter.requires_grad:
            category = "adapters"
        elif id(parameter) in ends:
            category = "embeddings and head"
        else:
            category = "other base weights"
        tracker.follow(parameter.data, category)
    for buffer in model.buffers():
        tracker.follow(buffer, "other base weights")
