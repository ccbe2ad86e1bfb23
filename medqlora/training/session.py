"""The one place where a model is built and an optimizer step is taken.

A model consists of the base, its adapter if it has one, recomputation, the loss and a strategy. The
recipe, preflight, the benchmarks, the memory forecast and the gradient check all use the functions
of this module. Therefore what they check or measure is what trains.
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
from transformers import PretrainedConfig

from medqlora.batches.collate import cap_batches, collate
from medqlora.batches.plan import Plan, fit_bins
from medqlora.core.config import Config
from medqlora.core.errors import UserError
from medqlora.core.seeds import fit_seed
from medqlora.model.adapter import trainable
from medqlora.model.agreement import Agreement, prove_agreement
from medqlora.model.attention.backends import IMPLEMENTATIONS, choose_backend
from medqlora.model.attention.packed_batch import move_batch
from medqlora.model.base import load_base
from medqlora.model.compiling import compile_layers
from medqlora.model.hardware import choose_dtype
from medqlora.model.head_loss import AnswerLoss, count_chunks
from medqlora.model.random_base import make_base
from medqlora.model.recomputation import set_checkpointing
from medqlora.prompts.rows import TokenTable
from medqlora.training.methods import Method, choose_method
from medqlora.training.optimizers import make_optimizer
from medqlora.training.processes import gather
from medqlora.training.strategies.interface import Trainer
from medqlora.training.strategies.launch import Strategy
from medqlora.training.strategies.wrapping import wrap


class TrainingError(UserError):
    """Training cannot go on."""


@dataclass(frozen=True)
class Loaded:
    """A frozen base on its device.

    Args:
        base: The causal language model.
        backend: Name of its attention backend.
        compiled: Whether its norms and activations are compiled.
    """

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
        storage: The dtype that 4-bit weights are packed in (strategies.launch.choose_storage).
        architecture: Random weights of this architecture are made instead of loading weights.

    Raises:
        ModelError: The base cannot be loaded, or its hardware or quantization does not fit.
        AttentionError: The attention backend does not run here.
        TrainingError: The base does not fit the device's memory.
    """
    try:
        if architecture is None:
            base, backend = load_base(config.model, device, storage)
        else:
            # load_base chooses the attention backend itself, and make_base does not.
            dtype = choose_dtype(config.model.dtype, device)
            base = make_base(architecture, config.model, device, dtype, storage)
            backend = choose_backend(config.model.attention, device, dtype, base.config).backend
            base.set_attn_implementation(IMPLEMENTATIONS[backend])
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0][:200]
        raise TrainingError(
            f"{config.model.base} does not fit the GPU's memory: {reason}; every GPU must hold the"
            " whole base while it is loaded, whatever the strategy (docs/scaling.md); use a smaller"
            " base or a GPU with more memory"
        ) from None
    return Loaded(base, backend, compile_layers(base, device, config.training.compile))


@dataclass(frozen=True)
class Built:
    """A model that trains and its loss, undivided on one device.

    Args:
        model: The base with its adapter, or the base itself where all of it trains.
        method: What training.method decides.
        loss_model: The module around it whose output is the summed loss.
        backend: Name of the attention backend.
        recomputed: Number of layers whose activations are computed again in the backward pass.
        shapes: Shapes of the trainable tensors by parameter name, before a strategy divides them.
    """

    model: torch.nn.Module
    method: Method
    loss_model: AnswerLoss
    backend: str
    recomputed: int
    shapes: dict[str, torch.Size]

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return self.model.config.get_text_config().vocab_size

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.model.config.get_text_config().num_hidden_layers


def build(loaded: Loaded, config: Config) -> Built:
    """Attach a new adapter to a base or unfreeze the base, set which layers are recomputed, and add
    the loss.

    Raises:
        ModelError: The adapter does not fit the base (attach_adapter), or the base cannot be
            trained (unfreeze).
    """
    method = choose_method(config)
    # An adapter's layers are put into loaded.base, which is the same base from here on.
    model = method.attach(loaded.base, config)
    recomputed = set_checkpointing(loaded.base, config.training.gradient_checkpointing)
    loss_model = AnswerLoss(model, config.training.loss_chunk_tokens)
    # A strategy may leave an empty or divided tensor in the place of a parameter. Here all of them
    # still have their whole shapes.
    shapes = {name: weight.shape for name, weight in trainable(model).items()}
    return Built(model, method, loss_model, loaded.backend, recomputed, shapes)


def prove(built: Built, config: Config) -> Agreement:
    """Prove that the loss and its gradients are those of the model as transformers computes it.

    A strategy may divide the model afterwards; the gradient check is for that.

    Raises:
        AttentionError: Logits or gradients differ, or packed rows see each other.
    """
    return prove_agreement(
        built.model, built.backend, config.data.max_length, built.loss_model, config.data.packing
    )


