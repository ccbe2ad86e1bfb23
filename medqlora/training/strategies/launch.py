"""What the launcher says: strategy, processes, settings, and what cannot work together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from medqlora.core.config import Config
from medqlora.core.errors import UserError

# What a DeepSpeed file may not say, because the recipe does.
RECIPE_OWNS = (
    "fp16",
    "bf16",
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "data_types",
)
PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}


class StrategyError(UserError):
    """A launch that cannot train this recipe."""


@dataclass(frozen=True)
class Strategy:
    """name: one, ddp, zero1, zero2, zero3 or fsdp2; ranks: processes; settings: of the engine, from
    the accelerate file.
    """

    name: str
    ranks: int = 1
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        """Is the frozen base divided over the ranks?"""
        return self.name in ("zero3", "fsdp2")


def is_true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("true", "1", "yes")


def read_strategy(environ: Mapping[str, str], ranks: int) -> Strategy:
    """What `accelerate launch` was told, from the variables by which it tells its processes.

    Raises: StrategyError: an engine that this recipe does not train with, or a DeepSpeed file that
        says what the recipe owns.
    """
    if is_true(environ, "ACCELERATE_USE_MEGATRON_LM") or is_true(
        environ, "ACCELERATE_USE_PARALLELISM_CONFIG"
    ):
        raise StrategyError(
            "accelerate config: tensor, context and pipeline parallelism are not supported; use"
            " ddp, zero or fsdp2"
        )
    if is_true(environ, "ACCELERATE_USE_DEEPSPEED"):
        return read_zero(environ, ranks)
    if is_true(environ, "ACCELERATE_USE_FSDP"):
        if environ.get("FSDP_VERSION", "1") != "2":
            raise StrategyError(
                "accelerate config: fsdp_version is 1; set fsdp_version: 2 (FSDP1 cannot hold"
                " adapter and base in two dtypes)"
            )
        settings = {
            "offload": is_true(environ, "FSDP_OFFLOAD_PARAMS"),
            "reshard_after_forward": (
                environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
            ),
        }
        return Strategy("fsdp2", ranks, settings)
    return Strategy("ddp" if ranks > 1 else "one", ranks)


def launch_environ(accelerate_config: dict[str, Any]) -> dict[str, str]:
    """The variables that `accelerate launch` would set for a configuration file, as far as
    read_strategy looks at them.
    """
    kind = str(accelerate_config.get("distributed_type", "NO")).upper()
    environ = {
        "ACCELERATE_MIXED_PRECISION": (
            str(accelerate_config.get("mixed_precision") or "no").lower().replace("false", "no")
        )
    }
    if kind == "DEEPSPEED":
        given = accelerate_config.get("deepspeed_config") or {}
        names = {
            "zero_stage": "ZERO_STAGE",
            "deepspeed_config_file": "CONFIG_FILE",
            "offload_optimizer_device": "OFFLOAD_OPTIMIZER_DEVICE",
            "offload_param_device": "OFFLOAD_PARAM_DEVICE",
        }
        environ |= {"ACCELERATE_USE_DEEPSPEED": "true"}
        environ |= {
            f"ACCELERATE_DEEPSPEED_{name}": str(given[key])
            for key, name in names.items()
            if given.get(key) is not None
        }
    elif kind == "FSDP":
        given = accelerate_config.get("fsdp_config") or {}
        environ |= {"ACCELERATE_USE_FSDP": "true"}
        environ |= {key.upper(): str(value).lower() for key, value in given.items()}
    elif kind == "MEGATRON_LM":
        environ |= {"ACCELERATE_USE_MEGATRON_LM": "true"}
    if accelerate_config.get("parallelism_config"):
        environ |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    return environ


def read_zero(environ: Mapping[str, str], ranks: int) -> Strategy:
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file:
        try:
            given = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StrategyError(f"deepspeed_config_file {file} cannot be read: {error}") from None
        for key, value in given.items():
            unset = value == "auto" or (
                isinstance(value, dict) and value.get("enabled") in (False, "auto")
            )
            if key in RECIPE_OWNS and not unset:
                raise StrategyError(
                    f"deepspeed_config_file {file}: {key} is the recipe's to say; remove it (see"
                    " training.* and model.dtype)"
                )
            if key not in (
                *RECIPE_OWNS,
                "zero_optimization",
                "steps_per_print",
                "wall_clock_breakdown",
            ):
                raise StrategyError(
                    f"deepspeed_config_file {file}: {key} is not used; zero_optimization is all"
                    " that is read, remove the rest"
                )
        zero = dict(given.get("zero_optimization", {}))
    else:
        zero = {"stage": int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
        for what in ("optimizer", "param"):
            place = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
            if place != "none":
                zero[f"offload_{what}"] = {"device": place}
    if "nvme" in json.dumps(zero):
        raise StrategyError("accelerate config: offloading to nvme is not supported; use cpu")
    if zero.get("stage") not in (1, 2, 3):
        raise StrategyError(
            f"accelerate config: zero_stage {zero.get('stage')}; expected 1, 2 or 3"
        )
    return Strategy(f"zero{zero['stage']}", ranks, zero)


def check_strategy(
    strategy: Strategy, config: Config, dtype: torch.dtype, environ: Mapping[str, str]
) -> None:
    """Refuse what cannot train, before a weight loads.

    Raises:
        StrategyError: with the reason and what to use.
    """
    asked = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "") and PRECISION.get(asked) is not dtype:
        raise StrategyError(
            f"accelerate config: mixed_precision {asked}, but the recipe computes in"
            f" {str(dtype).removeprefix('torch.')} (model.dtype); set mixed_precision: 'no', the"
            " recipe owns the dtype"
        )
    if strategy.name in ("one", "ddp"):
        return
    if dtype is torch.float16:
        raise StrategyError(
            f"{strategy.name} with float16: loss scaling is done for ddp only; use ddp, or"
            " model.dtype bfloat16 or float32"
        )
    if config.training.optimizer != "adamw":
        raise StrategyError(
            f"{strategy.name} with training.optimizer {config.training.optimizer}: 8-bit states of"
            " a shard cannot be gathered for a checkpoint; use adamw, whose states this strategy"
            " divides already"
        )
    if strategy.sharded and config.model.quantization == "int8":
        raise StrategyError(
            f"{strategy.name} with model.quantization int8: its row scales do not travel with the"
            " shards; use nf4, or ddp"
        )
    if strategy.name == "zero3" and config.lora.variant == "dora":
        raise StrategyError(
            "zero3 with lora.variant dora: it reads the base weight outside the layer that holds"
            " it; use fsdp2, zero2 or ddp"
        )
    if strategy.name == "fsdp2" and strategy.ranks == 1:
        raise StrategyError(
            "fsdp2 with one process has nothing to shard; use accelerate_configs/one_gpu.yaml"
        )


def choose_storage(strategy: Strategy, quantization: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which 4-bit weights are packed. Engines that shard the base move it as the
    compute dtype (uint8 would be replicated by FSDP2, and mixed in one message by ZeRO-3);
    elsewhere uint8."""
    return dtype if strategy.sharded and quantization in ("nf4", "fp4") else torch.uint8
