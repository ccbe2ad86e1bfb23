"""Memory of training steps, measured beside the forecast: what tensors take at their peak, and what the allocator reserves for it."""

import gc
import os
import sys
from pathlib import Path

from medqlora.allocator import prefer_expandable_segments

prefer_expandable_segments(os.environ)  # before torch is imported

import numpy as np
import torch
from transformers import LlamaConfig, PretrainedConfig

from medqlora.allocator import segments_expand
from medqlora.config import Config, Data, Lora, Model, Training
from medqlora.memory import Batch, forecast_step, read_architecture, with_layers
from medqlora.packing import make_plan
from medqlora.stages import Stage
from medqlora.trials import Trial, make_table

ARCHITECTURES = Path(__file__).parent.parent / "architectures"
LARGE = 30 * 2**30  # bytes of a GPU that holds all cases; a smaller one gets fewer layers and tokens
LAYERS = 8  # of Llama-3-8B's 32
PEAK_LIMIT, RESERVED_LIMIT = 0.03, 0.08  # relative errors
LABELLED = 2  # tokens of each row
CASES = {
    "none": ("none", 0.0, "nf4"), "full": ("full", 0.0, "nf4"), "offload": ("offload", 0.0, "nf4"), "none, dropout 0.1": ("none", 0.1, "nf4"), "none, int8": ("none", 0.0, "int8"),
    "none, 16 bits": ("none", 0.0, "none"),
}  # fmt: skip


def main() -> int:
    stage = Stage.from_arguments(sys.argv[1:], __doc__)
    if stage.small:
        architecture = LlamaConfig(hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=500)
    else:
        architecture = with_layers(read_architecture("llama3-8b", ARCHITECTURES), LAYERS if stage.memory > LARGE else 2)
    lengths = (60,) * 8 if stage.small else (512,) * 16 if stage.memory > LARGE else (512,) * 4
    for case, (mode, dropout, quantization) in CASES.items():
        compare(stage, case, make_config(stage, mode, dropout, quantization, lengths), architecture, lengths)
    return stage.finish()


def make_config(stage: Stage, mode: str, dropout: float, quantization: str, lengths: tuple[int, ...]) -> Config:
    tokens = sum(lengths)
    return Config(
        model=Model(base="random", quantization=quantization, dtype=str(stage.dtype).removeprefix("torch.")), lora=Lora(dropout=dropout), data=Data(max_length=lengths[0]),
        training=Training(max_tokens_per_batch=tokens, global_batch_tokens=2 * tokens, gradient_checkpointing=mode),
    )  # fmt: skip


def compare(stage: Stage, case: str, config: Config, architecture: PretrainedConfig, lengths: tuple[int, ...]) -> None:
    batch = Batch(lengths, LABELLED * len(lengths))
    forecast = forecast_step(config, architecture, stage.device, stage.dtype, torch.uint8, batch)
    if stage.small:  # a CPU has no allocator to ask: the same step on real tensors, followed in the same way
        real = forecast_step(config, architecture, stage.device, stage.dtype, torch.uint8, batch, place=stage.device)
        peak, reserved = real.peak, real.reserved.plenty
    else:
        peak, reserved = measure(stage, config, architecture, lengths)
    predicted = (forecast.reserved if segments_expand() else forecast.reserved_fixed).plenty
    stage.figure(case, {
        "predicted_peak_bytes": forecast.peak, "measured_peak_bytes": peak, "predicted_reserved_bytes": predicted, "measured_reserved_bytes": reserved,
        "predicted_host_bytes": forecast.host, "by_category": forecast.by_category,
    })  # fmt: skip
    stage.check(f"{case}: relative error of the peak", abs(forecast.peak / peak - 1), PEAK_LIMIT)
    stage.check(f"{case}: relative error of what is reserved", abs(predicted / reserved - 1), RESERVED_LIMIT)


def measure(stage: Stage, config: Config, architecture: PretrainedConfig, lengths: tuple[int, ...]) -> tuple[int, int]:
    """Highest allocated and reserved bytes of two optimizer steps of two micro-batches, above what was there before."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    before, kept = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    trial = Trial(config, architecture, stage.device)
    for module in trial.model.modules():  # what int8's outliers keep depends on the data and is not forecast
        if hasattr(getattr(module, "state", None), "threshold"):
            module.state.threshold = 0.0
    table = make_table(np.tile(lengths, 4), LABELLED, trial.vocabulary, 0)
    plan = make_plan(table.lengths, capacity=sum(lengths), global_tokens=2 * sum(lengths), epochs=1, seed=0)
    torch.cuda.empty_cache()  # what loading left
    torch.cuda.reset_peak_memory_stats()
    for step in range(2):
        trial.step(table, plan, step)
    return torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved() - kept


if __name__ == "__main__":
    sys.exit(main())
