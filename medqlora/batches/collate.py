"""Turn the rows of a plan into packed micro-batches."""

from __future__ import annotations

import numpy as np

from medqlora.batches.budgets import PlanError
from medqlora.batches.plan import spread_rows
from medqlora.prompts.rows import TokenTable


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
        # A rank may have a micro-batch without rows, which has no longest row. It has no tokens
        # either, so `max` is not reached.
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
    # Rows go in by their supervised part, largest first. The row that passes the limit counts as a
    # whole, which makes the sum a bound for every choice of different rows.
    order = np.argsort(-table.supervised / table.lengths, kind="stable")
    filled = np.cumsum(table.lengths[order])  # int64 [rows]
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
    table_starts = table.offsets[rows]  # int64 [rows], in the table
    lengths = table.lengths[rows]  # int64 [rows]
    ends = np.cumsum(lengths)  # int64 [rows], in the packed sequence
    starts = ends - lengths
    # Positions begin again in each row, and attention is separated by cu_seqlens. With wrong
    # borders documents would read each other without an error.
    position_ids = np.arange(ends[-1]) - np.repeat(starts, lengths)  # [tokens]
    ids = table.ids[np.repeat(table_starts, lengths) + position_ids].astype(np.int64)
    supervised = position_ids >= np.repeat(table.prompt_lengths[rows], lengths)  # bool [tokens]
    labelled = np.flatnonzero(supervised)  # int64 [labelled]
    return {
        "input_ids": ids[None],
        "position_ids": position_ids[None],
        # The variable-length kernels take int32 here and a Python integer below.
        "cu_seqlens": np.concatenate([[0], ends]).astype(np.int32),
        "max_seqlen": int(lengths.max()),
        # The logits of a position predict the token behind it. Each row has an unsupervised first
        # token, so this is never a position of the row before.
        "predict_at": labelled - 1,
        "targets": ids[labelled],
    }
