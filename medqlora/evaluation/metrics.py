"""From predictions to scores with intervals, calibration and position bias.

This module needs no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from medqlora.data.examples import LETTERS
from medqlora.evaluation.open_answers import (
    group_open,
    measure_open,
    score_open,
    score_passages,
)
from medqlora.evaluation.predictions import Predictions
from medqlora.evaluation.statistics import mean_interval, wilson_interval
from medqlora.evaluation.strata import list_strata

# Where the two best options lie less than this apart, in nats, rounding in bfloat16 may change
# which of them is chosen.
NEAR_TIE = 0.01


def score_predictions(rows: Predictions, by: str | None = None) -> dict[str, Any]:
    """Compute all scores of one predictions file.

    The keys depend on the kind of its rows (choice, open or text); docs/outputs.md explains them.

    Args:
        rows: the rows.
        by: a column whose strata are scored too (see score_by).

    Raises:
        PredictionError: the rows are texts without a single token, or cannot be grouped.
    """
    names = None if by is None else list_strata(rows, by)
    if rows.kind == "text":
        return score_passages(rows)
    if rows.kind == "open":
        values = measure_open(rows)
        scores = score_open(rows, values)
        scores |= count_citations(rows)
        return scores if by is None else scores | {"by": {by: group_open(names, values)}}
    right = rows.right
    # A mean over all rows would be NaN where a single one lacks its mass.
    known = ~np.isnan(rows.letter_mass)
    scores = {
        **summarise(right),
        "unparsed": sum(prediction is None for prediction in rows.prediction),
        "unfinished": rows.unfinished,
        "reached_limit": rows.reached_limit,
        "truncated": rows.truncated,
        "too_long": len(rows.too_long),
        "too_long_ids": list(rows.too_long),
        "letter_mass": float(rows.letter_mass[known].mean()) if known.any() else None,
        **measure_calibration(rows.confidence, right),
        "brier": brier_score(rows),
        **measure_margins(rows),
        "position_bias": measure_position_bias(rows),
        "per_subject": group(rows.column("subject"), right),
    }
    for name in ("topic", "choice_type", "dataset"):
        several = len(set(rows.columns[name])) > 1
        has_types = name == "choice_type" and rows.columns[name][0] is not None
        if several or has_types:
            scores[f"per_{name}"] = group(rows.column(name), right)
    choices = {
        i: extra["predictions"] for i, extra in rows.extras.items() if "predictions" in extra
    }
    if choices:  # Only cloze scoring chooses by several normalizations.
        scores["per_normalization"] = {}
        # The order is that of the file; a row that lacks a normalization is not counted under it.
        for name in dict.fromkeys(name for choice in choices.values() for name in choice):
            named = {i: choice[name] for i, choice in choices.items() if name in choice}
            hits = [letter == rows.gold[i] for i, letter in named.items()]
            scores["per_normalization"][name] = summarise(np.array(hits))
    scores |= count_citations(rows)
    return scores if by is None else scores | {"by": {by: group(names, right)}}


def count_citations(rows: Predictions) -> dict[str, Any]:
    """Return how often generated answers cite the passages that they were shown; empty without
    passages.
    """
    if not rows.shown:
        return {}
    known = [extra.get("citations", []) for extra in rows.extras.values()]
    unknown = [extra.get("unknown_citations", []) for extra in rows.extras.values()]
    return {
        "citations": {
            "shown": rows.shown,
            "citing": sum(map(bool, known)),
            "citations": sum(map(len, known)),
            "unknown": sum(map(len, unknown)),
        }
    }


def score_by(rows: Predictions, column: str) -> dict[str, dict[str, Any]]:
    """Score the answers of each stratum: of each value of a column.

    Args:
        rows: answers to multiple-choice or open questions.
        column: a column of the data file that the rows keep, or a value that every row has (see
            list_strata).

    Returns:
        Value -> scores, in the order of the values' names. The scores are number, accuracy and
        interval, or those of summarise_open.

    Raises:
        PredictionError: no row has the column, or the rows are texts.
    """
    names = list_strata(rows, column)
    if rows.kind == "open":
        return group_open(names, measure_open(rows))
    return group(names, rows.right)


def summarise(right: np.ndarray) -> dict[str, Any]:
    """Return number, accuracy and its interval of answers that are right or not, bool [n]."""
    return summarise_counts(int(np.sum(right)), len(right))


def summarise_counts(hits: int, n: int) -> dict[str, Any]:
    """Return number, accuracy and its interval of n answers, of which some are right."""
    return {
        "n": n,
        "accuracy": hits / n if n else None,
        "accuracy_ci95": list(wilson_interval(hits, n)),
    }


def group(names: list[str], right: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return number, accuracy and its interval of each group of answers.

    Args:
        names: the group of each answer.
        right: whether each answer is right, bool [n].
    """
    unique, codes = np.unique(np.array(names, dtype=object).astype(str), return_inverse=True)
    totals = np.bincount(codes)
    hits = np.bincount(codes, weights=right)  # float64 [groups]
    return {
        str(name): summarise_counts(int(hit), int(total))
        for name, total, hit in zip(unique, totals, hits, strict=True)
    }


