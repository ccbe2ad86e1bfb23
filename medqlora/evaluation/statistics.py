"""Confidence intervals and exact tests."""

from __future__ import annotations

import math

import numpy as np

Z95 = 1.959963984540054  # the standard normal quantile of 0.975


def wilson_interval(right: float, total: float, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (Wilson, JASA 22, 1927, p. 209-212).

    Args:
        right, total: the proportion; nothing is known of 0 of 0, so its interval is (0, 1). Both
            may be fractions of a count, as `mean_interval` gives them.
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


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean of values from 0 to 1, one for each question.

    It is Wilson's interval with an effective number of questions: the number of yes-or-no answers
    that would give a mean of this variance (Korn & Graubard, Survey Methodology 24, 1998, p.
    193-201; with Wilson's interval Franco et al., Journal of Survey Statistics and Methodology 7,
    2019, p. 334-364). So it stays within [0, 1], and values of only 0 and 1 get exactly Wilson's
    interval. A share of several answers to one question is one value, whatever the answers have in
    common, which makes the questions the clusters.

    Args:
        values: float [n], one value of each question.
    """
    n = len(values)
    if n == 0:
        return (0.0, 1.0)
    # One more 0 and one more 1, as Agresti & Coull add them (The American Statistician 52, 1998),
    # keep the variance of equal values from being 0, and the interval from having no width.
    mean = (float(values.sum()) + 1) / (n + 2)
    variance = (float((values * values).sum()) + 1) / (n + 2) - mean * mean
    effective = n * mean * (1 - mean) / variance
    # A mean of rounded sums may lie beyond its bounds by the last bit.
    share = min(1.0, max(0.0, float(values.mean())))
    return wilson_interval(share * effective, effective)


def difference_interval(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two paired proportions, b less a.

    The Wilson intervals of the two kinds of disagreement are squared and added, with the
    correlation of two counts of one sample. This is Newcombe's way (Statistics in Medicine 17,
    1998, p. 2635-2650, method 10) of combining limits (Zou & Donner, Statistics in Medicine 27,
    2008, p. 1693-1702). Newcombe combines the limits of both accuracies, which come too close where
    few pairs disagree. The limits of the disagreements never coincide.

    Args:
        only_a, only_b: how many questions only the first and only the second model got right.
        n: questions.
    """
    share_a = only_a / n
    share_b = only_b / n
    low_a, high_a = wilson_interval(only_a, n)
    low_b, high_b = wilson_interval(only_b, n)
    correlation = 0.0
    # Where all pairs are of one kind there is nothing to correlate.
    if only_a < n and only_b < n:
        correlation = -math.sqrt(share_a * share_b / ((1 - share_a) * (1 - share_b)))
    below = add_squares(share_b - low_b, high_a - share_a, correlation)
    above = add_squares(high_b - share_b, share_a - low_a, correlation)
    difference = share_b - share_a
    return (max(-1.0, difference - below), min(1.0, difference + above))


def add_squares(first: float, second: float, correlation: float) -> float:
    """Return the length of the difference of two deviations with this correlation."""
    return math.sqrt(first * first + second * second - 2 * correlation * first * second)


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
