"""What a merge does to each tensor of the base's files, found before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from medqlora.model.adapter_tensors import AdapterTensors
from medqlora.model.base_weights import check_files
from medqlora.model.checkpoint_names import make_skeleton, map_names, quantized_modules
from medqlora.model.hardware import DTYPES
from medqlora.model.weight_files import MergeError, list_shards, read_layout


@dataclass(frozen=True)
class MergePlan:
    """What becomes of each tensor of the base's files.

    Attributes:
        tensors: the adapter.
        layouts: the dtype and the shape of each tensor of the merged files, by the base's file.
        parameters: the model's name of each tensor; None for one that is only copied.
        quantized: the parameters that are quantized and dequantized first.
        transposed: the parameters that are stored as [in, out].
        head: the parameter of a head that gets weights of its own, because the adapter changes the
            head or the embedding that it was tied to; None otherwise.
        vocabulary: the rows of embeddings that the adapter brings with another size; None
            otherwise.
    """

    tensors: AdapterTensors
    layouts: dict[Path, dict[str, tuple[torch.dtype, list[int]]]]
    parameters: dict[str, str | None]
    quantized: set[str]
    transposed: set[str]
    head: str | None
    vocabulary: int | None


def plan_merge(
    adapter: Path, base: Path, config: PretrainedConfig, dtype_name: str | None, quantized: bool
) -> MergePlan:
    """Find what does not fit before anything is written.

    Args:
        adapter: The folder of a PEFT adapter.
        base: The local folder of the base.
        config: The base's config.
        dtype_name: The dtype of the merged model; that of the base's first tensor by default.
        quantized: Whether linear layers are quantized and dequantized first.

    Raises:
        ModelError: The adapter is of a kind that cannot be merged.
        MergeError: The adapter and the base do not fit.
    """
    check_files(base, config)
    model = make_skeleton(config)
    tensors = AdapterTensors(adapter, model)
    layouts = {shard: read_layout(shard) for shard in list_shards(base)}
    parameters = map_names(model, [name for layout in layouts.values() for name in layout])
    files = {parameter: name for name, parameter in parameters.items() if parameter is not None}
    rounded = {f"{module}.weight" for module in quantized_modules(model)} if quantized else set()
    head, embedding = find_tied_head(model)
    untied = head if head is not None and separates_head(tensors, head, embedding) else None
    for parameter in sorted(tensors.changed() | rounded):
        # A tied head has no tensor in the files.
        if parameter not in files and not (parameter == head and embedding in files):
            raise MergeError(describe_missing(parameter, model))
    if clash := rounded & set(tensors.replaced):
        raise MergeError(
            f"adapter {adapter}: it replaces {min(clash)}, which was quantized in training; merge"
            " it with --base_weights original"
        )
    dtype = DTYPES[dtype_name] if dtype_name else next(iter(layouts[min(layouts)].values()))[0]
    vocabulary = None
    merged: dict[Path, dict[str, tuple[torch.dtype, list[int]]]] = {}
    for shard, layout in layouts.items():
        merged[shard] = {}
        for name, (_, shape) in layout.items():
            if head is not None and parameters[name] == head:
                continue  # A copy of the embedding, which would now be another head.
            new = tensors.replaced.get(parameters[name])
            if new is not None and list(new.shape) != shape:
                vocabulary = check_resized(parameters[name], model, list(new.shape), shape)
                shape = list(new.shape)
            merged[shard][name] = (dtype, shape)
            if untied and parameters[name] == embedding:
                rows = tensors.replaced.get(untied)
                merged[shard][untied] = (dtype, shape if rows is None else list(rows.shape))
    transposed = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (Conv1D, torch.nn.Embedding))
    }
    return MergePlan(tensors, merged, parameters, rounded, transposed, untied, vocabulary)


def find_tied_head(model: torch.nn.Module) -> tuple[str | None, str | None]:
    """Return the parameters of a tied head and of its embedding; twice None without one."""
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None, None
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    return names[id(head)], names[id(embedding)]


def separates_head(tensors: AdapterTensors, head: str, embedding: str) -> bool:
    """Whether the adapter makes a tied head and its embedding different.

    Rows of tokens are trained in both at once, and a copy of both may be saved beside an adapter.
    """
    modules = {name.removesuffix(".weight") for name in (head, embedding)}
    if modules & set(tensors.modules):
        return True
    if len(modules & set(tensors.rows)) > 1:
        raise MergeError(
            "trainable_token_indices of a head that is tied to its embedding cannot be merged;"
            " merge it with the program that trained it"
        )
    copies = [tensors.replaced.get(name) for name in (head, embedding)]
    if copies[0] is None or copies[1] is None:
        return copies[0] is not copies[1]
    return not torch.equal(*copies)


def check_resized(parameter: str, model: torch.nn.Module, new: list[int], old: list[int]) -> int:
    """Return the rows of a replaced embedding or head of another size.

    Raises:
        MergeError: Another parameter has another size, or the width differs.
    """
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if any(module is embedding for embedding in embeddings)
    }
    if parameter not in names or new[1:] != old[1:]:
        raise MergeError(
            f"tensor {parameter} is {old} in the base, {new} in the adapter; this is not the base"
            " that was trained on"
        )
    return new[0]


def describe_missing(parameter: str, model: torch.nn.Module) -> str:
    """Return why a parameter has no tensor in the base's files."""
    if parameter not in model.state_dict():
        reason = "this architecture has no such tensor"
    else:
        reason = "transformers makes it of others, or this is not the base that was trained on"
    return (
        f"tensor {parameter} of the adapter is not in the base's files: {reason}; it cannot be"
        " merged, evaluate the adapter without merging"
    )
