"""Steps of full fine-tuning under strategies, which test_full.py starts on several processes.

python full_steps.py BASE DTYPE RESULTS STRATEGY [STRATEGY ...]
"""

import os
import sys
from pathlib import Path

import torch

from medqlora.batches.plan import make_plan
from medqlora.core.config import Config
from medqlora.model.hardware import DTYPES
from medqlora.training.processes import start_processes
from medqlora.training.session import Session, build, load
from medqlora.training.strategies.launch import Strategy
from medqlora.training.trial import draw_lengths, make_table

CPU = torch.device("cpu")
OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


def open_steps(base: str, dtype: str, strategy: str, ranks: int = 1, rank: int = 0):
    """A session, rows and a plan of 30 steps of four micro-batches of one process."""
    training = {"method": "full", "lr": 1e-3, "max_tokens_per_batch": 128, "max_grad_norm": 5.0}
    training |= {"gradient_checkpointing": "every_2", "loss_chunk_tokens": 8}
    model = {"base": base, "quantization": "none", "dtype": dtype}
    config = Config.model_validate(
        {"model": model, "training": training, "data": {"max_length": 64}}
    )
    name, _, offload = strategy.partition("_")
    settings = {"stage": int(name[-1])} if name.startswith("zero") else {}
    if offload:
        settings |= OFFLOAD if name == "zero3" else {"offload": True}
    chosen = Strategy(name, ranks, settings)
    session = Session(build(load(config, CPU), config), config, chosen, CPU, DTYPES[dtype], rank)
    table = make_table(draw_lengths(240, 64, 0), 4, 300, 0)
    plan = make_plan(
        table.lengths, capacity=128, global_tokens=512, ranks=ranks, max_steps=30, epochs=9
    )
    return session, table, plan


def take(session, table, plan, steps) -> list[tuple[float, float]]:
    """Take steps; return the loss per supervised token and the norm of the gradient of each."""
    figures = []
    for step in steps:
        targets = int(table.supervised[plan.rows_of(step)].sum())
        gradients = session.accumulate(table, plan, step, targets)
        total, _ = session.sum_over_ranks(gradients.losses)
        figures.append((total / targets, session.update(1e-3)["grad_norm"]))
    return figures


def copy(tree: dict) -> dict:
    """Copy live tensors, which the next step changes."""
    return {
        key: copy(value) if isinstance(value, dict) else torch.as_tensor(value).clone()
        for key, value in tree.items()
    }


def main() -> None:
    base, dtype, results, *strategies = sys.argv[1:]
    accelerator = start_processes(os.environ, cuda=False)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    for strategy in strategies:
        session, table, plan = open_steps(base, dtype, strategy, ranks, rank)
        figures = take(session, table, plan, range(20))
        found = {"weights": copy(session.trainer.read_weights(keep=rank == 0))}
        found["states"] = copy(session.trainer.read_states(keep=rank == 0))
        # What was read is written back, and the steps go on as if nothing had been.
        session.trainer.write_weights(copy(session.trainer.read_weights()))
        session.trainer.write_states(copy(session.trainer.read_states()))
        figures += take(session, table, plan, range(20, 30))
        found |= {"figures": figures, "last": copy(session.trainer.read_weights(keep=rank == 0))}
        found["eval"] = session.evaluate(table)
        if rank == 0:
            torch.save(found, Path(results) / f"{strategy}-{dtype}.pt")
    torch.distributed.barrier()
    os._exit(0)  # DeepSpeed's engines of one process do not end one after the other.


if __name__ == "__main__":
    main()
