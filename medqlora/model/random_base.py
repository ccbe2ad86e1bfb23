"""Bases with random weights or none, for measurements and forecasts of memory and speed.

Memory and speed depend on shapes and dtypes, not on the values of the weights.
"""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from medqlora.core.config import Model
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
    """Make a base like that of load_base, but with random weights.

    Args:
        architecture: The config of the model.
        model: The configuration's section.
        device: The device of the weights. On torch.device("meta") they have no content.
        dtype: The compute dtype.
        storage: The dtype in which 4-bit weights are packed.

    Raises:
        ModelError: transformers has no causal language model of this architecture, or its attention
            cannot be replaced.
    """
    try:
        # Buffers are made for real, because rotary tables follow from the config and nothing below
        # would fill them.
        with init_empty_weights(include_buffers=False):
            base = AutoModelForCausalLM.from_config(
                architecture, dtype=dtype, attn_implementation=IMPLEMENTATIONS["varlen"]
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        # transformers raises a KeyError of the attention's name where a model does not support it.
        if str(error).strip("'") in IMPLEMENTATIONS.values():
            reason = (
                "its attention cannot be replaced, and that of transformers cannot be forecast;"
                " train with --model.attention sdpa or eager, and name"
                " training.max_tokens_per_batch and training.gradient_checkpointing"
            )
        raise ModelError(
            f"architecture {architecture.model_type}: cannot be built: {reason}"
        ) from None
    head = base.get_output_embeddings()
    # Each weight is quantized as soon as it is made, so the unquantized model is never in memory.
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            is_linear = type(child) in (torch.nn.Linear, Conv1D)
            if is_linear and child is not head and model.quantization != "none":
                setattr(module, name, quantize_linear(child, model, device, dtype, storage))
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and device.type != "meta":
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                # Vectors are the weights of norms, or biases.
                value = value.normal_(std=0.02) if value.dim() > 1 else value.fill_(1)
                setattr(module, name, torch.nn.Parameter(value))
        for name, buffer in list(module.named_buffers(recurse=False)):
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, buffer.to(device), persistent=persistent)
    base.tie_weights()
    # PEFT chooses the class of its LoRA layers by these two flags.
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
    """Return the bitsandbytes layer that transformers would put in a layer's place.

    Its weights are random. The arguments are those of make_base.
    """
    import bitsandbytes

    # bitsandbytes makes this code table with the first layer and keeps it for all later ones. If
    # the first layer were on the meta device, the table would have no content for real layers.
    bitsandbytes.functional.name2qmap.setdefault(
        "dynamic", bitsandbytes.functional.create_dynamic_map()
    )
    outputs, inputs = linear.weight.shape
    if type(linear) is Conv1D:  # Its weight is transposed.
        inputs, outputs = linear.weight.shape
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
        # On the meta device no input can be searched for outliers; memory.list_inside adds what the
        # search takes.
        threshold = 0.0 if device.type == "meta" else INT8_THRESHOLD
        layer = bitsandbytes.nn.Linear8bitLt(**sizes, has_fp16_weights=False, threshold=threshold)
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False)._quantize(device)
    else:
        settings = {
            "compress_statistics": model.double_quantization,
            "quant_type": model.quantization,
            "quant_storage": storage,
        }
        layer = bitsandbytes.nn.Linear4bit(**sizes, compute_dtype=dtype, **settings)
        parameter = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, module=layer, **settings
        )
        layer.weight = parameter._quantize(device)
    if linear.bias is not None:
        bias = torch.zeros(outputs, dtype=dtype, device=device)
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer
