"""4- and 8-bit weights of bitsandbytes."""

from __future__ import annotations

import importlib.util

import torch
from transformers import BitsAndBytesConfig

from medqlora.core.config import Model

# int8 layers multiply inputs over this magnitude in 16 bits; the value is the one that transformers
# sets.
INT8_THRESHOLD = BitsAndBytesConfig().llm_int8_threshold


def list_constants(parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """What a quantized weight needs beside itself: scales and code tables; nothing for another
    weight.
    """
    state = getattr(parameter, "quant_state", None)
    found = [getattr(parameter, "SCB", None)]
    if state is not None:
        found += [
            state.absmax,
            state.code,
            *([state.offset, state.state2.absmax, state.state2.code] if state.nested else []),
        ]
    return [tensor for tensor in found if torch.is_tensor(tensor)]


def quantization_config(
    model: Model, dtype: torch.dtype, storage: torch.dtype
) -> BitsAndBytesConfig | None:
    if model.quantization == "none":
        return None
    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantization,
        bnb_4bit_use_double_quant=model.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def keep_quantized_layout(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation on an AVX512-BF16 CPU:
    in that layout the gradient of the input is silently lost (bitsandbytes 0.50.2)."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


class GatheredMatMul(torch.autograd.Function):
    """x W^T for a 4-bit W that its layer holds only while it runs. bitsandbytes keeps the packed
    tensor for the backward pass, which ZeRO-3 has emptied by then, and gives a wrong gradient
    without a word; here backward reads the layer again.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        import bitsandbytes

        ctx.layer = layer
        return bitsandbytes.matmul_4bit(x, layer.weight.t(), quant_state=layer.weight.quant_state)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(ctx.layer.weight.data.view(-1, 1), ctx.layer.weight.quant_state)
        return gradient @ weight.to(gradient.dtype), None


def is_quantized_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a 4-bit layer of bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes

    return isinstance(module, bitsandbytes.nn.Linear4bit)


def forward_gathered(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    result = GatheredMatMul.apply(x.to(layer.compute_dtype or x.dtype), layer).to(x.dtype)
    return result if layer.bias is None else result + layer.bias.to(x.dtype)
