"""Which weights a model's files hold, and whether they may be quantized while they are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import cached_file

from medqlora.core.config import Model
from medqlora.core.errors import UserError

# The key of a merged model's medqlora.json that says which weights the adapter was merged into:
# "dequantized" or "original".
MERGED_WEIGHTS = "merged_base_weights"
FOUR_BIT = ("nf4", "fp4")


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
    folder = Path(base).expanduser()
    # A merged model may have been uploaded; nearly all models of the hub lack this file.
    path = cached_file(
        str(folder) if folder.is_dir() else base,
        "medqlora.json",
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    metadata = json.loads(Path(path).read_text(encoding="utf-8"))
    quantization = metadata.get("quantization", "none")
    # Merges of older versions do not say which weights they hold; dequantized ones were the
    # default.
    weights = metadata.get(MERGED_WEIGHTS, "dequantized")
    return quantization if weights == "dequantized" and quantization != "none" else None
