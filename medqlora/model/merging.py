"""Merge an adapter into the weight files of its base, with one tensor in memory at a time.

compare_logits checks that the merged model and the base with its adapter agree.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.quantizers.base import get_keys_to_not_convert

from medqlora.core.errors import UserError
from medqlora.model.hardware import DTYPES

# The dtypes that can be merged, with their names in the headers of safetensors files.
SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# The base's files with these beginnings of names are copied to the merged model.
COPIED_PREFIXES = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "merges",
    "chat_template",
    "generation_config",
    "LICENSE",
)
INDEX = "model.safetensors.index.json"


class MergeError(UserError):
    """An adapter and a base that cannot be merged."""


# Keys of PEFT's adapter_config.json that give modules a rank or scale of their own, transpose the
# update, or repeat layers.
UNSUPPORTED = ("rank_pattern", "alpha_pattern", "fan_in_fan_out", "layer_replication")


class AdapterTensors:
    """The tensors of an adapter by the base's modules.

    `modules` holds for each module the float32 tensors "A" [r, in], "B" [out, r] and, for DoRA,
    "magnitude_vector" [out]. `scale` is alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski,
    2023, arXiv 2312.03732).
    """

    def __init__(self, folder: Path):
        """Read a PEFT adapter.

        Raises:
            MergeError: The adapter is of a kind that cannot be merged.
        """
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if (
            settings.get("peft_type") != "LORA"
            or settings.get("bias", "none") != "none"
            or settings.get("modules_to_save")
        ):
            raise MergeError(
                f"adapter {folder}: only LoRA, rsLoRA and DoRA without bias and modules_to_save can"
                " be merged"
            )
        # An adapter of another program may have these, and each would change the update silently.
        unknown = [key for key in UNSUPPORTED if settings.get(key)]
        if unknown:
            raise MergeError(
                f"adapter {folder}: {unknown[0]} in adapter_config.json cannot be merged; merge it"
                " with the program that trained it"
            )
        rank = settings["r"]
        divisor = math.sqrt(rank) if settings.get("use_rslora") else rank
        self.scale = settings["lora_alpha"] / divisor
        self.modules: dict[str, dict[str, torch.Tensor]] = {}
        # A key begins with base_model.model.MODULE.lora_PART, where PART is A, B or
        # magnitude_vector.
        for key, tensor in load_file(folder / "adapter_model.safetensors").items():
            module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
            self.modules.setdefault(module, {})[part.partition(".")[0]] = tensor.float()

    def apply(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """Add the adapter's update to a module's weight, in place.

        DoRA also scales each row (Liu et al., 2024, arXiv 2402.09353, equation 5).

        Args:
            module: The name of the module in the base.
            weight: float32 [out, in], which is changed.

        Returns:
            The same tensor.

        Raises:
            MergeError: The weight has another shape than the adapter's base.
        """
        parts = self.modules[module]
        expected = [parts["B"].shape[0], parts["A"].shape[1]]
        if list(weight.shape) != expected:
            raise MergeError(
                f"tensor {module}.weight is {list(weight.shape)} in the base, {expected} in the"
                " adapter; this is not the base that was trained on"
            )
        # The sum is made in float32 and rounded once, when it is written.
        weight.addmm_(parts["B"], parts["A"], alpha=self.scale)
        if "magnitude_vector" in parts:
            # DoRA takes the norm of the weight with its update, so this follows the sum.
            row_scale = parts["magnitude_vector"].view(-1) / weight.norm(dim=1)  # [out]
            weight.mul_(row_scale[:, None])
        return weight


def list_shards(folder: Path) -> list[Path]:
    """Return the base's weight files.

    Raises:
        MergeError: A file that the index names is missing.
    """
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        # Without an index there is one file of the usual name, or files of other names.
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise MergeError(
            f"base {folder}: {INDEX} names {missing[0]}, which is missing; fetch the whole model"
        )
    return [folder / name for name in names]


def quantized_modules(config: PretrainedConfig) -> set[str]:
    """Return the names of the linear layers that transformers quantizes in this architecture."""
    # Only names are needed, so the model is made on the meta device.
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    # transformers itself leaves the head and tied weights unquantized. With another list the merge
    # would round weights that training did not.
    unquantized = get_keys_to_not_convert(model)
    names = set()
    for name, module in model.named_modules():
        kept = any(name == key or name.startswith(f"{key}.") for key in unquantized)
        if isinstance(module, torch.nn.Linear) and not kept:
            names.add(name)
    return names


def make_dequantizer(
    quantization: str, double: bool, dtype: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that quantizes a weight and dequantizes it again.

    Its result [out, in] is the weight that training multiplied with. The 4-bit types are those of
    QLoRA (Dettmers et al., 2023, arXiv 2305.14314), the 8-bit type is that of LLM.int8 (Dettmers et
    al., 2022, arXiv 2208.07339).

    Args:
        quantization: "nf4", "fp4" or "int8".
        double: Whether the 4-bit scales were quantized too.
        dtype: The compute dtype.
    """
    import bitsandbytes.functional as bnb

    def round_trip_4bit(weight: torch.Tensor) -> torch.Tensor:
        # load_base casts to the compute dtype before the weight is quantized. From another dtype
        # the codes may differ.
        # bitsandbytes calls double quantization compress_statistics.
        packed, state = bnb.quantize_4bit(
            weight.to(dtype).contiguous(), compress_statistics=double, quant_type=quantization
        )
        return bnb.dequantize_4bit(packed, state)

    def round_trip_8bit(weight: torch.Tensor) -> torch.Tensor:
        # bitsandbytes itself quantizes int8 weights from float16, whatever their dtype.
        values, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return bnb.int8_vectorwise_dequant(values, scales)

    return round_trip_8bit if quantization == "int8" else round_trip_4bit


