"""Tokens per second of whole training steps: with nothing recomputed, with everything recomputed,
with layer inputs offloaded, and without compiled functions.
"""

import os
import sys
from pathlib import Path

from medqlora.core.environment import prefer_expandable_segments

prefer_expandable_segments(os.environ)  # torch reads this variable when it is imported.

import numpy as np
import torch

from medqlora.batches.plan import Plan, make_plan
from medqlora.model.base import find_layers, unwrap
from medqlora.model.compiling import Kernels
from medqlora.model.recomputation import set_checkpointing
from medqlora.prompts.rows import TokenTable
from medqlora.training.gpu_stage import Stage
from medqlora.training.trial import Trial, count_flops, find_peak, make_table

ARCHITECTURES = Path(__file__).parent.parent / "architectures"
# A GPU with more bytes than this holds all 32 layers with nothing recomputed. A smaller one gets
# few layers.
WHOLE = 60 * 2**30
FEW_LAYERS = 4
WARM_UP = 2
STEPS = 5


def main() -> int:
    stage = Stage.from_arguments(sys.argv[1:], __doc__)
    architecture = stage.choose_shape(ARCHITECTURES, 32 if stage.memory > WHOLE else FEW_LAYERS)
    lengths = stage.choose_lengths(8_192)
    config = stage.make_config(lengths)
    tokens = sum(lengths)
    trial = Trial(config, architecture, stage.device)
    stage.figure(
        "model",
        {
            "shape": "small Llama" if stage.small else "llama3-8b",
            "layers": trial.layers,
            "quantization": "nf4",
            "lora_r": config.lora.r,
            "dtype": config.model.dtype,
            "attention": trial.backend,
            "compiled": trial.compiled,
            "tokens": tokens,
            "row_tokens": lengths[0],
        },
    )
    table = make_table(np.tile(lengths, WARM_UP + STEPS), 2, trial.vocabulary, 0)
    plan = make_plan(table.lengths, capacity=tokens, global_tokens=tokens, epochs=1, seed=0)
    base = unwrap(trial.model)
    for case in ("none", "full", "offload", "none, not compiled"):
        # The mode none leaves layers as they are, so the case before must be undone here.
        for layer in find_layers(base):
            layer.gradient_checkpointing = False
        recomputed = set_checkpointing(base, case.partition(",")[0])
        if "not compiled" in case:
            # This case is the last one, because nothing puts the compiled functions back.
            for module in base.modules():
                if hasattr(module, "kernels"):
                    module.kernels = Kernels()
        try:
            stage.figure(case, measure(stage, trial, table, plan, recomputed))
        # Whether a case fits is a finding; the other cases go on.
        except torch.OutOfMemoryError:
            stage.figure(f"{case}: out of memory", True)
    return stage.finish()


def measure(stage: Stage, trial: Trial, table: TokenTable, plan: Plan, recomputed: int) -> dict:
    """Rates and peak memory of the trial's steps with so many layers recomputed."""
    if stage.device.type == "cuda":
        # Peaks are those of one case, so blocks of the case before are returned first.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    steps = [trial.step(table, plan, number) for number in range(WARM_UP + STEPS)]
    steps = steps[WARM_UP:]
    seconds = sorted(step.seconds for step in steps)[len(steps) // 2]
    rate = steps[0].tokens / seconds
    flops = count_flops(trial, recomputed) * rate
    peak, source = find_peak(stage.device, trial.dtype, None)
    return {
        "tokens_per_second": rate,
        "step_seconds": [step.seconds for step in steps],
        "recomputed_layers": recomputed,
        "model_flops_per_second": flops,
        "model_flops_utilisation": flops / peak if peak else None,
        "peak_source": source,
        "peak_memory_bytes": (
            torch.cuda.max_memory_allocated() if stage.device.type == "cuda" else None
        ),
        "loss": steps[-1].loss,
    }


if __name__ == "__main__":
    sys.exit(main())