def measure_calibration(
    confidence: np.ndarray, right: np.ndarray, bins: int = 10
) -> dict[str, Any]:
    """Compute calibration scores; all of them are None where no row has a confidence.

    They are the expected calibration error over bins of equal width (Guo et al., ICML 2017, eq. 3),
    its reliability curve, and the accuracy where only the most confident answers are kept (risk and
    coverage, El-Yaniv & Wiener, JMLR 11, 2010).

    Args:
        confidence: probability of each prediction, float64 [rows]; rows with NaN are left out.
        right: whether each prediction is right, bool [rows].
        bins: number of bins from 0 to 1.
    """
    known = ~np.isnan(confidence)
    if not known.any():
        return {"ece": None, "reliability": None, "selective": None}
    confidence = confidence[known]
    right = right[known].astype(float)
    # A confidence of exactly 1 belongs to the last bin.
    bin_numbers = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(bin_numbers, minlength=bins)
    confidence_sums = np.bincount(bin_numbers, confidence, bins)
    right_sums = np.bincount(bin_numbers, right, bins)
    reliability = [
        {
            "from": b / bins,
            "to": (b + 1) / bins,
            "n": int(counts[b]),
            "confidence": float(confidence_sums[b] / counts[b]),
            "accuracy": float(right_sums[b] / counts[b]),
        }
        for b in range(bins)
        if counts[b]
    ]
    # Element k of the risk is the error rate of the k + 1 most confident answers.
    # Ties keep the order of the file, so the same file gives the same curve.
    order = np.argsort(-confidence, kind="stable")
    risk = 1 - np.cumsum(right[order]) / np.arange(1, len(right) + 1)
    accuracy_at_coverage = {}
    for share in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
        kept = max(1, math.ceil(share * len(right)))
        accuracy_at_coverage[f"{share:.0%}"] = float(1 - risk[kept - 1])
    return {
        # A bin's weight n_b / n times its gap of means is its gap of sums over n.
        "ece": float(np.abs(confidence_sums - right_sums).sum() / len(right)),
        "reliability": reliability,
        "selective": {
            "n": len(right),
            "area_under_risk_coverage": float(risk.mean()),
            "accuracy_at_coverage": accuracy_at_coverage,
        },
    }


def option_probabilities(rows: Predictions) -> np.ndarray:
    """Return the probabilities of the options among each other, float64 [rows, options].

    They follow from the values that chose the predictions. They are 0 where a row has fewer
    options, and NaN in rows without such values.
    """
    if rows.deciding.shape[1] == 0:
        return np.full((len(rows), 1), np.nan)
    values = np.where(np.isnan(rows.deciding), -np.inf, rows.deciding)
    # The largest value is subtracted so that not all exponentials underflow to 0.
    top = values.max(1, keepdims=True)
    # A row without any value has a top of -inf. As NaN it makes the row NaN without the warning
    # that -inf minus -inf gives.
    weights = np.exp(values - np.where(np.isfinite(top), top, np.nan))
    return weights / weights.sum(1, keepdims=True)


def brier_score(rows: Predictions) -> float | None:
    """Compute the Brier score (Brier, Monthly Weather Review 78, 1950), from 0 to 2.

    It is the mean over rows of the squared distance between probabilities and the right answer,
    summed over options; None where no row has probabilities.
    """
    probabilities = option_probabilities(rows)
    known = ~np.isnan(probabilities[:, 0])
    if not known.any():
        return None
    # The letter of a row without probabilities may lie beyond the columns of the others.
    gold = [LETTERS.index(letter) for letter, used in zip(rows.gold, known, strict=True) if used]
    probabilities = probabilities[known]
    truth = np.zeros_like(probabilities)  # [rows with probabilities, options]
    truth[np.arange(len(gold)), gold] = 1
    return float(((probabilities - truth) ** 2).sum(1).mean())


