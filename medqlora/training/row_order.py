"""The order of the training rows: the base's own loss of each one, and what is said of the order.

data.order easy_to_hard sorts the rows by these losses.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from medqlora.batches.cache import Prepared, load_arrays, name_files, save_arrays
from medqlora.batches.collate import collate
from medqlora.batches.order import count_moved, find_order
from medqlora.batches.plan import Plan, fit_bins
from medqlora.core.config import Config
from medqlora.core.config_loading import change
from medqlora.core.files import find_problem, hash_json, read_lines, write_json_lines
from medqlora.model.attention.packed_batch import move_batch
from medqlora.model.base import compute_hidden
from medqlora.model.head_loss import compute_logits, count_chunks
from medqlora.model.identity import hash_base, resolve_base
from medqlora.prompts.rows import TokenTable
from medqlora.training.session import Loaded, TrainingError, load
from medqlora.training.setup import Setup

FILE = "row_losses.jsonl"
# Rows are measured in batches of this size. It may depend on nothing that another number of
# processes changes, because packing decides the last bits of a loss.
BATCH_TOKENS = 4_096


def find_losses(setup: Setup, prepared: Prepared, report: Callable[[str], None]) -> np.ndarray:
    """Return the base's loss of each training row; on rank 0.

    A resumed run takes those of its folder. A new one takes them from the cache, or measures them.

    Args:
        report: Is called with the name of the stage if the losses are measured.

    Returns:
        The mean loss per supervised token in nats, float32 [rows].

    Raises:
        TrainingError: A loss is not finite, or the base does not fit the memory.
    """
    rows = len(prepared.train.lengths)
    if setup.resume:
        kept = read_losses(setup.output_dir)
        if len(kept) == rows:
            return kept
    model = setup.config.model
    # The name of the table's folder stands for its tokens, its labels and the code.
    key = hash_json(
        [
            prepared.folders["train"],
            hash_base(resolve_base(model.base, model.revision)),
            [model.quantization, model.double_quantization, model.upcast_embeddings],
            [str(setup.dtype), setup.attention.backend, setup.device.type],
        ]
    )
    folder = Path(setup.config.data.cache_dir).expanduser() / f"losses-{key[:24]}"
    if find_problem(folder, name_files(["losses"]), key=key) is not None:
        report("measuring the base's loss of each row")
        # No compiled piece pays for itself in one pass.
        loaded = load(change(setup.config, "training", compile=False), setup.device)
        losses = measure_rows(loaded, prepared.train, setup.config.training.loss_chunk_tokens)
        del loaded
        gc.collect()  # The training loads the base again, and both would not fit a GPU.
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
        save_arrays(folder, {"losses": losses}, key)
    return np.array(load_arrays(folder, ["losses"])["losses"])


@torch.no_grad()
def measure_rows(loaded: Loaded, table: TokenTable, chunk: int) -> np.ndarray:
    """Return the mean loss per supervised token of each row in nats, float32 [rows].

    Args:
        loaded: The base without an adapter.
        table: The rows.
        chunk: The number of labelled positions whose logits are computed at a time.

    Raises:
        TrainingError: A loss is not finite.
    """
    base = loaded.base.eval()
    device = next(base.parameters()).device
    sums = np.zeros(len(table.lengths))
    capacity = max(BATCH_TOKENS, int(table.lengths.max()))
    for members in fit_bins(table.lengths, capacity):
        rows = np.asarray(members)
        batch = move_batch(collate(table, rows), loaded.backend, device)
        predict_at = batch.pop("predict_at")
        targets = batch.pop("targets")
        labelled = compute_hidden(base, **batch)[0].index_select(0, predict_at)
        chunks = count_chunks(len(targets), chunk)
        losses = []  # Each element is float32 [positions of the chunk].
        for hidden, right in zip(
            labelled.tensor_split(chunks), targets.tensor_split(chunks), strict=True
        ):
            logits = compute_logits(base, hidden)
            losses.append(F.cross_entropy(logits, right, reduction="none").cpu())
        # The labelled positions of a row stand side by side, in the order of the rows.
        owners = np.repeat(rows, table.supervised[rows])  # int64 [labelled]
        np.add.at(sums, owners, torch.cat(losses).numpy())
    means = (sums / table.supervised).astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(means))
    if wrong.size:
        names = ", ".join(table.names[row] for row in wrong[:10])
        raise TrainingError(
            f"data.order easy_to_hard: the base's loss of {wrong.size:,} rows is not finite, such"
            f" as {names}; look at these rows, or take another order"
        )
    return means


def hash_losses(losses: np.ndarray | None) -> dict[str, str]:
    """Return the hash of the losses by its key in run_origin.MEANINGS; nothing without losses."""
    if losses is None:
        return {}
    return {"row_losses_sha256": hashlib.sha256(losses.tobytes()).hexdigest()}


def write_losses(output_dir: Path, table: TokenTable, losses: np.ndarray | None) -> None:
    """Write one line per training row: the id of its example, its tokens and its loss, if known."""
    if losses is None:
        return
    columns = zip(table.names, table.lengths.tolist(), losses.tolist(), strict=True)
    rows = [{"id": name, "tokens": tokens, "loss": loss} for name, tokens, loss in columns]
    write_json_lines(output_dir / FILE, rows)


def read_losses(output_dir: Path) -> np.ndarray:
    """Return the losses of write_losses, float32 [rows]; none where a line is damaged."""
    try:
        losses = [float(row["loss"]) for row in read_lines(output_dir / FILE)]
    except (KeyError, TypeError, ValueError, OSError):
        losses = []
    return np.asarray(losses if np.isfinite(losses).all() else [], np.float32)


def describe_order(config: Config, prepared: Prepared, losses: np.ndarray | None) -> dict[str, Any]:
    """Return what environment.json says of the order of the rows of an epoch.

    Args:
        losses: The base's loss of each row, for data.order easy_to_hard.
    """
    order_by = find_order(config.data.order, prepared.train.lengths, losses)
    rows, moved = count_moved(prepared.repeats, order_by, config.training.seed)
    order = {
        "name": config.data.order,
        "temperature": config.data.temperature,
        "seed": config.training.seed,
        "rows": rows,
        "moved_rows": moved,
    }
    if losses is not None:
        ascending = np.sort(losses)
        tenth = max(1, len(ascending) // 10)
        order["first_tenth_loss"] = float(ascending[:tenth].mean())
        order["last_tenth_loss"] = float(ascending[-tenth:].mean())
    return order


def find_unseen(config: Config, plan: Plan) -> list[str]:
    """Return a warning where a sorted training ends inside an epoch, whose last rows it misses."""
    epochs = float(plan.epochs[-1])
    if config.data.order == "shuffled" or epochs == round(epochs):
        return []
    return [
        f"data.order {config.data.order}: the training ends after {epochs:.4g} epochs, so its last"
        " epoch lacks the rows at the end of the order; choose training.epochs and"
        " training.max_steps so that it ends with an epoch"
    ]
