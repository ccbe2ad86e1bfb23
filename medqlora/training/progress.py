"""Where a training is: its step, its best evaluation, and whether it should stop early."""

from __future__ import annotations

import math
from typing import Any

from medqlora.core.config import Training
from medqlora.training.checkpoints import Checkpoint
from medqlora.training.planning import Planned
from medqlora.training.session import TrainingError


def begin(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Return the state that a training goes on from; checkpoints hold it as state.json."""
    state = {"step": 0, "best_loss": None, "best_step": 0, "patience": 0}
    return state if checkpoint is None else state | checkpoint.state


def measures_first(planned: Planned, state: dict[str, Any]) -> bool:
    """Say whether the evaluation loss is measured before the first step.

    It is where the run begins with another run's adapter. The loss shows that this is the adapter
    as it was, and the steps must beat it to replace the adapter.
    """
    begins_with_adapter = planned.config.lora.init_adapter is not None and state["step"] == 0
    return begins_with_adapter and planned.prepared.eval is not None


def is_due(step: int, every: int | None, final: bool) -> bool:
    """Say whether something that happens every so many steps is due; at the last step it is."""
    return final or bool(every and step % every == 0)


def stops_early(state: dict[str, Any], training: Training) -> bool:
    """Say whether there were too many evaluations in a row without a lower loss."""
    patience = training.early_stopping_patience
    return patience is not None and state["patience"] >= patience


def note_loss(state: dict[str, Any], loss: float) -> bool:
    """Note an evaluation loss in the state, and return whether it is the lowest so far.

    Raises:
        TrainingError: The loss is not finite, so it can be compared with no other.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"step {state['step']}: the evaluation loss is {loss}; lower training.lr and start a"
            " new run"
        )
    if state["best_loss"] is not None and loss >= state["best_loss"]:
        state["patience"] += 1
        return False
    state |= {"best_loss": loss, "best_step": state["step"], "patience": 0}
    return True
