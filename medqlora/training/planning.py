"""The second stage: rows, what a forecast decides, and the plan of all steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medqlora.batches.cache import (
    Prepared,
    load_plan,
    load_prepared,
    prepare_plan,
    save_prepared,
)
from medqlora.batches.collate import most_supervised
from medqlora.batches.pipeline import prepare
from medqlora.batches.plan import Plan, choose_packing, list_budgets
from medqlora.core.config import Config
from medqlora.core.config_loading import change
from medqlora.core.run_folder import open_run
from medqlora.training.checkpoints import Checkpoint, load_newest
from medqlora.training.memory.allocator import segments_expand
from medqlora.training.memory.estimate import forecast_plan
from medqlora.training.memory.planner import cost_of_attention, plan_step
from medqlora.training.memory.target import (
    StepPlan,
    TargetHardware,
    available_host,
    available_memory,
)
from medqlora.training.processes import ProcessError, agree_on_errors, gather, share_once
from medqlora.training.setup import Setup
from medqlora.training.strategies.launch import choose_storage


@dataclass(frozen=True)
class Decision:
    """Micro-batch and recomputation of a run, and the forecast that they follow from.

    max_tokens_per_batch is of one process; packed_tokens of the bins that steps are packed in,
    which do not depend on the number of processes. Without a forecast no_forecast says why there is
    none. Sizes are bytes.
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
        return change(
            config,
            "training",
            max_tokens_per_batch=self.max_tokens_per_batch,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def as_dict(self) -> dict[str, Any]:
        """What is known, for environment.json."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Planned:
    """What there is to train on, step by step.

    Args:
        config: with what the forecast decided.
        checkpoint: where a resumed run goes on; None at the beginning.
        damaged: warnings about checkpoints that were passed over.
    """

    config: Config
    prepared: Prepared
    plan: Plan
    plan_sha256: str
    decision: Decision
    checkpoint: Checkpoint | None
    damaged: list[str]


def plan_run(setup: Setup, show: Callable[[str], None]) -> Planned:
    """Rank 0 reads, cleans, tokenizes, decides what the configuration leaves to a forecast, and
    plans; the others map what it wrote. Then the run folder is opened.

    Args:
        show: is told each stage.

    Raises:
        AgreedError: on every rank, with what is wrong on any.
    """
    config = setup.config
    data = config.data
    memory = min(gather(available_memory(setup.device, setup.local_ranks)))  # of the fullest GPU
    kept: list[Prepared] = []

    def work(report: Callable[[str], None]) -> dict[str, Any]:
        prepared = prepare(config, setup.encoder, report)
        report("forecasting")
        decision = decide_step(setup, prepared, memory)
        report("planning")
        decided = decision.apply(config)
        ranks = setup.strategy.ranks
        _, name = prepare_plan(decided, prepared, ranks, decision.packed_tokens)
        kept.append(prepared)
        return {
            "prepared": save_prepared(data, prepared) if setup.strategy.ranks > 1 else "",
            "plan": name,
            "decision": asdict(decision),
        }

    shared = share_once(Path(data.cache_dir).expanduser(), work, show)
    decision = Decision(**shared["decision"])
    with agree_on_errors():
        if setup.rank == 0:
            open_run(setup.output_dir, config)
        prepared = kept[0] if kept else load_prepared(data, shared["prepared"])
        plan = load_plan(data, shared["plan"])
    checkpoint, damaged = find_checkpoint(setup)
    return Planned(
        config=decision.apply(config),
        prepared=prepared,
        plan=plan,
        plan_sha256=shared["plan"].removeprefix("plan-"),
        decision=decision,
        checkpoint=checkpoint,
        damaged=damaged,
    )


def find_checkpoint(setup: Setup) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, the same on every rank, and warnings about damaged ones."""
    checkpoint = None
    damaged: list[str] = []
    with agree_on_errors():
        if setup.resume:
            checkpoint, damaged = load_newest(setup.output_dir / "checkpoints")
    with agree_on_errors():
        steps = gather(checkpoint and checkpoint.state["step"])
        if len(set(steps)) > 1:
            raise ProcessError(
                f"ranks see different newest checkpoints (steps {steps}); --output_dir must be on a"
                " filesystem that all machines share"
            )
    return checkpoint, damaged


def decide_step(setup: Setup, prepared: Prepared, memory: int) -> Decision:
    """Micro-batch and recomputation by forecast, where the configuration says auto.

    A resumed run keeps the micro-batches that it began with, which its plan is made of.
    Recomputation changes no number and is decided for the machine at hand.
    """
    config = setup.config
    training = config.training
    if setup.begun_with and training.max_tokens_per_batch == "auto":
        config = change(config, "training", max_tokens_per_batch=setup.begun_with)
    ranks = setup.strategy.ranks
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
        found = forecast_recipe(setup, config, prepared, target)
        labelled = most_supervised(prepared.train, found.tokens)
        cost = cost_of_attention(config, setup.architecture, target, found, labelled)
    except Exception as error:  # A model's own code may raise anything on tensors without content.
        if "auto" in (training.max_tokens_per_batch, training.gradient_checkpointing):
            raise  # Nothing can be decided without a forecast.
        tokens = list_budgets(config.training, config.data.max_length, ranks)[0]
        return Decision(
            max_tokens_per_batch=tokens,
            gradient_checkpointing=training.gradient_checkpointing,
            packed_tokens=choose_packing(config.training, tokens, ranks),
            no_forecast=" ".join(str(error).split())[:200],
        )
    return Decision(
        max_tokens_per_batch=found.tokens,
        gradient_checkpointing=found.checkpointing,
        packed_tokens=choose_packing(config.training, found.tokens, ranks),
        predicted_peak_bytes=found.forecast.peak,
        predicted_needed_bytes=target.needs(found.forecast, found.short),
        predicted_host_bytes=found.forecast.host,
        memory_bytes=memory,
        layers=found.forecast.layers,
        recomputed_layers=found.forecast.recomputed,
        attention_cost_bytes=cost,
    )


def forecast_recipe(
    setup: Setup, config: Config, prepared: Prepared, target: TargetHardware
) -> StepPlan:
    """The plan of what is auto; where nothing is, the forecast of what the configuration says."""
    training = config.training
    checkpointing = training.gradient_checkpointing
    if "auto" in (training.max_tokens_per_batch, checkpointing):
        return plan_step(
            config,
            setup.architecture,
            target,
            lambda tokens: most_supervised(prepared.train, tokens),
        )
    tokens = list_budgets(training, config.data.max_length, setup.strategy.ranks)[0]
    labelled = most_supervised(prepared.train, tokens)
    return forecast_plan(config, setup.architecture, target, tokens, checkpointing, labelled)
