"""The optimizer over the adapter, and the learning rate of each step as a function of the step
alone.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable

import torch

from medqlora.core.config import Training
from medqlora.model.base import ModelError


def learning_rate(step: int, steps: int, training: Training) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then constant, linear or
    half a cosine to zero.

    A function of the step alone: a resumed run needs no scheduler state.
    """
    warmup = (
        math.ceil(training.warmup_steps * steps)
        if training.warmup_steps < 1
        else int(training.warmup_steps)
    )
    if step < warmup:
        return training.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return training.lr * shape[training.scheduler]


def make_optimizer(
    training: Training, weights: Iterable[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW over the adapter's weights.

    Raises:
        ModelError: an 8-bit optimizer without bitsandbytes.
    """
    weights = list(weights)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(
            weights, lr=training.lr, weight_decay=training.weight_decay, fused=True
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"training.optimizer {training.optimizer} needs the bitsandbytes package; install it or"
            " use adamw"
        )
    import bitsandbytes

    kind = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    return kind[training.optimizer](weights, lr=training.lr, weight_decay=training.weight_decay)


def restore_pages(optimizer: torch.optim.Optimizer) -> None:
    """After loading: move the states of a paged optimizer to paged memory again. bitsandbytes loads
    them as plain tensors, which would fill the GPU after a resume as they did not before it."""
    if not getattr(optimizer, "is_paged", False):
        return
    for weight, states in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in states:
                paged = optimizer.get_state_buffer(weight, dtype=states[name].dtype)
                paged.copy_(states[name])
                states[name] = paged
