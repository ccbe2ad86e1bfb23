"""Attach, save and load a LoRA adapter (Hu et al., 2021, arXiv 2106.09685)."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save as serialize
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from medqlora.core.config import Lora
from medqlora.core.files import hash_file
from medqlora.core.reading import expand_path
from medqlora.core.seeds import fit_seed
from medqlora.model.adapter_metadata import FILE, check_present, read_metadata
from medqlora.model.adapter_settings import read_settings
from medqlora.model.adapter_tokenizer import (
    count_rows,
    list_embeddings,
    name_whole_embeddings,
)
from medqlora.model.base import ModelError, describe, list_untrained
from medqlora.model.checkpoint_names import LINEAR, PREFIX, make_skeleton, map_names
from medqlora.model.dropout import SeededDropout
from medqlora.model.identity import architecture_hash
from medqlora.model.overrides import ADAPTER_OVERRIDES, apply_overrides
from medqlora.model.weight_files import load_weights, read_shapes

# The keys of medqlora.json that hold the hash of another file of the adapter.
HASHED = {"weights_sha256": "adapter_model.safetensors", "config_sha256": "adapter_config.json"}


def attach_adapter(model: torch.nn.Module, lora: Lora, seed: int) -> PeftModel:
    """Put a new adapter on a base model, which is changed.

    The adapter's weights are float32 and are cast to the compute dtype where they are used.

    Args:
        model: A transformers causal LM.
        lora: The configuration's section.
        seed: The seed of the initial weights.

    Raises:
        ModelError: The base has no layer of a target's name.
    """
    # PEFT draws the factors A from torch's global generator, so this seed alone decides them.
    torch.manual_seed(fit_seed(seed, 64))
    try:
        # PEFT casts adapter weights to float32 by default (autocast_adapter_dtype).
        adapted = get_peft_model(model, make_settings(model, lora))
    except ValueError as error:
        raise ModelError(
            f"lora.target_modules {lora.target_modules}: {' '.join(str(error).split())[:200]}"
        ) from None
    replace_layer_methods(adapted)
    return adapted


def make_settings(model: torch.nn.Module, lora: Lora) -> LoraConfig:
    """Return PEFT's settings of a new adapter on a model."""
    targets = lora.target_modules
    if not isinstance(targets, str):
        targets = list(targets)
    excluded = None
    # Who names modules has told which ones, wherever they are.
    if targets == "all-linear" and (untrained := list_untrained(model)):
        # PEFT compares this pattern with whole names.
        excluded = rf"(?:{'|'.join(map(re.escape, untrained))})(?:\..*)?"
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=excluded,
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
    )


