"""Memory of training steps, measured beside the forecast: the peak of the tensors, and the peak of
what the allocator reserves for them.
"""

import gc
import os
import sys
from pathlib import Path

from medqlora.core.environment import prefer_expandable_segments

prefer_expandable_segments(os.environ)  # torch reads this variable when it is imported.

import numpy as np
import torch
from transformers import PretrainedConfig

from medqlora.batches.plan import make_plan
from medqlora.core.config import Config
from medqlora.training.gpu_stage import Stage
from medqlora.training.memory.allocator import segments_expand
from medqlora.training.memory.forecast import forecast_step
from medqlora.training.memory.tracker import Batch
from medqlora.training.trial import Trial, make_table

ARCHITECTURES = Path(__file__).parent.parent / "architectures"
# A GPU with more bytes than this holds all cases; a smaller one gets fewer layers and tokens.
LARGE = 30 * 2**30
LAYERS = 8  # Llama-3-8B has 32, all alike.
# A forecast may have these relative errors.
PEAK_LIMIT = 0.03
RESERVED_LIMIT = 0.08
SUPERVISED = 2  # supervised tokens of each row
# Recomputation, dropout and quantization of each case.
CASES = {
    "none": ("none", 0.0, "nf4"),
    "full": ("full", 0.0, "nf4"),
    "offload": ("offload", 0.0, "nf4"),
    "none, dropout 0.1": ("none", 0.1, "nf4"),
    "none, int8": ("none", 0.0, "int8"),
    "none, 16 bits": ("none", 0.0, "none"),
}


def main() -> int:
    stage = Stage.from_arguments(sys.argv[1:], __doc__)
    large = stage.memory > LARGE
    architecture = stage.choose_shape(ARCHITECTURES, LAYERS if large else 2)
    lengths = stage.choose_lengths(8_192 if large else 2_048)
    for case, (mode, dropout, quantization) in CASES.items():
        config = stage.make_config(lengths, 2, mode, dropout, quantization)
        compare(stage, case, config, architecture, lengths)
    return stage.finish()


def compare(
    stage: Stage,
    case: str,
    config: Config,
    architecture: PretrainedConfig,
    lengths: tuple[int, ...],
) -> None:
    batch = Batch(lengths, SUPERVISED * len(lengths))
    step = (config, architecture, stage.device, stage.dtype, torch.uint8, batch)
    forecast = forecast_step(*step)
    if stage.small:  # A CPU has no allocator to ask, so the same step is followed on real tensors.
        real = forecast_step(*step, place=stage.device)
        peak = real.peak
        reserved = real.reserved.plenty
    else:
        peak, reserved = measure(stage, config, architecture, lengths)
    reserve = forecast.reserved if segments_expand() else forecast.reserved_fixed
    predicted = reserve.plenty
    stage.figure(
        case,
        {
            "predicted_peak_bytes": forecast.peak,
            "measured_peak_bytes": peak,
            "predicted_reserved_bytes": predicted,
            "measured_reserved_bytes": reserved,
            "predicted_host_bytes": forecast.host,
            "by_category": forecast.by_category,
        },
    )
    stage.check(f"{case}: relative error of the peak", abs(forecast.peak / peak - 1), PEAK_LIMIT)
    stage.check(
        f"{case}: relative error of what is reserved", abs(predicted / reserved - 1), RESERVED_LIMIT
    )


def measure(
    stage: Stage, config: Config, architecture: PretrainedConfig, lengths: tuple[int, ...]
) -> tuple[int, int]:
    """Highest allocated and reserved bytes of two optimizer steps of two micro-batches, above those
    before.
    """
    # The case before leaves objects, cuBLAS's workspaces and free blocks, which would be counted.
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    reserved_before = torch.cuda.memory_reserved()
    trial = Trial(config, architecture, stage.device)
    # The memory of int8's outliers depends on the data and is not forecast, so there are none.
    for module in trial.model.modules():
        if hasattr(getattr(module, "state", None), "threshold"):
            module.state.threshold = 0.0
    table = make_table(np.tile(lengths, 4), SUPERVISED, trial.vocabulary, 0)
    plan = make_plan(
        table.lengths, capacity=sum(lengths), global_tokens=2 * sum(lengths), epochs=1, seed=0
    )
    torch.cuda.empty_cache()  # Loading leaves blocks that training does not need.
    torch.cuda.reset_peak_memory_stats()
    for step in range(2):
        trial.step(table, plan, step)
    allocated = torch.cuda.max_memory_allocated() - before
    return allocated, torch.cuda.max_memory_reserved() - reserved_before


if __name__ == "__main__":
    sys.exit(main())
