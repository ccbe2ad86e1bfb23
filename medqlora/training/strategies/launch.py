"""The strategy that `accelerate launch` was told, and checks of what it can be combined with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from medqlora.core.config import Config
from medqlora.core.errors import ConfigError, UserError
from medqlora.core.reading import read_object
from medqlora.core.yaml_reading import read_yaml_file

# A DeepSpeed file must not set these keys, because the recipe's configuration owns their values.
RECIPE_KEYS = (
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
# A DeepSpeed file may have these keys; the last two change nothing here.
USED_KEYS = ("zero_optimization", "steps_per_print", "wall_clock_breakdown")
MOST_PROCESSES = 1_000_000  # A larger number is a slip of the keyboard.
PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}


class StrategyError(UserError):
    """The launcher's configuration cannot train this recipe, or a strategy failed."""


@dataclass(frozen=True)
class Strategy:
    """How a model is trained by several processes.

    Args:
        name: one, ddp, zero1, zero2, zero3 or fsdp2.
        ranks: Number of processes.
        settings: Settings of DeepSpeed or FSDP2 from the accelerate file.
    """

    name: str
    ranks: int = 1
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        """Whether the frozen base is divided over the ranks."""
        return self.name in ("zero3", "fsdp2")


def is_true(environ: Mapping[str, str], name: str) -> bool:
    """Say whether an environment variable has one of the values that Accelerate writes for true."""
    return environ.get(name, "").lower() in ("true", "1", "yes")


def read_strategy(environ: Mapping[str, str], ranks: int) -> Strategy:
    """Read the strategy from the environment variables that `accelerate launch` sets.

    Raises:
        StrategyError: The recipe does not support the engine, or a DeepSpeed file sets a key that
            the recipe owns.
    """
    # Parallelism can be set beside any other engine, so it is looked at first.
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
                "accelerate config: fsdp_version is 1 or not given; set fsdp_version: 2 (FSDP1"
                " cannot hold adapter and base in two dtypes)"
            )
        settings = {
            "offload": is_true(environ, "FSDP_OFFLOAD_PARAMS"),
            # The value is a text here, and only `false` turns off what FSDP2 does by default.
            "reshard_after_forward": (
                environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
            ),
        }
        return Strategy("fsdp2", ranks, settings)
    return Strategy("ddp" if ranks > 1 else "one", ranks)


def read_accelerate_config(path: Path) -> dict[str, Any]:
    """Return the content of a configuration file of `accelerate launch`.

    Raises:
        ConfigError: The file cannot be read, is no mapping, counts processes with something else
            than a number from 1, or has a section that is no mapping.
    """
    tree, _ = read_yaml_file(path, f"accelerate config {path}")
    if not isinstance(tree, dict):
        raise ConfigError(
            f"accelerate config {path}: expected keys with values (key: value), got"
            f" {type(tree).__name__}"
        )
    for key in ("num_machines", "num_processes"):
        value = tree.get(key, 1)
        # true is a whole number for Python.
        if type(value) is not int or not 1 <= value <= MOST_PROCESSES:
            raise ConfigError(
                f"accelerate config {path}: {key} {value!r}; expected a number from 1 to"
                f" {MOST_PROCESSES:,}"
            )
    for key in ("deepspeed_config", "fsdp_config", "parallelism_config"):
        if not isinstance(tree.get(key) or {}, dict):
            raise ConfigError(
                f"accelerate config {path}: {key} got {tree[key]!r}; expected keys with values"
            )
    return tree


def launch_environ(accelerate_config: dict[str, Any]) -> dict[str, str]:
    """Return the environment variables that `accelerate launch` would set for a configuration file.

    Only the variables that read_strategy and check_strategy read are returned.
    """
    kind = str(accelerate_config.get("distributed_type", "NO")).upper()
    # YAML reads an unquoted `no` as false.
    precision = str(accelerate_config.get("mixed_precision") or "no").lower()
    environ = {"ACCELERATE_MIXED_PRECISION": precision.replace("false", "no")}
    if kind == "DEEPSPEED":
        given = accelerate_config.get("deepspeed_config") or {}
        names = {
            "zero_stage": "ZERO_STAGE",
            "deepspeed_config_file": "CONFIG_FILE",
            "offload_optimizer_device": "OFFLOAD_OPTIMIZER_DEVICE",
            "offload_param_device": "OFFLOAD_PARAM_DEVICE",
        }
        environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        for key, name in names.items():
            if given.get(key) is not None:
                environ[f"ACCELERATE_DEEPSPEED_{name}"] = str(given[key])
    elif kind == "FSDP":
        given = accelerate_config.get("fsdp_config") or {}
        environ["ACCELERATE_USE_FSDP"] = "true"
        # The keys of this section already begin with fsdp_, as the variables do.
        environ |= {key.upper(): str(value).lower() for key, value in given.items()}
    elif kind == "MEGATRON_LM":
        environ["ACCELERATE_USE_MEGATRON_LM"] = "true"
    if accelerate_config.get("parallelism_config"):
        environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
    return environ


