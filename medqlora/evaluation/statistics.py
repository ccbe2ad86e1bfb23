"""Intervals and exact tests."""

from __future__ import annotations

import math

import numpy as np

Z95 = 1.959963984540054  # standard normal quantile of 0.975


def wilson_interval(right: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, JASA 22, 1927, p. 209-212)."""
    if total == 0:
        return (0.0, 1.0)
    p = right / total
    square = z * z
    center = (p + square / (2 * total)) / (1 + square / total)
    half = z / (1 + square / total) * math.sqrt(p * (1 - p) / total + square / (4 * total * total))
    return (
        0.0 if right == 0 else max(0.0, center - half),
        1.0 if right == total else min(1.0, center + half),
    )


def mean_interval(values: np.ndarray) -> list[float]:
    """95 % interval of a mean by the central limit theorem."""
    half = Z95 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return [float(values.mean()) - half, float(values.mean()) + half]


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value that both models are equally good, from the questions that only one
    got right (McNemar, Psychometrika 12, 1947; exact binomial form)."""
    n = only_a + only_b
    k = min(only_a, only_b)
    if n == 0:
        return 1.0
    log_terms = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
        for i in range(k + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(term) for term in log_terms))


def adjust_holm(p_values: list[float]) -> list[float]:
    """p-values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