def run_micro_batch(
    trainer: Trainer, batch: dict[str, Any], factor: float, last: bool
) -> torch.Tensor:
    """Run forward and backward of one packed batch.

    Args:
        batch: Arguments of AnswerLoss.forward, on the device.
        factor: Multiplies the loss before its gradient is computed. Each strategy averages
            gradients over ranks, but the gradient of a step is that of the mean over all its
            supervised tokens. The factor is therefore ranks / supervised tokens of the step.
        last: Whether this is the last micro-batch of this rank in the step.

    Returns:
        The summed loss over the supervised tokens of the batch, float32 [], without the factor.
    """
    # The forward pass stands inside the context too: DDP decides in it whether the backward pass
    # sends gradients.
    with trainer.accumulate(last):
        loss = trainer(**batch)
        trainer.backward(loss if factor == 1 else loss * factor)
    # The losses wait for the end of the step. Their graphs must not wait with them.
    return loss.detach()


@dataclass(frozen=True)
class Gradients:
    """The part of one rank in a step whose gradients have been computed.

    Args:
        batches: Row numbers of each micro-batch.
        losses: Summed loss of each micro-batch, float32 [].
        data_seconds: Seconds that making the batches took.
    """

    batches: list[np.ndarray]
    losses: list[torch.Tensor]
    data_seconds: float


