"""Which weights a model's files hold, and whether they may be quantized while they are loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.utils import cached_file

from medqlora.core.config import Model
from medqlora.core.errors import UserError
from medqlora.core.reading import expand_path
from medqlora.model.adapter_metadata import FILE, read_metadata
from medqlora.model.weight_files import (
    INDEX,
    ModelError,
    is_finite,
    list_shards,
    read_dtypes,
    read_weight_map,
)

# The key of a merged model's medqlora.json that says which weights the adapter was merged into:
# "dequantized" or "original".
MERGED_WEIGHTS = "merged_base_weights"
FOUR_BIT = ("nf4", "fp4")
# The packages that transformers needs for weights that other programs have quantized.
PACKAGES = {"gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel",)}
FLOATS = ("F64", "F32", "F16", "BF16")  # the names in the headers of safetensors files
LAYER_NUMBER = re.compile(r"\.\d+(?=\.)")


class WeightsError(UserError):
    """Weights that cannot be loaded in the way that was asked for."""


def describe_quantized(config: PretrainedConfig) -> str | None:
    """Return how the weights of a model's files are quantized, or None if they are not.

    The names of bitsandbytes' types are those of model.quantization.
    """
    settings: Any = getattr(config, "quantization_config", None)
    settings = settings or getattr(config.get_text_config(), "quantization_config", None)
    if not settings:
        return None
    if not isinstance(settings, dict):
        settings = settings.to_dict()
    if settings.get("load_in_8bit"):
        return "int8"
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "fp4"))
    return str(settings.get("quant_method", "unknown"))


def check_files(folder: Path, config: PretrainedConfig) -> None:
    """Refuse the weight files of a model that are damaged or can be read in two ways.

    Only the headers are read.

    Raises:
        ModelError: The message names the file.
    """
    shards = list_shards(folder)
    single = folder / "model.safetensors"
    if single.is_file() and single not in shards:
        raise ModelError(
            f"model {folder}: it has {single.name} and the files of {INDEX}, which may be two"
            " models; take one of them out of the folder"
        )
    homes: dict[str, Path] = {}
    for shard in shards:
        for name, dtype in read_dtypes(shard).items():
            if name in homes:
                raise ModelError(
                    f"model {folder}: tensor {name} stands in {homes[name].name} and in"
                    f" {shard.name}; fetch the whole model again"
                )
            homes[name] = shard
            # transformers would cast codes as if they were weights. Masks of older versions are
            # whole numbers, but are named otherwise.
            if name.endswith("weight") and dtype not in FLOATS and not describe_quantized(config):
                raise ModelError(
                    f"model {folder}: tensor {name} is {dtype}, and config.json names no"
                    " quantization; fetch the whole model again"
                )
    for name, file in read_weight_map(folder).items():
        if homes.get(name) != folder / file:
            raise ModelError(
                f"model {folder}: {INDEX} says that tensor {name} is in {file}, and it is not;"
                " fetch the whole model again"
            )


def check_loaded(base: str, model: torch.nn.Module, found: dict[str, Any]) -> None:
    """Refuse a model that is not the one of its files.

    Args:
        base: The folder or hub id, for messages.
        model: The model as transformers has loaded it.
        found: What transformers has found of its tensors (output_loading_info).

    Raises:
        ModelError: A tensor is missing, has no place in the model, or is not finite.
    """
    # transformers only warns of these, and draws missing weights at random.
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"model {base}: its files lack tensor {missing[0]} ({len(missing)} in all); fetch the"
            " whole model again"
        )
    # Files may hold more than a causal model needs, such as heads for other tasks. A layer or a
    # bias that its config does not count is a part of the model that would be left out.
    modules = {LAYER_NUMBER.sub(".#", name) for name, _ in model.named_modules()}
    for name in sorted(found["unexpected_keys"]):
        if LAYER_NUMBER.sub(".#", name).rpartition(".")[0] in modules:
            raise ModelError(
                f"model {base}: config.json has no place for tensor {name} of its files; fetch the"
                " whole model again"
            )
    for name, parameter in model.named_parameters():
        if not all(map(is_finite, list_numbers(parameter))):
            raise ModelError(
                f"model {base}: tensor {name} has NaN or infinite values; fetch the model again,"
                " or use another dtype if its numbers are too large for this one"
            )


def list_numbers(parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """Return the numbers of a parameter: itself, or the constants of one that holds codes."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return [state.offset, state.state2.absmax] if state.nested else [state.absmax]
    scales = getattr(parameter, "SCB", None)  # those of bitsandbytes' int8 weights
    return [parameter] if scales is None else [scales]


