"""The longest row that fits the memory of a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from transformers import PretrainedConfig

from medqlora.core.config import Config
from medqlora.core.config_loading import change
from medqlora.training.memory.estimate import Estimate, forecast_plan
from medqlora.training.memory.target import TargetHardware
from medqlora.training.memory.tracker import Forecast


def least_memory(device: torch.device) -> str:
    """Return the value of training.gradient_checkpointing that needs the least memory."""
    return "offload" if device.type == "cuda" else "full"


def longest_sequence(
    config: Config,
    architecture: PretrainedConfig,
    target: TargetHardware,
    labelled_of: Callable[[int], int],
) -> int | None:
    """Find the longest row that fits, if it is alone in the optimizer step of each process.

    Layers are recomputed (on a GPU also offloaded), and the allocator returns what it can. A secant
    search on estimates from few layers gives a first length. Forecasts of all layers then correct
    it, downwards until it fits, and upwards by bisection.

    Args:
        labelled_of: Takes the tokens of a micro-batch and returns its supervised tokens.

    Returns:
        Tokens of the row, a multiple of 16; None if no row fits.
    """
    mode = least_memory(target.device)
    ranks = target.strategy.ranks
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None)

    def configure(tokens: int) -> Config:
        """Return the configuration of a step that consists of one such row per process."""
        longer = change(config, "data", max_length=tokens)
        return change(longer, "training", global_batch_tokens=tokens * ranks)

    def estimate(tokens: int) -> float:
        """Return the peak bytes of a row, from forecasts of a few layers."""
        sizes = (tokens, tokens)
        estimate = Estimate(configure(tokens), architecture, target, sizes, labelled_of)
        return estimate.peak_at(tokens, mode)

    def forecast(tokens: int) -> Forecast:
        """Return the forecast of a row, with all layers."""
        labelled = labelled_of(tokens)
        plan = forecast_plan(configure(tokens), architecture, target, tokens, mode, labelled)
        return plan.forecast

    # Two lengths give the first slope in bytes per token.
    previous = 1024
    previous_need = estimate(previous)
    length = 2048
    need = estimate(length)
    for _ in range(6):  # The memory of a row grows nearly linearly with its length.
        per_token = max(1.0, (need - previous_need) / (length - previous))
        guess = length + (target.memory - need) / per_token
        guess = int(min(guess, positions or guess)) // 16 * 16
        if guess < 16 or guess == length:
            break
        previous = length
        previous_need = need
        length = guess
        need = estimate(length)
    per_token = max(1.0, (need - previous_need) / (length - previous))
    length = min(length, guess)

    too_long = None  # This is the shortest row that is known not to fit.
    while length >= 16:
        all_layers = forecast(length)
        if target.holds(all_layers, short=True):
            break
        too_long = length
        shorter = length - (target.needs(all_layers, short=True) - target.memory) / per_token
        # The pinned memory of the host may be the tighter limit.
        if all_layers.host > target.host:
            shorter = min(shorter, length * target.host / all_layers.host)
        # Each round shortens the row by 16 at least, so the loop ends.
        length = min(length - 16, int(shorter) // 16 * 16)
    if length < 16:
        return None
    # Where the first length fits, rows of at most a tenth more are tried.
    too_long = too_long or min(positions or sys.maxsize, length + length // 10 + 32)
    # The reserve of the allocator grows in steps, so the linear search may have ended too low.
    for _ in range(4):
        middle = (too_long + length) // 32 * 16
        if middle - length <= length // 100:
            break
        if target.holds(forecast(middle), short=True):
            length = middle
        else:
            too_long = middle
    return length
