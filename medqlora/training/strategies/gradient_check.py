"""A check at the start of a training that a strategy computes the gradients of the whole model."""

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
from medqlora.core.seeds import fit_seed
from medqlora.model.adapter import trainable
from medqlora.model.attention.packed_batch import move_batch
from medqlora.model.head_loss import AnswerLoss, count_chunks
from medqlora.prompts.rows import TokenTable
from medqlora.training.processes import agree_on_errors
from medqlora.training.session import Built, Session, run_micro_batch
from medqlora.training.setup import Setup
from medqlora.training.strategies.interface import Trainer
from medqlora.training.strategies.launch import Strategy, StrategyError

# The relative error that the gradient of a strategy may have, by the dtype of computing.
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class GradientCheck:
    """Result of the check.

    Args:
        relative_error: Largest error of any tensor (see compare_gradients).
        seconds: Seconds of the check and of handing the model to the strategy.
    """

    relative_error: float
    seconds: float


def open_session(
    setup: Setup, config: Config, built: Built, table: TokenTable
) -> tuple[Session, GradientCheck | None]:
    """Hand the model to its strategy, and check the gradients of the strategy; collective.

    Each rank takes one short row of `table`. The gradient of these rows is computed by the whole
    model before, and by the strategy after, and the two are compared.

    The strategy `one` changes nothing that could be wrong and is not checked. ZeRO is checked even
    on one process, because the check also makes the states of its optimizer, which a resumed run
    fills. float16 is not checked, because scaled and unscaled losses round differently.

    Returns:
        The session, and the result of the check (None where there was none).

    Raises:
        AgreedError: The gradients differ; every rank raises it.
    """
    strategy = setup.strategy
    if strategy.name == "one" or setup.dtype is torch.float16:
        return Session(built, config, strategy, setup.device, setup.dtype, setup.rank), None
    start = time.perf_counter()
    seed = fit_seed(config.training.seed, 64)
    ranks = strategy.ranks
    rows = choose_rows(table, ranks)
    targets = int(table.supervised[rows].sum())
    own_row = rows[setup.rank : setup.rank + 1]  # int64 [1]
    batch = move_batch(collate(table, own_row), built.backend, setup.device)
    # Each call of a divided head gathers it from all ranks, so they must make equally many.
    if strategy.sharded:
        most = int(table.supervised[rows].max())
        batch["chunks"] = count_chunks(most, config.training.loss_chunk_tokens)
    # The reference needs the whole model, and the session divides it.
    initial_weights = fill_zero_weights(built.model, seed)
    reference = compute_reference(built.loss_model, batch, targets, seed)
    session = Session(built, config, strategy, setup.device, setup.dtype, setup.rank)
    measured = measure_gradients(session.trainer, batch, targets, ranks, seed)
    with agree_on_errors():
        error = compare_gradients(reference, measured, setup.dtype, strategy)
    # The run begins from the weights before the noise, which a checkpoint may have set.
    session.trainer.write_weights(initial_weights)
    return session, GradientCheck(error, time.perf_counter() - start)


def choose_rows(table: TokenTable, ranks: int) -> np.ndarray:
    """Choose the shortest row for each rank; rows repeat if there are fewer rows than ranks.

    Returns:
        Row numbers, int64 [ranks].
    """
    # A stable sort chooses the same rows on every rank.
    rows = np.argsort(table.lengths, kind="stable")[:ranks]
    return rows[np.arange(ranks) % len(rows)]


def fill_zero_weights(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Fill zero tensors of what trains with noise, the same on every rank.

    The second factor of a new adapter is zero, which makes the gradient of the first factor zero,
    and a comparison of zeros shows nothing.

    Returns:
        The weights before, by parameter name.
    """
    weights = trainable(model)
    # They wait in the host's memory: a GPU may have none for a second model.
    initial_weights = {
        name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()
    }
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in weights.values():
            if not weight.any():
                weight.normal_(std=0.02)
    return initial_weights


def measure_gradients(
    trainer: Trainer, batch: dict[str, Any], targets: int, ranks: int, seed: int
) -> dict[str, torch.Tensor]:
    """Compute the gradients of one batch per rank under a strategy, without an update; collective.

    Args:
        targets: Supervised tokens of the batches of all ranks.

    Returns:
        Whole gradients by parameter name, float32.
    """
    # This is the seed of compute_reference, so both passes draw the same dropout.
    torch.manual_seed(seed)
    trainer.module.train()
    run_micro_batch(trainer, batch, ranks / targets, last=True)
    # A strategy may return its own buffers, which drop_gradients clears.
    gradients = {name: value.clone() for name, value in trainer.read_gradients().items()}
    trainer.drop_gradients()
    return gradients


def compute_reference(
    loss_model: AnswerLoss, batch: dict[str, Any], targets: int, seed: int
) -> dict[str, torch.Tensor]:
    """Compute the same gradients with the whole model on each rank, summed over ranks; collective.

    Returns:
        Whole gradients by parameter name, in the dtype of the weights.
    """
    torch.manual_seed(seed)
    loss_model.train()
    weights = trainable(loss_model.model)
    # autograd.grad leaves weight.grad alone, so no gradient is there when the strategy takes over.
    # Strategies average over ranks where this function sums; measure_gradients therefore multiplies
    # the loss by the number of ranks.
    gradients = torch.autograd.grad(loss_model(**batch) / targets, list(weights.values()))
    gradients = [gradient.contiguous() for gradient in gradients]  # all_reduce demands it.
    for gradient in gradients:
        if dist.is_initialized():
            dist.all_reduce(gradient)
    return {name: gradient.cpu() for name, gradient in zip(weights, gradients, strict=True)}


def compare_gradients(
    reference: dict[str, torch.Tensor],
    measured: dict[str, torch.Tensor],
    dtype: torch.dtype,
    strategy: Strategy,
) -> float:
    """Compare the gradients of a strategy with those of the whole model.

    The error of a tensor is its largest absolute difference, divided by the largest absolute entry
    of the reference. It is infinite for a tensor of another shape or with an entry that is not
    finite.

    Returns:
        The largest error of any tensor.

    Raises:
        StrategyError: That error is above GRADIENT_TOLERANCE.
    """
    largest_error = 0.0
    largest_name = ""
    for name, expected in reference.items():
        gradient = measured[name].to(expected.device)
        # NaN would pass: no comparison with it is true. The reference may be NaN as well.
        expected = expected.float()  # A gradient of a weight in bfloat16 is rounded to it.
        error = math.inf
        if gradient.shape == expected.shape and bool(torch.isfinite(gradient - expected).all()):
            scale = expected.abs().max().clamp_min(1e-12)
            error = float((gradient - expected).abs().max() / scale)
        if error > largest_error:
            largest_error = error
            largest_name = name
    if largest_error > GRADIENT_TOLERANCE[dtype]:
        raise StrategyError(
            f"{strategy.name}: on a short batch the gradient of {largest_name} differs from the"
            f" unsharded model's by {largest_error:.1e} (relative), more than"
            f" {GRADIENT_TOLERANCE[dtype]:.0e}; this combination of model, engine and versions"
            " trains wrongly; use ddp, or training.gradient_checkpointing full"
        )
    return largest_error
