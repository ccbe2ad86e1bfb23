"""The memory of one rank when a strategy divides the model."""

from __future__ import annotations

from dataclasses import replace

import torch

from medqlora.model.base import find_layers
from medqlora.model.quantization import list_constants
from medqlora.training.memory.allocator import Reserve
from medqlora.training.memory.tracker import CATEGORIES, Forecast, Tracker, sum_unavoidable
from medqlora.training.strategies.launch import Strategy
from medqlora.training.strategies.zero import LARGEST_BUCKET

ALL_DIVIDED = (
    "optimizer",
    "gradients",
    "adapters",
    "trained weights",
    "master weights",
    "quantized weights",
    "embeddings and head",
    "other base weights",
)
# The categories that each strategy divides over the ranks; zero3 and fsdp2 divide all of the above.
DIVIDED = {
    "ddp": (),
    "zero1": ("optimizer", "master weights"),
    "zero2": ("optimizer", "master weights", "gradients"),
}


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
    - The other strategies hold the gradients once more while they are sent. Those of a whole model
      are sent in buckets by ZeRO, two of which are there at a time, and layer by layer by fsdp2.
    - ZeRO also holds its part of a float32 copy of float32 weights that train.
    - The float32 masters of fsdp2 are the divided weights themselves.
    - zero3 and fsdp2 hold two gathered layers, because the next one is fetched while one computes.

    Quantization constants stay whole on each GPU. Everything is whole while the base is loaded, and
    where all of it trains, so are the gradients that the strategy's are checked against.

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
    at_loading = dict(forecast.at_loading)
    if strategy.name != "ddp":
        parts["workspace"] += count_sent(forecast, strategy, gradients)
    if strategy.name.startswith("zero") and not parts["master weights"]:
        parts["workspace"] += (parts["adapters"] + parts["trained weights"]) // ranks
    if strategy.name == "fsdp2" and parts["master weights"]:
        parts["trained weights"] = 0
    if strategy.sharded:
        parts["workspace"] += 2 * forecast.largest
    if forecast.full:
        at_loading["gradients"] = at_loading["trained weights"]
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
    unavoidable = sum_unavoidable(parts, parts["gradients"])
    loaded = sum(at_loading.values())
    if loaded > peak:  # The whole base is there before it is divided.
        peak = loaded
        parts = {name: at_loading.get(name, 0) for name in CATEGORIES}
        phases["loading"] = loaded
    return replace(
        forecast,
        peak=peak,
        at_loading=at_loading,
        unavoidable=unavoidable,
        reserved=shift_reserve(forecast.reserved, change, peak),
        reserved_fixed=shift_reserve(forecast.reserved_fixed, change, peak),
        by_category=parts,
        by_phase=phases,
    )


def count_sent(forecast: Forecast, strategy: Strategy, gradients: int) -> int:
    """Return the bytes that gradients take once more while a strategy sends them.

    Args:
        forecast: The forecast of one process that has the whole model.
        strategy: The strategy; not ddp.
        gradients: Bytes of all gradients, in float32.
    """
    if not forecast.full:
        return gradients
    if strategy.name == "fsdp2":
        # The gradient of a layer is made in the compute dtype and sent in float32.
        weights = forecast.by_category["trained weights"]
        return forecast.largest + forecast.largest * gradients // weights
    return 2 * min(gradients, 4 * LARGEST_BUCKET)


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
            category = "trained weights" if model is base else "adapters"
        elif id(parameter) in ends:
            category = "embeddings and head"
        else:
            category = "other base weights"
        tracker.follow(parameter.data, category)
    for buffer in model.buffers():
        tracker.follow(buffer, "other base weights")
