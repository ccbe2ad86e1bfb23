"""What each rank holds of a divided model."""

from __future__ import annotations

from dataclasses import replace

import torch

from medqlora.model.base import find_layers
from medqlora.model.quantization import list_constants
from medqlora.training.memory.allocator import Reserve
from medqlora.training.memory.tracker import CATEGORIES, Forecast, Tracker
from medqlora.training.strategies.launch import Strategy


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
