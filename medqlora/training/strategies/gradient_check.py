"""The proof at start-up that a strategy's gradients are the whole model's."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from medqlora.batches.collate import collate
from medqlora.core.config import Config
from medqlora.model.adapter import trainable
from medqlora.model.attention.packed_batch import move_batch
from medqlora.model.head_loss import AnswerLoss, count_chunks
from medqlora.prompts.encoding import TokenTable
from medqlora.training.processes import agree_on_errors
from medqlora.training.session import Built, Session, run_micro_batch
from medqlora.training.setup import Setup
from medqlora.training.strategies.interface import Trainer
from medqlora.training.strategies.launch import Strategy, StrategyError

# The relative error that a strategy's gradient may have, by compute dtype.
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class GradientCheck:
    """relative_error: the largest of any tensor; seconds: of the check and of wrapping."""

    relative_error: float
    seconds: float


def open_session(
    setup: Setup, config: Config, built: Built, table: TokenTable
) -> tuple[Session, GradientCheck | None]:
    """Hand the model to the strategy, and prove on a short row of `table` for each rank that its
    gradients are the whole model's.

    One process has nothing to prove, but for ZeRO, whose optimizer has no states to restore before
    a first step. float16 is left out: scaled and unscaled losses round differently.

    Raises:
        AgreedError: on every rank, where the gradients differ.
    """
    strategy = setup.strategy
    if strategy.name == "one" or setup.dtype is torch.float16:
        return Session(built, config, strategy, setup.device, setup.dtype, setup.rank), None
    began = time.perf_counter()
    seed = config.training.seed
    ranks = strategy.ranks
    shown = choose_rows(table, ranks)
    targets = int(table.supervised[shown].sum())
    mine = shown[setup.rank : setup.rank + 1]
    batch = move_batch(collate(table, mine), built.backend, setup.device)
    if strategy.sharded:
        most = int(table.supervised[shown].max())
        batch["chunks"] = count_chunks(most, config.training.loss_chunk_tokens)
    before = fill_zero_weights(built.model, seed)
    reference = compute_reference(built.loss_model, batch, targets, seed)
    session = Session(built, config, strategy, setup.device, setup.dtype, setup.rank)
    found = measure_gradients(session.trainer, batch, targets, ranks, seed)
    with agree_on_errors():
        error = compare_gradients(reference, found, setup.dtype, strategy)
    session.trainer.write_weights(before)
    return session, GradientCheck(error, time.perf_counter() - began)


def choose_rows(table: TokenTable, ranks: int) -> np.ndarray:
    """A short row for each rank: the shortest ones, repeated where there are too few."""
    rows = np.argsort(table.lengths, kind="stable")[:ranks]
    return rows[np.arange(ranks) % len(rows)]


def fill_zero_weights(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
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
    trainer: Trainer, batch: dict[str, Any], targets: int, ranks: int, seed: int
) -> dict[str, torch.Tensor]:
    """The adapter's gradients of one batch per rank, without a step; targets: supervised tokens of
    all ranks.
    """
    torch.manual_seed(seed)
    trainer.module.train()
    run_micro_batch(trainer, batch, ranks / targets, last=True)
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
