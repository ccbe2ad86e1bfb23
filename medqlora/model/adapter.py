"""Attach, name, save and load a LoRA adapter."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from transformers import PretrainedConfig

from medqlora.core.config import Lora
from medqlora.model.base import ModelError
from medqlora.model.dropout import DroppedLinear, SeededDropout
from medqlora.model.identity import architecture_hash


def attach_adapter(model: torch.nn.Module, lora: Lora, seed: int) -> PeftModel:
    """A fresh adapter with float32 weights (the compute dtype is cast to on use), initialised from
    `seed`.

    Raises:
        ModelError: a target name that no layer has.
    """
    torch.manual_seed(seed)
    targets = (
        lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    )
    try:
        adapted = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=targets,
                use_rslora=lora.variant == "rslora",
                use_dora=lora.variant == "dora",
            ),
        )
    except ValueError as error:
        raise ModelError(
            f"lora.target_modules {lora.target_modules}: {' '.join(str(error).split())[:200]}"
        ) from None
    lean_adapter(adapted)
    return adapted


def lean_adapter(model: PeftModel) -> None:
    """Give plain LoRA layers a forward without PEFT's defensive clone, dtype round trip and
    separate scale and add; and all of them dropout that keeps no mask."""
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for name, dropout in module.lora_dropout.items():
            if isinstance(dropout, torch.nn.Dropout):
                module.lora_dropout[name] = SeededDropout(dropout.p)
        if (
            len(module.lora_A) == 1
            and not module.lora_variant
            and isinstance(module.get_base_layer(), torch.nn.Linear)
        ):
            module.forward = types.MethodType(forward_lean, module)


def forward_lean(layer: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """base(x) + scaling * B A dropout(x); x [..., in] -> [..., out]. The update is added by the
    matrix product itself, in place: what a frozen base layer gives is needed by no backward
    pass."""
    flat = x.flatten(0, -2)  # [tokens, in]
    result = layer.base_layer(flat)
    if not layer.disable_adapters and not layer.merged:
        (name,) = layer.lora_A
        down = layer.lora_A[name].weight.to(x.dtype)
        up = layer.lora_B[name].weight.to(x.dtype)
        dropout = layer.lora_dropout[name]
        if isinstance(dropout, SeededDropout) and dropout.training:
            low = DroppedLinear.apply(flat, down, dropout.p)  # [tokens, r]
        else:
            low = F.linear(dropout(flat), down)
        result.addmm_(low, up.t(), alpha=layer.scaling[name])
    return result.view(*x.shape[:-1], result.shape[-1])


def adapter_weights(
    model: PeftModel, values: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The adapter's tensors in PEFT's own names, on the CPU; values: by parameter name, where a
    strategy has gathered them.
    """
    return {
        key: value.detach().cpu().contiguous()
        for key, value in get_peft_model_state_dict(model, state_dict=values).items()
    }


def name_parameters(model: PeftModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of adapter_weights: PEFT's own names -> parameter names."""
    named = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    names = {id(parameter): name for name, parameter in named.items()}
    keys = get_peft_model_state_dict(model, state_dict=dict(named))
    return {names[id(parameter)]: weights[key] for key, parameter in keys.items()}


def restore_adapter(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    """Load tensors from `adapter_weights`.

    Raises:
        ModelError: missing, surplus or misshapen tensors.
    """
    expected = get_peft_model_state_dict(model)
    wrong = sorted(set(expected) ^ set(weights)) or [
        k for k in expected if expected[k].shape != weights[k].shape
    ]
    if wrong:
        raise ModelError(
            f"adapter does not fit this model: tensor {wrong[0]} is missing, surplus or of another"
            " shape"
        )
    set_peft_model_state_dict(model, weights)


def load_adapter(model: torch.nn.Module, folder: Path) -> PeftModel:
    """Attach a saved adapter for evaluation.

    Raises:
        ModelError: no adapter there, or one for another base.
    """
    check_adapter(folder, model.config)
    with warnings.catch_warnings():
        # we check it ourselves, below
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, folder)
    restore_adapter(adapted, load_file(folder / "adapter_model.safetensors"))
    lean_adapter(adapted)
    return adapted


def read_adapter_card(folder: Path) -> dict[str, Any]:
    """medqlora.json of an adapter: prompt style, completion, fingerprint, base id, architecture
    hash, quantization.

    Raises:
        ModelError: not an adapter folder, or one whose weights do not match the card.
    """
    folder = Path(folder)
    if (
        not (folder / "adapter_config.json").is_file()
        or not (folder / "adapter_model.safetensors").is_file()
    ):
        raise ModelError(
            f"adapter {folder}: no adapter_config.json and adapter_model.safetensors; give a run's"
            " adapter folder"
        )
    card = folder / "medqlora.json"
    if not card.is_file():
        return {}
    facts = json.loads(card.read_text(encoding="utf-8"))
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    if facts.get("weights_sha256") not in (None, digest):
        raise ModelError(
            f"adapter {folder}: adapter_model.safetensors is not the file medqlora.json describes;"
            " it was cut or changed"
        )
    return facts


def check_adapter(folder: Path, config: PretrainedConfig) -> dict[str, Any]:
    """The adapter's card, if it was trained on a base of this architecture.

    Raises:
        ModelError: adapter for another base.
    """
    card = read_adapter_card(folder)
    if card and card["architecture_sha256"] != architecture_hash(config):
        raise ModelError(
            f"adapter {folder} was trained on {card['base']}; this base has another architecture;"
            " give that one with --base or --model"
        )
    return card


def save_adapter(
    folder: Path,
    model: PeftModel,
    card: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a PEFT adapter with its card (see read_adapter_card). Each file is replaced whole; the
    card holds the weights' hash, so that a kill between two files is seen when the adapter is read.

    weights: of adapter_weights; default the model's own.

    Raises:
        ModelError: the disk refused.
    """
    try:
        write_adapter_files(
            folder, model, card, adapter_weights(model) if weights is None else weights
        )
    except OSError as error:
        raise ModelError(
            f"adapter {folder} cannot be written: {error.strerror or error}; free space and"
            " continue with --resume"
        ) from None


def write_adapter_files(
    folder: Path, model: PeftModel, card: dict[str, Any], weights: dict[str, torch.Tensor]
) -> None:
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    # its own writer reports a full disk as an error of the format
    content = serialize(weights, metadata={"format": "pt"})
    (aside / "adapter_model.safetensors").write_bytes(content)
    model.active_peft_config.save_pretrained(aside)
    digest = hashlib.sha256(content).hexdigest()
    (aside / "medqlora.json").write_text(
        json.dumps({**card, "weights_sha256": digest}, indent=2) + "\n", encoding="utf-8"
    )
    folder.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "medqlora.json"):
        os.replace(aside / name, folder / name)
    aside.rmdir()


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
