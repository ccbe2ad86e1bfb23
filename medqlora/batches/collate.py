"""Turn the rows of a plan into packed micro-batches."""

from __future__ import annotations

import numpy as np

from medqlora.batches.plan import PlanError, spread_rows
from medqlora.prompts.encoding import TokenTable


def cap_batches(lengths: np.ndarray, batches: list[np.ndarray], budget: int) -> list[np.ndarray]:
    """Divide micro-batches of more than `budget` tokens, after a step that ran out of memory.

    Args:
        lengths: The tokens of each row, int [rows].
        batches: The row numbers of each micro-batch.
        budget: The largest number of tokens that a micro-batch may have.

    Returns:
        The row numbers of micro-batches that hold the same rows.

    Raises:
        PlanError: A single row is over the budget.
    """
    capped = []
    for rows in batches:
        tokens = int(lengths[rows].sum())
        if tokens > budget and lengths[rows].max() > budget:
            raise PlanError(
                f"out of memory at {tokens} tokens, and a single row has {lengths[rows].max()};"
                " lower data.max_length, set training.gradient_checkpointing to full, or use a"
                " smaller model"
            )
        if tokens <= budget:
            capped.append(rows)
        else:
            capped += spread_rows(lengths, rows, -(-tokens // budget), budget)
    return capped


def most_supervised(table: TokenTable, tokens: int) -> int:
    """Return an upper bound for the supervised tokens of a micro-batch of `tokens` tokens.

    It is reached by a micro-batch of the rows with the largest supervised part.
    """
    order = np.argsort(-table.supervised / table.lengths, kind="stable")
    filled = np.cumsum(table.lengths[order])
    count = int(np.searchsorted(filled, tokens)) + 1
    return int(table.supervised[order[:count]].sum())


def collate(table: TokenTable, rows: np.ndarray) -> dict[str, np.ndarray | int]:
    """Pack rows into one sequence without padding.

    Returns:
        input_ids: int64 [1, tokens].
        position_ids: int64 [1, tokens]; they begin from 0 in each row.
        cu_seqlens: int32 [rows + 1]; where rows begin and end in the sequence.
        max_seqlen: The length of the longest row.
        predict_at: int64 [labelled]; the positions whose next token is supervised.
        targets: int64 [labelled]; those next tokens.
    """
    table_starts = table.offsets[rows]
    lengths = table.lengths[rows]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    position_ids = np.arange(ends[-1]) - np.repeat(starts, lengths)
    ids = table.ids[np.repeat(table_starts, lengths) + position_ids].astype(np.int64)
    supervised = position_ids >= np.repeat(table.prompt_lengths[rows], lengths)
    labelled = np.flatnonzero(supervised)
    return {
        "input_ids": ids[None],
        "position_ids": position_ids[None],
        "cu_seqlens": np.concatenate([[0], ends]).astype(np.int32),
        "max_seqlen": int(lengths.max()),
        "predict_at": labelled - 1,
        "targets": ids[labelled],
    }
