"""Subjects of few questions stand together in one row of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from medqlora.evaluation.comparison import compare_counts
from medqlora.evaluation.metrics import summarise_counts

# An accuracy of fewer questions says next to nothing: its interval is over 40 points wide.
FEW = 20

Groups = dict[str, dict[str, Any]]


def fold_small(
    models: Sequence[Groups], merge: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> list[Groups]:
    """Return each model's subjects, with those of under FEW questions merged into one at the end.

    The files that hold the scores keep every subject by itself.

    Args:
        models: subject -> its scores, among them `n`, of each model. A subject is small where it
            is so for every model, so that all of them get the same rows.
        merge: makes the scores of several subjects those of one.
    """
    names = dict.fromkeys(name for groups in models for name in groups)
    small = [name for name in names if all(name not in g or g[name]["n"] < FEW for g in models)]
    # A single subject is everything there is, so a row of its own hides nothing.
    if not small or len(names) == 1:
        return list(models)
    label = f"{len(small)} subject{'s' * (len(small) > 1)} under {FEW} questions"
    folded = []
    for groups in models:
        kept = {name: scores for name, scores in groups.items() if name not in small}
        merged = [groups[name] for name in small if name in groups]
        folded.append(kept | ({label: merge(merged)} if merged else {}))
    return folded


def merge_accuracies(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the accuracy of several groups together, with its interval."""
    # An accuracy is a quotient of counts, so its product with n is the count.
    hits = sum(round(part["accuracy"] * part["n"]) for part in parts)
    return summarise_counts(hits, sum(part["n"] for part in parts))


def merge_changes(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the comparison of two models on several groups together."""
    n = sum(part["n"] for part in parts)
    only_a = sum(part["only_a_right"] for part in parts)
    only_b = sum(part["only_b_right"] for part in parts)
    right_a = sum(round(part["accuracy_a"] * part["n"]) for part in parts)
    return compare_counts(right_a - only_a, only_a, only_b, n)


def merge_open(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean scores of the open answers of several groups together."""
    merged: dict[str, Any] = {"n": sum(part["n"] for part in parts)}
    # ROUGE-L is a mean over fewer answers where some are not in Latin letters.
    for key, count in (("exact_match", "n"), ("f1", "n"), ("rouge_l", "rouge_l_n")):
        known = [part for part in parts if part[key] is not None]
        total = sum(part[count] for part in known)
        weighted = sum(part[key] * part[count] for part in known)
        merged[key] = weighted / total if total else None
    return merged
