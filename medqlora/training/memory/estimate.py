"""Forecasts of a whole step from forecasts of a few layers."""

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

OVERHEAD_TOKENS = 250
OFFLOAD_TIME = 0.2  # see time_per_token


def assume_labelled(config: Config, tokens: int) -> int:
    """Supervised tokens in a micro-batch where the data is not at hand: rows of 64 tokens with a
    letter and its end token, or a quarter of the tokens for a letter with its text, or all."""
    part = {"letter": 2 / 64, "letter_text": 1 / 4}.get(config.data.completion, 1.0)
    if any(find_format(entry.format).scoring != "letters" for entry in config.data.train):
        part = 1.0
    return max(1, int(part * tokens))


def make_batch(config: Config, tokens: int, labelled: int, accumulated: bool) -> Batch:
    """A full micro-batch of rows as long as they may be; one row where rows are not packed."""
    longest = min(config.data.max_length, tokens)
    lengths = [longest] * (tokens // longest) + [tokens % longest] * bool(tokens % longest)
    lengths = lengths if config.data.packing else [longest]
    return Batch(tuple(lengths), min(labelled, sum(lengths)), accumulated)


def time_per_token(tokens: int, recomputed: float, offloaded: bool = False) -> float:
    """Relative training time per token, of micro-batches of `tokens` with this part of the layers
    recomputed; 1: all recomputed, endless batches. Six operations per weight and token with full
    recomputation, four without (frozen weights need no gradient). Each pass over a micro-batch also
    dequantizes the base: about 2.5 bytes per weight, which takes an H100 as long as computing
    OVERHEAD_TOKENS tokens in three passes (22 % of the time at 1,024 tokens, 5.5 % at 4,096).
    Offloading moves 16 KiB per token and layer of an 8B model over PCIe, at 25 GB/s OFFLOAD_TIME of
    an H100's time. Computed, not measured.
    """
    return (
        (4 + 2 * recomputed) / 6
        + (2 + recomputed) / 3 * OVERHEAD_TOKENS / tokens
        + OFFLOAD_TIME * offloaded
    )


def forecast_plan(
    config: Config,
    architecture: PretrainedConfig,
    target: TargetHardware,
    tokens: int,
    checkpointing: str,
    labelled: int,
    backend: str | None = None,
) -> StepPlan:
    """The forecast per process of one way to train. backend: of attention, default what the target
    gets.
    """
    backend = backend or target.choose_attention(config, architecture).backend
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
    """The same architecture with fewer layers."""
    small = copy.deepcopy(architecture)
    text = small.get_text_config()
    text.num_hidden_layers = count
    if isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = (text.layer_types * count)[:count]
    return small


class Estimate:
    """Peak bytes for any micro-batch and number of recomputed layers, from forecasts of 2 and 4
    layers at two sizes: layers are alike (or alternate), and all that a batch needs grows linearly
    with its tokens."""

    def __init__(
        self,
        config: Config,
        architecture: PretrainedConfig,
        target: TargetHardware,
        sizes: tuple[int, int],
        labelled_of: Callable[[int], int],
    ):
        self.config = config
        self.architecture = architecture
        self.target = target
        self.sizes = sizes
        self.labelled_of = labelled_of
        self.layers = architecture.get_text_config().num_hidden_layers
        self.lines: dict[tuple[int, str], tuple[float, float]] = {}
        # The least ratio of reserve to peak that a forecast of all layers had so far.
        self.slack: float | None = None

    def line(self, tokens: int, mode: str) -> tuple[float, float]:
        """Bytes of the ends, and of each layer."""
        if (tokens, mode) not in self.lines:
            two, four = (
                forecast_plan(
                    self.config,
                    with_layers(self.architecture, count),
                    self.target,
                    tokens,
                    mode,
                    self.labelled_of(tokens),
                ).forecast.peak
                for count in (2, 4)
            )
            self.lines[tokens, mode] = (two - (four - two), (four - two) / 2)
        return self.lines[tokens, mode]

    def needs(self, tokens: int, mode: str) -> float:
        return (self.slack or 1.0) * self.peak(tokens, mode)

    def learn(self, plan: StepPlan) -> None:
        """Take the slack from a forecast of all layers."""
        slack = self.target.needs(plan.forecast) / plan.forecast.peak
        self.slack = slack if self.slack is None else min(self.slack, slack)

    def peak(self, tokens: int, mode: str) -> float:
        """mode: training.gradient_checkpointing."""
        low, high = (self.peak_at(size, mode) for size in self.sizes)
        return low + (high - low) * (tokens - self.sizes[0]) / max(1, self.sizes[1] - self.sizes[0])

    def peak_at(self, size: int, mode: str) -> float:
        if not mode.startswith("first_"):
            ends, each = self.line(size, mode)
            return ends + self.layers * each
        recomputed = int(mode.removeprefix("first_"))
        (ends, kept), (_, recomputing) = self.line(size, "none"), self.line(size, "full")
        return max(
            ends + (self.layers - recomputed) * kept + recomputed * recomputing,
            self.peak_at(size, "full"),
        )
