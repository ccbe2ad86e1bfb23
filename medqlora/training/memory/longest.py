"""The longest row that fits."""

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
    """The value of training.gradient_checkpointing that needs the least memory."""
    return "offload" if device.type == "cuda" else "full"


def longest_sequence(
    config: Config,
    architecture: PretrainedConfig,
    target: TargetHardware,
    labelled_of: Callable[[int], int],
) -> int | None:
    """Tokens of the longest row that fits, alone in its optimizer step on each process, with the
    least memory, where the allocator gives back what it can; a multiple of 16; None: none does."""
    mode = least_memory(target.device)
    ranks = target.strategy.ranks
    most = getattr(architecture.get_text_config(), "max_position_embeddings", None)

    def alone(tokens: int) -> Config:
        return change(
            change(config, "data", max_length=tokens),
            "training",
            global_batch_tokens=tokens * ranks,
        )

    def estimate(tokens: int) -> float:
        return Estimate(alone(tokens), architecture, target, (tokens, tokens), labelled_of).peak_at(
            tokens, mode
        )

    (before, needed), (length, need) = ((tokens, estimate(tokens)) for tokens in (1024, 2048))
    for _ in range(6):  # all that a row needs grows nearly linearly with it
        guess = length + (target.memory - need) / max(1.0, (need - needed) / (length - before))
        guess = int(min(guess, most or guess)) // 16 * 16
        if guess < 16 or guess == length:
            break
        (before, needed), (length, need) = (length, need), (guess, estimate(guess))
    length, per_token = min(length, guess), max(1.0, (need - needed) / (length - before))

    def forecast(tokens: int) -> Forecast:
        return forecast_plan(
            alone(tokens), architecture, target, tokens, mode, labelled_of(tokens)
        ).forecast

    over = None  # This is the shortest row that is known not to fit.
    # from few layers to all of them
    while length >= 16 and not target.holds(found := forecast(length), short=True):
        over = length
        shorter = length - (target.needs(found, short=True) - target.memory) / per_token
        if found.host > target.host:
            shorter = min(shorter, length * target.host / found.host)
        length = min(length - 16, int(shorter) // 16 * 16)
    if length < 16:
        return None
    over = over or min(most or sys.maxsize, length + length // 10 + 32)
    # What the allocator reserves grows in steps, so the line may have led too low.
    for _ in range(4):
        middle = (over + length) // 32 * 16
        if middle - length <= length // 100:
            break
        if target.holds(forecast(middle), short=True):
            length = middle
        else:
            over = middle
    return length
