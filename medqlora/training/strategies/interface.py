"""The methods that the trainer of every strategy has.

Replicated, Zero and FullyShard have them, so that the training loop needs no knowledge of the
strategy. Under each strategy, the weights that the optimizer updates, its states and the sums of
gradients over micro-batches are float32; the frozen base keeps its own storage. Weights that
compute in 16 bits, as all do under training.method full, are rounded from float32 masters
(Micikevicius et al., 2018, arXiv 1710.03740, section 3.1). Every method is collective: all ranks
must call it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from medqlora.model.head_loss import AnswerLoss


class Trainer(Protocol):
    """A loss model under one strategy.

    Attributes:
        module: The loss model, whose train or eval mode the caller sets.
        weights: The trainable parameters by name, or their float32 masters; a strategy may have
            divided them over ranks.
    """

    module: AnswerLoss
    weights: dict[str, torch.nn.Parameter]

    def __call__(self, **batch: Any) -> torch.Tensor:
        """Return the summed loss over the supervised tokens of a packed batch, float32 [].

        The arguments are those of AnswerLoss.forward, on the device.
        """

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss to those of earlier micro-batches."""

    def accumulate(self, last: bool) -> AbstractContextManager:
        """Return the context in which forward and backward of a micro-batch run.

        Gradients are averaged over ranks in the backward pass of the last micro-batch of a step.
        """

    def step(self, lr: float) -> float:
        """Clip the gradients, update the weights, and clear the gradients.

        Returns:
            The global norm of the gradients before clipping.
        """

    def drop_gradients(self) -> None:
        """Clear the gradients without an update."""

    def read_gradients(self) -> dict[str, torch.Tensor]:
        """Return the whole gradients by parameter name, float32."""

    def read_weights(self, keep: bool = True) -> dict[str, torch.Tensor]:
        """Return the whole trainable tensors by parameter name, float32.

        A rank without `keep` takes part in gathering them, and returns none of them: the host of
        many ranks has no memory for a whole model in each.
        """

    def write_weights(self, values: dict[str, torch.Tensor]) -> None:
        """Set the trainable tensors from whole tensors by parameter name."""

    def read_states(self, keep: bool = True) -> dict[str, dict[str, Any]]:
        """Return the whole optimizer states by parameter name; empty before the first step.

        The meaning of `keep` is that of read_weights.
        """

    def write_states(self, states: dict[str, dict[str, Any]]) -> None:
        """Set the optimizer states from whole tensors by parameter name."""

    def read_scale(self) -> dict[str, Any]:
        """Return the state of the loss scaling for float16; it is empty for other dtypes."""

    def write_scale(self, state: dict[str, Any]) -> None:
        """Set the state of the loss scaling for float16."""
