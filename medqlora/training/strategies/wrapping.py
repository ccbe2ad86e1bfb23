"""One adapter trained by many processes.

Replicated, Zero and FullyShard do the same with the same methods, so that the training loop does
not know which one it has: call it with a batch for the loss, `backward`, `step`; read and write
whole tensors by name. What is trained, accumulated and reduced is float32 under each; the frozen
base keeps its own storage. Every method is collective: all ranks call it.
"""

from __future__ import annotations

from typing import Any

import torch

from medqlora.model.head_loss import AnswerLoss
from medqlora.training.strategies.fsdp2 import FullyShard
from medqlora.training.strategies.launch import Strategy, StrategyError
from medqlora.training.strategies.replicated import Replicated
from medqlora.training.strategies.zero import Zero


def wrap(
    strategy: Strategy,
    loss_model: AnswerLoss,
    optimizer_of,
    max_grad_norm: float,
    dtype: torch.dtype,
):
    """The whole model of each rank -> the strategy's trainer. optimizer_of: parameters -> torch
    optimizer.
    """
    device = next(loss_model.parameters()).device
    if strategy.name.startswith("zero"):
        return Zero(strategy, loss_model, optimizer_of, max_grad_norm)
    if strategy.name == "fsdp2":
        return FullyShard(strategy, loss_model, optimizer_of, max_grad_norm, device)
    return Replicated(
        strategy, loss_model, optimizer_of, max_grad_norm, device, scale=dtype is torch.float16
    )


def gather_weights(trainer, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The adapter's whole tensors, each compared with the shape it had before it was divided.

    Raises:
        StrategyError: one that came back empty, in part, or not finite.
    """
    values = trainer.read_weights()
    for name, shape in shapes.items():
        value = values.get(name)
        if value is None or value.shape != shape or not bool(torch.isfinite(value).all()):
            got = (
                "nothing"
                if value is None
                else (
                    f"shape {tuple(value.shape)}"
                    if value.shape != shape
                    else "values that are not finite"
                )
            )
            raise StrategyError(
                f"gathering the adapter: {name} came back with {got}, expected {tuple(shape)};"
                " nothing was saved"
            )
    return values


def load_states(trainer, states: dict[str, dict[str, Any]]) -> None:
    """Optimizer states of a checkpoint, whatever strategy and number of processes wrote it.

    Raises:
        StrategyError: they belong to another adapter or optimizer.
    """
    wrong = sorted(states.keys() ^ trainer.weights.keys())
    if wrong:
        raise StrategyError(
            f"the checkpoint's optimizer does not fit this adapter: {wrong[0]} is missing or"
            " surplus; start without --resume"
        )
    trainer.write_states(states)
