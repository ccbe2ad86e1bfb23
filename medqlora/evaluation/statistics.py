"""Confidence intervals and exact tests."""

from __future__ import annotations

import math

import numpy as np

Z95 = 1.959963984540054  # the standard normal quantile of 0.975


def wilson_interval(right: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (Wilson, JASA 22, 1927, p. 209-212).

    Args:
        right, total: the proportion; nothing is known of 0 of 0, so its interval is (0, 1).
        z: standard normal quantile of the interval's upper end.
    """
    if total == 0:
        return (0.0, 1.0)
    p = right / total
    square = z * z
    center = (p + square / (2 * total)) / (1 + square / total)
    half = z / (1 + square / total) * math.sqrt(p * (1 - p) / total + square / (4 * total * total))
    # Rounding must not take the interval off a proportion of exactly 0 or 1.
    low = 0.0 if right == 0 else max(0.0, center - half)
    high = 1.0 if right == total else min(1.0, center + half)
    return (low, high)


def mean_interval(values: np.ndarray) -> list[float]:
    """Return the 95 % interval of a mean by the central limit theorem.

    values: float [n]. The interval of a single value has no width.
    """
    half = 0.0
    if len(values) > 1:
        half = Z95 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return [float(values.mean()) - half, float(values.mean()) + half]


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Return the two-sided exact p-value of the hypothesis that both models are equally good.

    It is the binomial form of McNemar's test (Psychometrika 12, 1947): of the questions that one
    model alone got right, each model has half.

    Args:
        only_a, only_b: how many questions only the first and only the second model got right.
    """
    if only_a + only_b == 0:
        return 1.0
    from scipy.stats import binomtest  # Its import takes half a second; scores do without it.

    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def adjust_holm(p_values: list[float]) -> list[float]:
    """Return p-values corrected for their number (Holm, Scandinavian Journal of Statistics 6,
    1979).
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
