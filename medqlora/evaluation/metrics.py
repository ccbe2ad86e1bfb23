"""Predictions -> scores with intervals, calibration, position bias; paired comparison of two
models. Needs no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from medqlora.data.examples import LETTERS
from medqlora.evaluation.open_answers import score_open, score_passages
from medqlora.evaluation.predictions import Predictions
from medqlora.evaluation.statistics import wilson_interval

# nats between the two best options: rounding in bfloat16 may turn such an answer over
NEAR_TIE = 0.01


def score_predictions(rows: Predictions) -> dict[str, Any]:
    """All scores of one file; the keys depend on its kind (choice, open, text)."""
    if rows.kind == "text":
        return score_passages(rows)
    if rows.kind == "open":
        return score_open(rows)
    right = rows.right
    known = ~np.isnan(rows.letter_mass)
    scores = {
        **summarise(right),
        "unparsed": sum(prediction is None for prediction in rows.prediction),
        "truncated": rows.truncated,
        "letter_mass": float(rows.letter_mass[known].mean()) if known.any() else None,
        **measure_calibration(rows.confidence, right),
        "brier": brier_score(rows),
        **measure_margins(rows),
        "position_bias": measure_position_bias(rows),
        "per_subject": group(rows.column("subject"), right),
    }
    for name in ("topic", "choice_type", "dataset"):
        if len(set(rows.columns[name])) > 1 or (
            name == "choice_type" and rows.columns[name][0] is not None
        ):
            scores[f"per_{name}"] = group(rows.column(name), right)
    choices = {
        i: extra["predictions"] for i, extra in rows.extras.items() if "predictions" in extra
    }
    if choices:  # cloze: by raw log-probability, per character, per token
        names = next(iter(choices.values()))
        hits = {
            name: np.array([choice[name] == rows.gold[i] for i, choice in choices.items()])
            for name in names
        }
        scores["per_normalization"] = {name: summarise(values) for name, values in hits.items()}
    return scores


def summarise(right: np.ndarray) -> dict[str, Any]:
    n = len(right)
    hits = int(np.sum(right))
    return {
        "n": n,
        "accuracy": hits / n if n else None,
        "accuracy_ci95": list(wilson_interval(hits, n)),
    }


def group(names: list[str], right: np.ndarray) -> dict[str, dict[str, Any]]:
    """Accuracy of each group, by name."""
    unique, codes = np.unique(np.array(names, dtype=object).astype(str), return_inverse=True)
    totals = np.bincount(codes)
    hits = np.bincount(codes, weights=right)
    return {
        str(name): {
            "n": int(n),
            "accuracy": float(k / n),
            "accuracy_ci95": list(wilson_interval(int(k), int(n))),
        }
        for name, n, k in zip(unique, totals, hits, strict=True)
    }


def measure_calibration(
    confidence: np.ndarray, right: np.ndarray, bins: int = 10
) -> dict[str, Any]:
    """Expected calibration error over equal-width bins (Guo et al., ICML 2017, eq. 3), its
    reliability curve, and accuracy when only the most confident answers are kept (risk and
    coverage: El-Yaniv & Wiener, JMLR 11, 2010).

    Rows of unknown confidence (NaN) are left out; all values are None where no row has one.
    """
    known = ~np.isnan(confidence)
    if not known.any():
        return {"ece": None, "reliability": None, "selective": None}
    confidence = confidence[known]
    right = right[known].astype(float)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    means = np.bincount(place, confidence, bins), np.bincount(place, right, bins)
    order = np.argsort(-confidence, kind="stable")
    risk = 1 - np.cumsum(right[order]) / np.arange(1, len(right) + 1)
    kept = {
        f"{share:.0%}": max(1, math.ceil(share * len(right)))
        for share in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    }
    return {
        "ece": float(np.abs(means[0] - means[1]).sum() / len(right)),
        "reliability": [
            {
                "from": b / bins,
                "to": (b + 1) / bins,
                "n": int(counts[b]),
                "confidence": float(means[0][b] / counts[b]),
                "accuracy": float(means[1][b] / counts[b]),
            }
            for b in range(bins)
            if counts[b]
        ],
        "selective": {
            "area_under_risk_coverage": float(risk.mean()),
            "accuracy_at_coverage": {share: float(1 - risk[n - 1]) for share, n in kept.items()},
        },
    }


def option_probabilities(rows: Predictions) -> np.ndarray:
    """Probabilities among the options [rows, options]; 0 where a row has fewer, NaN rows where it
    has none.
    """
    if rows.logprobs.shape[1] == 0:
        return np.full((len(rows), 1), np.nan)
    values = np.where(np.isnan(rows.logprobs), -np.inf, rows.logprobs)
    top = values.max(1, keepdims=True)
    weights = np.exp(values - np.where(np.isfinite(top), top, np.nan))
    return weights / weights.sum(1, keepdims=True)


def brier_score(rows: Predictions) -> float | None:
    """Mean squared distance between probabilities and the right answer, summed over options: 0 to 2
    (Brier, Monthly Weather Review 78, 1950)."""
    chances = option_probabilities(rows)
    known = ~np.isnan(chances[:, 0])
    if not known.any():
        return None
    truth = np.zeros_like(chances)
    truth[np.arange(len(rows)), [LETTERS.index(gold) for gold in rows.gold]] = 1
    return float(((chances - truth) ** 2).sum(1)[known].mean())


def measure_margins(rows: Predictions) -> dict[str, Any]:
    """Nats between the best and the second option: its quartiles, and how many answers hang on less
    than NEAR_TIE.
    """
    if rows.logprobs.shape[1] < 2:
        return {"margin_quartiles": None, "near_ties": None}
    best = np.sort(np.where(np.isnan(rows.logprobs), -np.inf, rows.logprobs), 1)[:, ::-1]
    known = np.isfinite(best[:, 1])
    margins = best[known, 0] - best[known, 1]
    if not len(margins):
        return {"margin_quartiles": None, "near_ties": None}
    return {
        "margin_quartiles": np.quantile(margins, [0.25, 0.5, 0.75]).tolist(),
        "near_ties": int((margins < NEAR_TIE).sum()),
    }


def measure_position_bias(rows: Predictions) -> dict[str, Any]:
    """How often each letter is right, is predicted, and its mean probability; with permutations
    also the share of questions whose answer changes with the order of options, and accuracy by the
    position of the right option.
    """
    gold = Counter(rows.gold)
    chosen = Counter(p for p in rows.prediction if p is not None)
    chances = option_probabilities(rows)
    n = len(rows)
    letters = sorted(set(gold) | set(chosen))
    bias: dict[str, Any] = {
        letter: {
            "gold": gold[letter] / n,
            "predicted": chosen[letter] / n,
            "mean_probability": column_mean(chances, LETTERS.index(letter)),
        }
        for letter in letters
    }
    permuted = {
        i: extra["permutations"] for i, extra in rows.extras.items() if "permutations" in extra
    }
    if not permuted:
        return {"letters": bias}
    flips = 0
    hits = {}
    for i, orders in permuted.items():
        answers = set()
        for order, logprobs in orders.items():
            answer = order[
                max(
                    range(len(order)),
                    key=lambda at: -math.inf if logprobs[at] is None else logprobs[at],
                )
            ]
            answers.add(answer)
            hits.setdefault(LETTERS[order.index(rows.gold[i])], []).append(answer == rows.gold[i])
        flips += len(answers) > 1
    per_position = {letter: summarise(np.array(values)) for letter, values in sorted(hits.items())}
    return {"letters": bias, "flip_rate": flips / len(permuted), "per_position": per_position}


def column_mean(chances: np.ndarray, column: int) -> float | None:
    if column >= chances.shape[1] or np.isnan(chances[:, column]).all():
        return None
    return float(np.nanmean(chances[:, column]))
