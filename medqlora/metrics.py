"""Predictions -> accuracy with its interval, per subject; paired comparison. Needs neither torch nor a GPU."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np

Z95 = 1.959963984540054  # standard normal quantile of 0.975


def wilson_interval(right: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, JASA 22, 1927, p. 209-212)."""
    if total == 0:
        return (0.0, 1.0)
    p, square = right / total, z * z
    center = (p + square / (2 * total)) / (1 + square / total)
    half = z / (1 + square / total) * math.sqrt(p * (1 - p) / total + square / (4 * total * total))
    return (0.0 if right == 0 else max(0.0, center - half), 1.0 if right == total else min(1.0, center + half))


def score_predictions(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy over prediction rows (keys of the contract: gold, prediction, subject, letter_mass, option_logprobs).

    A row without a prediction counts as wrong and as unparsed.
    """
    groups: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        groups[row.get("subject") or "none"].append(is_right(row))
    right = [is_right(row) for row in rows]
    masses = [row["letter_mass"] for row in rows if row.get("letter_mass") is not None]
    return {
        **summarise(right),
        "unparsed": sum(row.get("prediction") is None for row in rows),
        "letter_mass": float(np.mean(masses)) if masses else None,
        "ece": calibration_error(rows),
        "per_subject": {name: summarise(values) for name, values in sorted(groups.items())},
    }


def is_right(row: dict[str, Any]) -> bool:
    return row.get("prediction") is not None and row["prediction"] == row["gold"]


def summarise(right: list[bool]) -> dict[str, Any]:
    return {
        "n": len(right),
        "accuracy": sum(right) / len(right) if right else None,
        "accuracy_ci95": list(wilson_interval(sum(right), len(right))),
    }


def calibration_error(rows: list[dict[str, Any]], bins: int = 10) -> float | None:
    """Expected calibration error over equal-width bins of the chosen option's probability among the options
    (Guo et al., ICML 2017, eq. 3)."""
    confidence, right = [], []
    for row in rows:
        if row.get("option_logprobs"):
            values = np.exp(np.array(list(row["option_logprobs"].values())) - max(row["option_logprobs"].values()))
            confidence.append(float(values.max() / values.sum()))
            right.append(is_right(row))
    if not confidence:
        return None
    confidence, right = np.array(confidence), np.array(right, float)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[place == b].sum() - right[place == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(right))


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value that both models are equally good, from the questions that only one got right
    (McNemar, Psychometrika 12, 1947; exact binomial form)."""
    n, k = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    log_terms = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(math.exp(term) for term in log_terms))


def compare_paired(a: list[bool], b: list[bool], resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Compare two models on the same questions; `difference` is b - a with a paired bootstrap interval."""
    n = len(a)
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    counts = np.random.default_rng(seed).multinomial(n, [only_a / n, only_b / n, 1 - (only_a + only_b) / n], resamples)
    low, high = np.quantile((counts[:, 1] - counts[:, 0]) / n, [0.025, 0.975])
    return {
        "n": n, "accuracy_a": sum(a) / n, "accuracy_b": sum(b) / n, "difference": (only_b - only_a) / n,
        "difference_ci95": [float(low), float(high)], "mcnemar_p": mcnemar_exact(only_a, only_b),
        "only_a_right": only_a, "only_b_right": only_b,
    }  # fmt: skip
