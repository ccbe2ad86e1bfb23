"""A model is built once and stepped once, here.

Base, adapter, recomputation, loss, strategy, and one micro-batch through them: the recipe,
preflight, benchmarks, memory forecasts and the gradient check all use these functions, so that
what they try or measure is what trains.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PretrainedConfig

from medqlora.batches.collate import cap_batches, collate
from medqlora.batches.plan import Plan, fit_bins
from medqlora.core.config import Config
from medqlora.core.errors import UserError
from medqlora.model.adapter import attach_adapter, trainable
from medqlora.model.attention.backends import IMPLEMENTATIONS, choose_backend
from medqlora.model.attention.packed_batch import (
    ISOLATION_TOLERANCE,
    move_batch,
    verify_isolation,
)
from medqlora.model.base import backbone_of, load_base
from medqlora.model.compiling import compile_layers
from medqlora.model.hardware import choose_dtype
from medqlora.model.head_loss import AnswerLoss, count_chunks
from medqlora.model.random_base import make_base
from medqlora.model.recomputation import set_checkpointing
from medqlora.prompts.encoding import TokenTable
from medqlora.training.optimizers import make_optimizer
from medqlora.training.processes import gather
from medqlora.training.strategies.interface import Trainer
from medqlora.training.strategies.launch import Strategy
from medqlora.training.strategies.wrapping import wrap


class TrainingError(UserError):
    """Training cannot go on."""


@dataclass(frozen=True)
class Loaded:
    """A frozen base on its device; compiled: whether its norms and activations are."""

    base: torch.nn.Module
    backend: str
    compiled: bool


def load(
    config: Config,
    device: torch.device,
    storage: torch.dtype = torch.uint8,
    architecture: PretrainedConfig | None = None,
) -> Loaded:
    """Load the base that `config.model` names.

    Args:
        storage: dtype that 4-bit weights are packed in (strategies.launch.choose_storage).
        architecture: makes random weights of this shape instead.

    Raises:
        ModelError, AttentionError: as load_base and make_base.
        TrainingError: the base does not fit the device.
    """
    try:
        if architecture is None:
            base, backend = load_base(config.model, device, storage)
        else:
            dtype = choose_dtype(config.model.dtype, device)
            base = make_base(architecture, config.model, device, dtype, storage)
            backend = choose_backend(config.model.attention, device, dtype, base.config).backend
            base.set_attn_implementation(IMPLEMENTATIONS[backend])
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0][:200]
        raise TrainingError(
            f"{config.model.base} does not fit: {reason}; every GPU holds the whole base once"
            " (docs/scaling.md)"
        ) from None
    return Loaded(base, backend, compile_layers(base, device, config.training.compile))


def prove_isolation(loaded: Loaded, dtype: torch.dtype) -> float:
    """The largest error by which rows of one packed batch see each other; dtype: of computing.

    Raises:
        AttentionError: they do.
    """
    vocabulary = loaded.base.config.get_text_config().vocab_size
    tolerance = ISOLATION_TOLERANCE[dtype]
    return verify_isolation(backbone_of(loaded.base), loaded.backend, vocabulary, tolerance)


@dataclass(frozen=True)
class Built:
    """A base with its adapter and loss, whole on one device.

    Args:
        recomputed: number of layers whose activations are computed again.
        shapes: of the adapter's tensors by parameter name, before a strategy divides them.
    """

    model: PeftModel
    loss_model: AnswerLoss
    backend: str
    recomputed: int
    shapes: dict[str, torch.Size]

    @property
    def vocabulary(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers


def build(loaded: Loaded, config: Config) -> Built:
    """Attach a fresh adapter, choose what is recomputed, put the loss around the model."""
    model = attach_adapter(loaded.base, config.lora, config.training.seed)
    recomputed = set_checkpointing(loaded.base, config.training.gradient_checkpointing)
    loss_model = AnswerLoss(model, config.training.loss_chunk_tokens)
    shapes = {name: weight.shape for name, weight in trainable(model).items()}
    return Built(model, loss_model, loaded.backend, recomputed, shapes)


def run_micro_batch(
    trainer: Trainer, batch: dict[str, Any], factor: float, last: bool
) -> torch.Tensor:
    """Forward and backward of one packed batch -> its summed loss, float32 [].

    Args:
        factor: what the loss is multiplied by before its gradient. Each strategy averages over
            ranks, and the gradient that is wanted is that of the mean over all supervised tokens
            of the step: ranks / supervised tokens.
        last: whether this is the step's last micro-batch of this rank.
    """
    with trainer.accumulate(last):
        loss = trainer(**batch)
        trainer.backward(loss if factor == 1 else loss * factor)
    return loss.detach()


@dataclass(frozen=True)
class Gradients:
    """One rank's part of a step: each micro-batch's rows and summed loss, and the seconds that
    making batches took.
    """

    batches: list[np.ndarray]
    losses: list[torch.Tensor]
    data_seconds: float


class Session:
    """A model under a strategy, ready to step."""

    def __init__(
        self,
        built: Built,
        config: Config,
        strategy: Strategy,
        device: torch.device,
        dtype: torch.dtype,
        rank: int = 0,
    ):
        """config: with training.max_tokens_per_batch decided; dtype: of computing."""
        training = config.training
        self.built = built
        self.config = config
        self.strategy = strategy
        self.device = device
        self.dtype = dtype
        self.rank = rank
        self.budget = training.max_tokens_per_batch  # tokens; lower after memory ran out
        self.trainer: Trainer = wrap(
            strategy,
            built.loss_model,
            lambda weights: make_optimizer(training, weights),
            training.max_grad_norm,
            dtype,
        )

    def make_batch(
        self, table: TokenTable, rows: np.ndarray, side_by_side: Sequence[np.ndarray] = ()
    ) -> dict[str, Any]:
        """Rows of a table -> a packed batch on the device.

        side_by_side: the rows of all ranks' batches of this round. Where the head is divided over
        ranks, each of its calls gathers it from all of them, so they must call it equally often.
        """
        batch = move_batch(collate(table, rows), self.built.backend, self.device)
        if self.strategy.sharded:
            most = max(int(table.supervised[others].sum()) for others in side_by_side)
            batch["chunks"] = count_chunks(most, self.config.training.loss_chunk_tokens)
        return batch

    def accumulate(
        self,
        table: TokenTable,
        plan: Plan,
        step: int,
        targets: int,
        say: Callable[[str], None] = lambda text: None,
    ) -> Gradients:
        """Gradients of this rank's micro-batches of a step; targets: supervised tokens of all.

        Where memory runs out on one process, the micro-batches are halved and tried again; the
        step's rows, and so its gradient, stay the same. `say` is told.

        Raises:
            TrainingError: memory ran out, and other ranks wait for this one.
            PlanError: memory ran out at a single row.
        """
        while True:
            planned = plan.micro_batches(step, self.rank, self.strategy.ranks)
            batches = cap_batches(table.lengths, planned, self.budget)
            gradients = self.try_batches(table, plan, step, batches, targets)
            if gradients is not None:
                return gradients
            self.recover_from_full_memory()
            say(
                f"[yellow]out of memory: micro-batches of {self.budget} tokens from here on, same"
                " global batch"
            )

    def try_batches(
        self, table: TokenTable, plan: Plan, step: int, batches: list[np.ndarray], targets: int
    ) -> Gradients | None:
        """Forward and backward of each batch; None where memory ran out.

        This is a function of its own because nothing may refer to the graph of a failed backward
        pass when the step is tried again: its local variables and the error's traceback end with
        it.
        """
        ranks = self.strategy.ranks
        self.trainer.module.train()
        losses = []
        data_seconds = 0.0
        try:
            for number, rows in enumerate(batches):
                asked = time.perf_counter()
                # A rank without rows in a round computes a row that counts zero, because the
                # others wait for it.
                factor = ranks / targets if len(rows) else 0.0
                shown = rows if len(rows) else plan.rows_of(step)[:1]
                side_by_side = [*plan.round(step, number, ranks), shown]
                batch = self.make_batch(table, shown, side_by_side)
                data_seconds += time.perf_counter() - asked
                # Each micro-batch of the plan has its own dropout, whichever rank computes it, so
                # a resumed run has no generator's state to restore.
                seed = (self.config.training.seed << 40) + (step << 16)
                torch.manual_seed(seed + number * ranks + self.rank)
                last = number == len(batches) - 1
                loss = run_micro_batch(self.trainer, batch, factor, last)
                losses.append(loss if len(rows) else torch.zeros_like(loss))
        except torch.OutOfMemoryError:
            return None
        return Gradients(batches, losses, data_seconds)

    def recover_from_full_memory(self) -> None:
        """Forget the gradients of a step that ran out of memory, and halve the micro-batches."""
        if self.strategy.ranks > 1:
            raise TrainingError(
                f"out of memory on rank {self.rank}; lower training.max_tokens_per_batch below"
                f" {self.budget}"
            )
        self.trainer.drop_gradients()
        gc.collect()  # Autograd's objects refer to each other in circles.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.budget //= 2

    def update(self, lr: float) -> dict[str, Any]:
        """Clip, and update the adapter -> the global norm before clipping, for the log.

        A float16 step whose gradients overflow is skipped; the loss scale is lower afterwards.
        """
        norm = self.trainer.step(lr)
        if self.dtype is torch.float16 and not math.isfinite(norm):
            return {"grad_norm": None, "skipped": True}
        return {"grad_norm": norm}

    def sum_over_ranks(self, losses: list[torch.Tensor], flag: float = 0.0) -> tuple[float, float]:
        """The summed loss and the summed flag of all ranks, in one message."""
        total = torch.stack(losses).sum().float()
        both = torch.stack([total, torch.tensor(flag, device=self.device)])
        if self.strategy.ranks > 1:
            torch.distributed.all_reduce(both)
        return both[0].item(), both[1].item()

    @torch.no_grad()
    def evaluate(self, table: TokenTable) -> float:
        """Mean loss per supervised token over a whole table."""
        ranks = self.strategy.ranks
        self.trainer.module.eval()
        total = torch.zeros((), device=self.device)
        bins = fit_bins(table.lengths, max(self.budget, int(table.lengths.max())))
        # A divided model needs every rank each time: those left over repeat the last batch.
        for first in range(0, len(bins), ranks):
            index = first + self.rank
            rows = bins[min(index, len(bins) - 1)]
            loss = self.trainer(**self.make_batch(table, rows, bins[first : first + ranks]))
            total += loss if index < len(bins) else 0
        if ranks > 1:
            torch.distributed.all_reduce(total)
        return total.item() / int(table.supervised.sum())

    @torch.no_grad()
    def describe_non_finite(self, table: TokenTable, gradients: Gradients, step: int) -> str:
        """Name the examples of the micro-batches whose loss is not finite. Each is tried alone,
        but for a divided model, which one rank cannot try.
        """
        suspects: list[int] = []
        for rows, loss in zip(gradients.batches, gradients.losses, strict=True):
            if not torch.isfinite(loss):
                suspects += rows.tolist()
        guilty = []
        if not self.strategy.sharded:
            guilty = [row for row in suspects if not self.is_finite_alone(table, row)]
        mine = (bool(guilty), [table.names[row] for row in guilty or suspects])
        everyone = [(sure, names) for sure, names in gather(mine) if names]
        certain = [found for found in everyone if found[0]]
        names = [name for _, some in certain or everyone for name in some]
        kind = "finite alone but not together: examples"
        if certain:
            kind = "examples"
        elif self.strategy.sharded:
            kind = "among examples"
        return (
            f"step {step}: loss is not finite; {kind} {', '.join(names[:10])}; look at these rows,"
            " or lower training.lr"
        )

    def is_finite_alone(self, table: TokenTable, row: int) -> bool:
        batch = self.make_batch(table, np.array([row]))
        return bool(torch.isfinite(self.built.loss_model(**batch)))
