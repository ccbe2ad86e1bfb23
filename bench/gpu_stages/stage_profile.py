"""Where the time of a training step goes: the kernels by kind, the 25 longest kernels, and the
share of the step in which the GPU waits.
"""

import os
import sys
from collections import Counter
from pathlib import Path

from medqlora.core.environment import prefer_expandable_segments

prefer_expandable_segments(os.environ)  # torch reads this variable when it is imported.

import numpy as np
from torch.profiler import ProfilerActivity, profile

from medqlora.batches.plan import make_plan
from medqlora.training.gpu_stage import Stage
from medqlora.training.trial import Trial, make_table

ARCHITECTURES = Path(__file__).parent.parent / "architectures"
# A GPU with more bytes than this holds eight layers with nothing recomputed.
LARGE = 30 * 2**30
LAYERS = 8
LONGEST = 25
# A kernel has the first kind with a word that the name of the kernel or of its operation holds.
KINDS = (
    # This kind stands first, because gemm_4bit would also count as a matrix product.
    ("dequantization", ("dequant", "gemm_4bit", "quantiz")),
    ("attention", ("flash", "fmha", "attention", "varlen")),
    (
        "matrix products",
        (
            "gemm",
            "nvjet",
            "cutlass",
            "xmma",
            "cublas",
            "splitk",
            "::mm",
            "::addmm",
            "::bmm",
            "::linear",
            "::matmul",
        ),
    ),
    ("optimizer", ("adam", "multi_tensor", "foreach")),
    ("copies", ("memcpy", "memset", "::copy_", "::index_select", "gather", "::cat")),
)


def main() -> int:
    stage = Stage.from_arguments(sys.argv[1:], __doc__)
    architecture = stage.choose_shape(ARCHITECTURES, LAYERS if stage.memory > LARGE else 2)
    lengths = stage.choose_lengths(8_192)
    config = stage.make_config(lengths)
    tokens = sum(lengths)
    trial = Trial(config, architecture, stage.device)
    table = make_table(np.tile(lengths, 5), 2, trial.vocabulary, 0)
    plan = make_plan(table.lengths, capacity=tokens, global_tokens=tokens, epochs=1, seed=0)
    for number in range(3):
        trial.step(table, plan, number)
    # The profiler slows the host down, so the length of a step is taken from one without it.
    unprofiled = trial.step(table, plan, 3).seconds
    on_gpu = stage.device.type == "cuda"
    activities = [ProfilerActivity.CPU]
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as recorded:
        trial.step(table, plan, 4)
    by_kind, by_name, launches = collect(recorded.events(), config.lora.r, on_gpu)
    busy = sum(by_kind.values())
    stage.figure(
        "seconds", {"step": unprofiled, "busy": busy, "by_kind": dict(by_kind.most_common())}
    )
    # Kernel times and step times are those of different steps, so the difference may fall below 0.
    stage.figure("idle share", max(0.0, 1 - busy / unprofiled))
    stage.figure("launches", launches)
    stage.figure(
        "longest",
        [
            {"name": name[:160], "kind": kind, "seconds": seconds}
            for (name, kind), seconds in by_name.most_common(LONGEST)
        ],
    )
    stage.check("profile without a single kernel", float(not launches), 0)
    return stage.finish()


def collect(events, rank: int, on_gpu: bool) -> tuple[Counter, Counter, int]:
    """Seconds by kind, seconds by (name, kind), and the number of kernels. On a CPU these are
    operations, without the ones that they call.
    """
    by_kind = Counter()
    by_name = Counter()
    launches = 0
    for event in events:
        if on_gpu:
            # The profiler counts microseconds.
            timed = [(kernel.name, kernel.duration / 1e6) for kernel in event.kernels]
        else:
            timed = [(event.name, event.self_cpu_time_total / 1e6)]
        for name, seconds in timed:
            kind = classify(f"{name} {event.name}".lower(), event.input_shapes, rank)
            by_kind[kind] += seconds
            by_name[name, kind] += seconds
            launches += 1
    return by_kind, by_name, launches


def classify(name: str, shapes: list, rank: int) -> str:
    kinds = [kind for kind, words in KINDS if any(word in name for word in words)]
    if not kinds:
        return "pointwise and other"
    # A product in which a matrix has the adapter's rank as a dimension is one of the adapter's.
    matrices = [shape for shape in shapes if isinstance(shape, (list, tuple)) and len(shape) == 2]
    if kinds[0] == "matrix products" and any(rank in shape for shape in matrices):
        return "adapter's products"
    return kinds[0]


if __name__ == "__main__":
    sys.exit(main())
