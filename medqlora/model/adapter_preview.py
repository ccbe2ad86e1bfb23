"""What a new adapter will train and leave, before any weight is loaded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import PretrainedConfig

from medqlora.core.config import Lora, Model
from medqlora.model.adapter import make_settings, trainable
from medqlora.model.adapter_settings import SETTINGS
from medqlora.model.base import ModelError
from medqlora.model.checkpoint_names import PREFIX, list_converted, make_skeleton, quantized_modules
from medqlora.model.hardware import name_dtype


@dataclass(frozen=True)
class Preview:
    """What is trained of a base, or of a new adapter on it.

    Attributes:
        base_parameters: number of the base's parameters.
        frozen_parameters: number of those of the base that are not trained.
        trained_parameters: number of those that are trained, of the adapter or of the base.
        kept_parameters: number of the base's weights that no quantization reaches, because they are
            in no linear layer, as the experts of most mixtures are; embeddings and head, which are
            left on purpose, do not count.
        kept_example: the name of one of them; empty if there is none.
        settings: PEFT's settings of the adapter, as adapter_config.json has them.
        tensors: the shapes of the adapter's tensors, by PEFT's names.
        unmergeable: why recipes/merge_adapter.py will refuse the adapter; None if it will not.
    """

    base_parameters: int
    frozen_parameters: int
    trained_parameters: int
    kept_parameters: int
    kept_example: str
    settings: dict[str, Any]
    tensors: dict[str, list[int]]
    unmergeable: str | None

    def describe_kept(self, model: Model, dtype: torch.dtype) -> str | None:
        """Return how much of a quantized base stays in the compute dtype; None if nothing."""
        # A small convolution or router matters to nobody's memory.
        small = self.kept_parameters < 0.01 * self.base_parameters
        if model.quantization == "none" or small:
            return None
        size = self.kept_parameters * dtype.itemsize / 2**30
        return (
            f"{size:,.2f} GiB of weights stay in {name_dtype(dtype)} under {model.quantization},"
            f" because they are in no linear layer ({self.kept_example}, …)"
        )


def preview_adapter(config: PretrainedConfig, lora: Lora) -> Preview:
    """Put a new adapter on a base without weights, and look at the result.

    Args:
        config: The config of the base.
        lora: The configuration's section.

    Raises:
        ModelError: The base has no layer of a target's name.
    """
    model = make_skeleton(config)
    parameters = dict(model.named_parameters())
    # Vectors are the weights of norms, or biases.
    weights = {name: weight for name, weight in parameters.items() if weight.dim() > 1}
    reached = {f"{name}.weight" for name in quantized_modules(model)}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head or isinstance(module, torch.nn.Embedding):
            reached.add(f"{name}.weight")
    kept = {name: weight for name, weight in weights.items() if name not in reached}
    converted = list_converted(model)
    try:
        with init_empty_weights(), warnings.catch_warnings():
            # Attaching the real adapter says the same again.
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, make_settings(model, lora))
    except ValueError as error:
        raise ModelError(
            f"lora.target_modules {lora.target_modules}: {' '.join(str(error).split())[:200]}"
        ) from None
    trained = trainable(adapted)
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    total = sum(parameter.numel() for parameter in parameters.values())
    return Preview(
        base_parameters=total,
        frozen_parameters=total,
        trained_parameters=sum(parameter.numel() for parameter in trained.values()),
        kept_parameters=sum(weight.numel() for weight in kept.values()),
        kept_example=max(kept, key=lambda name: kept[name].numel(), default=""),
        settings=adapted.active_peft_config.to_dict(),
        tensors={key: list(value.shape) for key, value in state.items()},
        unmergeable=find_unmergeable(adapted, converted),
    )


def find_unmergeable(adapted: torch.nn.Module, converted: set[str]) -> str | None:
    """Return why an adapter cannot be merged, or None.

    Args:
        adapted: The model with the adapter.
        converted: The result of checkpoint_names.list_converted for the model before.
    """
    # PEFT adds these by itself where linear layers of another version of transformers have become
    # one parameter, as the experts of Mixtral have.
    experts = getattr(adapted.active_peft_config, "target_parameters", None)
    if experts and "merge" not in SETTINGS["target_parameters"]:
        what = f"it trains {', '.join(sorted(experts))}, which are in no linear layer"
    else:
        layers = {name.partition(".lora_")[0].removeprefix(PREFIX) for name in trainable(adapted)}
        if not layers & converted:
            return None
        what = f"transformers makes {min(layers & converted)} of other tensors of the files"
    return (
        f"this adapter can be evaluated but not merged: {what}; to merge it later, name other"
        " layers in lora.target_modules"
    )
