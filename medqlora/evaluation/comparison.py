"""Two models on the same questions: paired differences, exact tests, agreement."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np

from medqlora.evaluation.journal import hash_id
from medqlora.evaluation.open_answers import measure_open
from medqlora.evaluation.open_comparison import compare_answers
from medqlora.evaluation.predictions import PredictionError, Predictions
from medqlora.evaluation.row_checks import quote
from medqlora.evaluation.statistics import adjust_holm, difference_interval, mcnemar_exact

# A model that gives less than this share of its probability to letters, or names an option in less
# than this share of its answers, would mostly answer in another form.
FORM = 0.5


def compare_paired(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Compare two models on the same questions; see compare_counts.

    Args:
        a, b: bool [n], which questions each model got right.
    """
    a = np.asarray(a, bool)
    b = np.asarray(b, bool)
    return compare_counts(int((a & b).sum()), int((a & ~b).sum()), int((b & ~a).sum()), len(a))


def compare_counts(both: int, only_a: int, only_b: int, n: int) -> dict[str, Any]:
    """Return the accuracies, their difference b - a with its interval, and the exact test.

    Args:
        both, only_a, only_b: how many questions both and only one of the models got right.
        n: questions.
    """
    return {
        "n": n,
        "accuracy_a": (both + only_a) / n,
        "accuracy_b": (both + only_b) / n,
        "difference": (only_b - only_a) / n,
        "difference_ci95": list(difference_interval(only_a, only_b, n)),
        "mcnemar_p": mcnemar_exact(only_a, only_b),
        "only_a_right": only_a,
        "only_b_right": only_b,
    }


def find_doubt(base: dict[str, Any], tuned: dict[str, Any]) -> str | None:
    """Say why a difference may be one of form and not of knowledge; None where it is not.

    Args:
        base, tuned: scores of multiple-choice questions, as score_predictions returns them.
    """
    for name, scores in (("base", base), ("tuned model", tuned)):
        mass = scores.get("letter_mass")
        if mass is not None and mass < FORM:
            return (
                f"the {name} gives only {mass:.1%} of its probability to letters at all, so its"
                " answers by letter say little about what it knows"
            )
        read = 1 - scores["unparsed"] / scores["n"]
        if read < FORM:
            return (
                f"only {read:.1%} of the answers of the {name} name an option, so they say little"
                " about what it knows"
            )
    return None


