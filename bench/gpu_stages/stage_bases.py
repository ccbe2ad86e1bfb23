"""The adapter's gradients on every kind of base, dtype and recomputation, compared with those on
the same weights, dense in float32.
"""

import os
import sys

from medqlora.core.environment import prefer_expandable_segments

prefer_expandable_segments(os.environ)  # torch reads this variable when it is imported.

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from medqlora.batches.collate import collate
from medqlora.core.config import Config, Data, Lora, Model, Training
from medqlora.core.config_loading import change
from medqlora.model.attention.backends import IMPLEMENTATIONS
from medqlora.model.attention.packed_batch import move_batch
from medqlora.training.gpu_stage import Stage, relative_error
from medqlora.training.session import Loaded, build, load
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
LENGTHS = np.array([70, 33, 120, 9, 64, 64])  # tokens of each row, int64 [rows]
# The vector of all gradients may have these relative errors. int8 also rounds the layers' inputs to
# 8 bits.
LIMITS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 8e-2}
INT8_LIMIT = 0.1
# Recomputed gradients may differ from kept ones, because attention sums in any order on a GPU.
SAME_LIMIT = 1e-2


def main() -> int:
    stage = Stage.from_arguments(sys.argv[1:], __doc__)
    if stage.small:
        dtypes = ["float32", "bfloat16"]
    elif stage.dtype is torch.bfloat16:
        dtypes = ["bfloat16", "float16"]
    else:
        dtypes = ["float16"]
    for quantization in ("nf4", "fp4", "int8", "none"):
        for dtype in dtypes:
            check_base(stage, quantization, dtype, "lora")
    check_base(stage, "nf4", dtypes[0], "dora")
    return stage.finish()


def check_base(stage: Stage, quantization: str, dtype: str, variant: str) -> None:
    config = Config(
        model=Model(base="random", quantization=quantization, dtype=dtype),
        lora=Lora(r=8, variant=variant),
        data=Data(),
        training=Training(compile=False),  # The kernels stage tries compiled functions.
    )
    torch.manual_seed(0)
    loaded = load(config, stage.device, architecture=SHAPE)
    dense = Loaded(copy_dense(loaded.base, stage.device), "grouped", False)
    expected = read_gradients(stage, dense, config, "none")
    kept = read_gradients(stage, loaded, config, "none")
    case = f"{quantization}, {dtype}, {variant}, attention {loaded.backend}"
    limit = INT8_LIMIT if quantization == "int8" else LIMITS[dtype]
    stage.check(f"gradients, {case}", relative_error(kept, expected), limit)
    for mode in ("full", "offload"):
        recomputed = read_gradients(stage, loaded, config, mode)
        error = relative_error(recomputed, kept)
        stage.check(f"gradients with {mode} against none, {case}", error, SAME_LIMIT)


def copy_dense(base: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """transformers' own model in float32 with the weights that a quantized base multiplies with."""
    with torch.device(device):
        dense = AutoModelForCausalLM.from_config(
            SHAPE, dtype=torch.float32, attn_implementation=IMPLEMENTATIONS["grouped"]
        )
    originals = dict(base.named_modules())
    with torch.no_grad():
        for name, module in dense.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(dequantize(originals[name]))
            elif getattr(module, "weight", None) is not None:
                module.weight.copy_(originals[name].weight)
    return dense.requires_grad_(False)


def dequantize(linear: torch.nn.Module) -> torch.Tensor:
    weight = linear.weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    if weight.dtype is torch.int8:
        # bitsandbytes moves the scales into the layer's state when the layer is first called.
        scale = weight.SCB if weight.SCB is not None else linear.state.SCB
        return weight.data.float() * scale[:, None] / 127
    return weight.float()


def read_gradients(stage: Stage, loaded: Loaded, config: Config, mode: str) -> torch.Tensor:
    """All gradients of a seeded adapter in one vector; the adapter is taken off again."""
    for layer in loaded.base.model.layers:  # An earlier mode may have set this.
        layer.gradient_checkpointing = False
    # A is drawn from training.seed, so all modes and the dense model get the same adapter.
    built = build(loaded, change(config, "training", gradient_checkpointing=mode))
    # A fresh adapter's B is zero, and so would be the gradients of A.
    generator = torch.Generator().manual_seed(1)
    for name, weight in built.model.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    table = make_table(LENGTHS, 5, SHAPE.vocab_size, 0)
    batch = move_batch(collate(table, np.arange(len(LENGTHS))), loaded.backend, stage.device)
    built.loss_model.train()
    built.loss_model(**batch).backward()
    trained = [weight for weight in built.model.parameters() if weight.requires_grad]
    # The adapter's weights are float32 on every base, so this is a float32 vector.
    gradients = torch.cat([weight.grad.flatten() for weight in trained])
    # This takes the adapter's layers out of the base, which the next mode begins from.
    built.model.unload()
    return gradients


if __name__ == "__main__":
    sys.exit(main())