def measure_margins(rows: Predictions) -> dict[str, Any]:
    """Compute the margins between the best and the second option, in nats.

    With cloze scoring they are nats of what decides, such as nats per character. The result has
    their quartiles, and the number of answers with a margin below NEAR_TIE; both are None where no
    row has two options with such values.
    """
    margins = find_margins(rows)
    margins = margins[~np.isnan(margins)]
    if not len(margins):
        return {"margin_quartiles": None, "near_ties": None}
    return {
        "margin_quartiles": np.quantile(margins, [0.25, 0.5, 0.75]).tolist(),
        "near_ties": int((margins < NEAR_TIE).sum()),
    }


def find_margins(rows: Predictions) -> np.ndarray:
    """Return the margin between the best and the second option of each row, float64 [rows].

    It is NaN where fewer than two options have a value that decides.
    """
    if rows.deciding.shape[1] < 2:
        return np.full(len(rows), np.nan)
    # [rows, options], the most likely option first
    best = np.sort(np.where(np.isnan(rows.deciding), -np.inf, rows.deciding), 1)[:, ::-1]
    # A row with fewer than two known options has -inf in second place.
    known = np.isfinite(best[:, 1])
    margins = np.full(len(rows), np.nan)
    margins[known] = best[known, 0] - best[known, 1]
    return margins


def measure_position_bias(rows: Predictions) -> dict[str, Any]:
    """Measure how much the letter of an option influences the answers.

    For each letter the result says how often it is right, how often it is predicted, and its mean
    probability. With permutations it also has the share of questions whose answer changes with the
    order of the options, and the accuracy by the position of the right option.
    """
    gold = Counter(rows.gold)
    chosen = Counter(prediction for prediction in rows.prediction if prediction is not None)
    probabilities = option_probabilities(rows)
    n = len(rows)
    letters: dict[str, Any] = {
        letter: {
            "gold": gold[letter] / n,
            "predicted": chosen[letter] / n,
            "mean_probability": column_mean(probabilities, LETTERS.index(letter)),
        }
        for letter in sorted(set(gold) | set(chosen))
    }
    permuted = {
        i: extra["permutations"] for i, extra in rows.extras.items() if "permutations" in extra
    }
    if not permuted:
        return {"letters": letters}
    flips, per_position = score_orders(rows, permuted)
    return {"letters": letters, "flip_rate": flips / len(permuted), "per_position": per_position}


def score_orders(
    rows: Predictions, permuted: dict[int, dict[str, list[float | None]]]
) -> tuple[int, dict[str, Any]]:
    """Score the answers to each order of the options.

    Args:
        rows: the rows.
        permuted: row number -> order -> log-probabilities by place.

    Returns:
        How many questions have answers that change with the order, and for each place of the right
        option the share of right answers with its interval. The answers to one question are alike,
        so every question counts once there, with its share.
    """
    flips = 0
    answered: Counter[str] = Counter()
    shares: dict[str, list[float]] = {}
    for i, orders in permuted.items():
        answers = set()
        hits: dict[str, list[bool]] = {}
        for order, logprobs in orders.items():
            answer = choose_option(order, logprobs)
            position = LETTERS[order.index(rows.gold[i])]
            answers.add(answer)
            hits.setdefault(position, []).append(answer == rows.gold[i])
        flips += len(answers) > 1
        for position, values in hits.items():
            answered[position] += len(values)
            shares.setdefault(position, []).append(float(np.mean(values)))
    per_position = {
        position: {
            "n": answered[position],
            "questions": len(values),
            "accuracy": float(np.mean(values)),
            "accuracy_ci95": list(mean_interval(np.array(values))),
        }
        for position, values in sorted(shares.items())
    }
    return flips, per_position


def choose_option(order: str, logprobs: list[float | None]) -> str | None:
    """Return the answer to one order of the options, None where nothing is known of any.

    `order` names the options by their letters in the file, so that answers to different orders are
    comparable.
    """
    values = [-math.inf if logprob is None else logprob for logprob in logprobs]
    if max(values) == -math.inf:
        return None
    return order[values.index(max(values))]


def column_mean(probabilities: np.ndarray, column: int) -> float | None:
    """Return the mean of a column without its NaN; None where nothing is known of it."""
    if column >= probabilities.shape[1] or np.isnan(probabilities[:, column]).all():
        return None
    return float(np.nanmean(probabilities[:, column]))