def align(
    a: Predictions, b: Predictions, common: bool = False, any_prompt: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers of the same questions in both files, in the order of `a`.

    Args:
        a, b: the files' rows.
        common: takes the shared questions where the files hold different ones.
        any_prompt: allows different prompts.

    Raises:
        PredictionError: different questions, labels or prompts.
    """
    place = {id: i for i, id in enumerate(b.ids)}
    pairs = [(i, place[id]) for i, id in enumerate(a.ids) if id in place]
    only_first = len(a) - len(pairs)
    only_second = len(b) - len(pairs)
    left_out = ""
    if a.too_long or b.too_long:
        left_out = f"; {len(a.too_long)} and {len(b.too_long)} were left out as too long"
    if not pairs or ((only_first or only_second) and not common):
        raise PredictionError(
            f"{a.path} and {b.path} hold different questions ({only_first} only in the first,"
            f" {only_second} only in the second, {len(pairs)} in both{left_out}); predict the same"
            " file with both, or compare the shared ones with --common"
        )
    for i, j in pairs:
        # Equal ids do not prove equal questions: options in another order have another label.
        if a.gold[i] != b.gold[j]:
            raise PredictionError(
                f"id {a.ids[i]} has label {quote(a.gold[i])} in {a.path} and {quote(b.gold[j])} in"
                f" {b.path}; the files are of different data"
            )
    # A difference of prompts would pass for a difference of models.
    prompts = set(a.columns["prompt_sha256"]), set(b.columns["prompt_sha256"])
    if prompts[0] != prompts[1] and not any_prompt:
        shown = [", ".join(sorted(str(digest)[:12] for digest in some)) for some in prompts]
        raise PredictionError(
            f"{a.path} and {b.path} were asked with different prompts ({shown[0]} and {shown[1]});"
            " use one prompt style, or compare all the same with --any_prompt"
        )
    first, second = zip(*pairs, strict=True)
    return np.array(first), np.array(second)  # int64 [pairs] each


def compare_predictions(
    a: Predictions, b: Predictions, common: bool = False, any_prompt: bool = False
) -> dict[str, Any]:
    """Compare two files of predictions question by question.

    The result is that of `compare_paired`, or of `compare_answers` for open questions, overall and
    per subject (with Holm's correction), what changed, and how alike the answers are.

    Raises:
        PredictionError: predictions of texts, or files that do not belong together.
    """
    for rows in (a, b):
        if rows.kind == "text":
            raise PredictionError(
                f"{rows.path}: kind text; paired comparison is for answers to questions, so compare"
                " perplexities as they are"
            )
    if a.kind != b.kind:
        raise PredictionError(
            f"{a.path} holds predictions of kind {a.kind} and {b.path} of kind {b.kind}; predict"
            " the same questions with both"
        )
    first, second = align(a, b, common, any_prompt)
    agreement = measure_agreement(a, b, first, second)
    too_long = {"too_long_a": len(a.too_long), "too_long_b": len(b.too_long)}
    subjects = np.array(a.column("subject"), dtype=object)[first]
    if a.kind == "open":
        scores_a = {name: values[first] for name, values in measure_open(a).items()}
        scores_b = {name: values[second] for name, values in measure_open(b).items()}
        same = agreement["different_predictions"] == 0
        result = compare_answers(scores_a, scores_b, subjects, same)
    else:
        result = compare_choices(a, first, a.right[first], b.right[second], subjects)
    return result | too_long | {"agreement": agreement}


def compare_choices(
    a: Predictions,
    rows: np.ndarray,
    right_a: np.ndarray,
    right_b: np.ndarray,
    subjects: np.ndarray,
) -> dict[str, Any]:
    """Compare two models on multiple-choice questions, overall and per subject.

    Args:
        a, rows, right_a, right_b: see describe_outcomes.
        subjects: object [n], the subject of each question.
    """
    result = compare_paired(right_a, right_b)
    parts = {
        str(name): compare_paired(right_a[subjects == name], right_b[subjects == name])
        for name in sorted(set(subjects))
    }
    # Among many subjects some differ by chance alone, which the correction accounts for.
    adjusted = adjust_holm([part["mcnemar_p"] for part in parts.values()])
    result["per_subject"] = {
        name: part | {"holm_p": p} for (name, part), p in zip(parts.items(), adjusted, strict=True)
    }
    result["outcomes"] = describe_outcomes(a, rows, right_a, right_b)
    return result


def describe_outcomes(
    a: Predictions, rows: np.ndarray, right_a: np.ndarray, right_b: np.ndarray, shown: int = 20
) -> dict[str, Any]:
    """Count the questions that b fixed, broke or left wrong, by groups, and name some of them.

    Args:
        a: rows of the first file.
        rows: row numbers of the compared questions in it, int [n].
        right_a, right_b: bool [n], which of them each model got right.
        shown: how many ids are named; a hash of the id draws them, the same ones in every run.
    """
    groups = {
        "subject": np.array(a.column("subject"), dtype=object)[rows],
        "choice_type": np.array(a.column("choice_type"), dtype=object)[rows],
        "length": name_lengths(np.array(a.length)[rows]),
        "negation": np.where(np.array(a.negated)[rows], "negated", "plain"),
        "numbers": np.where(np.array(a.numeric)[rows], "with numbers", "without numbers"),
    }
    outcomes = {
        "fixed": ~right_a & right_b,
        "broken": right_a & ~right_b,
        "both_wrong": ~right_a & ~right_b,
        "both_right": right_a & right_b,
    }
    described = {"all": {"n": len(rows)} | count_groups(groups, np.ones(len(rows), bool))}
    for name, here in outcomes.items():
        ids = []
        if name != "both_right":
            ids = sorted((a.ids[i] for i in rows[here]), key=hash_id)[:shown]
        described[name] = {"n": int(here.sum()), "ids": ids} | count_groups(groups, here)
    return described


def name_lengths(words: np.ndarray) -> np.ndarray:
    """Return a name for the length of each question, by the quarters of all lengths.

    words: int [n]
    """
    # Lengths are whole numbers, so the names of the groups are those of their shortest and longest
    # questions. Quarters that end at one length are one group.
    edges = sorted({int(edge) for edge in np.quantile(words, [0.25, 0.5, 0.75])})
    names = [f"up to {edges[0]} words"]
    for before, edge in itertools.pairwise(edges):
        names.append(f"{before + 1} to {edge} words" if before + 1 < edge else f"{edge} words")
    names.append(f"over {edges[-1]} words")
    # A length that equals an edge falls into the group up to it.
    return np.array(names, dtype=object)[np.searchsorted(edges, words)]


def count_groups(groups: dict[str, np.ndarray], here: np.ndarray) -> dict[str, dict[str, int]]:
    """Count the questions of each group where the mask `here`, bool [n], is set."""
    counts = {}
    for key, values in groups.items():
        counted = Counter(map(str, values[here]))
        counts[f"by_{key}"] = dict(sorted(counted.items()))
    return counts


def measure_agreement(
    a: Predictions, b: Predictions, first: np.ndarray, second: np.ndarray
) -> dict[str, Any]:
    """Measure how alike two runs answer.

    The result is the share of equal predictions, and how far the options' log-probabilities lie
    apart, in nats.
    """
    # Two answers that could not be read (None) count as equal.
    same = [a.prediction[i] == b.prediction[j] for i, j in zip(first, second, strict=True)]
    agreement: dict[str, Any] = {
        "same_prediction": float(np.mean(same)),
        "different_predictions": int(len(same) - sum(same)),
    }
    # Files without log-probabilities have no columns here.
    if a.logprobs.shape[1] and a.logprobs.shape[1] == b.logprobs.shape[1]:
        with np.errstate(invalid="ignore"):  # Two impossible options (-inf) have no distance.
            distance = np.abs(a.logprobs[first] - b.logprobs[second])  # [pairs, options]
        # An option that one of the two does not know is NaN and is left out.
        if not np.isnan(distance).all():
            agreement |= {
                "mean_logprob_difference": float(np.nanmean(distance)),
                "max_logprob_difference": float(np.nanmax(distance)),
            }
    return agreement
