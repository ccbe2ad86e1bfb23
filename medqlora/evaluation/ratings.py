"""Agreement of people who rated answers, and the means of the models that gave them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from medqlora.evaluation.rating_sheet import CRITERIA, HIGHEST, LOWEST, Key
from medqlora.evaluation.statistics import mean_interval

LEVELS = HIGHEST - LOWEST + 1
DRAWS = 2_000  # The bootstrap draws so many samples.


def summarise_ratings(sheets: Sequence[dict[str, tuple[int, ...]]], key: Key) -> dict[str, Any]:
    """Return the agreement of the raters, the mean rating of each model and their differences.

    The answers to one question are alike, so every interval takes the questions for its units.

    Args:
        sheets: the ratings of each rater, as rating_sheet.read_sheet returns them.
        key: the key of these sheets.

    Returns:
        The numbers of questions, items and raters, and for each criterion: Krippendorff's alpha
        with its interval (None for one rater, and where all ratings are equal), the mean of each
        file, and the differences of each two files. docs/outputs.md explains the keys.
    """
    items = list(key.items)
    questions = list(dict.fromkeys(entry.question for entry in key.items.values()))
    rows = np.array([questions.index(key.items[item].question) for item in items])  # int64 [items]
    table = np.array([[sheet[item] for item in items] for sheet in sheets])
    described = {}
    for number, name in enumerate(CRITERIA):
        values = table[:, :, number]  # int64 [raters, items]
        alpha, bounds = measure_agreement(values, rows)
        # A model has one answer to each question; its rating is the mean of all raters.
        means = {}
        for file in key.files:
            own = [i for i, item in enumerate(items) if key.items[item].file == file]
            means[file] = np.full(len(questions), math.nan)
            means[file][rows[own]] = values[:, own].mean(0)
        described[name] = {
            "alpha": alpha,
            "alpha_ci95": bounds,
            "per_file": {file: describe_mean(ratings) for file, ratings in means.items()},
            "differences": [
                {"a": a, "b": b, **describe_difference(means[b] - means[a])}
                for a, b in itertools.combinations(means, 2)
            ],
        }
    return {
        "questions": len(questions),
        "items": len(items),
        "raters": len(sheets),
        "models": key.files,
        "criteria": described,
    }


def measure_agreement(
    ratings: np.ndarray, questions: np.ndarray
) -> tuple[float | None, list[float] | None]:
    """Return Krippendorff's alpha of ordinal ratings, and its 95 % bootstrap interval.

    The interval draws questions with all their answers. Draws in which all ratings are equal have
    no alpha and are left out.

    Args:
        ratings: from LOWEST to HIGHEST, int [raters, items].
        questions: the number of each item's question, int [items].
    """
    raters = len(ratings)
    if raters < 2:
        return None, None
    # Every ordered pair of two raters' values of one item is counted, by 1 / (raters - 1), so that
    # an item counts as often as it has values (Krippendorff, Computing Krippendorff's
    # Alpha-Reliability, 2011, section D).
    pairs = np.zeros((questions.max() + 1, LEVELS, LEVELS))
    for a, b in itertools.permutations(range(raters), 2):
        np.add.at(pairs, (questions, ratings[a] - LOWEST, ratings[b] - LOWEST), 1 / (raters - 1))
    alpha = compute_alpha(pairs.sum(0))
    if math.isnan(alpha):
        return None, None
    draws = np.random.default_rng(0).multinomial(len(pairs), [1 / len(pairs)] * len(pairs), DRAWS)
    drawn = [compute_alpha(np.tensordot(weights, pairs, 1)) for weights in draws]
    bounds = np.nanquantile(drawn, [0.025, 0.975])
    return alpha, bounds.tolist()


def compute_alpha(coincidences: np.ndarray) -> float:
    """Return Krippendorff's alpha for ordinal values; NaN where all values are equal.

    The distance of two ranks is squared: the values from one to the other, of which the two ends
    count half (Krippendorff, Content Analysis, 4th edition, 2019, chapter 12).

    Args:
        coincidences: how often each pair of values stands on one item, float64 [levels, levels].
    """
    totals = coincidences.sum(0)  # [levels]
    n = totals.sum()
    reached = np.cumsum(totals) - totals / 2  # the middle of each value's ranks
    distance = (reached[:, None] - reached[None, :]) ** 2
    expected = (np.outer(totals, totals) * distance).sum() / (n - 1)
    if expected == 0:
        return math.nan
    return float(1 - (coincidences * distance).sum() / expected)


def describe_mean(ratings: np.ndarray) -> dict[str, Any]:
    """Return the mean of ratings, one for each question, with its interval (see mean_interval)."""
    span = HIGHEST - LOWEST
    bounds = mean_interval((ratings - LOWEST) / span)
    return {
        "n": len(ratings),
        "mean": float(ratings.mean()),
        "mean_ci95": [LOWEST + span * bound for bound in bounds],
    }


def describe_difference(differences: np.ndarray) -> dict[str, Any]:
    """Return the mean of paired differences, one for each question, with its t interval.

    There is no interval (None) where no two differences are unlike, because nothing is known then
    of how much they vary.
    """
    n = len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    mean = float(differences.mean())
    bounds = None
    if error > 0:
        from scipy.stats import t  # Its import takes half a second.

        half = float(t.ppf(0.975, n - 1)) * error
        bounds = [mean - half, mean + half]
    return {"n": n, "difference": mean, "difference_ci95": bounds}
