"""The transformers engine: options scored with a shared beginning and without, the same numbers and
the rates; text generated.
"""

import os
import sys
import time
from pathlib import Path

from medqlora.core.environment import prefer_expandable_segments

prefer_expandable_segments(os.environ)  # torch reads this variable when it is imported.

import numpy as np
import torch

from medqlora.core.config import Model
from medqlora.engines.hf import TOLERANCE, HfEngine
from medqlora.engines.interface import Request, Sampling
from medqlora.model.attention.backends import IMPLEMENTATIONS, choose_backend
from medqlora.model.random_base import make_base
from medqlora.training.gpu_stage import Stage

ARCHITECTURES = Path(__file__).parent.parent / "architectures"
LAYERS = 8


def main() -> int:
    stage = Stage.from_arguments(sys.argv[1:], __doc__)
    dtype = stage.dtype
    architecture = stage.choose_shape(ARCHITECTURES, LAYERS)
    torch.manual_seed(0)
    base = make_base(architecture, Model(base="random"), stage.device, dtype)
    backend = choose_backend("auto", stage.device, dtype, architecture).backend
    base.set_attn_implementation(IMPLEMENTATIONS[backend])
    engine = HfEngine(base, backend)
    stage.figure(
        "attention", {"backend": backend, "nested": engine.nested, "sharing": engine.sharing}
    )
    stage.check(
        "segments cannot be nested or shared", float(not (engine.nested and engine.sharing)), 0
    )
    score(stage, engine, dtype)
    generate(stage, engine)
    return stage.finish()


def score(stage: Stage, engine: HfEngine, dtype: torch.dtype) -> None:
    """Questions of 60 to 180 tokens after 600 shared ones, four options of one and of two
    tokens.
    """
    count, shared = (12, 64) if stage.small else (384, 600)
    draw = np.random.default_rng(0)
    beginning = draw.integers(3, 400, shared).tolist()
    requests = []
    for _ in range(count):
        question = draw.integers(3, 400, int(draw.integers(60, 180))).tolist()
        requests.append(Request(beginning + question, [[10], [11], [12, 13], [14, 15]]))
    found = {}
    for name, length in (("warm-up", shared), ("shared", shared), ("plain", 0)):
        stage.synchronize()
        began = time.perf_counter()
        found[name] = np.array(engine.score(requests, length))
        stage.synchronize()
        stage.figure(f"{name}: questions per second", count / (time.perf_counter() - began))
    stage.check(
        "shared beginning against plain, log-probabilities",
        float(abs(found["shared"] - found["plain"]).max()),
        20 * TOLERANCE[dtype],
    )


def generate(stage: Stage, engine: HfEngine) -> None:
    rows, tokens = (3, 8) if stage.small else (32, 64)
    draw = np.random.default_rng(1)
    prompts = [draw.integers(3, 400, int(draw.integers(20, 100))).tolist() for _ in range(rows)]
    lengths = []
    sampling = Sampling(
        max_new_tokens=tokens, stop_ids=(2,), decode=lambda ids: lengths.append(len(ids)) or ""
    )
    began = time.perf_counter()
    answers = engine.generate(prompts, sampling)
    stage.figure("generated tokens per second", sum(lengths) / (time.perf_counter() - began))
    stage.check("answers missing", float(rows - sum(len(some) for some in answers)), 0)
    stage.check("nothing was generated", float(not sum(lengths)), 0)


if __name__ == "__main__":
    sys.exit(main())
