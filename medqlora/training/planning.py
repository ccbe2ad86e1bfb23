"""The second stage of a training: prepare the rows, decide the micro-batch, and plan all steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medqlora.batches.budgets import choose_packing, list_budgets
from medqlora.batches.cache import (
    Prepared,
    load_plan,
    load_prepared,
    prepare_plan,
    save_prepared,
    use_cache,
)
from medqlora.batches.collate import most_supervised
from medqlora.batches.pipeline import prepare
from medqlora.batches.plan import Plan
from medqlora.core.config import Config
from medqlora.core.config_loading import change
from medqlora.core.environment import read_commit, read_versions
from medqlora.core.errors import UserError
from medqlora.core.run_folder import open_run
from medqlora.core.run_origin import ORIGIN, describe_changes, find_changes
from medqlora.model.identity import hash_base, resolve_base
from medqlora.model.initial_adapter import describe_initial
from medqlora.training.checkpoints import Checkpoint, load_newest
from medqlora.training.memory.allocator import segments_expand
from medqlora.training.memory.estimate import forecast_plan
from medqlora.training.memory.planner import check_unavoidable, cost_of_attention, plan_step
from medqlora.training.memory.target import (
    StepPlan,
    TargetHardware,
    available_host,
    available_memory,
)
from medqlora.training.memory.tracker import ForecastError
from medqlora.training.processes import ProcessError, agree_on_errors, gather, share_once
from medqlora.training.row_order import (
    describe_order,
    find_losses,
    find_unseen,
    hash_losses,
    write_losses,
)
from medqlora.training.setup import Setup
from medqlora.training.strategies.launch import choose_storage


@dataclass(frozen=True)
class Decision:
    """Micro-batch and recomputation of a run, and the memory forecast that they follow from.

    environment.json holds these fields under `step_plan`. A field that is unknown is None.

    Args:
        max_tokens_per_batch: Tokens of one micro-batch of one process.
        gradient_checkpointing: Value of training.gradient_checkpointing, never `auto`.
        packed_tokens: Tokens of the bins that rows are packed into. They do not depend on the
            number of processes, so a step has the same rows for any number of them.
        no_forecast: Why there is no forecast; None if there is one.
        predicted_peak_bytes: Highest sum of live tensors on one GPU.
        predicted_needed_bytes: The peak with what the GPU's allocator reserves beside it.
        predicted_host_bytes: Pinned host memory for offloaded layer inputs.
        memory_bytes: Memory that one process may use on the fullest GPU.
        layers: Number of decoder layers.
        recomputed_layers: Number of layers whose activations are computed again.
        attention_cost_bytes: Peak memory beyond that of the variable-length attention kernel.
    """

    max_tokens_per_batch: int
    gradient_checkpointing: str
    packed_tokens: int
    no_forecast: str | None = None
    predicted_peak_bytes: int | None = None
    predicted_needed_bytes: int | None = None
    predicted_host_bytes: int | None = None
    memory_bytes: int | None = None
    layers: int | None = None
    recomputed_layers: int | None = None
    attention_cost_bytes: int | None = None

    def apply(self, config: Config) -> Config:
        """Return the configuration with the decided values in place of `auto`."""
        return change(
            config,
            "training",
            max_tokens_per_batch=self.max_tokens_per_batch,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that are known, for environment.json."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Planned:
    """The rows of a run and the plan of its steps.

    Args:
        config: The configuration with the decision applied.
        prepared: The tokenized rows, the test questions, and the list of removed rows.
        plan: The rows of every micro-batch of every step.
        plan_sha256: Hash of everything that the plan follows from.
        decision: Micro-batch and recomputation.
        order: The order of the rows of an epoch, with the keys that environment.json has for it.
        checkpoint: The checkpoint that a resumed run continues from; None for a new run.
        warnings: What the user should know of damaged checkpoints that were passed over, and of
            what is otherwise than when a resumed run began.
        hashes: The hashes of data, prompts and base, by the keys of run_origin.MEANINGS; on rank 0
            alone, as is `origin`.
        origin: The content of origin.json.
    """

    config: Config
    prepared: Prepared
    plan: Plan
    plan_sha256: str
    decision: Decision
    order: dict[str, Any]
    checkpoint: Checkpoint | None
    warnings: list[str]
    hashes: dict[str, str]
    origin: dict[str, Any]


def plan_run(setup: Setup, show: Callable[[str], None]) -> Planned:
    """Prepare the rows, decide what the configuration leaves to a forecast, and plan all steps.

    Rank 0 does the work. The other ranks map the files that it wrote into memory. Afterwards rank 0
    opens the run folder.

    Args:
        show: Receives a text when a stage of the work begins.

    Raises:
        AgreedError: A rank met an error of the user; every rank raises it.
    """
    config = setup.config
    data = config.data
    # All ranks run the same micro-batches, so the fullest GPU decides for all of them.
    memory = min(gather(available_memory(setup.device, setup.local_ranks)))
    prepared_here: list[Prepared] = []  # Rank 0 need not read its own rows back from the cache.
    losses: np.ndarray | None = None  # The base's loss of each row, on rank 0 alone.

    def work(report: Callable[[str], None]) -> dict[str, Any]:
        nonlocal losses
        prepared = prepare(config, setup.encoder, report)
        report("forecasting")
        decision = decide_step(setup, prepared, memory)
        if data.order == "easy_to_hard":
            losses = find_losses(setup, prepared, report)
        report("planning")
        decided = decision.apply(config)
        ranks = setup.strategy.ranks
        # Only the plan's name travels; every rank maps the plan itself from the cache.
        _, name = prepare_plan(decided, prepared, ranks, decision.packed_tokens, losses)
        prepared_here.append(prepared)
        return {
            # A single process keeps its rows in memory and needs no copy on disk.
            "prepared": save_prepared(data, prepared) if setup.strategy.ranks > 1 else "",
            "plan": name,
            "decision": asdict(decision),
            "order": describe_order(config, prepared, losses),
        }

    cache = Path(data.cache_dir).expanduser()
    # Rank 0 alone writes to the cache.
    with use_cache(cache) if setup.rank == 0 else nullcontext():
        shared = share_once(cache, work, show)
    decision = Decision(**shared["decision"])
    with agree_on_errors():
        prepared = prepared_here[0] if prepared_here else load_prepared(data, shared["prepared"])
        plan = load_plan(data, shared["plan"])
    checkpoint, warnings = find_checkpoint(setup)
    origin = {}
    hashes = {}
    with agree_on_errors():
        if setup.rank == 0:
            done = checkpoint.state["step"] if checkpoint is not None else 0
            base = resolve_base(config.model.base, config.model.revision)
            setup.method.check_base(base, setup.architecture)
            hashes = {
                "base_files_sha256": hash_base(base),
                **prepared.hashes,
                **hash_losses(losses),
                "steps_sha256": plan.hash_steps(),
            }
            origin, changes = trace_origin(setup, hashes, decision, done)
            warnings += changes
            # The run is opened only now, so a mistake in the data leaves no folder behind.
            open_run(setup.output_dir, config, origin)
            write_losses(setup.output_dir, prepared.train, losses)
    return Planned(
        config=decision.apply(config),
        prepared=prepared,
        plan=plan,
        plan_sha256=shared["plan"].removeprefix("plan-"),
        decision=decision,
        order=shared["order"],
        checkpoint=checkpoint,
        warnings=setup.warnings + warnings + find_unseen(config, plan),
        hashes=hashes,
        origin=origin,
    )


def trace_origin(
    setup: Setup, hashes: dict[str, str], decision: Decision, done: int
) -> tuple[dict[str, Any], list[str]]:
    """Compare this start with the first one of the run.

    Args:
        hashes: The hashes of this start, by the keys of run_origin.MEANINGS.
        done: Steps that were taken before this start.

    Returns:
        The content of origin.json: what the run began with, and the list of resumptions with this
        one; and warnings about what has changed.

    Raises:
        RunError: The remaining steps would not be those of the run.
    """
    versions = {**read_versions(), "commit": read_commit()}
    first = {
        **hashes,
        "versions": versions,
        "packed_tokens": decision.packed_tokens,
        "init_adapter": find_initial(setup),
        "resumptions": [],
    }
    if setup.origin:
        changes = find_changes(setup.origin, hashes, versions)
        warnings = describe_changes(changes, setup.origin, hashes, setup.accept_changes)
        resumption = {"step": done, "changed": changes.hashes, "versions": changes.versions}
        resumptions = [*setup.origin.get("resumptions", []), resumption]
        # What the run began with wins over what is found now, for this start and the next ones.
        return {**first, **setup.origin, "resumptions": resumptions}, warnings
    if done:
        # The record was damaged or missing, and --resume_changed let that pass.
        resumption = {"step": done, "changed": [ORIGIN], "versions": {}}
        warning = f"--resume_changed: what the run began with is not known ({ORIGIN})"
        return {**first, "resumptions": [resumption]}, [warning]
    return first, []


def find_initial(setup: Setup) -> dict[str, Any] | None:
    """Return what is recorded of lora.init_adapter; None for a training that begins without it."""
    lora = setup.config.lora
    if lora.init_adapter is None:
        return None
    # The folder of a resumed run's initial adapter may be gone or changed since.
    return setup.origin.get("init_adapter") or describe_initial(lora)


def find_checkpoint(setup: Setup) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest complete checkpoint on every rank.

    Returns:
        The checkpoint (None for a new run), and warnings about damaged ones.

    Raises:
        AgreedError: The ranks see different checkpoints.
    """
    checkpoint = None
    warnings: list[str] = []
    with agree_on_errors():
        if setup.resume:
            folder = setup.output_dir / "checkpoints"
            checkpoint, warnings = load_newest(folder, setup.method.weights_file)
    # gather may stand only where no rank can fail before it, so comparing has a block of its own.
    with agree_on_errors():
        steps = gather(checkpoint and checkpoint.state["step"])
        if len(set(steps)) > 1:
            raise ProcessError(
                f"the ranks see different newest checkpoints (steps {steps}); --output_dir must be"
                " on a filesystem that all machines share"
            )
    return checkpoint, warnings


