"""Two models on the same questions: paired differences, exact tests, agreement."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from medqlora.evaluation.journal import hash_id
from medqlora.evaluation.predictions import PredictionError, Predictions
from medqlora.evaluation.statistics import adjust_holm, mcnemar_exact


def compare_paired(
    a: np.ndarray, b: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Compare two models on the same questions (bool [n] each); `difference` is b - a with a paired
    bootstrap interval.

    Resampling n pairs with replacement only changes how many fall into (a only, b only, other): one
    multinomial draw each.
    """
    a, b, n = np.asarray(a, bool), np.asarray(b, bool), len(a)
    only_a = int((a & ~b).sum())
    only_b = int((b & ~a).sum())
    counts = np.random.default_rng(seed).multinomial(
        n, [only_a / n, only_b / n, 1 - (only_a + only_b) / n], resamples
    )
    low, high = np.quantile((counts[:, 1] - counts[:, 0]) / n, [0.025, 0.975])
    return {
        "n": n,
        "accuracy_a": float(a.mean()),
        "accuracy_b": float(b.mean()),
        "difference": (only_b - only_a) / n,
        "difference_ci95": [float(low), float(high)],
        "mcnemar_p": mcnemar_exact(only_a, only_b),
        "only_a_right": only_a,
        "only_b_right": only_b,
    }


def align(
    a: Predictions, b: Predictions, common: bool = False, any_prompt: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the same questions in both files, in the order of `a`.

    Raises: PredictionError: different questions (unless `common`: the shared ones are taken),
        different labels, or different prompts (unless `any_prompt`).
    """
    place = {id: i for i, id in enumerate(b.ids)}
    pairs = [(i, place[id]) for i, id in enumerate(a.ids) if id in place]
    missing = (len(a) - len(pairs), len(b) - len(pairs))
    if (any(missing) and not common) or not pairs:
        raise PredictionError(
            f"{a.path} and {b.path} hold different questions ({missing[0]} only in the first,"
            f" {missing[1]} only in the second, {len(pairs)} in both); predict the same file with"
            " both, or compare the shared ones with --common"
        )
    for i, j in pairs:
        if a.gold[i] != b.gold[j]:
            raise PredictionError(
                f"id {a.ids[i]} has label {a.gold[i]} in {a.path} and {b.gold[j]} in {b.path}; the"
                " files are of different data"
            )
    prompts = set(a.columns["prompt_sha256"]), set(b.columns["prompt_sha256"])
    if prompts[0] != prompts[1] and not any_prompt:
        shown = [", ".join(sorted(str(digest)[:12] for digest in some)) for some in prompts]
        raise PredictionError(
            f"{a.path} and {b.path} were asked with different prompts ({shown[0]} and {shown[1]});"
            " use one prompt style, or compare all the same with --any_prompt"
        )
    first, second = zip(*pairs, strict=True)
    return np.array(first), np.array(second)


def compare_predictions(
    a: Predictions, b: Predictions, common: bool = False, any_prompt: bool = False
) -> dict[str, Any]:
    """Paired comparison of two files of multiple-choice predictions: overall, per subject (Holm),
    and what changed.
    """
    for rows in (a, b):
        if rows.kind != "choice":
            raise PredictionError(
                f"{rows.path}: kind {rows.kind}; paired comparison is for multiple-choice"
                " predictions"
            )
    first, second = align(a, b, common, any_prompt)
    right_a = a.right[first]
    right_b = b.right[second]
    result = compare_paired(right_a, right_b)
    subjects = np.array(a.column("subject"), dtype=object)[first]
    parts = {
        str(name): compare_paired(right_a[subjects == name], right_b[subjects == name])
        for name in sorted(set(subjects))
    }
    adjusted = adjust_holm([part["mcnemar_p"] for part in parts.values()])
    result["per_subject"] = {
        name: part | {"holm_p": p} for (name, part), p in zip(parts.items(), adjusted, strict=True)
    }
    result["outcomes"] = describe_outcomes(a, first, right_a, right_b)
    result["agreement"] = measure_agreement(a, b, first, second)
    return result


def describe_outcomes(
    a: Predictions, rows: np.ndarray, right_a: np.ndarray, right_b: np.ndarray, shown: int = 20
) -> dict[str, Any]:
    """Questions that b fixed, broke, or left wrong: how many, in which groups, and which (drawn by
    a hash of the id: the same in every run).
    """
    words = np.array(a.length)[rows]
    edges = np.quantile(words, [0.25, 0.5, 0.75]) if len(words) else [0, 0, 0]
    bounds = [
        f"up to {edges[0]:.0f} words",
        f"up to {edges[1]:.0f} words",
        f"up to {edges[2]:.0f} words",
        f"over {edges[2]:.0f} words",
    ]
    groups = {
        "subject": np.array(a.column("subject"), dtype=object)[rows],
        "choice_type": np.array(a.column("choice_type"), dtype=object)[rows],
        "length": np.array(bounds, dtype=object)[np.searchsorted(edges, words)],
        "negation": np.where(np.array(a.negated)[rows], "negated", "plain"),
        "numbers": np.where(np.array(a.numeric)[rows], "with numbers", "without numbers"),
    }
    outcomes = {
        "fixed": ~right_a & right_b,
        "broken": right_a & ~right_b,
        "both_wrong": ~right_a & ~right_b,
        "both_right": right_a & right_b,
    }
    described = {}
    for name, here in outcomes.items():
        ids = (
            sorted((a.ids[i] for i in rows[here]), key=hash_id)[:shown]
            if name != "both_right"
            else []
        )
        described[name] = {"n": int(here.sum()), "ids": ids}
        described[name] |= {
            f"by_{key}": dict(sorted(Counter(map(str, values[here])).items()))
            for key, values in groups.items()
        }
    totals = {
        f"by_{key}": dict(sorted(Counter(map(str, values)).items()))
        for key, values in groups.items()
    }
    return {"all": {"n": len(rows), **totals}, **described}


def measure_agreement(
    a: Predictions, b: Predictions, first: np.ndarray, second: np.ndarray
) -> dict[str, Any]:
    """How alike two runs answer: share of equal predictions, and how far the options'
    log-probabilities lie apart (nats).
    """
    same = [a.prediction[i] == b.prediction[j] for i, j in zip(first, second, strict=True)]
    facts: dict[str, Any] = {
        "same_prediction": float(np.mean(same)),
        "different_predictions": int(len(same) - sum(same)),
    }
    if a.logprobs.shape[1] and a.logprobs.shape[1] == b.logprobs.shape[1]:
        with np.errstate(invalid="ignore"):  # two impossible options (-inf) have no distance
            distance = np.abs(a.logprobs[first] - b.logprobs[second])
        if not np.isnan(distance).all():
            facts |= {
                "mean_logprob_difference": float(np.nanmean(distance)),
                "max_logprob_difference": float(np.nanmax(distance)),
            }
    return facts
