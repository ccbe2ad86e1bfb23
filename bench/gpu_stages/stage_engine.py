"""The transformers engine scores options with a shared beginning and without, which must give the
same numbers, and generates text; the rates of both are recorded.
"""

import os
import sys
import time
from pathlib import Path

from medqlora.core.environment import prefer_expandable_segments

prefer_expandable_segments(os.environ)  # torch reads this variable when it is imported.

import numpy as np
import torch

from medqlora.core.config_loading import change
from medqlora.engines.hf import TOLERANCE, HfEngine
from medqlora.engines.interface import Request, Sampling
from medqlora.training.gpu_stage import Stage
from medqlora.training.session import load

ARCHITECTURES = Path(__file__).parent.parent / "architectures"
LAYERS = 8  # Llama-3-8B has 32, all alike.


def main() -> int:
    stage = Stage.from_arguments(sys.argv[1:], __doc__)
    architecture = stage.choose_shape(ARCHITECTURES, LAYERS)
    # Evaluation does not compile.
    config = change(stage.make_config(stage.choose_lengths(512)), "training", compile=False)
    torch.manual_seed(0)
    loaded = load(config, stage.device, architecture=architecture)
    engine = HfEngine(loaded.base, loaded.backend)
    stage.figure(
        "attention",
        {"backend": loaded.backend, "nested": engine.nested, "sharing": engine.sharing},
    )
    stage.check(
        "segments cannot be nested or shared", float(not (engine.nested and engine.sharing)), 0
    )
    score(stage, engine)
    generate(stage, engine)
    return stage.finish()


def score(stage: Stage, engine: HfEngine) -> None:
    """Questions of 60 to 180 tokens after 600 shared ones; four options of one or two tokens."""
    count, shared = (12, 64) if stage.small else (384, 600)
    rng = np.random.default_rng(0)
    # Ids from 3 to 399 are in the vocabulary of both shapes and are no special tokens.
    beginning = rng.integers(3, 400, shared).tolist()
    requests = []
    for _ in range(count):
        question = rng.integers(3, 400, int(rng.integers(60, 180))).tolist()
        requests.append(Request(beginning + question, [[10], [11], [12, 13], [14, 15]]))
    scores = {}
    # The first round loads the kernels and reads the shared beginning; its rate is no measure. With
    # length 0 every request reads its whole prompt.
    for name, length in (("warm-up", shared), ("shared", shared), ("plain", 0)):
        stage.synchronize()
        began = time.perf_counter()
        scores[name] = np.array(engine.score(requests, length))  # [requests, options]
        stage.synchronize()
        stage.figure(f"{name}: questions per second", count / (time.perf_counter() - began))
    # The engine itself allows a log-probability to change by so many nats (engines/hf.py).
    stage.check(
        "shared beginning against plain, log-probabilities",
        float(abs(scores["shared"] - scores["plain"]).max()),
        20 * TOLERANCE[stage.dtype],
    )


def generate(stage: Stage, engine: HfEngine) -> None:
    rows, tokens = (3, 8) if stage.small else (32, 64)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 400, int(rng.integers(20, 100))).tolist() for _ in range(rows)]
    lengths = []

    def decode(ids: list[int]) -> str:
        # The engine decodes every answer once, so its tokens can be counted here.
        lengths.append(len(ids))
        return ""

    sampling = Sampling(max_new_tokens=tokens, stop_ids=(2,), decode=decode)
    began = time.perf_counter()
    answers = engine.generate(prompts, sampling)
    stage.figure("generated tokens per second", sum(lengths) / (time.perf_counter() - began))
    missing = rows - sum(len(samples) for samples in answers)
    stage.check("answers missing", float(missing), 0)
    stage.check("nothing was generated", float(not sum(lengths)), 0)


if __name__ == "__main__":
    sys.exit(main())