def decide_step(setup: Setup, prepared: Prepared, memory: int) -> Decision:
    """Decide micro-batch and recomputation from a memory forecast where the configuration says
    `auto`.

    A resumed run keeps the bins that it was packed into, because its plan consists of them.
    Recomputation changes no number, so it is decided again for the present machine.

    Args:
        memory: Bytes that one process may use on its GPU or CPU.

    Raises:
        ForecastError: Something is `auto` and nothing fits.
    """
    ranks = setup.strategy.ranks
    config = keep_bins(setup.config, setup.resumed_packed_tokens, ranks)
    # This section is as the user wrote it: keep_bins may have replaced an `auto` in `config`.
    training = setup.config.training
    target = TargetHardware(
        setup.device,
        setup.dtype,
        choose_storage(setup.strategy, config.model.quantization, setup.dtype),
        setup.strategy,
        memory,
        available_host(setup.local_ranks),
        expandable=segments_expand(),
    )
    try:
        step = forecast_recipe(setup, config, prepared, target)
        labelled = most_supervised(prepared.train, step.tokens)
        attention_cost = cost_of_attention(config, setup.architecture, target, step, labelled)
    # The forecast runs the model's own code on tensors without content, and that code may raise any
    # exception there. Going on is right where nothing depends on the forecast: the training itself
    # uses real tensors. Where a value is `auto`, nothing can be decided and the error is raised.
    except Exception as error:
        if "auto" in (training.max_tokens_per_batch, training.gradient_checkpointing):
            if isinstance(error, UserError):
                raise
            raise ForecastError(
                f"the memory of {setup.architecture.model_type} cannot be forecast"
                f" ({type(error).__name__}: {' '.join(str(error).split())[:160]}); give"
                " training.max_tokens_per_batch and training.gradient_checkpointing values"
            ) from error
        # A given max_tokens_per_batch leaves one size.
        tokens = list_budgets(config.training, config.data.max_length, ranks)[0]
        return Decision(
            max_tokens_per_batch=tokens,
            gradient_checkpointing=training.gradient_checkpointing,
            packed_tokens=choose_packing(config.training, tokens, ranks),
            no_forecast=" ".join(str(error).split())[:200],
        )
    check_unavoidable(step.forecast, target)
    return Decision(
        max_tokens_per_batch=step.tokens,
        gradient_checkpointing=step.checkpointing,
        packed_tokens=choose_packing(config.training, step.tokens, ranks),
        predicted_peak_bytes=step.forecast.peak,
        predicted_needed_bytes=target.needs(step.forecast, step.short),
        predicted_host_bytes=step.forecast.host,
        memory_bytes=memory,
        layers=step.forecast.layers,
        recomputed_layers=step.forecast.recomputed,
        attention_cost_bytes=attention_cost,
    )