class Session:
    """A model under a strategy that takes optimizer steps."""

    def __init__(
        self,
        built: Built,
        config: Config,
        strategy: Strategy,
        device: torch.device,
        dtype: torch.dtype,
        rank: int = 0,
    ):
        """Hand a model to its strategy, which makes the optimizer; collective.

        Args:
            config: The configuration, where training.max_tokens_per_batch is not `auto`.
            dtype: The dtype of computing.
        """
        training = config.training
        self.built = built
        self.config = config
        self.strategy = strategy
        self.device = device
        self.dtype = dtype
        self.rank = rank
        # Tokens of a micro-batch. They become fewer when memory runs out.
        self.budget = training.max_tokens_per_batch
        # The trainer makes the optimizer itself, because a strategy may replace the parameters
        # first. An optimizer of the old ones would update nothing that trains.
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
        """Pack rows of a table into one batch on the device.

        Args:
            rows: Row numbers, int64 [rows].
            side_by_side: Rows of the batches that all ranks compute at the same time. Where a
                strategy divides the head over ranks, each call of the head gathers it from all of
                them. Therefore all ranks must call it equally often, and the largest of these
                batches decides how often.

        Returns:
            Arguments of AnswerLoss.forward.
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
        """Compute the gradients of this rank's micro-batches of a step.

        If memory runs out in a training of one process, the micro-batches are halved and tried
        again. The rows of the step, and therefore its gradient, stay the same.

        Args:
            step: Number of the step, from 0.
            targets: Supervised tokens of the whole step, on all ranks.
            say: Receives a text for the user when memory has run out.

        Raises:
            TrainingError: Memory ran out in a training of several processes, where the other ranks
                already wait for this one.
            PlanError: Memory ran out at a micro-batch of a single row.
        """
        while True:
            planned = plan.micro_batches(step, self.rank, self.strategy.ranks)
            # The plan never changes: micro-batches over a lowered budget are split in each step.
            batches = cap_batches(table.lengths, planned, self.budget)
            gradients = self.try_batches(table, plan, step, batches, targets)
            if gradients is not None:
                return gradients
            self.recover_from_full_memory()
            say(
                f"out of memory: training continues with micro-batches of {self.budget}"
                " tokens and the same global batch"
            )

    def try_batches(
        self, table: TokenTable, plan: Plan, step: int, batches: list[np.ndarray], targets: int
    ) -> Gradients | None:
        """Run forward and backward of each batch; return None if memory ran out.

        When the step is tried again, nothing may refer to the autograd graph of the failed pass.
        The local variables and the traceback of the error do so, and they end with this function.
        """
        ranks = self.strategy.ranks
        # Scoring and evaluation leave the model in eval mode, which has no dropout and no
        # recomputation.
        self.trainer.module.train()
        losses = []
        data_seconds = 0.0
        try:
            for number, rows in enumerate(batches):
                start = time.perf_counter()
                # The other ranks wait for each micro-batch of this one. A rank without rows
                # therefore computes some row, and the factor 0 removes it from the gradient.
                factor = ranks / targets if len(rows) else 0.0
                computed_rows = rows if len(rows) else plan.rows_of(step)[:1]
                side_by_side = [*plan.round(step, number, ranks), computed_rows]
                batch = self.make_batch(table, computed_rows, side_by_side)
                data_seconds += time.perf_counter() - start
                # The dropout of a micro-batch depends on its number in the plan alone, so a resumed
                # run need not restore the state of a random generator.
                # The step has bits 16 to 39 and the micro-batch those below, so no two seeds of a
                # run are equal. torch takes 64 bits, which leaves 24 for the run's own seed.
                seed = (fit_seed(self.config.training.seed, 24) << 40) + (step << 16)
                torch.manual_seed(seed + number * ranks + self.rank)
                last = number == len(batches) - 1
                loss = run_micro_batch(self.trainer, batch, factor, last)
                # A row that stands in for none must not count in the reported loss either.
                losses.append(loss if len(rows) else torch.zeros_like(loss))
        except torch.OutOfMemoryError:
            return None
        return Gradients(batches, losses, data_seconds)

    def recover_from_full_memory(self) -> None:
        """Drop the gradients of a step that ran out of memory, and halve the micro-batches."""
        if self.strategy.ranks > 1:
            raise TrainingError(
                f"out of memory on rank {self.rank} with micro-batches of {self.budget} tokens;"
                f" start a new run with training.max_tokens_per_batch below {self.budget}"
            )
        # Micro-batches that went through have left gradients, which would count twice.
        self.trainer.drop_gradients()
        gc.collect()  # Objects of autograd refer to each other in cycles.
        if self.device.type == "cuda":
            # The cached blocks have the sizes of the failed attempt.
            torch.cuda.empty_cache()
        self.budget //= 2

    def update(self, lr: float) -> dict[str, Any]:
        """Clip the gradients and update the trainable weights; collective.

        A float16 step whose gradients overflow changes nothing, and lowers the loss scale.

        Returns:
            The columns of the log: `grad_norm`, the global norm before clipping, which is None in a
            skipped step, and `skipped` in such a step.
        """
        norm = self.trainer.step(lr)
        if self.dtype is torch.float16 and not math.isfinite(norm):
            return {"grad_norm": None, "skipped": True}
        return {"grad_norm": norm}

    def sum_over_ranks(self, losses: list[torch.Tensor], flag: float = 0.0) -> tuple[float, float]:
        """Return the sum of the losses and the sum of the flags of all ranks; collective.

        Both travel in one message. A flag tells the other ranks that this one was asked to stop.
        """
        total = torch.stack(losses).sum().float()  # float32 []
        sums = torch.stack([total, torch.tensor(flag, device=self.device)])  # float32 [2]
        if self.strategy.ranks > 1:
            torch.distributed.all_reduce(sums)
        return sums[0].item(), sums[1].item()

    @torch.no_grad()
    def evaluate(self, table: TokenTable) -> float:
        """Return the mean loss per supervised token over a whole table; collective."""
        ranks = self.strategy.ranks
        self.trainer.module.eval()
        total = torch.zeros((), device=self.device)  # float32 []
        # fit_bins takes no row over its capacity, and a budget that was halved may be below a row.
        bins = fit_bins(table.lengths, max(self.budget, int(table.lengths.max())))
        # A divided model needs every rank in each forward pass. Where fewer batches than ranks are
        # left, the remaining ranks repeat the last batch, which they do not count.
        for first in range(0, len(bins), ranks):
            index = first + self.rank
            rows = bins[min(index, len(bins) - 1)]
            # The call goes through the trainer: only the strategy's wrapper gathers divided
            # weights.
            loss = self.trainer(**self.make_batch(table, rows, bins[first : first + ranks]))
            total += loss if index < len(bins) else 0
        if ranks > 1:
            torch.distributed.all_reduce(total)
        return total.item() / int(table.supervised.sum())

    @torch.no_grad()
    def describe_non_finite(self, table: TokenTable, gradients: Gradients, step: int) -> str:
        """Name the examples whose loss is not finite, in an error message; collective.

        Each example of a micro-batch with such a loss is tried alone. One rank cannot try an
        example on a divided model, so the whole micro-batch is named there.

        Args:
            step: Number of the step, from 1.
        """
        suspects: list[int] = []
        for rows, loss in zip(gradients.batches, gradients.losses, strict=True):
            if not torch.isfinite(loss):
                suspects += rows.tolist()
        failing = []
        if not self.strategy.sharded:
            failing = [row for row in suspects if not self.is_finite_alone(table, row)]
        names = [table.names[row] for row in failing or suspects]
        certain: list[str] = []
        possible: list[str] = []
        # A rank whose losses are all finite takes part too, because gather is collective.
        for proven, names_of_rank in gather((bool(failing), names)):
            possible += names_of_rank
            if proven:
                certain += names_of_rank
        if certain:
            problem = "the loss is not finite at the examples"
        elif self.strategy.sharded:
            problem = "the loss is not finite in a batch of the examples"
        else:
            problem = (
                "the loss is not finite in a batch, but is finite for each of its examples alone:"
            )
        names = ", ".join((certain or possible)[:10])
        return f"step {step}: {problem} {names}; look at these rows, or lower training.lr"

    def is_finite_alone(self, table: TokenTable, row: int) -> bool:
        """Say whether the loss of one row is finite; not for a divided model."""
        batch = self.make_batch(table, np.array([row]))
        # Other ranks make no such call, so it must not go through the strategy's wrapper.
        return bool(torch.isfinite(self.built.loss_model(**batch)))
