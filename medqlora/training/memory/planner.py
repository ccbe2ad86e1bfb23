"""The choice of micro-batch and recomputation: the fastest combination that fits the memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PretrainedConfig

from medqlora.batches.budgets import list_budgets
from medqlora.core.config import Config
from medqlora.core.config_loading import change
from medqlora.training.memory.estimate import Estimate, forecast_plan, time_per_token
from medqlora.training.memory.longest import least_memory, longest_sequence
from medqlora.training.memory.target import StepPlan, TargetHardware
from medqlora.training.memory.tracker import GIB, Forecast, ForecastError


def plan_step(
    config: Config,
    architecture: PretrainedConfig,
    target: TargetHardware,
    labelled_of: Callable[[int], int],
) -> StepPlan:
    """Decide max_tokens_per_batch and gradient_checkpointing where the configuration says `auto`.

    Of the combinations that fit, the one with the least time_per_token is taken. Few recomputed
    layers count most for that time, then large micro-batches. On a GPU, layer inputs are offloaded
    where that is faster than smaller micro-batches, or where nothing else fits.

    Args:
        labelled_of: Takes the tokens of a micro-batch and returns the most that can be supervised.

    Returns:
        The decision and its forecast. If nothing is `auto`, it is the forecast of the configured
        step, whether it fits or not.

    Raises:
        ForecastError: Nothing fits (the message says what would), or the forecast cannot follow the
            architecture.
        PlanError: The global batch cannot be divided.
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
    if training.gradient_checkpointing == "auto":
        # Their order matters: the first is the fastest, and the last needs the least memory.
        modes = list_checkpointing(architecture, target.device)
    else:
        modes = {training.gradient_checkpointing: (0.0, False)}
    # The fastest combination is the largest micro-batch with the least recomputation.
    fastest = forecast_plan(
        config, architecture, target, sizes[0], next(iter(modes)), labelled_of(sizes[0])
    )
    if target.holds(fastest.forecast):
        return fastest
    # Neither smaller micro-batches nor recomputation make the loaded base smaller.
    if fastest.forecast.loaded > target.memory:
        raise ForecastError(
            f"memory: the base alone needs {fastest.forecast.loaded / GIB:.2f} GiB,"
            f" {target.memory / GIB:.2f} GiB may be used; use a smaller model"
        )
    check_unavoidable(fastest.forecast, target)
    estimated_sizes = (min(sizes[-1], max(1, sizes[0] // 2)), sizes[0])
    estimate = Estimate(config, architecture, target, estimated_sizes, labelled_of)
    options = []
    for size in sizes:
        for mode, (recomputed, offloaded) in modes.items():
            options.append((time_per_token(size, recomputed, offloaded), size, mode))
    options.sort(key=lambda option: option[0])
    passed_over = []
    for _, size, mode in options:
        # A given recomputation leaves few options. Each of them gets a forecast of all layers,
        # which is slower than an estimate and exact.
        if len(modes) > 1 and estimate.needs(size, mode) > target.memory:
            if estimate.peak(size, mode) <= target.memory:
                passed_over.append((size, mode))
            continue
        plan = forecast_plan(config, architecture, target, size, mode, labelled_of(size))
        if target.holds(plan.forecast):
            return plan
        estimate.learn(plan)
    # The ratio of reserve to peak differs from plan to plan, so a plan that was passed over because
    # of it may still fit.
    for size, mode in passed_over:
        plan = forecast_plan(config, architecture, target, size, mode, labelled_of(size))
        if target.holds(plan.forecast):
            return plan
    # The last resort is a step in which the allocator returns memory, which takes time.
    last = forecast_plan(
        config, architecture, target, sizes[-1], list(modes)[-1], labelled_of(sizes[-1])
    )
    smallest = last.forecast
    if target.holds(smallest, short=True):
        return replace(last, short=True)
    host = ""
    if smallest.host > target.host:
        host = (
            f" and {smallest.host / GIB:.2f} of {target.host / GIB:.2f} GiB that may be pinned in"
            " the host's memory"
        )
    raise ForecastError(
        f"memory: {sizes[-1]:,} tokens per micro-batch with gradient_checkpointing"
        f" {list(modes)[-1]} need {target.needs(smallest, short=True) / GIB:.2f} GiB,"
        f" {target.memory / GIB:.2f} GiB may be used{host};"
        f" {suggest(config, architecture, target, labelled_of)}"
    )


def check_unavoidable(forecast: Forecast, target: TargetHardware) -> None:
    """Refuse full fine-tuning where its weights and their states alone do not fit.

    Raises:
        ForecastError: The message says what needs less.
    """
    if not forecast.full or forecast.unavoidable <= target.memory:
        return
    raise ForecastError(
        f"memory: training.method full needs {forecast.unavoidable / GIB:.2f} GiB for"
        f" {forecast.trainable:,} weights, their float32 masters, gradients and optimizer states,"
        f" {target.memory / GIB:.2f} GiB may be used; train an adapter (training.method adapter),"
        " set training.optimizer to adamw_8bit, or divide the states over more GPUs"
        " (accelerate_configs/zero3.yaml or fsdp2.yaml)"
    )


def cost_of_attention(
    config: Config,
    architecture: PretrainedConfig,
    target: TargetHardware,
    plan: StepPlan,
    labelled: int,
) -> int | None:
    """Return how many bytes the attention backend `grouped` adds to the peak of a plan.

    The comparison is with torch's variable-length kernel. The result is None where the plan uses
    another backend than `grouped`, and on a CPU.

    Args:
        labelled: Supervised tokens of a micro-batch.
    """
    if (
        target.device.type == "cpu"
        or target.choose_attention(config, architecture).backend != "grouped"
    ):
        return None
    # A backend that is named is forecast without being asked whether it runs on this GPU.
    with_kernel = forecast_plan(
        config, architecture, target, plan.tokens, plan.checkpointing, labelled, backend="varlen"
    )
    return plan.forecast.peak - with_kernel.forecast.peak


def list_checkpointing(
    architecture: PretrainedConfig, device: torch.device
) -> dict[str, tuple[float, bool]]:
    """List the values of training.gradient_checkpointing, from most memory to least.

    It is the first layers that are recomputed. The backward pass reaches them last, when the
    activations of the other layers are already freed.

    Returns:
        For each value, the fraction of the layers that is recomputed, and whether layer inputs are
        offloaded.
    """
    layers = architecture.get_text_config().num_hidden_layers
    modes = {"none": (0.0, False)}
    for count in range(1, layers):
        modes[f"first_{count}"] = (count / layers, False)
    modes["full"] = (1.0, False)
    if least_memory(device) == "offload":
        modes["offload"] = (1.0, True)
    return modes


def suggest(
    config: Config,
    architecture: PretrainedConfig,
    target: TargetHardware,
    labelled_of: Callable[[int], int],
) -> str:
    """Say in an error message what would fit: another micro-batch, or else shorter rows."""
    free = change(config, "training", max_tokens_per_batch="auto", gradient_checkpointing="auto")
    # A row of 1 token lets list_budgets return also the sizes that hold no row of data.max_length.
    sizes = list_budgets(free.training, 1, target.strategy.ranks)
    mode = least_memory(target.device)
    holding_a_row = [size for size in sizes if size >= config.data.max_length]
    if holding_a_row:
        # The sizes come largest first.
        smallest = holding_a_row[-1]
        labelled = labelled_of(smallest)
        plan = forecast_plan(config, architecture, target, smallest, mode, labelled)
        if target.holds(plan.forecast, short=True):
            return (
                f"{smallest:,} tokens with gradient_checkpointing {mode} would fit: set"
                " training.max_tokens_per_batch and training.gradient_checkpointing to auto"
            )
    length = longest_sequence(config, architecture, target, labelled_of)
    fitting = [size for size in sizes if size <= (length or 0)]
    if not fitting and config.training.method == "full":
        return "no length fits; use a smaller model, more GPUs, or train an adapter"
    if not fitting:
        return (
            "no length fits; use a smaller model, a smaller lora.r or training.optimizer"
            " paged_adamw_8bit"
        )
    return (
        f"rows of {fitting[0]:,} tokens would fit: set data.max_length to {fitting[0]} or less,"
        " training.max_tokens_per_batch and training.gradient_checkpointing to auto"
    )