class ShardWriter:
    """Writes a safetensors file one tensor at a time.

    The writer of the safetensors library needs all tensors at once. A file is the length of the
    header in 8 bytes (little-endian), the header in JSON and the raw tensors, as the documentation
    of safetensors says.
    """

    def __init__(self, path: Path, layout: dict[str, tuple[torch.dtype, list[int]]]):
        """Open a file and write its header.

        Args:
            path: The file.
            layout: The dtype and the shape of each tensor, in the order in which they are written.
        """
        header = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in layout.items():
            size = math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": SAFETENSORS_NAMES[dtype],
                "shape": shape,
                # Offsets count from the end of the header.
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # The tensors begin at a multiple of 8 bytes.
        self.names = iter(layout)
        self.size = offset  # bytes of all tensors
        self.file: BinaryIO = path.open("wb")
        self.file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor of the layout."""
        assert name == next(self.names), "tensors are written in the order of the layout"
        # numpy has no bfloat16, so the tensor is seen as bytes.
        self.file.write(tensor.contiguous().view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_layout(path: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Return the dtype and the shape of each tensor of a weight file.

    Raises:
        MergeError: A tensor is of a dtype that cannot be merged.
    """
    dtypes = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
    with safe_open(path, "pt") as file:
        layout = {}
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            # A slice tells dtype and shape without reading the tensor.
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in dtypes:
                raise MergeError(
                    f"{path.name}: tensor {name} is {tensor.get_dtype()}; merge from an unquantized"
                    " 16- or 32-bit base"
                )
            layout[name] = (dtypes[tensor.get_dtype()], list(tensor.get_shape()))
    return layout


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Return a copy of one tensor.

    The file is mapped into memory here only, so its pages do not stay resident.
    """
    with safe_open(path, "pt") as file:
        return file.get_tensor(name).clone()


def merge(
    adapter: Path,
    base: Path,
    output: Path,
    config: PretrainedConfig,
    metadata: dict[str, Any],
    base_weights: str,
) -> Iterator[tuple[int, int]]:
    """Write the merged model to a new folder.

    Args:
        adapter: The folder of a PEFT adapter.
        base: The local folder of the base, with safetensors files.
        output: The folder to write, which must not exist.
        config: The base's config.
        metadata: The adapter metadata (see adapter.read_adapter_metadata).
        base_weights: "dequantized" for the weights that were trained on, which went through
            quantization and back, or "original" for the weights of the files.

    Yields:
        The number of tensors that are done and the number of all, for a progress bar.

    Raises:
        MergeError: The adapter and the base do not fit, or the disk refuses. Then `output` does not
            exist.
    """
    # Names and dtypes that do not fit are refused before anything is written.
    tensors = AdapterTensors(adapter)
    shards = list_shards(base)
    layouts = {shard: read_layout(shard) for shard in shards}
    names = set().union(*layouts.values())
    adapted_modules = {resolve_name(module, names): module for module in tensors.modules}
    if metadata.get("dtype"):
        dtype = DTYPES[metadata["dtype"]]
    else:
        # Without metadata the merged model gets the dtype of the base's first tensor.
        dtype, _ = next(iter(layouts[shards[0]].values()))
    quantization = "none"
    if base_weights == "dequantized":
        quantization = metadata.get("quantization", "none")
    quantize_and_back = None
    quantized = set()
    if quantization != "none":
        double = metadata.get("double_quantization", True)
        quantize_and_back = make_dequantizer(quantization, double, dtype)
        quantized = {resolve_name(module, names) for module in quantized_modules(config)}
    # The folder aside lies on the same file system, so the rename at the end is one step and
    # `output` is never half a model.
    aside = output.with_name(f".{output.name}.tmp")
    # A merge that was killed may have left such a folder.
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        done = 0
        total = len(names)
        weight_map = {}
        size = 0
        for shard in shards:
            layout = {name: (dtype, shape) for name, (_, shape) in layouts[shard].items()}
            writer = ShardWriter(aside / shard.name, layout)
            for name in layout:
                tensor = read_tensor(shard, name)
                # The weight is rounded before the update is added, because training added the
                # update to the rounded weight. Rounding the sum would lose nearly all of a small
                # update.
                if name in quantized:
                    tensor = quantize_and_back(tensor)
                if name in adapted_modules:
                    tensor = tensors.apply(adapted_modules[name], tensor.float())
                writer.write(name, tensor.to(dtype))
                weight_map[name] = shard.name
                done += 1
                yield done, total
            writer.close()
            size += writer.size
        copy_rest(base, adapter, aside, config, dtype)
        if len(shards) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (aside / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        aside.rename(output)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise MergeError(
            f"--output {output} cannot be written: {error.strerror or error}; free space or choose"
            " another folder"
        ) from None
    except BaseException:
        # Also an interrupt, or a caller that stops iterating, must leave no half written model.
        shutil.rmtree(aside, ignore_errors=True)
        raise


def resolve_name(module: str, names: set[str]) -> str:
    """Return the name of a module's weight in the base's files.

    Raises:
        MergeError: The files have no such tensor.
    """
    name = f"{module}.weight"
    if name not in names:
        reason = "the base stores it under another name"
        if module.endswith("lm_head"):
            reason = "it shares the embedding's weights"
        raise MergeError(
            f"tensor {name} of the adapter is not in the base: {reason}, or this is not the base"
            " that was trained on"
        )
    return name


def copy_rest(
    base: Path, adapter: Path, output: Path, config: PretrainedConfig, dtype: torch.dtype
) -> None:
    """Copy config, tokenizer, chat template and licence of the base, and the adapter metadata."""
    # The base's own weights must not stand beside the merged ones.
    for path in base.iterdir():
        if (
            path.is_file()
            and path.suffix != ".safetensors"
            and path.name.startswith(COPIED_PREFIXES)
        ):
            shutil.copyfile(path, output / path.name)
    merged_config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    # With this key transformers would take the merged weights for quantized ones or quantize them.
    merged_config.pop("quantization_config", None)
    merged_config.pop("torch_dtype", None)  # the name of "dtype" in older versions
    merged_config["dtype"] = str(dtype).removeprefix("torch.")
    text = json.dumps(merged_config, indent=2) + "\n"
    (output / "config.json").write_text(text, encoding="utf-8")
    # Evaluation reads the prompt style and the completion of a merged model from this file.
    if (adapter / "medqlora.json").is_file():
        shutil.copyfile(adapter / "medqlora.json", output / "medqlora.json")


@torch.inference_mode()
def compare_logits(reference: list[torch.Tensor], merged: list[torch.Tensor]) -> dict[str, float]:
    """Compare the logits of two models.

    A constant that is added to all logits changes no probability, so each prompt's logits are
    centred first.

    Args:
        reference: The logits at the last position of each prompt, float32 [vocab] each.
        merged: The same of the merged model.

    Returns:
        "max_relative_error" and "mean_relative_error" over the prompts of the norm of the
        difference by that of the reference, and "same_top_token", the part of the prompts with the
        same most likely token.
    """
    errors = []
    same = []
    for expected, logits in zip(reference, merged, strict=True):
        expected = expected - expected.mean()
        logits = logits - logits.mean()
        difference = torch.linalg.vector_norm(expected - logits)
        errors.append((difference / torch.linalg.vector_norm(expected)).item())
        same.append(bool(expected.argmax() == logits.argmax()))
    return {
        "max_relative_error": max(errors),
        "mean_relative_error": sum(errors) / len(errors),
        "same_top_token": sum(same) / len(same),
    }
