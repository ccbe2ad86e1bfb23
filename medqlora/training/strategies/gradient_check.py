"""The proof at start-up that a strategy's gradients are the whole model's."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from medqlora.model.adapter import trainable
from medqlora.model.head_loss import AnswerLoss
from medqlora.training.strategies.launch import Strategy, StrategyError

# relative error of a strategy's gradient, by compute dtype
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


def wake_adapter(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Fill the adapter's zero tensors with noise, the same on every rank, so that no gradient of
    the check is zero only because a fresh adapter's second factor is; -> the values as they
    were."""
    weights = trainable(model)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in weights.values():
            if not weight.any():
                weight.normal_(std=0.02)
    return before


def measure_gradients(
    trainer, batch: dict[str, Any], targets: int, ranks: int, seed: int
) -> dict[str, torch.Tensor]:
    """The adapter's gradients of one batch per rank, without a step; targets: supervised tokens of
    all ranks.
    """
    torch.manual_seed(seed)
    trainer.module.train()
    with trainer.accumulate(last=True):
        trainer.backward(trainer(**batch) * (ranks / targets))
    gradients = {name: value.clone() for name, value in trainer.read_gradients().items()}
    trainer.drop_gradients()
    return gradients


def compute_reference(
    loss_model: AnswerLoss, batch: dict[str, Any], targets: int, seed: int
) -> dict[str, torch.Tensor]:
    """The same gradients from the whole model on each rank, summed over ranks in float32."""
    torch.manual_seed(seed)
    loss_model.train()
    weights = trainable(loss_model.model)
    gradients = torch.autograd.grad(loss_model(**batch) / targets, list(weights.values()))
    gradients = [gradient.contiguous() for gradient in gradients]
    for gradient in gradients:
        if dist.is_initialized():
            dist.all_reduce(gradient)
    return dict(zip(weights, gradients, strict=True))


def compare_gradients(
    reference: dict[str, torch.Tensor],
    found: dict[str, torch.Tensor],
    dtype: torch.dtype,
    strategy: Strategy,
) -> float:
    """Largest error of a tensor relative to the reference's largest entry.

    Raises:
        StrategyError: the strategy does not train this model rightly.
    """
    worst = 0.0
    where = ""
    for name, expected in reference.items():
        got = found[name].to(expected.device)
        error = math.inf
        if got.shape == expected.shape and bool(torch.isfinite(got).all()):
            error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        if error > worst:
            worst = error
            where = name
    if worst > GRADIENT_TOLERANCE[dtype]:
        raise StrategyError(
            f"{strategy.name}: on a short batch the gradient of {where} differs from the unsharded"
            f" model's by {worst:.1e} (relative); this combination of model, engine and versions"
            " trains wrongly; use ddp, or training.gradient_checkpointing full"
        )
    return worst
