"""Training of every weight of a language model, and the Hugging Face folder that holds the result.

The folder has the files of the base, tensor by tensor, with the trained weights in the compute
dtype: these are the weights that each forward pass computed with.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from medqlora.model.adapter_metadata import FILE, check_present, read_metadata
from medqlora.model.adapter_preview import Preview
from medqlora.model.base import ModelError, list_towers
from medqlora.model.checkpoint_names import make_skeleton, map_names
from medqlora.model.hardware import name_dtype
from medqlora.model.identity import hash_base
from medqlora.model.weight_files import (
    INDEX,
    MergeError,
    ShardWriter,
    copy_companions,
    is_finite,
    list_shards,
    read_layout,
    read_tensor,
)


def list_trained(causal: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that training.method full trains, by name.

    They are all parameters of the language model, its embeddings and head included. Towers for
    images or sound, and the projectors behind them, are no part of it. A head that is tied to the
    embeddings is one parameter with them.
    """
    towers = tuple(f"{name}." for name in list_towers(causal))
    return {
        name: parameter
        for name, parameter in causal.named_parameters()
        if not name.startswith(towers)
    }


def unfreeze(base: torch.nn.Module) -> torch.nn.Module:
    """Let every weight of a base's language model train, and return the base, which is changed.

    Raises:
        ModelError: A weight is held in another dtype than the embeddings.
    """
    dtype = base.get_input_embeddings().weight.dtype  # the compute dtype
    for name, parameter in list_trained(base).items():
        # Strategies cast all weights alike, and would compute with another dtype than transformers.
        if parameter.dtype is not dtype:
            raise ModelError(
                f"training.method full: transformers holds {name} in {name_dtype(parameter.dtype)}"
                f" beside weights in {name_dtype(dtype)}; set model.dtype float32, or train an"
                " adapter"
            )
        parameter.requires_grad_(True)
    return base


def preview_full(config: PretrainedConfig) -> Preview:
    """Count what training.method full will train and leave; no weight is loaded.

    Raises:
        ModelError: transformers has no causal language model of this architecture.
    """
    model = make_skeleton(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in list_trained(model).values())
    return Preview(
        base_parameters=total,
        frozen_parameters=total - trained,
        trained_parameters=trained,
        kept_parameters=0,
        kept_example="",
        settings={},
        tensors={},
        unmergeable=None,
    )


def place_tensors(base: Path, config: PretrainedConfig) -> dict[Path, dict[str, str | None]]:
    """Return the parameter that each tensor of a base's files is, file by file.

    A head that is tied to the embeddings has their name. A tensor that is no trained weight has
    None.

    Raises:
        ModelError: A trained weight is not one tensor of the files, so it could not be written.
    """
    model = make_skeleton(config)
    first_names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first_names[id(parameter)] = name
    # A shared parameter has several names here, and named_parameters above gave the first of them.
    aliases = {
        name: first_names[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    trained = list_trained(model)
    places: dict[Path, dict[str, str | None]] = {}
    found: set[str] = set()
    for shard in list_shards(base):
        mapped = map_names(model, read_layout(shard))
        names = {name: aliases.get(parameter or "") for name, parameter in mapped.items()}
        places[shard] = {name: key if key in trained else None for name, key in names.items()}
        found.update(key for key in names.values() if key is not None)
    missing = sorted(trained.keys() - found)
    if missing:
        raise ModelError(
            f"training.method full: transformers makes {missing[0]} of other tensors of the files"
            f" of {base}, so the trained weight could not be written; train an adapter"
        )
    return places


def check_writable(base: Path, config: PretrainedConfig) -> None:
    """Refuse a base whose trained weights could not be written in the form of its files.

    Raises:
        ModelError: The message names the tensor.
    """
    try:
        place_tensors(base, config)
    except MergeError as error:
        raise ModelError(f"training.method full: {error}") from None


def save_model(
    folder: Path,
    base: Path,
    config: PretrainedConfig,
    weights: dict[str, torch.Tensor],
    metadata: dict[str, Any],
) -> None:
    """Write a whole model in place of the one before it, if there is one.

    The folder is written aside and gets its name when it is whole. A kill between the two renames
    leaves no folder of this name, and a resumed run puts it back from its checkpoint.

    Args:
        folder: The model's folder; its parent must exist.
        base: The local folder of the base.
        config: The config of the base.
        weights: The trained weights by parameter name, float32 on the CPU.
        metadata: The content of medqlora.json, where `dtype` is the compute dtype's name.

    Raises:
        ModelError: A weight is not finite in the compute dtype, or the disk refuses.
    """
    try:
        # A resumed run removes what a kill has left under such a name (files.UNFINISHED).
        aside = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
        aside.mkdir(parents=True)
        try:
            write_weights(aside, base, config, weights, getattr(torch, metadata["dtype"]))
            copy_companions(base, aside)
            write_config(base, aside, metadata["dtype"])
            described = {**metadata, "method": "full", "weights_sha256": hash_base(aside)}
            (aside / FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            exchange(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"model {folder} cannot be written: {error.strerror or error}; free space and continue"
            " with --resume"
        ) from None


def write_weights(
    output: Path,
    base: Path,
    config: PretrainedConfig,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Write the weight files, one tensor in memory at a time, and their index."""
    places = place_tensors(base, config)
    size = 0
    for shard, names in places.items():
        layout = {name: (dtype, shape) for name, (_, shape) in read_layout(shard).items()}
        writer = ShardWriter(output / shard.name, layout)
        for name, key in names.items():
            tensor = read_tensor(shard, name) if key is None else weights[key]
            assert list(tensor.shape) == layout[name][1], f"{name} has another shape than its base"
            tensor = tensor.to(dtype)
            if key is not None and not is_finite(tensor):
                raise ModelError(
                    f"weight {name} is not finite in {name_dtype(dtype)}: the training has"
                    " diverged; lower training.lr"
                )
            writer.write(name, tensor)
        writer.close()
        size += writer.size
    if len(places) > 1:
        files = {name: shard.name for shard, names in places.items() for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (output / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_config(base: Path, output: Path, dtype: str) -> None:
    """Write the base's config with the dtype of the trained weights."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # The name of "dtype" in older versions of transformers.
    text = json.dumps({**config, "dtype": dtype}, indent=2) + "\n"
    (output / "config.json").write_text(text, encoding="utf-8")


def exchange(new: Path, folder: Path) -> None:
    """Give a new folder the name of an old one, which is removed."""
    old = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    if os.path.lexists(folder):
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_full_metadata(folder: Path) -> dict[str, Any]:
    """Return the content of a trained model's medqlora.json.

    Raises:
        ModelError: There is no such model, or its files are not those that were written.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {folder}: no config.json; the trained model is gone, restore it")
    metadata = read_metadata(folder)
    check_present(folder, metadata, ("base", "weights_sha256"))
    if not metadata or hash_base(folder) != metadata["weights_sha256"]:
        raise ModelError(
            f"model {folder}: its weights are not those that {FILE} describes; a file was cut or"
            " changed"
        )
    return metadata


def load_trained(folder: Path, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Return the trained weights of a model's files by parameter name, on the CPU.

    Raises:
        ModelError: The files are damaged.
    """
    return {
        key: read_tensor(shard, name)
        for shard, names in place_tensors(folder, config).items()
        for name, key in names.items()
        if key is not None
    }
