"""Adapter + base shards -> merged shards, one tensor in memory at a time; and the check that they
agree.
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

SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
COPIED = (
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


class AdapterTensors:
    """The adapter's tensors by base module: A [r, in], B [out, r], DoRA magnitude [out] or None,
    and the scale.
    """

    def __init__(self, folder: Path):
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
        self.scale = settings["lora_alpha"] / (
            math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"]
        )
        self.modules: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(folder / "adapter_model.safetensors").items():
            module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
            self.modules.setdefault(module, {})[part.partition(".")[0]] = tensor.float()

    def apply(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """weight [out, in] float32 -> merged, in place where it can be. DoRA: arXiv 2402.09353, eq.
        5.
        """
        parts = self.modules[module]
        if weight.shape != (parts["B"].shape[0], parts["A"].shape[1]):
            raise MergeError(
                f"tensor {module}.weight is {list(weight.shape)} in the base,"
                f" {[parts['B'].shape[0], parts['A'].shape[1]]} in the adapter; this is not the"
                " base that was trained on"
            )
        weight.addmm_(parts["B"], parts["A"], alpha=self.scale)
        if "magnitude_vector" in parts:
            weight.mul_((parts["magnitude_vector"].view(-1) / weight.norm(dim=1))[:, None])
        return weight


def list_shards(folder: Path) -> list[Path]:
    """The base's weight files.

    Raises:
        MergeError: a file of the index is missing.
    """
    index = folder / INDEX
    if not index.is_file():
        return (
            [folder / "model.safetensors"]
            if (folder / "model.safetensors").is_file()
            else sorted(folder.glob("*.safetensors"))
        )
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise MergeError(
            f"base {folder}: {INDEX} names {missing[0]}, which is missing; fetch the whole model"
        )
    return [folder / name for name in names]


def quantized_modules(config: PretrainedConfig) -> set[str]:
    """Names of the linear layers that bitsandbytes quantizes when this architecture loads in 4 or 8
    bits.
    """
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    kept = get_keys_to_not_convert(model)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not any(name == k or name.startswith(f"{k}.") for k in kept)
    }


def make_dequantizer(
    quantization: str, double: bool, dtype: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Weight as loaded -> the weight that training really multiplied with, through quantization and
    back.
    """
    import bitsandbytes.functional as bnb

    def through_4bit(weight: torch.Tensor) -> torch.Tensor:
        # double quantization is compress_statistics in bitsandbytes
        packed, state = bnb.quantize_4bit(
            weight.to(dtype).contiguous(), compress_statistics=double, quant_type=quantization
        )
        return bnb.dequantize_4bit(packed, state)

    def through_8bit(weight: torch.Tensor) -> torch.Tensor:
        values, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return bnb.int8_vectorwise_dequant(values, scales)

    return through_8bit if quantization == "int8" else through_4bit


class ShardWriter:
    """A safetensors file written one tensor at a time (the library's own writer wants all of them
    at once).

    Format: 8-byte little-endian header length, JSON header, raw tensors; see the safetensors
    documentation.
    """

    def __init__(self, path: Path, layout: dict[str, tuple[torch.dtype, list[int]]]):
        header = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, (dtype, shape) in layout.items():
            size = math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": SAFETENSORS_NAMES[dtype],
                "shape": shape,
                "data_offsets": [at, at + size],
            }
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.names = iter(layout)
        self.size = at
        self.file: BinaryIO = path.open("wb")
        self.file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        assert name == next(self.names), "tensors are written in the order of the layout"
        self.file.write(tensor.contiguous().view(torch.uint8).numpy().data)

    def close(self) -> None:
        self.file.close()


def read_layout(path: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
    kinds = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
    with safe_open(path, "pt") as file:
        layout = {}
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            part = file.get_slice(name)
            if part.get_dtype() not in kinds:
                raise MergeError(
                    f"{path.name}: tensor {name} is {part.get_dtype()}; merge from an unquantized"
                    " 16- or 32-bit base"
                )
            layout[name] = (kinds[part.get_dtype()], list(part.get_shape()))
    return layout


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor, copied: the file's mapping ends here, so that its pages do not stay resident."""
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
    """Write the merged model to `output`, which must not exist.

    Args:
        adapter: PEFT folder.
        base: local folder with safetensors.
        config: the base's.
        metadata: the adapter's medqlora.json.
        base_weights: "dequantized" (the weights that were trained on, after quantization and back)
            or "original".

    Yields:
        (tensors done, tensors in all), for a progress bar.

    Raises:
        MergeError: see above; nothing is left in `output`.
    """
    tensors = AdapterTensors(adapter)
    shards = list_shards(base)
    layouts = {shard: read_layout(shard) for shard in shards}
    names = {name for layout in layouts.values() for name in layout}
    module_of = {resolve_name(module, names): module for module in tensors.modules}
    quantization = metadata.get("quantization", "none") if base_weights == "dequantized" else "none"
    dtype = (
        DTYPES[metadata["dtype"]]
        if metadata.get("dtype")
        else next(iter(layouts[shards[0]].values()))[0]
    )
    through = None
    quantized = set()
    if quantization != "none":
        through = make_dequantizer(quantization, metadata.get("double_quantization", True), dtype)
        quantized = {resolve_name(module, names) for module in quantized_modules(config)}
    aside = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        done = 0
        total = len(names)
        weight_map = {}
        size = 0
        for shard in shards:
            layout = {
                name: (dtype if kind.is_floating_point else kind, shape)
                for name, (kind, shape) in layouts[shard].items()
            }
            writer = ShardWriter(aside / shard.name, layout)
            for name in layout:
                tensor = read_tensor(shard, name)
                if name in quantized:
                    tensor = through(tensor)
                if name in module_of:
                    tensor = tensors.apply(module_of[name], tensor.float())
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
        shutil.rmtree(aside, ignore_errors=True)
        raise


def resolve_name(module: str, names: set[str]) -> str:
    """The tensor's name in the base's files."""
    name = f"{module}.weight"
    if name not in names:
        reason = (
            "it shares the embedding's weights"
            if module.endswith("lm_head")
            else "the base stores it under another name"
        )
        raise MergeError(
            f"tensor {name} of the adapter is not in the base: {reason}, or this is not the base"
            " that was trained on"
        )
    return name


def copy_rest(
    base: Path, adapter: Path, output: Path, config: PretrainedConfig, dtype: torch.dtype
) -> None:
    """Copy configuration, tokenizer, chat template and licence, and the metadata of the adapter."""
    for path in base.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name.startswith(COPIED):
            shutil.copyfile(path, output / path.name)
    facts = json.loads((base / "config.json").read_text(encoding="utf-8"))
    facts.pop("quantization_config", None)
    facts.pop("torch_dtype", None)
    facts["dtype"] = str(dtype).removeprefix("torch.")
    (output / "config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if (adapter / "medqlora.json").is_file():
        shutil.copyfile(adapter / "medqlora.json", output / "medqlora.json")


@torch.inference_mode()
def compare_logits(reference: list[torch.Tensor], merged: list[torch.Tensor]) -> dict[str, float]:
    """Logits float32 [vocab] at the last position of each prompt, from both models -> largest and
    mean relative error (by the norm of the centred reference) and the part of prompts with the same
    most likely token."""
    errors = []
    same = []
    for a, b in zip(reference, merged, strict=True):
        a = a - a.mean()
        b = b - b.mean()
        errors.append((torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a)).item())
        same.append(bool(a.argmax() == b.argmax()))
    return {
        "max_relative_error": max(errors),
        "mean_relative_error": sum(errors) / len(errors),
        "same_top_token": sum(same) / len(same),
    }
