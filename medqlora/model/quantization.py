"""4- and 8-bit weights of bitsandbytes.

The 4-bit types are those of QLoRA (Dettmers et al., 2023, arXiv 2305.14314), the 8-bit type is that
of LLM.int8 (Dettmers et al., 2022, arXiv 2208.07339).
"""

from __future__ import annotations

import importlib.util

import torch
from transformers import BitsAndBytesConfig

from medqlora.core.config import Model

# An int8 layer multiplies columns with an input over this magnitude in 16 bits. transformers sets
# this value in the models that it loads.
INT8_THRESHOLD = BitsAndBytesConfig().llm_int8_threshold


def list_constants(parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """Return the scales and code tables of a quantized weight; a plain weight has none."""
    constants = [getattr(parameter, "SCB", None)]  # the scales of an int8 weight
    state = getattr(parameter, "quant_state", None)  # the constants of a 4-bit weight
    if state is not None:
        constants += [state.absmax, state.code]
        if state.nested:
            constants += [state.offset, state.state2.absmax, state.state2.code]
    return [tensor for tensor in constants if torch.is_tensor(tensor)]


def count_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all weights, buffers and quantization constants of a model.

    Tied weights share a storage, which counts once.
    """
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        # The constants of 4-bit weights are no buffers of the module.
        tensors += list_constants(parameter)
    storages = [tensor.untyped_storage() for tensor in tensors]
    # The address of a storage is its key, so tied weights fall together.
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(sizes.values())


def quantization_config(
    model: Model, dtype: torch.dtype, storage: torch.dtype
) -> BitsAndBytesConfig | None:
    """Return the quantization settings for transformers, or None without quantization.

    Args:
        model: The configuration's section.
        dtype: The compute dtype.
        storage: The dtype in which 4-bit weights are packed.
    """
    if model.quantization == "none":
        return None
    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # Under DeepSpeed and FSDP the storage dtype must be the engine's. bfloat16 storage in a float16
    # engine gives garbage without an error.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantization,
        bnb_4bit_use_double_quant=model.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def keep_quantized_layout(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on a CPU with AVX512-BF16.

    bitsandbytes repacks them at the first evaluation. In the other layout the gradient of the
    input is lost without an error (bitsandbytes 0.50.2).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


class GatheredMatMul(torch.autograd.Function):
    """Computes x W^T for a 4-bit W that its layer holds only while the layer runs.

    bitsandbytes stores the packed weight for the backward pass. ZeRO-3 has released it by then, and
    the gradient is wrong without an error. This function reads the layer's weight anew, which
    ZeRO-3 has gathered for the layer's backward pass.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        """Return the product; x [..., in] -> [..., out]."""
        import bitsandbytes

        # The layer is kept instead of its weight. A kept weight would be the released one, or would
        # hold the whole base in memory.
        ctx.layer = layer
        return bitsandbytes.matmul_4bit(x, layer.weight.t(), quant_state=layer.weight.quant_state)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        """Return the gradient of x, [..., in]."""
        from bitsandbytes.functional import dequantize_4bit

        # A packed weight is one column of bytes or of storage elements.
        packed = ctx.layer.weight.data.view(-1, 1)
        weight = dequantize_4bit(packed, ctx.layer.weight.quant_state)  # [out, in]
        return gradient @ weight.to(gradient.dtype), None


def is_quantized_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a 4-bit linear layer of bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes

    return isinstance(module, bitsandbytes.nn.Linear4bit)


def forward_gathered(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Replace the forward of a 4-bit layer; x [..., in] -> [..., out] in x's dtype."""
    result = GatheredMatMul.apply(x.to(layer.compute_dtype or x.dtype), layer).to(x.dtype)
    return result if layer.bias is None else result + layer.bias.to(x.dtype)