def read_zero(environ: Mapping[str, str], ranks: int) -> Strategy:
    """Read the stage and the settings of ZeRO, from a DeepSpeed file if one is named."""
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file:
        settings = read_deepspeed_file(file)
    else:
        settings = {"stage": int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
        for part in ("optimizer", "param"):
            device = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
            if device != "none":
                settings[f"offload_{part}"] = {"device": device}
    # The device may be named at any depth of the settings.
    if "nvme" in json.dumps(settings):
        raise StrategyError("accelerate config: offloading to nvme is not supported; use cpu")
    if settings.get("stage") not in (1, 2, 3):
        raise StrategyError(
            f"accelerate config: zero_stage {settings.get('stage')}; expected 1, 2 or 3"
        )
    return Strategy(f"zero{settings['stage']}", ranks, settings)


def read_deepspeed_file(file: str) -> dict[str, Any]:
    """Return the section zero_optimization of a DeepSpeed file; refuse keys that are not read."""
    given = read_object(Path(file), f"deepspeed_config_file {file}", StrategyError)
    for key, value in given.items():
        # `auto` and a section that is not enabled say nothing against the recipe.
        unset = value == "auto" or (
            isinstance(value, dict) and value.get("enabled") in (False, "auto")
        )
        if key in RECIPE_KEYS and not unset:
            raise StrategyError(
                f"deepspeed_config_file {file}: {key} is the recipe's to say; remove it (see"
                " training.* and model.dtype)"
            )
        # A key that nobody reads would look as if it were obeyed.
        if key not in (*RECIPE_KEYS, *USED_KEYS):
            raise StrategyError(
                f"deepspeed_config_file {file}: {key} is not used; remove it (only"
                " zero_optimization is read)"
            )
    section = given.get("zero_optimization", {})
    if not isinstance(section, dict):
        raise StrategyError(
            f"deepspeed_config_file {file}: zero_optimization got {section!r}; expected an object"
        )
    return section


def check_strategy(
    strategy: Strategy, config: Config, dtype: torch.dtype, environ: Mapping[str, str]
) -> None:
    """Refuse a combination that cannot train, before any weight is loaded.

    Args:
        dtype: The dtype of computing.
        environ: The environment variables of `accelerate launch`.

    Raises:
        StrategyError: The message gives the reason and a combination that trains.
    """
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    # A precision that agrees is let through. It changes nothing, because no model is handed to
    # Accelerator.prepare, which would set up autocast.
    if precision not in ("no", "") and PRECISION.get(precision) is not dtype:
        raise StrategyError(
            f"accelerate config: mixed_precision {precision}, but the recipe computes in"
            f" {str(dtype).removeprefix('torch.')} (model.dtype); set mixed_precision: 'no', the"
            " recipe owns the dtype"
        )
    if config.training.method == "full" and dtype is torch.float16:
        raise StrategyError(
            "training.method full computes in float16 on this GPU, where its gradients would"
            " overflow; set model.dtype float32, or use a GPU that multiplies bfloat16"
        )
    if config.training.method == "full" and strategy.settings.get("offload"):
        raise StrategyError(
            "fsdp2 with fsdp_offload_params: training.method full has not been tried with it; set"
            " fsdp_offload_params: false, or use accelerate_configs/zero3_offload.yaml"
        )
    # Each rank has the whole model here, so none of the cases below arises.
    if strategy.name in ("one", "ddp"):
        return
    if dtype is torch.float16:
        raise StrategyError(
            f"{strategy.name} with float16: only one process and ddp have loss scaling; use ddp, or"
            " model.dtype bfloat16 or float32"
        )
    if config.training.optimizer != "adamw":
        raise StrategyError(
            f"{strategy.name} with training.optimizer {config.training.optimizer}: 8-bit states of"
            " a shard cannot be gathered for a checkpoint; set training.optimizer to adamw, whose"
            " states this strategy divides over the GPUs"
        )
    if strategy.sharded and config.model.quantization == "int8":
        raise StrategyError(
            f"{strategy.name} with model.quantization int8: the row scales of int8 weights are not"
            " divided with the weights; use nf4, or ddp"
        )
    if strategy.name == "zero3" and config.lora.variant == "dora":
        raise StrategyError(
            "zero3 with lora.variant dora: dora reads a base weight outside the layer that gathers"
            " it; use fsdp2, zero2 or ddp"
        )
    if strategy.name == "fsdp2" and strategy.ranks == 1:
        raise StrategyError(
            "fsdp2 with one process has nothing to shard; use accelerate_configs/one_gpu.yaml"
        )


def choose_storage(strategy: Strategy, quantization: str, dtype: torch.dtype) -> torch.dtype:
    """Choose the dtype in which 4-bit weights are packed.

    It is uint8, or the dtype of computing where the base is divided over the ranks. There FSDP2
    would leave uint8 weights whole on each rank, and ZeRO-3 would mix two dtypes in one message.

    Args:
        quantization: Value of model.quantization.
        dtype: The dtype of computing.
    """
    return dtype if strategy.sharded and quantization in ("nf4", "fp4") else torch.uint8
