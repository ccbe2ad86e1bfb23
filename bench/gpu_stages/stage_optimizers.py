"""Every optimizer is saved as a checkpoint saves it and loaded again: its next step is the same to
the bit, and paged states are paged again.
"""

import io
import os
import sys

from medqlora.core.environment import prefer_expandable_segments

prefer_expandable_segments(os.environ)  # torch reads this variable when it is imported.

import numpy as np
import torch
from transformers import LlamaConfig

from medqlora.core.config import Config, Data, Lora, Model, Training
from medqlora.training.gpu_stage import Stage
from medqlora.training.strategies.replicated import Replicated
from medqlora.training.trial import Trial

# With an adapter of rank 128 this shape has tensors that are large enough to be paged.
SHAPE = LlamaConfig(
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=1,
    num_attention_heads=8,
    vocab_size=500,
)


def main() -> int:
    stage = Stage.from_arguments(sys.argv[1:], __doc__)
    for optimizer in ("adamw", "adamw_8bit", "paged_adamw_8bit"):
        check_optimizer(stage, optimizer)
    return stage.finish()


def check_optimizer(stage: Stage, optimizer: str) -> None:
    whole = make_trainer(stage, optimizer)
    resumed = make_trainer(stage, optimizer)
    for step in range(3):
        take_step(whole, step)
    # A step changes states in place, so both trainers continue only after the copy is made.
    resumed.write_states(save_and_load(whole.read_states()))
    resumed.write_weights(whole.read_weights())
    # Both take the step with the same gradients, so any difference comes from saving and loading.
    take_step(whole, 3)
    take_step(resumed, 3)
    differences = [
        float((a - b).detach().abs().max())
        for a, b in zip(whole.weights.values(), resumed.weights.values(), strict=True)
    ]
    largest = np.max(differences)  # Python's max() would pass over NaN.
    stage.check(f"{optimizer}: largest difference after loading and a step", largest, 0.0)
    if optimizer.startswith("paged"):
        before = count_paged(whole)
        after = count_paged(resumed)
        stage.figure("paged states", {"before saving": before, "after loading": after})
        stage.check("paged states lost by loading", before - after, 0)
        stage.check(
            "paged optimizer without paged states on a GPU",
            float(stage.device.type == "cuda" and not before),
            0,
        )
    stage.figure(f"{optimizer}: seconds per step", stage.time(lambda: take_step(whole, 4)))


def save_and_load(states: dict[str, dict]) -> dict[str, dict]:
    """An optimizer's states by weight, through a file as a checkpoint has it."""
    on_host = {}
    for name, state in states.items():
        on_host[name] = {
            key: value.cpu() if torch.is_tensor(value) else value for key, value in state.items()
        }
    file = io.BytesIO()
    torch.save(on_host, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location="cpu")


def make_trainer(stage: Stage, optimizer: str) -> Replicated:
    # float16 would have a loss scale, which this stage does not try.
    dtype = "bfloat16" if stage.dtype is torch.bfloat16 else "float32"
    config = Config(
        model=Model(base="random", dtype=dtype),
        lora=Lora(r=128),
        data=Data(),
        training=Training(optimizer=optimizer, gradient_checkpointing="none", compile=False),
    )
    torch.manual_seed(0)
    return Trial(config, SHAPE, stage.device).session.trainer


def take_step(trainer: Replicated, number: int) -> None:
    """A step with random gradients that depend on its number only."""
    generator = torch.Generator().manual_seed(number)
    for weight in trainer.weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.device)
    trainer.step(1e-3)


def count_paged(trainer: Replicated) -> int:
    states = trainer.optimizer.state.values()
    # bitsandbytes marks its paged tensors with the attribute is_paged.
    values = [value for state in states for value in state.values()]
    return sum(bool(getattr(value, "is_paged", False)) for value in values)


if __name__ == "__main__":
    sys.exit(main())
