"""A base with random or no weights: memory and speed depend on shapes alone."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from medqlora.core.config import Lora, Model
from medqlora.model.attention.backends import IMPLEMENTATIONS
from medqlora.model.base import ModelError, freeze
from medqlora.model.quantization import INT8_THRESHOLD


def make_base(
    architecture: PretrainedConfig,
    model: Model,
    device: torch.device,
    dtype: torch.dtype,
    storage: torch.dtype = torch.uint8,
) -> torch.nn.Module:
    """A base as load_base gives it, with random weights: memory and speed depend on shapes alone.
    Tensors are made one at a time on `device`; on torch.device("meta") they have no content.

    Raises:
        ModelError: an architecture that transformers has no causal language model for.
    """
    try:
        with init_empty_weights(include_buffers=False):
            base = AutoModelForCausalLM.from_config(
                architecture, dtype=dtype, attn_implementation=IMPLEMENTATIONS["varlen"]
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if str(error).strip("'") in IMPLEMENTATIONS.values():
            error = (
                "its attention cannot be replaced, and that of transformers cannot be forecast;"
                " train with --model.attention sdpa"
            )
        raise ModelError(
            f"architecture {architecture.model_type}: cannot be built:"
            f" {' '.join(str(error).split())[:200]}"
        ) from None
    head = base.get_output_embeddings()
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if (
                type(child) in (torch.nn.Linear, Conv1D)
                and child is not head
                and model.quantization != "none"
            ):
                setattr(module, name, quantize_linear(child, model, device, dtype, storage))
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and device.type != "meta":
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                setattr(
                    module,
                    name,
                    torch.nn.Parameter(
                        value.normal_(std=0.02) if value.dim() > 1 else value.fill_(1)
                    ),
                )
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(
                name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set
            )
    base.tie_weights()
    base.is_loaded_in_4bit = model.quantization in ("nf4", "fp4")
    base.is_loaded_in_8bit = model.quantization == "int8"
    freeze(base, model, dtype)
    return base.eval()


def quantize_linear(
    linear: torch.nn.Linear | Conv1D,
    model: Model,
    device: torch.device,
    dtype: torch.dtype,
    storage: torch.dtype,
) -> torch.nn.Module:
    """The bitsandbytes layer that transformers would put in this layer's place, with random
    weights.
    """
    import bitsandbytes

    # kept for all later layers, real ones too: on the meta device, where the first might lie, it
    # would have no content
    bitsandbytes.functional.name2qmap.setdefault(
        "dynamic", bitsandbytes.functional.create_dynamic_map()
    )
    outputs, inputs = (
        reversed(linear.weight.shape) if type(linear) is Conv1D else linear.weight.shape
    )
    weight = torch.empty(outputs, inputs, dtype=dtype, device=device)
    if device.type != "meta":
        weight.normal_(std=0.02)
    sizes = {
        "input_features": inputs,
        "output_features": outputs,
        "bias": linear.bias is not None,
        "device": device,
    }
    if model.quantization == "int8":
        # Without content nothing can be an outlier; memory.list_inside counts what looking for them
        # takes.
        threshold = 0.0 if device.type == "meta" else INT8_THRESHOLD
        made = bitsandbytes.nn.Linear8bitLt(**sizes, has_fp16_weights=False, threshold=threshold)
        made.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False)._quantize(device)
    else:
        given = {
            "compress_statistics": model.double_quantization,
            "quant_type": model.quantization,
            "quant_storage": storage,
        }
        made = bitsandbytes.nn.Linear4bit(**sizes, compute_dtype=dtype, **given)
        made.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, module=made, **given
        )._quantize(device)
    if linear.bias is not None:
        made.bias = torch.nn.Parameter(
            torch.zeros(outputs, dtype=dtype, device=device), requires_grad=False
        )
    return made


def count_parameters(config: PretrainedConfig, lora: Lora) -> tuple[int, int]:
    """Parameters of the base and of an adapter on it, from the architecture alone (meta device)."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()  # on the meta device a shared embedding is two parameters until then
    head = model.get_output_embeddings()
    total = 0
    for name, module in model.named_modules():
        wanted = (
            lora.target_modules == "all-linear" or name.rpartition(".")[2] in lora.target_modules
        )
        if isinstance(module, torch.nn.Linear) and module is not head and wanted:
            total += lora.r * (module.in_features + module.out_features)
            total += module.out_features if lora.variant == "dora" else 0
    return sum(parameter.numel() for parameter in model.parameters()), total
