"""Micro-batch and recomputation by forecast: the fastest that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PretrainedConfig

from medqlora.batches.plan import list_budgets
from medqlora.core.config import Config
from medqlora.core.config_loading import change
from medqlora.training.memory.estimate import Estimate, forecast_plan, time_per_token
from medqlora.training.memory.longest import least_memory, longest_sequence
from medqlora.training.memory.target import StepPlan, TargetHardware
from medqlora.training.memory.tracker import GIB, ForecastError


def plan_step(
    config: Config,
    architecture: PretrainedConfig,
    target: TargetHardware,
    labelled_of: Callable[[int], int],
) -> StepPlan:
    """Decide what of max_tokens_per_batch and gradient_checkpointing is auto: of what fits, the
    fastest by time_per_token, which is few recomputed layers first, then large micro-batches; on a
    GPU with offloaded layer inputs where that is faster than smaller micro-batches, or alone fits.
    labelled_of: tokens of a micro-batch -> most that are supervised.

    Raises:
        ForecastError: nothing fits (says what would), or the architecture cannot be followed.
        PlanError: the global batch cannot be divided.
    """
    training = config.training
    longest = config.data.max_length
    sizes = list_budgets(training, longest, target.strategy.ranks)
    if training.gradient_checkpointing != "auto" and training.max_tokens_per_batch != "auto":
        return forecast_plan(
            config,
            architecture,
            target,
            sizes[0],
            training.gradient_checkpointing,
            labelled_of(sizes[0]),
        )
    modes = (
        list_checkpointing(architecture, target.device)
        if training.gradient_checkpointing == "auto"
        else {training.gradient_checkpointing: (0.0, False)}
    )
    easiest = forecast_plan(
        config, architecture, target, sizes[0], next(iter(modes)), labelled_of(sizes[0])
    )
    # the largest micro-batch, nothing recomputed that need not be
    if target.holds(easiest.forecast):
        return easiest
    if easiest.forecast.loaded > target.memory:
        raise ForecastError(
            f"memory: the base alone needs {easiest.forecast.loaded / GIB:.2f} GiB,"
            f" {target.memory / GIB:.2f} GiB may be used; use a smaller model"
        )
    estimate = Estimate(
        config,
        architecture,
        target,
        (min(sizes[-1], max(1, sizes[0] // 2)), sizes[0]),
        labelled_of,
    )
    options = [
        (time_per_token(size, *costs), size, mode)
        for size in sizes
        for mode, costs in modes.items()
    ]
    fastest = [option[1:] for option in sorted(options, key=lambda option: option[0])]
    passed_over = []
    for size, mode in fastest:
        if len(modes) > 1 and estimate.needs(size, mode) > target.memory:
            if estimate.peak(size, mode) <= target.memory:
                passed_over.append((size, mode))
            continue
        plan = forecast_plan(config, architecture, target, size, mode, labelled_of(size))
        if target.holds(plan.forecast):
            return plan
        estimate.learn(plan)
    # The slack differs from plan to plan, so one of them may fit after all.
    for size, mode in passed_over:
        plan = forecast_plan(config, architecture, target, size, mode, labelled_of(size))
        if target.holds(plan.forecast):
            return plan
    last = forecast_plan(
        config, architecture, target, sizes[-1], list(modes)[-1], labelled_of(sizes[-1])
    )
    smallest = last.forecast
    if target.holds(smallest, short=True):
        return replace(last, short=True)
    host = (
        f" and {smallest.host / GIB:.2f} of {target.host / GIB:.2f} GiB that may be pinned in the"
        " host's memory"
        if smallest.host > target.host
        else ""
    )
    raise ForecastError(
        f"memory: {sizes[-1]:,} tokens per micro-batch with gradient_checkpointing"
        f" {list(modes)[-1]} need {target.needs(smallest, short=True) / GIB:.2f} GiB,"
        f" {target.memory / GIB:.2f} GiB may be used{host};"
        f" {suggest(config, architecture, target, labelled_of)}"
    )


def cost_of_attention(
    config: Config,
    architecture: PretrainedConfig,
    target: TargetHardware,
    plan: StepPlan,
    labelled: int,
) -> int | None:
    """Bytes by which the peak of a plan is higher than with torch's variable-length kernel; None
    where that runs, and on a CPU.
    """
    if (
        target.device.type == "cpu"
        or target.choose_attention(config, architecture).backend != "grouped"
    ):
        return None
    with_kernel = forecast_plan(
        config, architecture, target, plan.tokens, plan.checkpointing, labelled, backend="varlen"
    )
    return plan.forecast.peak - with_kernel.forecast.peak


def list_checkpointing(
    architecture: PretrainedConfig, device: torch.device
) -> dict[str, tuple[float, bool]]:
    """Values of training.gradient_checkpointing, most memory first -> part of the layers that is
    recomputed, whether inputs are offloaded. The first layers are recomputed: their turn in the
    backward pass comes when the others' activations are gone.
    """
    layers = architecture.get_text_config().num_hidden_layers
    modes = (
        {"none": (0.0, False)}
        | {f"first_{count}": (count / layers, False) for count in range(1, layers)}
        | {"full": (1.0, False)}
    )
    return modes | ({"offload": (1.0, True)} if least_memory(device) == "offload" else {})


def suggest(
    config: Config,
    architecture: PretrainedConfig,
    target: TargetHardware,
    labelled_of: Callable[[int], int],
) -> str:
    """What would fit, for an error: other recomputation and micro-batches, else shorter rows."""
    free = change(config, "training", max_tokens_per_batch="auto", gradient_checkpointing="auto")
    tokens = list_budgets(free.training, 1, target.strategy.ranks)
    mode = least_memory(target.device)
    hold = [size for size in tokens if size >= config.data.max_length]
    if hold and target.holds(
        forecast_plan(config, architecture, target, hold[-1], mode, labelled_of(hold[-1])).forecast,
        short=True,
    ):
        return (
            f"{hold[-1]:,} tokens with gradient_checkpointing {mode} would fit: set"
            " training.max_tokens_per_batch and training.gradient_checkpointing to auto"
        )
    length = longest_sequence(config, architecture, target, labelled_of)
    fitting = [size for size in tokens if size <= (length or 0)]
    if not fitting:
        return (
            "no length fits; use a smaller model, a smaller lora.r or training.optimizer"
            " paged_adamw_8bit"
        )
    return (
        f"rows of {fitting[0]:,} tokens would fit: set data.max_length to {fitting[0]} or less,"
        " training.max_tokens_per_batch and training.gradient_checkpointing to auto"
    )
