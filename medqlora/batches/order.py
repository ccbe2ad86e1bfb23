"""How often an epoch shows each row, and in which order."""

from __future__ import annotations

import numpy as np

from medqlora.core.config import DataEntry


def count_repeats(
    entries: list[DataEntry], entry_of_row: np.ndarray, temperature: float | None = None
) -> np.ndarray:
    """Return how often each row is seen per epoch, float64 [rows].

    It is the weight of the row's entry, or the weight that gives the entry its share of all rows.
    With a temperature T the share of an entry of n rows is n^(1/T) by the sum over all entries
    (Arivazhagan et al., 2019, arXiv 1907.05019), and an epoch keeps its number of rows.

    Args:
        entries: The entries of data.train.
        entry_of_row: The number of each row's entry, int64 [rows].
        temperature: data.temperature, at least 1; no entry then has a weight or a share.
    """
    rows = np.bincount(entry_of_row, minlength=len(entries)).astype(float)  # [entries]
    if temperature is not None:
        parts = rows ** (1 / temperature)
        weights = rows.sum() * parts / parts.sum() / np.maximum(rows, 1)
        return weights[entry_of_row]
    shares = np.array([entry.share or 0.0 for entry in entries])  # [entries]
    weights = np.array([entry.weight for entry in entries])  # [entries]
    without_share = (rows * weights)[shares == 0].sum()
    # The entries without a share make up the part of an epoch that the shares leave over.
    total = without_share / (1 - shares.sum())
    weights = np.where(shares > 0, shares * total / np.maximum(rows, 1), weights)
    return weights[entry_of_row]  # float64 [rows]


def draw_rows(repeats: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw the rows of an epoch, shuffled.

    A row that is to be seen 2.25 times per epoch is drawn twice. A random quarter of the rows with
    this number of repeats is drawn once more.

    Args:
        repeats: How often each row is seen per epoch, float64 [rows].
        generator: The generator that is drawn from.

    Returns:
        The drawn row numbers, int64.
    """
    whole = np.floor(repeats).astype(np.int64)  # [rows]
    rows = [np.repeat(np.arange(len(repeats)), whole)]
    # Rows of one entry have the same float64, so equality is exact. Fractions come in sorted order,
    # so the draws from the generator do too.
    for fraction in np.unique(repeats - whole):
        candidates = np.flatnonzero(repeats - whole == fraction)
        rows.append(generator.choice(candidates, round(fraction * len(candidates)), replace=False))
    return generator.permutation(np.concatenate(rows))  # int64 [drawn rows]


def find_order(name: str, lengths: np.ndarray, losses: np.ndarray | None) -> np.ndarray | None:
    """Return the value that the rows of an epoch ascend by, float64 [rows]; None where shuffled.

    Args:
        name: The value of data.order.
        lengths: The tokens of each training row, int64 [rows].
        losses: The base's loss of each training row, float32 [rows], for easy_to_hard.
    """
    if name == "shuffled":
        return None
    if name == "short_to_long":
        return lengths.astype(np.float64)
    assert losses is not None  # Only a training has measured them.
    assert np.isfinite(losses).all()
    return losses.astype(np.float64)


def sort_rows(rows: np.ndarray, order_by: np.ndarray | None) -> np.ndarray:
    """Return the drawn rows of an epoch in ascending order of a value; None leaves them shuffled.

    Args:
        rows: The row numbers in shuffled order, which rows of equal values keep, int64.
        order_by: The value of each row, float [rows]; all of them are finite.
    """
    return rows if order_by is None else rows[np.argsort(order_by[rows], kind="stable")]


def count_moved(repeats: np.ndarray, order_by: np.ndarray | None, seed: int) -> tuple[int, int]:
    """Return the rows of the first epoch, and how many stand elsewhere than in shuffled order."""
    drawn = draw_rows(repeats, np.random.default_rng([seed, 0]))
    return len(drawn), int((drawn != sort_rows(drawn, order_by)).sum())
