"""Every optimizer, saved as a checkpoint saves it and loaded again: the next step is the same to
the bit, paged states are paged again.
"""

import io
import os
import sys

from medqlora.core.environment import prefer_expandable_segments

prefer_expandable_segments(os.environ)  # torch reads this variable when it is imported.

import torch
from transformers import LlamaConfig

from medqlora.core.config import Lora, Model, Training
from medqlora.model.adapter import attach_adapter
from medqlora.model.head_loss import AnswerLoss
from medqlora.model.random_base import make_base
from medqlora.training.gpu_stage import Stage
from medqlora.training.optimizers import make_optimizer
from medqlora.training.strategies.launch import Strategy
from medqlora.training.strategies.replicated import Replicated
from medqlora.training.strategies.wrapping import wrap

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
    file = io.BytesIO()
    states = {
        name: {key: v.cpu() if torch.is_tensor(v) else v for key, v in some.items()}
        for name, some in whole.read_states().items()
    }
    torch.save(states, file)
    file.seek(0)
    resumed.write_states(torch.load(file, weights_only=True, map_location="cpu"))
    resumed.write_weights(whole.read_weights())
    take_step(whole, 3)
    take_step(resumed, 3)
    pairs = zip(whole.weights.values(), resumed.weights.values(), strict=True)
    stage.check(
        f"{optimizer}: largest difference after loading and a step",
        max(float((a - b).detach().abs().max()) for a, b in pairs),
        0.0,
    )
    if optimizer.startswith("paged"):
        paged = [count_paged(trainer) for trainer in (whole, resumed)]
        stage.figure("paged states", {"before saving": paged[0], "after loading": paged[1]})
        stage.check("paged states lost by loading", paged[0] - paged[1], 0)
        stage.check(
            "paged optimizer without paged states on a GPU",
            float(stage.device.type == "cuda" and not paged[0]),
            0,
        )
    stage.figure(f"{optimizer}: seconds per step", stage.time(lambda: take_step(whole, 4)))


def make_trainer(stage: Stage, optimizer: str) -> Replicated:
    # float16's loss scale is tried elsewhere.
    dtype = torch.float32 if stage.dtype is torch.float16 else stage.dtype
    torch.manual_seed(0)
    # Its tensors are large enough to be paged.
    model = attach_adapter(
        make_base(SHAPE, Model(base="random"), stage.device, dtype), Lora(r=128), 0
    )
    return wrap(
        Strategy("one"),
        AnswerLoss(model, 16),
        lambda weights: make_optimizer(Training(optimizer=optimizer), weights),
        1.0,
        dtype,
    )


def take_step(trainer: Replicated, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for weight in trainer.weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.device)
    trainer.step(1e-3)


def count_paged(trainer: Replicated) -> int:
    states = (value for some in trainer.optimizer.state.values() for value in some.values())
    return sum(bool(getattr(value, "is_paged", False)) for value in states)


if __name__ == "__main__":
    sys.exit(main())