def keep_bins(config: Config, packed_tokens: int | None, ranks: int) -> Config:
    """Fix the micro-batch of a resumed run to the bins that it was packed into.

    Where the ranks cannot share a step evenly, the whole step is one bin and the forecast decides
    how its rows are spread. There the configuration stays as it is: the forecast decides again, and
    on the same machine as before.

    Args:
        packed_tokens: Tokens of the bins; None for a run that has not begun, or whose configuration
            gives the micro-batch.
    """
    training = config.training
    if packed_tokens is None or training.max_tokens_per_batch != "auto":
        return config
    # This is the condition under which choose_packing takes the whole step as one bin. Both must
    # agree, or a resumed run would be packed in other bins than its checkpoint was trained on.
    largest = list_budgets(training, config.data.max_length, ranks)[0]
    spread = training.global_batch_tokens % (largest * ranks) != 0
    if spread and packed_tokens == training.global_batch_tokens:
        return config
    return change(config, "training", max_tokens_per_batch=packed_tokens)


def forecast_recipe(
    setup: Setup, config: Config, prepared: Prepared, target: TargetHardware
) -> StepPlan:
    """Choose the values that are `auto`, or forecast the configured step where none is."""
    training = config.training
    checkpointing = training.gradient_checkpointing
    if "auto" in (training.max_tokens_per_batch, checkpointing):
        return plan_step(
            config,
            setup.architecture,
            target,
            lambda tokens: most_supervised(prepared.train, tokens),
        )
    # Nothing is `auto` here, so there is one size.
    tokens = list_budgets(training, config.data.max_length, setup.strategy.ranks)[0]
    # This is an upper bound, so the forecast holds for every micro-batch of the run.
    labelled = most_supervised(prepared.train, tokens)
    return forecast_plan(config, setup.architecture, target, tokens, checkpointing, labelled)
