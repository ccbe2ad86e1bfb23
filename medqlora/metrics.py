"""Predictions -> scores with intervals, calibration, position bias; paired comparison of two
models. Needs no torch.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from typing import Any

import numpy as np

from medqlora.examples import LETTERS
from medqlora.predictions import PredictionError, Predictions, hash_id

Z95 = 1.959963984540054  # standard normal quantile of 0.975
# nats between the two best options: rounding in bfloat16 may turn such an answer over
NEAR_TIE = 0.01


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


# ---- open answers and text -----------------------------------------------------------------------


def normalise_answer(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces (Rajpurkar et al., EMNLP
    2016; official script v1.1).
    """
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(prediction: str, gold: str) -> float:
    """Overlap of normalised words (SQuAD's F1)."""
    a = normalise_answer(prediction).split()
    b = normalise_answer(gold).split()
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def score_open(rows: Predictions) -> dict[str, Any]:
    """Exact match, token F1 and ROUGE-L (F-measure, with stemming off) of free text; an empty
    answer counts as unparsed.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    texts = [prediction or "" for prediction in rows.prediction]
    exact = np.array(
        [
            normalise_answer(text) == normalise_answer(gold)
            for text, gold in zip(texts, rows.gold, strict=True)
        ]
    )
    f1 = np.array([token_f1(text, gold) for text, gold in zip(texts, rows.gold, strict=True)])
    rouge = np.array(
        [
            scorer.score(gold, text)["rougeL"].fmeasure
            for text, gold in zip(texts, rows.gold, strict=True)
        ]
    )
    names = np.array(rows.column("subject"))
    subjects = {}
    for name in sorted(set(rows.column("subject"))):
        here = names == name
        subjects[name] = {
            "n": int(here.sum()),
            "exact_match": float(exact[here].mean()),
            "f1": float(f1[here].mean()),
            "rouge_l": float(rouge[here].mean()),
        }
    return {
        "n": len(rows),
        "exact_match": float(exact.mean()),
        "exact_match_ci95": list(wilson_interval(int(exact.sum()), len(rows))),
        "f1": float(f1.mean()),
        "f1_ci95": mean_interval(f1),
        "rouge_l": float(rouge.mean()),
        "rouge_l_ci95": mean_interval(rouge),
        "unparsed": sum(not text.strip() for text in texts),
        "truncated": rows.truncated,
        "per_subject": subjects,
    }


def mean_interval(values: np.ndarray) -> list[float]:
    """95 % interval of a mean by the central limit theorem."""
    half = Z95 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return [float(values.mean()) - half, float(values.mean()) + half]


def score_passages(rows: Predictions) -> dict[str, Any]:
    """Perplexity per token; per word and bits per byte, which models of different tokenizers
    share.
    """
    if not sum(extra["tokens"] for extra in rows.extras.values()):
        raise PredictionError(f"{rows.path}: holds no tokens; perplexity needs one")
    total = {
        key: sum(extra[key] for extra in rows.extras.values())
        for key in ("logprob", "tokens", "bytes", "words")
    }
    return {
        "n": len(rows),
        "tokens": total["tokens"],
        "perplexity": math.exp(-total["logprob"] / total["tokens"]),
        "word_perplexity": (
            math.exp(min(700.0, -total["logprob"] / total["words"])) if total["words"] else None
        ),
        "bits_per_byte": (
            -total["logprob"] / total["bytes"] / math.log(2) if total["bytes"] else None
        ),
    }


# ---- comparison ----------------------------------------------------------------------------------


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


def adjust_holm(p_values: list[float]) -> list[float]:
    """p-values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


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
