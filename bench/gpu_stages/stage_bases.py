"""The adapter's gradients on every kind of base, dtype and recomputation, against the same weights
dense in float32.
"""

import os
import sys

from medqlora.core.environment import prefer_expandable_segments

prefer_expandable_segments(os.environ)  # torch reads this variable when it is imported.

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from medqlora.batches.collate import collate
from medqlora.core.config import Lora, Model
from medqlora.model.adapter import attach_adapter
from medqlora.model.attention.backends import IMPLEMENTATIONS, choose_backend
from medqlora.model.attention.packed_batch import move_batch
from medqlora.model.head_loss import AnswerLoss
from medqlora.model.random_base import make_base
from medqlora.model.recomputation import set_checkpointing
from medqlora.training.gpu_stage import Stage, relative_error
from medqlora.training.trial import make_table

SHAPE = LlamaConfig(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=1000,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LENGTHS = np.array([70, 33, 120, 9, 64, 64])
# All gradients together may have these relative errors; int8 rounds what comes in to 8 bits as
# well.
LIMITS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
INT8_LIMIT = 0.1
# Recomputed gradients may differ from kept ones, because attention sums in any order on a GPU.
SAME_LIMIT = 1e-2


def main() -> int:
    stage = Stage.from_arguments(sys.argv[1:], __doc__)
    dtypes = (
        ["float32", "bfloat16"]
        if stage.small
        else ["bfloat16", "float16"]
        if stage.dtype is torch.bfloat16
        else ["float16"]
    )
    for quantization in ("nf4", "fp4", "int8", "none"):
        for dtype in dtypes:
            check_base(stage, quantization, dtype, "lora")
    check_base(stage, "nf4", dtypes[0], "dora")
    return stage.finish()


def check_base(stage: Stage, quantization: str, dtype: str, variant: str) -> None:
    model = Model(base="random", quantization=quantization, dtype=dtype)
    compute = getattr(torch, dtype)
    torch.manual_seed(0)
    base = make_base(SHAPE, model, stage.device, compute)
    dense = copy_dense(base, stage.device)
    backend = choose_backend("auto", stage.device, compute, SHAPE).backend
    base.set_attn_implementation(IMPLEMENTATIONS[backend])
    expected = read_gradients(stage, dense, "none", variant, "grouped")
    case = f"{quantization}, {dtype}, {variant}, attention {backend}"
    kept = read_gradients(stage, base, "none", variant, backend)
    stage.check(
        f"gradients, {case}",
        relative_error(kept, expected),
        INT8_LIMIT if quantization == "int8" else LIMITS[compute],
    )
    for mode in ("full", "offload"):
        stage.check(
            f"gradients with {mode} against none, {case}",
            relative_error(read_gradients(stage, base, mode, variant, backend), kept),
            SAME_LIMIT,
        )


def copy_dense(base: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """transformers' own model in float32 with the weights that a quantized base multiplies with."""
    with torch.device(device):
        dense = AutoModelForCausalLM.from_config(
            SHAPE, dtype=torch.float32, attn_implementation=IMPLEMENTATIONS["grouped"]
        )
    ours = dict(base.named_modules())
    with torch.no_grad():
        for name, module in dense.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(dequantize(ours[name]))
            elif getattr(module, "weight", None) is not None:
                module.weight.copy_(ours[name].weight)
    return dense.requires_grad_(False)


def dequantize(linear: torch.nn.Module) -> torch.Tensor:
    weight = linear.weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    if weight.dtype is torch.int8:
        scale = weight.SCB if weight.SCB is not None else linear.state.SCB
        return weight.data.float() * scale[:, None] / 127
    return weight.float()


def read_gradients(
    stage: Stage, base: torch.nn.Module, mode: str, variant: str, backend: str
) -> torch.Tensor:
    """Of a seeded adapter, all in one vector; the adapter is taken off again."""
    model = attach_adapter(base, Lora(r=8, variant=variant), 0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    for layer in base.model.layers:
        layer.gradient_checkpointing = False
    set_checkpointing(base, mode)
    table = make_table(LENGTHS, 5, SHAPE.vocab_size, 0)
    loss = AnswerLoss(model.train(), 1024)(
        **move_batch(collate(table, np.arange(len(LENGTHS))), backend, stage.device)
    )
    loss.backward()
    found = torch.cat(
        [weight.grad.flatten() for weight in model.parameters() if weight.requires_grad]
    )
    model.unload()
    return found


if __name__ == "__main__":
    sys.exit(main())
