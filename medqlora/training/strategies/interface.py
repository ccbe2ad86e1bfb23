"""What every strategy's trainer can do.

Replicated, Zero and FullyShard have these methods, so that the training loop does not know which
one it has. What is trained, accumulated and reduced is float32 under each; the frozen base keeps
its own storage. Every method is collective: all ranks call it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from medqlora.model.head_loss import AnswerLoss


class Trainer(Protocol):
    """A loss model under one strategy.

    Attributes:
        module: the loss model; set it to train or eval mode.
        weights: the adapter's parameters by name, perhaps divided over ranks.
    """

    module: AnswerLoss
    weights: dict[str, torch.nn.Parameter]

    def __call__(self, **batch: Any) -> torch.Tensor:
        """A packed batch on the device -> summed loss over its supervised tokens, float32 []."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradients to those of earlier micro-batches."""

    def accumulate(self, last: bool) -> AbstractContextManager:
        """Context of a micro-batch's forward and backward. Gradients are averaged over ranks with
        the step's last one.
        """

    def step(self, lr: float) -> float:
        """Clip, update, clear the gradients -> their global norm before clipping."""

    def drop_gradients(self) -> None: ...

    def read_gradients(self) -> dict[str, torch.Tensor]:
        """Whole float32 gradients by parameter name."""

    def read_weights(self) -> dict[str, torch.Tensor]:
        """Whole float32 tensors of the adapter by parameter name."""

    def write_weights(self, values: dict[str, torch.Tensor]) -> None: ...

    def read_states(self) -> dict[str, dict[str, Any]]:
        """Whole optimizer states by parameter name, for a checkpoint."""

    def write_states(self, states: dict[str, dict[str, Any]]) -> None: ...

    def read_scale(self) -> dict[str, Any]:
        """State of float16's loss scaling; empty for other dtypes."""

    def write_scale(self, state: dict[str, Any]) -> None: ...
