"""Rows of a plan become packed micro-batches."""

from __future__ import annotations

import numpy as np

from medqlora.batches.plan import PlanError, level
from medqlora.prompts.encoding import TokenTable


def cap_batches(lengths: np.ndarray, batches: list[np.ndarray], budget: int) -> list[np.ndarray]:
    """The same rows in micro-batches of at most `budget` tokens (after running out of memory).

    Raises:
        PlanError: a single row is over the budget.
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
        capped += [rows] if tokens <= budget else level(lengths, rows, -(-tokens // budget), budget)
    return capped


def most_supervised(table: TokenTable, tokens: int) -> int:
    """No micro-batch of so many tokens has more supervised ones: those of the densest rows that
    fill it.
    """
    order = np.argsort(-table.supervised / table.lengths, kind="stable")
    filled = np.cumsum(table.lengths[order])
    return int(table.supervised[order[: int(np.searchsorted(filled, tokens)) + 1]].sum())


def collate(table: TokenTable, rows: np.ndarray) -> dict[str, np.ndarray | int]:
    """Pack rows into one sequence without padding.

    Returns: input_ids, position_ids int64 [1, tokens]; cu_seqlens int32 [rows + 1]; max_seqlen;
        predict_at int64 [labelled]: positions whose next token is supervised; targets int64
        [labelled]: those tokens.
    """
    starts = table.offsets[rows]
    lengths = table.lengths[rows]
    ends = np.cumsum(lengths)
    begins = ends - lengths
    position_ids = np.arange(ends[-1]) - np.repeat(begins, lengths)
    ids = table.ids[np.repeat(starts, lengths) + position_ids].astype(np.int64)
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