def describe_loaded(model: Model, config: PretrainedConfig, dtype: str) -> str:
    """Return which weights a base is held in, e.g. "nf4" or "bfloat16".

    Args:
        model: The configuration's section.
        config: The model's config.
        dtype: The compute dtype's name.
    """
    if model.quantization != "none":
        return model.quantization
    return describe_quantized(config) or dtype


def check_trainable(model: Model, config: PretrainedConfig) -> None:
    """Refuse to train on files whose weights are quantized.

    Their adapter metadata would name weights that no merge can find.

    Raises:
        WeightsError: The files hold quantized weights, or ones that may not be quantized.
    """
    kind = describe_quantized(config)
    if kind in PACKAGES:
        raise WeightsError(
            f"model.base {model.base}: its weights are quantized already ({kind}); transformers"
            f" needs {' and '.join(PACKAGES[kind])} to load them, and this recipe neither trains on"
            " them nor merges into them; give the unquantized model that it was made from, which"
            " model.quantization quantizes while it is loaded"
        )
    if kind is not None:
        raise WeightsError(
            f"model.base {model.base}: its weights are quantized already ({kind}), and an adapter"
            " on them could not be merged; give the unquantized model that it was made from, which"
            " model.quantization quantizes while it is loaded"
        )
    check_quantizable(model, config)


def check_quantizable(model: Model, config: PretrainedConfig) -> None:
    """Refuse to quantize weights that are quantized already or would lose a merged adapter.

    Weights that were dequantized lie on the levels of their code. An update that is small beside
    the distance of two levels is rounded away when they are quantized again: of a rank-16 update of
    0.3 to 3 % of the weight's norm, 1 to 4 % stay in nf4, 4 to 11 % in fp4 and 7 to 100 % in int8.

    Args:
        model: The configuration's section.
        config: The model's config.

    Raises:
        WeightsError: The message says what to do instead.
    """
    wanted = model.quantization
    kind = describe_quantized(config)
    if kind is not None and wanted not in ("none", kind):
        raise WeightsError(
            f"model {model.base}: its weights are quantized already ({kind}) and cannot be loaded"
            f" as {wanted}; leave the quantization out (--dtype, or model.quantization none), or"
            " give the unquantized model that it was made from"
        )
    if wanted == "none":
        return
    merged = read_merged_kind(model.base, model.revision)
    if merged is None:
        return
    if merged == wanted or (merged in FOUR_BIT and wanted in FOUR_BIT):
        raise WeightsError(
            f"model {model.base}: it was merged into dequantized {merged} weights, and {wanted}"
            " would round most of the adapter away; load it unquantized, train on from the adapter"
            " (lora.init_adapter), or merge with --base_weights original"
        )


def read_merged_kind(base: str, revision: str | None) -> str | None:
    """Return the quantization whose dequantized weights an adapter was merged into, or None.

    Args:
        base: A folder or a hub id.
        revision: The hub's revision.
    """
    folder = expand_path(base, "model")
    # A merged model may have been uploaded; nearly all models of the hub lack this file.
    path = cached_file(
        str(folder) if folder.is_dir() else base,
        FILE,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    metadata = read_metadata(Path(path).parent)
    quantization = metadata.get("quantization", "none")
    # Merges of older versions do not say which weights they hold; dequantized ones were the
    # default.
    weights = metadata.get(MERGED_WEIGHTS, "dequantized")
    return quantization if weights == "dequantized" and quantization != "none" else None
