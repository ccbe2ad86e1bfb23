"""Estimates of a whole step, computed from forecasts of a few layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

from transformers import PretrainedConfig

from medqlora.core.config import Config
from medqlora.core.config_loading import change
from medqlora.data.formats.registry import find_format
from medqlora.training.memory.forecast import forecast_step
from medqlora.training.memory.sharding import divide
from medqlora.training.memory.target import StepPlan, TargetHardware
from medqlora.training.memory.tracker import Batch

# time_per_token explains both numbers.
OVERHEAD_TOKENS = 250
OFFLOAD_TIME = 0.2


def assume_labelled(config: Config, tokens: int) -> int:
    """Assume the number of supervised tokens in a micro-batch of `tokens`, without its data.

    A letter with its end token makes 2 of 64 tokens supervised, a letter with its text a quarter.
    For other completions, and for data without letters, all tokens are assumed to be supervised.
    """
    fraction = {"letter": 2 / 64, "letter_text": 1 / 4}.get(config.data.completion, 1.0)
    if any(find_format(entry.format).scoring != "letters" for entry in config.data.train):
        fraction = 1.0
    return max(1, int(fraction * tokens))


def make_batch(config: Config, tokens: int, labelled: int, accumulated: bool) -> Batch:
    """Make the full micro-batch of a forecast, of the longest rows that data.max_length allows.

    It has a single row where rows are not packed.

    Args:
        tokens: Tokens of the micro-batch.
        labelled: Supervised tokens of the micro-batch.
        accumulated: Whether gradients of an earlier micro-batch are there.
    """
    longest = min(config.data.max_length, tokens)
    lengths = [longest]
    if config.data.packing:
        lengths = [longest] * (tokens // longest)
        # A shorter row fills the rest, because the largest micro-batch is the one to forecast.
        if tokens % longest:
            lengths.append(tokens % longest)
    return Batch(tuple(lengths), min(labelled, sum(lengths)), accumulated)


def time_per_token(tokens: int, recomputed: float, offloaded: bool = False) -> float:
    """Estimate the relative training time per token.

    The time is 1 where all layers are recomputed and micro-batches are infinitely long. It is
    computed, not measured, from these assumptions:

    - A weight takes 4 operations per token without recomputation and 6 with it, because frozen
      weights need no gradient.
    - Each pass over a micro-batch dequantizes the base, which moves about 2.5 bytes per weight. On
      an H100, three passes take as long for that as for computing OVERHEAD_TOKENS tokens (22 % of
      the time at 1,024 tokens, 5.5 % at 4,096).
    - Offloading moves 16 KiB per token and layer of an 8B model over PCIe. At 25 GB/s that takes
      OFFLOAD_TIME of the time of an H100.

    Args:
        tokens: Tokens of a micro-batch.
        recomputed: Fraction of the layers that are recomputed.
        offloaded: Whether layer inputs wait in the host's memory.
    """
    computing = (4 + 2 * recomputed) / 6
    dequantizing = (2 + recomputed) / 3 * OVERHEAD_TOKENS / tokens
    return computing + dequantizing + OFFLOAD_TIME * offloaded


def forecast_plan(
    config: Config,
    architecture: PretrainedConfig,
    target: TargetHardware,
    tokens: int,
    checkpointing: str,
    labelled: int,
    backend: str | None = None,
) -> StepPlan:
    """Forecast the memory of one process for a given micro-batch and recomputation.

    Args:
        tokens: Tokens of a micro-batch.
        checkpointing: Value of training.gradient_checkpointing, not `auto`.
        labelled: Supervised tokens of a micro-batch.
        backend: The attention backend; None chooses the one that the target hardware uses.

    Raises:
        UnknownForecast: The forecast cannot follow the architecture or the attention backend.
        AttentionError: The attention backend does not run on the target hardware.
    """
    backend = backend or target.choose_attention(config, architecture).backend
    # From the second micro-batch of a step on, gradients are there while activations are highest.
    accumulated = config.training.global_batch_tokens > tokens * target.strategy.ranks
    batch = make_batch(config, tokens, labelled, accumulated)
    chosen = change(
        config, "training", max_tokens_per_batch=tokens, gradient_checkpointing=checkpointing
    )
    forecast = forecast_step(
        chosen, architecture, target.device, target.dtype, target.storage, batch, backend=backend
    )
    return StepPlan(tokens, checkpointing, divide(forecast, target.strategy))


def with_layers(architecture: PretrainedConfig, count: int) -> PretrainedConfig:
    """Return the same architecture with `count` layers."""
    small = copy.deepcopy(architecture)
    text = small.get_text_config()
    text.num_hidden_layers = count
    if isinstance(getattr(text, "layer_types", None), list):
        # transformers demands one entry per layer. The pattern begins as in the whole model.
        text.layer_types = (text.layer_types * count)[:count]
    return small


class Estimate:
    """Estimates of peak bytes for any micro-batch and number of recomputed layers.

    They are interpolated from forecasts of 2 and 4 layers at two sizes of micro-batch. This is
    right because all layers (or all pairs of alternating layers) need the same memory, and because
    the memory of a batch grows linearly with its tokens.
    """

    def __init__(
        self,
        config: Config,
        architecture: PretrainedConfig,
        target: TargetHardware,
        sizes: tuple[int, int],
        labelled_of: Callable[[int], int],
    ):
        """Make an estimate for one recipe and hardware.

        Args:
            sizes: The two sizes of micro-batch in tokens, the smaller one first.
            labelled_of: Takes the tokens of a micro-batch and returns its supervised tokens.
        """
        self.config = config
        self.architecture = architecture
        self.target = target
        self.sizes = sizes
        self.labelled_of = labelled_of
        self.layers = architecture.get_text_config().num_hidden_layers
        # (tokens, mode) -> bytes outside the layers, bytes of each layer
        self.costs: dict[tuple[int, str], tuple[float, float]] = {}
        # The least ratio of reserve to peak in the forecasts of all layers so far.
        self.reserve_ratio: float | None = None

    def forecast_costs(self, tokens: int, mode: str) -> tuple[float, float]:
        """Return the bytes outside the layers and the bytes of each layer."""
        if (tokens, mode) not in self.costs:
            peaks = []
            for count in (2, 4):
                architecture = with_layers(self.architecture, count)
                labelled = self.labelled_of(tokens)
                plan = forecast_plan(self.config, architecture, self.target, tokens, mode, labelled)
                peaks.append(plan.forecast.peak)
            # With c bytes outside and p per layer, two = c + 2 p and four = c + 4 p.
            two, four = peaks
            self.costs[tokens, mode] = (two - (four - two), (four - two) / 2)
        return self.costs[tokens, mode]

    def needs(self, tokens: int, mode: str) -> float:
        """Return the bytes that the allocator reserves at least."""
        return (self.reserve_ratio or 1.0) * self.peak(tokens, mode)

    def learn(self, plan: StepPlan) -> None:
        """Take the ratio of reserve to peak from a forecast of all layers."""
        ratio = self.target.needs(plan.forecast) / plan.forecast.peak
        # The least ratio rules out the fewest plans. Those that it lets pass are forecast with all
        # layers before one is taken.
        self.reserve_ratio = ratio if self.reserve_ratio is None else min(self.reserve_ratio, ratio)

    def peak(self, tokens: int, mode: str) -> float:
        """Return the peak bytes for micro-batches of any size.

        Args:
            tokens: Tokens of a micro-batch.
            mode: Value of training.gradient_checkpointing.
        """
        smaller, larger = self.sizes
        low = self.peak_at(smaller, mode)
        high = self.peak_at(larger, mode)
        return low + (high - low) * (tokens - smaller) / max(1, larger - smaller)

    def peak_at(self, size: int, mode: str) -> float:
        """Return the peak bytes for micro-batches of `size` tokens, one of the two sizes."""
        if not mode.startswith("first_"):
            outside, per_layer = self.forecast_costs(size, mode)
            return outside + self.layers * per_layer
        recomputed = int(mode.removeprefix("first_"))
        outside, per_kept_layer = self.forecast_costs(size, "none")
        _, per_recomputed_layer = self.forecast_costs(size, "full")
        # No mixture needs less than full recomputation, whose peak may lie at another moment.
        return max(
            outside
            + (self.layers - recomputed) * per_kept_layer
            + recomputed * per_recomputed_layer,
            self.peak_at(size, "full"),
        )