def replace_layer_methods(model: PeftModel) -> None:
    """Let the LoRA layers keep less memory for the backward pass.

    All of them get dropout that stores no mask, and plain ones the forward of overrides.py.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        # forward_lora recognises this class and then stores a seed instead of the dropped input.
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, torch.nn.Dropout):
                layer.lora_dropout[name] = SeededDropout(dropout.p)
    apply_overrides(layers, ADAPTER_OVERRIDES, model.get_input_embeddings().weight.dtype)


def adapter_weights(
    model: PeftModel, values: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors on the CPU, by PEFT's names.

    Args:
        model: The model with its adapter.
        values: The values by parameter name, where a strategy has gathered them from all ranks;
            the model's own by default.
    """
    state = get_peft_model_state_dict(model, state_dict=values)
    # safetensors writes contiguous tensors only.
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def name_parameters(model: PeftModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of adapter_weights by the names of the model's parameters."""
    named = trainable(model)
    # PEFT's keys lack the name of the adapter. The parameters themselves go through PEFT's renaming
    # here, and their identity tells which key belongs to which name.
    names = {id(parameter): name for name, parameter in named.items()}
    keys = get_peft_model_state_dict(model, state_dict=named)
    return {names[id(parameter)]: weights[key] for key, parameter in keys.items()}


def restore_adapter(
    model: PeftModel, weights: dict[str, torch.Tensor], whole: Collection[str] = ()
) -> None:
    """Load tensors of adapter_weights into the model's adapter.

    Args:
        model: The model with its adapter.
        weights: The tensors, by PEFT's names.
        whole: Names of embeddings and heads that may be among them, where they are saved beside
            the adapter.

    Raises:
        ModelError: A tensor is missing, surplus or of another shape.
    """
    # PEFT loads with strict=False, which passes over missing and surplus tensors, so they are
    # looked for here. It would ask the hub whether embeddings belong to an adapter if not told.
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing = set(expected) - set(weights)
    surplus = set(weights) - set(expected) - set(whole)
    mismatched = sorted(missing | surplus)
    if not mismatched:
        mismatched = [key for key in expected if expected[key].shape != weights[key].shape]
    if mismatched:
        raise ModelError(
            f"adapter does not fit this model: tensor {mismatched[0]} is missing, surplus or of"
            " another shape"
        )
    set_peft_model_state_dict(model, weights)


def load_adapter(model: torch.nn.Module, folder: Path) -> PeftModel:
    """Put a saved adapter on a base model for evaluation.

    Raises:
        ModelError: The folder holds no adapter, one for another base, or one that the transformers
            engine does not compute.
    """
    # PEFT changes the model in place, so an adapter for another base is refused first.
    check_adapter(folder, model.config)
    read_settings(folder, "hf")
    whole = name_whole_embeddings(list_embeddings(model))
    rows = count_rows(folder, whole)
    if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
        # The adapter brings embeddings with tokens added, which PEFT puts into those of the model.
        model.resize_token_embeddings(rows, mean_resizing=False)
    weights = rename_modules(model, load_weights(folder / "adapter_model.safetensors"))
    try:
        with warnings.catch_warnings():
            # PEFT only warns of a tensor that is missing; restore_adapter refuses it.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            # It also warns of tied layers, which merge_plan separates where that is needed.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            adapted = PeftModel.from_pretrained(model, folder)
    except torch.OutOfMemoryError:
        raise
    # PEFT fails in any line where a module, a size, a quantization or a setting does not fit.
    except Exception as error:  # noqa: BLE001
        raise ModelError(f"adapter {folder} does not fit this model: {describe(error)}") from None
    restore_adapter(adapted, weights, whole)
    replace_layer_methods(adapted)
    return adapted


def rename_modules(
    model: torch.nn.Module, weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors by the names that the base's modules have in this version.

    transformers has renamed the modules of some models, such as Gemma-3 with vision.
    """
    known = dict(model.named_modules())
    renamed = {}
    for key, tensor in weights.items():
        module, update, part = key.removeprefix(PREFIX).partition(".lora_")
        if update and module not in known:
            weight = f"{module}.weight"
            module = (map_names(model, [weight])[weight] or weight).removesuffix(".weight")
            key = f"{PREFIX}{module}{update}{part}"
        renamed[key] = tensor
    return renamed


def read_adapter_metadata(folder: Path) -> dict[str, Any]:
    """Return the adapter metadata: the content of medqlora.json.

    It names the base and holds its architecture's hash, the quantization, the prompt style, the
    completion and the prompt's fingerprint. An adapter of another program has none.

    Raises:
        ModelError: The folder holds no adapter, or weights that do not match the metadata.
    """
    folder = expand_path(folder, "adapter")
    if (
        not (folder / "adapter_config.json").is_file()
        or not (folder / "adapter_model.safetensors").is_file()
    ):
        if (folder / "config.json").is_file() and read_metadata(folder).get("method") == "full":
            raise ModelError(
                f"adapter {folder}: a whole model (training.method full), so there is nothing to"
                " merge or to put on a base; give this folder as --model or model.base"
            )
        raise ModelError(
            f"adapter {folder}: no adapter_config.json and adapter_model.safetensors; give a run's"
            " adapter folder"
        )
    if not os.path.lexists(folder / FILE):
        return {}
    metadata = read_metadata(folder)
    if not metadata:
        raise ModelError(f"adapter {folder}: {FILE} is empty; restore the file")
    check_present(folder, metadata, ("base", "architecture_sha256"))
    for key, name in HASHED.items():
        if metadata.get(key) not in (None, hash_file(folder / name)):
            raise ModelError(
                f"adapter {folder}: {name} is not the file medqlora.json describes; it was cut or"
                " changed"
            )
    return metadata


def check_adapter(folder: Path, config: PretrainedConfig) -> dict[str, Any]:
    """Return the adapter metadata if the adapter was trained on a base of this architecture.

    Raises:
        ModelError: The adapter was trained on another base.
    """
    metadata = read_adapter_metadata(folder)
    # An adapter of another program has no hash, but the sizes of its matrices tell.
    if not metadata:
        check_sizes(folder, make_skeleton(config))
    elif metadata["architecture_sha256"] != architecture_hash(config):
        raise ModelError(
            f"adapter {folder} was trained on {metadata['base']}; this base has another"
            " architecture; give that one with --base or --model"
        )
    return metadata


def check_sizes(folder: Path, model: torch.nn.Module) -> None:
    """Refuse an adapter with a matrix that does not fit its layer, before any weight is loaded.

    Args:
        folder: The adapter's folder.
        model: The base without weights, as make_skeleton returns it.

    Raises:
        ModelError: The adapter was trained on another base.
    """
    known = dict(model.named_modules())
    head = model.get_output_embeddings()  # An adapter may bring one of another size.
    for key, shape in read_shapes(folder / "adapter_model.safetensors").items():
        module, _, part = key.removeprefix(PREFIX).partition(".lora_")
        linear = known.get(module)
        # PEFT itself resolves what has no such layer here; load_adapter compares all names then.
        if part not in ("A.weight", "B.weight") or not isinstance(linear, LINEAR):
            continue
        if linear is head:
            continue
        sizes = list(linear.weight.shape)  # [out, in], which a Conv1D turns round
        if isinstance(linear, Conv1D):
            sizes.reverse()
        found, expected = (shape[1], sizes[1]) if part == "A.weight" else (shape[0], sizes[0])
        if found != expected:
            raise ModelError(
                f"adapter {folder} does not fit this model: {module} has {expected}"
                f" {'inputs' if part == 'A.weight' else 'outputs'}, and {found} in the adapter;"
                " give the base that it was trained on"
            )


def save_adapter(
    folder: Path,
    model: PeftModel,
    metadata: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a PEFT adapter with its metadata.

    Each file is replaced as a whole. The metadata holds the weights' hash, so that a kill between
    two files is noticed when the adapter is read.

    Args:
        folder: The adapter's folder; its parent must exist.
        model: The model with its adapter.
        metadata: The content of medqlora.json (see read_adapter_metadata).
        weights: Tensors of adapter_weights; the model's own by default.

    Raises:
        ModelError: The disk refuses.
    """
    if weights is None:
        weights = adapter_weights(model)
    try:
        write_adapter_files(folder, model, metadata, weights)
    except OSError as error:
        raise ModelError(
            f"adapter {folder} cannot be written: {error.strerror or error}; free space and"
            " continue with --resume"
        ) from None


def write_adapter_files(
    folder: Path, model: PeftModel, metadata: dict[str, Any], weights: dict[str, torch.Tensor]
) -> None:
    """Write the three files of an adapter aside, then move each to its place."""
    # The folder aside lies on the same file system, where os.replace is one atomic step. Its name
    # is one of files.UNFINISHED, so a resumed run removes what a kill has left.
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    aside.mkdir(parents=True)
    try:
        # The writer of safetensors reports a full disk as an error of the format, so its bytes are
        # written here.
        content = serialize(weights, metadata={"format": "pt"})
        (aside / "adapter_model.safetensors").write_bytes(content)
        model.active_peft_config.save_pretrained(aside)
        digests = {key: hash_file(aside / name) for key, name in HASHED.items()}
        (aside / FILE).write_text(
            json.dumps({**metadata, **digests}, indent=2) + "\n", encoding="utf-8"
        )
        # A rename cannot replace a folder that has content, so the files move one by one.
        folder.mkdir(exist_ok=True)
        # The metadata moves last. Until then its old hash does not fit the new weights, and
        # read_adapter_metadata refuses the pair.
        for name in ("adapter_config.json", "adapter_model.safetensors", FILE):
            os.replace(aside / name, folder / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
