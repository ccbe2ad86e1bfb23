"""Two models on the same open questions: paired differences of each score."""

from __future__ import annotations

from typing import Any

import numpy as np

from medqlora.evaluation.open_answers import OPEN_SCORES
from medqlora.evaluation.statistics import (
    RESAMPLES,
    SEED,
    adjust_holm,
    bootstrap_interval,
    difference_interval,
    mcnemar_exact,
    mean_interval,
    sign_flip_test,
)

Values = dict[str, np.ndarray]

# How the numbers below are computed; the outputs repeat it.
METHOD = {
    "interval": "percentile bootstrap over questions with two added differences",
    "test": "paired sign-flip permutation",
    "exact_match": "intervals of two paired proportions and exact McNemar test",
    "resamples": RESAMPLES,
    "seed": SEED,
}


def compare_answers(a: Values, b: Values, subjects: np.ndarray, same: bool) -> dict[str, Any]:
    """Compare two models by each score of open answers, overall and by subject.

    Args:
        a, b: score -> float64 [n], as measure_open returns them; answer i of both is to one
            question. NaN where there is no such score, in both alike.
        subjects: object [n], the subject of each question.
        same: whether all answers of both models are the same texts.

    Returns:
        What `compare_parts` returns, `method`, and the same for each subject under `per_subject`,
        with Holm's correction.
    """
    result = compare_parts(a, b, same) | {"method": METHOD}
    parts = {}
    for name in sorted(set(subjects)):
        here = subjects == name
        parts[str(name)] = compare_parts(
            {score: values[here] for score, values in a.items()},
            {score: values[here] for score, values in b.items()},
            same,
        )
    # Each score is corrected for the number of subjects, as accuracies are.
    for score in OPEN_SCORES:
        known = [part[score] for part in parts.values() if part[score] is not None]
        adjusted = adjust_holm([compared["p"] for compared in known])
        for compared, p in zip(known, adjusted, strict=True):
            compared["holm_p"] = p
    return result | {"per_subject": parts}


def compare_parts(a: Values, b: Values, same: bool) -> dict[str, Any]:
    """Compare two models on some questions by each score; see compare_answers.

    Returns:
        The number of questions, and for each score what `compare_score` returns, or None where no
        answer has it.
    """
    parts: dict[str, Any] = {"n": len(next(iter(a.values())))}
    for score in OPEN_SCORES:
        known = ~(np.isnan(a[score]) | np.isnan(b[score]))
        binary = score == "exact_match"
        compared = None
        if known.any():
            compared = compare_score(a[score][known], b[score][known], binary, same)
        parts[score] = compared
    return parts


def compare_score(a: np.ndarray, b: np.ndarray, binary: bool, same: bool) -> dict[str, Any]:
    """Compare two models by one score.

    Args:
        a, b: float64 [n], the score of each answer, from 0 to 1.
        binary: whether it is 0 or 1.
        same: whether all answers are the same texts; then nothing is left to doubt.

    Returns:
        Number, both means and their difference b - a with 95 % intervals, the p-value of no
        difference, and how many questions each model has the higher score on.
    """
    higher = int((a > b).sum()), int((b > a).sum())
    if same:
        bounds, p = (0.0, 0.0), 1.0
    elif binary:
        bounds, p = difference_interval(*higher, len(a)), mcnemar_exact(*higher)
    else:
        bounds, p = bootstrap_interval(b - a), sign_flip_test(b - a)
    return {
        "n": len(a),
        "a": float(a.mean()),
        "a_ci95": list(mean_interval(a)),
        "b": float(b.mean()),
        "b_ci95": list(mean_interval(b)),
        "difference": float((b - a).mean()),
        "difference_ci95": list(bounds),
        "p": p,
        "a_higher": higher[0],
        "b_higher": higher[1],
    }
