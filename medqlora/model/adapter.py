"""Attach, name, save and load a LoRA adapter."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from transformers import PretrainedConfig

from medqlora.core.config import Lora
from medqlora.model.base import ModelError
from medqlora.model.dropout import SeededDropout
from medqlora.model.identity import architecture_hash
from medqlora.model.overrides import ADAPTER_OVERRIDES, apply_overrides


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
    make_lighter(adapted)
    return adapted


def make_lighter(model: PeftModel) -> None:
    """Give LoRA layers dropout that keeps no mask, and plain ones our forward (overrides.py)."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, torch.nn.Dropout):
                layer.lora_dropout[name] = SeededDropout(dropout.p)
    apply_overrides(layers, ADAPTER_OVERRIDES, model.get_input_embeddings().weight.dtype)


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
    make_lighter(adapted)
    return adapted


def read_adapter_metadata(folder: Path) -> dict[str, Any]:
    """medqlora.json of an adapter: prompt style, completion, fingerprint, base id, architecture
    hash, quantization.

    Raises:
        ModelError: not an adapter folder, or one whose weights do not match the metadata.
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
    metadata = folder / "medqlora.json"
    if not metadata.is_file():
        return {}
    facts = json.loads(metadata.read_text(encoding="utf-8"))
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    if facts.get("weights_sha256") not in (None, digest):
        raise ModelError(
            f"adapter {folder}: adapter_model.safetensors is not the file medqlora.json describes;"
            " it was cut or changed"
        )
    return facts


def check_adapter(folder: Path, config: PretrainedConfig) -> dict[str, Any]:
    """The adapter's metadata, if it was trained on a base of this architecture.

    Raises:
        ModelError: adapter for another base.
    """
    metadata = read_adapter_metadata(folder)
    if metadata and metadata["architecture_sha256"] != architecture_hash(config):
        raise ModelError(
            f"adapter {folder} was trained on {metadata['base']}; this base has another"
            " architecture; give that one with --base or --model"
        )
    return metadata


def save_adapter(
    folder: Path,
    model: PeftModel,
    metadata: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a PEFT adapter with its metadata (see read_adapter_metadata).

    Each file is replaced whole. The metadata holds the weights' hash, so that a kill between two
    files is seen when the adapter is read.

    weights: of adapter_weights; default the model's own.

    Raises:
        ModelError: the disk refused.
    """
    try:
        write_adapter_files(
            folder, model, metadata, adapter_weights(model) if weights is None else weights
        )
    except OSError as error:
        raise ModelError(
            f"adapter {folder} cannot be written: {error.strerror or error}; free space and"
            " continue with --resume"
        ) from None


def write_adapter_files(
    folder: Path, model: PeftModel, metadata: dict[str, Any], weights: dict[str, torch.Tensor]
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
        json.dumps({**metadata, "weights_sha256": digest}, indent=2) + "\n", encoding="utf-8"
    )
    folder.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "medqlora.json"):
        os.replace(aside / name, folder / name)
    aside.rmdir()


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
