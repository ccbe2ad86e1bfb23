"""The names of a model's tensors in its weight files.

transformers renames many tensors while it loads them, and joins or divides some. The mapping here
is its own, so a merge finds a tensor where loading would find it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from medqlora.model.base import ModelError

# What bitsandbytes quantizes and LoRA adapts. The weight of a Conv1D is stored as [in, out].
LINEAR = (torch.nn.Linear, Conv1D)


PREFIX = "base_model.model."  # PEFT puts it before the name of each of the base's modules.


def make_skeleton(config: PretrainedConfig) -> torch.nn.Module:
    """Return the model of a config without weights, on the meta device.

    Raises:
        ModelError: transformers has no causal language model of this architecture.
    """
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"architecture {config.model_type}: transformers makes no causal language model of it:"
            f" {' '.join(str(error).split())[:200]}"
        ) from None
    # On the meta device a shared embedding is two parameters until then.
    model.tie_weights()
    return model


def map_names(model: torch.nn.Module, names: Iterable[str]) -> dict[str, str | None]:
    """Return the model's name of each tensor of its weight files.

    Args:
        model: The model, as make_skeleton returns it.
        names: The names in the files.

    Returns:
        The name in model.state_dict(), or None where transformers makes another tensor of it.
    """
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    mapped: dict[str, str | None] = {}
    for name in names:
        renamed, converter = rename_source_key(name, renamings, converters, prefix, state)
        # transformers itself tries the plain name where the renamed one does not exist.
        if renamed not in state:
            renamed, converter = rename_source_key(name, [], [], prefix, state)
        mapped[name] = renamed if converter is None and renamed in state else None
    return mapped


def list_converted(model: torch.nn.Module) -> set[str]:
    """Return the linear layers whose weights transformers joins or divides while it loads them.

    Their tensors in the files are not those of the model, so an adapter on them cannot be merged.
    """
    converters = [
        entry.reverse_transform()
        for entry in get_model_conversion_mapping(model)
        if isinstance(entry, WeightConverter)
    ]
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR)
        and any(entry.rename_source_key(f"{name}.weight")[1] is not None for entry in converters)
    }


def quantized_modules(model: torch.nn.Module) -> set[str]:
    """Return the names of the linear layers that transformers quantizes in this model."""
    # transformers itself leaves the head and tied weights unquantized. With another list a merge
    # would round weights that training did not.
    unquantized = get_keys_to_not_convert(model)
    names = set()
    for name, module in model.named_modules():
        kept = any(name == key or name.startswith(f"{key}.") for key in unquantized)
        if isinstance(module, LINEAR) and not kept:
            names.add(name)
    return names
