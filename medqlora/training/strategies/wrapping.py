"""Handing a model to its strategy, and whole tensors to and from the strategy's trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from medqlora.model.head_loss import AnswerLoss
from medqlora.training.strategies.fsdp2 import FullyShard
from medqlora.training.strategies.interface import Trainer
from medqlora.training.strategies.launch import Strategy, StrategyError
from medqlora.training.strategies.replicated import Replicated
from medqlora.training.strategies.zero import Zero


def wrap(
    strategy: Strategy,
    loss_model: AnswerLoss,
    create_optimizer: Callable[..., torch.optim.Optimizer],
    max_grad_norm: float,
    dtype: torch.dtype,
) -> Trainer:
    """Make the trainer of a strategy around the whole model of each rank; collective.

    Args:
        create_optimizer: Takes the trainable parameters and returns a torch optimizer.
        max_grad_norm: The gradients are clipped to this global norm.
        dtype: The dtype of computing; the loss is scaled for float16.
    """
    # The whole model is on one device until a strategy divides or offloads it.
    device = next(loss_model.parameters()).device
    if strategy.name.startswith("zero"):
        return Zero(strategy, loss_model, create_optimizer, max_grad_norm)
    if strategy.name == "fsdp2":
        return FullyShard(strategy, loss_model, create_optimizer, max_grad_norm, device)
    # check_strategy has refused float16 under the strategies above, so they have no loss scaling.
    return Replicated(
        strategy, loss_model, create_optimizer, max_grad_norm, device, scale=dtype is torch.float16
    )


def gather_weights(
    trainer: Trainer, shapes: dict[str, torch.Size], keep: bool = True
) -> dict[str, torch.Tensor]:
    """Gather the whole trainable tensors by parameter name, and check them; collective.

    Args:
        shapes: Shape of each tensor before the strategy divided it.
        keep: Whether this rank checks and returns them; another one only takes part in gathering.

    Raises:
        StrategyError: A tensor is missing, has another shape, or has an entry that is not finite.
    """
    # ZeRO-3 has handed out empty tensors without an error, which would be saved.
    values = trainer.read_weights(keep)
    for name, shape in shapes.items() if keep else ():
        value = values.get(name)
        if value is None:
            problem = "nothing"
        elif value.shape != shape:
            problem = f"shape {tuple(value.shape)}"
        elif not bool(torch.isfinite(value).all()):
            problem = "values that are not finite"
        else:
            continue
        raise StrategyError(
            f"gathering the trained weights: got {problem} for {name}, expected finite values of"
            f" shape {tuple(shape)}; nothing was saved; continue from the last checkpoint with"
            " --resume"
        )
    return values


def load_states(trainer: Trainer, states: dict[str, dict[str, Any]]) -> None:
    """Load the optimizer states of a checkpoint; collective.

    Any strategy and any number of processes may have written them.

    Raises:
        StrategyError: They belong to other parameters than those that train.
    """
    differing = sorted(states.keys() ^ trainer.weights.keys())
    if differing:
        place = "the checkpoint" if differing[0] in states else "what trains"
        raise StrategyError(
            f"the optimizer states of the checkpoint do not fit what trains: only {place} has"
            f" {differing[0]}; start a new run without --resume"
        )
    # Nothing is set before all names are known to fit.
    trainer.write_states(states)
