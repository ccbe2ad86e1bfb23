"""The strategies `one` and `ddp`, in which every rank has the whole model."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from medqlora.model.adapter import trainable
from medqlora.model.head_loss import AnswerLoss
from medqlora.training.optimizers import restore_pages
from medqlora.training.strategies.launch import Strategy


class Replicated:
    """A trainer (interface.Trainer) through torch's DistributedDataParallel.

    On one process nothing is wrapped around the model. The loss is scaled for float16.

    Weights in 16 bits have float32 masters, and their gradients are added to those of the masters
    as soon as they are made. DistributedDataParallel knows no such gradients, so they are summed
    over the ranks here.
    """

    def __init__(
        self,
        strategy: Strategy,
        loss_model: AnswerLoss,
        create_optimizer,
        max_grad_norm: float,
        device: torch.device,
        scale: bool,
    ):
        self.module = loss_model
        self.max_grad_norm = max_grad_norm
        self.ranks = strategy.ranks
        self.computed = trainable(loss_model.model)
        self.weights = {name: make_master(weight) for name, weight in self.computed.items()}
        self.mixed = any(self.weights[name] is not self.computed[name] for name in self.weights)
        self.optimizer = create_optimizer(self.weights.values())
        # A scaler that is not enabled passes losses, gradients and steps on unchanged.
        self.scaler = torch.amp.GradScaler(device.type, enabled=scale)
        self.wrapped = loss_model
        if self.mixed:
            for name, weight in self.computed.items():
                hook = functools.partial(move_gradient, master=self.weights[name])
                weight.register_post_accumulate_grad_hook(hook)
        elif strategy.ranks > 1:
            ddp = torch.nn.parallel.DistributedDataParallel
            # torch 2.13 renamed the option `broadcast_buffers`.
            renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters
            buffer_option = "forward_sync_buffers" if renamed else "broadcast_buffers"
            # Buffers are not sent: those of the frozen base are the same on all ranks. Gradients
            # are views of DDP's buckets, so they exist once; sharding.divide counts on it.
            self.wrapped = ddp(
                loss_model,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **{buffer_option: False},
            )

    def __call__(self, **batch: Any) -> torch.Tensor:
        return self.wrapped(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def accumulate(self, last: bool):
        if self.mixed and self.ranks > 1 and last:
            return self.average_gradients()
        if self.wrapped is self.module or last:
            return contextlib.nullcontext()
        return self.wrapped.no_sync()

    @contextlib.contextmanager
    def average_gradients(self) -> Iterator[None]:
        """Average the float32 gradients over the ranks at the end of the block."""
        yield
        for master in self.weights.values():
            dist.all_reduce(master.grad)
            master.grad /= self.ranks

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # max_grad_norm is meant for unscaled gradients, so unscaling comes before clipping.
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), self.max_grad_norm)
        # The scaler skips the update where a gradient was not finite.
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.round_masters()
        return float(norm)

    @torch.no_grad()
    def round_masters(self) -> None:
        """Set the weights that compute from their masters."""
        if self.mixed:
            for name, weight in self.computed.items():
                weight.copy_(self.weights[name])

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad()

    def read_gradients(self) -> dict[str, torch.Tensor]:
        # These gradients are still scaled: only step unscales them.
        return {
            name: weight.grad.detach() / self.scaler.get_scale()
            for name, weight in self.weights.items()
        }

    def read_weights(self, keep: bool = True) -> dict[str, torch.Tensor]:
        # These are the live tensors, which the next step changes.
        return {name: weight.detach() for name, weight in self.weights.items()} if keep else {}

    def write_weights(self, values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(values[name])
        self.round_masters()

    def read_states(self, keep: bool = True) -> dict[str, dict[str, Any]]:
        # Every rank has all states, so nothing is gathered.
        return {
            name: dict(self.optimizer.state[weight])
            for name, weight in self.weights.items()
            if weight in self.optimizer.state
        }

    def write_states(self, states: dict[str, dict[str, Any]]) -> None:
        # load_state_dict casts the states and moves them to their device. It knows parameters by
        # their number, not by name.
        order = list(self.weights)
        numbered = {order.index(name): state for name, state in states.items()}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": numbered})
        restore_pages(self.optimizer)

    def read_scale(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def write_scale(self, state: dict[str, Any]) -> None:
        self.scaler.load_state_dict(state)


def make_master(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    """Return a float32 copy of a weight in 16 bits; a float32 weight is its own master."""
    if weight.dtype is torch.float32:
        return weight
    return torch.nn.Parameter(weight.detach().float())


def move_gradient(weight: torch.Tensor, master: torch.nn.Parameter) -> None:
    """Add a weight's new gradient to that of its master, in float32, and drop it."""
    if master.grad is None:
        master.grad = weight.grad.float()
    else:
        master.grad += weight.grad
    weight.grad = None
