"""Merge an adapter into the weight files of its base, with one tensor in memory at a time.

compare_logits checks that the merged model and the base with its adapter agree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from medqlora.model.adapter_tokenizer import save_tokenizer
from medqlora.model.base_weights import MERGED_WEIGHTS
from medqlora.model.hardware import name_dtype
from medqlora.model.merge_plan import MergePlan, plan_merge
from medqlora.model.weight_files import (
    INDEX,
    MergeError,
    ShardWriter,
    copy_companions,
    is_finite,
    read_tensor,
)


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


def merge(
    adapter: Path,
    base: Path,
    output: Path,
    config: PretrainedConfig,
    metadata: dict[str, Any],
    base_weights: str,
) -> Iterator[tuple[int, int]]:
    """Write the merged model to a folder.

    It may be another model than the trained one where a library computes something else, so the
    folder should get its name (see staging.stage_folder) after compare_logits only.

    Args:
        adapter: The folder of a PEFT adapter.
        base: The local folder of the base, with safetensors files.
        output: The folder to write, which must be new or empty.
        config: The base's config.
        metadata: The adapter metadata (see adapter.read_adapter_metadata).
        base_weights: "dequantized" for the weights that were trained on, which went through
            quantization and back, or "original" for the weights of the files.

    Yields:
        The number of tensors that are done and the number of all, for a progress bar.

    Raises:
        ModelError: The adapter is of a kind that cannot be merged.
        MergeError: The adapter and the base do not fit, or a merged weight is not finite.
        OSError: The disk refuses.
    """
    quantization = "none"
    if base_weights == "dequantized":
        quantization = metadata.get("quantization", "none")
    plan = plan_merge(adapter, base, config, metadata.get("dtype"), quantization != "none")
    dtype, _ = next(iter(next(iter(plan.layouts.values())).values()))
    quantize_and_back = None
    if quantization != "none":
        double = metadata.get("double_quantization", True)
        quantize_and_back = make_dequantizer(quantization, double, dtype)
    output.mkdir(parents=True, exist_ok=True)
    done = 0
    total = sum(map(len, plan.layouts.values()))
    weight_map = {}
    size = 0
    for shard, layout in plan.layouts.items():
        writer = ShardWriter(output / shard.name, layout)
        for name, tensor in merge_shard(plan, shard, quantize_and_back):
            tensor = tensor.to(dtype)
            # Tensors that are only copied are no weights of this model; masks may be infinite.
            if plan.parameters.get(name, plan.head) is not None and not is_finite(tensor):
                raise MergeError(
                    f"tensor {name} of the merged model is not finite in {name_dtype(dtype)}: the"
                    " adapter's update is too large or the base is damaged; fetch both again"
                )
            writer.write(name, tensor)
            weight_map[name] = shard.name
            done += 1
            yield done, total
        writer.close()
        size += writer.size
    copy_rest(base, adapter, output)
    write_config(base, output, plan, dtype)
    write_metadata(adapter, output, metadata, base_weights)
    if len(plan.layouts) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (output / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def merge_shard(
    plan: MergePlan, shard: Path, quantize_and_back: Callable[[torch.Tensor], torch.Tensor] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a merged file by name, in the order of its layout.

    Args:
        plan: The result of plan_merge.
        shard: The base's file.
        quantize_and_back: The result of make_dequantizer; None where nothing is quantized.
    """
    changed = plan.tensors.changed()
    before: torch.Tensor | None = None
    for name in plan.layouts[shard]:
        if name == plan.head:
            # The head follows the embedding that it was tied to.
            yield name, plan.tensors.apply(name, before)
            continue
        parameter = plan.parameters[name]
        transposed = parameter in plan.transposed
        tensor = read_tensor(shard, name)
        # Rounding to codes may turn infinite weights into numbers.
        if parameter in plan.quantized and not is_finite(tensor):
            raise MergeError(
                f"{shard.name}: tensor {name} is not finite; the base is damaged, fetch it again"
            )
        # The weight is rounded before the update is added, because training added the update to the
        # rounded weight. Rounding the sum would lose nearly all of a small update.
        if parameter in plan.quantized:
            rounded = quantize_and_back(tensor.T if transposed else tensor)
            tensor = rounded.T if transposed else rounded
        if plan.head is not None:
            before = tensor.float().clone()
        if parameter in changed:
            tensor = plan.tensors.apply(parameter, tensor.float(), transposed)
        yield name, tensor


def copy_rest(base: Path, adapter: Path, output: Path) -> None:
    """Copy tokenizer, chat template and licence; those beside the adapter win over the base's."""
    copy_companions(base, output)
    save_tokenizer(base, adapter, output)


def write_config(base: Path, output: Path, plan: MergePlan, dtype: torch.dtype) -> None:
    """Write the config of the merged model."""
    merged = json.loads((base / "config.json").read_text(encoding="utf-8"))
    merged.pop("torch_dtype", None)  # the name of "dtype" in older versions
    merged["dtype"] = name_dtype(dtype)
    # A model with vision has these keys in its text model's config, and transformers reads the
    # first one at the top too.
    text = merged.get("text_config", merged)
    if plan.head is not None:
        merged["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    if plan.vocabulary is not None:
        text["vocab_size"] = plan.vocabulary
    (output / "config.json").write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")


def write_metadata(
    adapter: Path, output: Path, metadata: dict[str, Any], base_weights: str
) -> None:
    """Write the adapter metadata beside the merged weights, with the kind of these weights.

    Evaluation reads from it how the model is asked, and what loads a base whether its weights may
    be quantized again.
    """
    if not metadata:
        return
    if metadata.get("quantization", "none") == "none":
        base_weights = "original"  # Nothing was quantized, so there is one kind of weights only.
    text = json.dumps({**metadata, MERGED_WEIGHTS: base_weights}, indent=2) + "\n"
    (output / "medqlora.json").write_text(text, encoding="utf-8")


@torch.inference_mode()
def compare_logits(reference: list[torch.Tensor], merged: list[torch.Tensor]) -> dict[str, float]:
    """Compare the logits of two models.

    A constant that is added to all logits changes no probability, so each prompt's logits are
    centred first.

    Args:
        reference: The logits at the last position of each prompt, float32 [vocab] each.
        merged: The same of the merged model.

    A prompt whose logits are not finite has an infinite error.

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
        error = (difference / torch.linalg.vector_norm(expected)).item()
        # max() would pass over NaN.
        errors.append(error if math.isfinite(error) else math.inf)
        same.append(bool(expected.argmax() == logits.argmax()))
    return {
        "max_relative_error": max(errors),
        "mean_relative_error": sum(errors) / len(errors),
        "same_top_token": sum(same) / len(same),
    }
