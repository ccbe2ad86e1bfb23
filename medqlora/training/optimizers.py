"""The optimizer of the trainable weights, and the learning rate of each step."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable

import torch

from medqlora.core.config import Training
from medqlora.model.base import ModelError


def learning_rate(step: int, steps: int, training: Training) -> float:
    """Return the learning rate of step `step`, counted from 0, of a run of `steps` steps.

    A linear warm-up is followed by a constant rate, a linear decay to zero, or half a cosine to
    zero (SGDR, arXiv:1608.03983, equation 5, without restarts). The rate depends on the step alone,
    so a resumed run needs no scheduler state.
    """
    warmup = count_warmup(steps, training)
    if step < warmup:
        # The first step already has a rate above zero, so no step is without effect.
        return training.lr * (step + 1) / warmup
    # This fraction stays below 1 in the last step, so the decay reaches zero only after the run.
    done = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return training.lr * shape[training.scheduler]


def count_warmup(steps: int, training: Training) -> int:
    """Return the number of warm-up steps of a run of `steps` steps."""
    if training.warmup_steps < 1:  # The value is a fraction of all steps.
        return math.ceil(training.warmup_steps * steps)
    return int(training.warmup_steps)


def make_optimizer(
    training: Training, weights: Iterable[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """Make the AdamW optimizer (arXiv:1711.05101) that `training.optimizer` names.

    The 8-bit optimizers quantize both moments in blocks (arXiv:2110.02861). The paged one also lets
    them move to the host's memory when the GPU is full (QLoRA, arXiv:2305.14314, section 3).

    Raises:
        ModelError: An 8-bit optimizer is named and bitsandbytes is not installed.
    """
    weights = list(weights)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(
            weights, lr=training.lr, weight_decay=training.weight_decay, fused=True
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"training.optimizer {training.optimizer} needs the package bitsandbytes, which is not"
            " installed; install it, or set training.optimizer to adamw"
        )
    import bitsandbytes

    classes = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    return classes[training.optimizer](weights, lr=training.lr, weight_decay=training.weight_decay)


def restore_pages(optimizer: torch.optim.Optimizer) -> None:
    """Move the states of a paged optimizer back to paged memory after `load_state_dict`.

    bitsandbytes loads them as plain tensors. A resumed run would then need more GPU memory than
    the run had before it was interrupted. Other optimizers are left as they are.
    """
    if not getattr(optimizer, "is_paged", False):
        return
    for weight, states in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in states:
                # bitsandbytes pages only states of at least 100,000 entries, and get_state_buffer
                # knows which.
                paged = optimizer.get_state_buffer(weight, dtype=states[name].dtype)
                paged.copy_(states[name])
                states[name] = paged
