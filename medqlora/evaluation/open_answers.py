"""Scores of free text: exact match, F1, ROUGE-L and perplexity."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from typing import Any

import numpy as np

from medqlora.evaluation.predictions import PredictionError, Predictions
from medqlora.evaluation.statistics import mean_interval, wilson_interval


def normalise_answer(text: str) -> str:
    """Normalise a text as SQuAD does (Rajpurkar et al., EMNLP 2016; official script v1.1).

    The result is in lower case, without punctuation and articles, and with single spaces.
    """
    # The order is that of the official script: punctuation goes before the articles.
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(prediction: str, gold: str) -> float:
    """Compute SQuAD's F1, the overlap of normalised words, from 0 to 1."""
    predicted_words = normalise_answer(prediction).split()
    gold_words = normalise_answer(gold).split()
    # Two empty texts agree fully; an empty one and another have nothing in common.
    if not predicted_words or not gold_words:
        return float(predicted_words == gold_words)
    # A repeated word counts as often as both texts have it.
    common = sum((Counter(predicted_words) & Counter(gold_words)).values())
    # This is 2PR / (P + R), where P = common / predicted and R = common / gold.
    return 2 * common / (len(predicted_words) + len(gold_words))


def score_open(rows: Predictions) -> dict[str, Any]:
    """Score free text by exact match, SQuAD's F1 and ROUGE-L, with 95 % intervals.

    ROUGE-L is the F-measure of the longest common subsequence of words (Lin, ROUGE: A Package for
    Automatic Evaluation of Summaries, 2004), without stemming. An empty answer counts as unparsed.
    """
    # Multiple-choice questions are scored without the slow import of this package.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    texts = [prediction or "" for prediction in rows.prediction]
    exact_values = []
    f1_values = []
    rouge_values = []
    for text, gold in zip(texts, rows.gold, strict=True):
        exact_values.append(normalise_answer(text) == normalise_answer(gold))
        f1_values.append(token_f1(text, gold))
        rouge_values.append(scorer.score(gold, text)["rougeL"].fmeasure)
    exact = np.array(exact_values)
    f1 = np.array(f1_values)
    rouge = np.array(rouge_values)
    subjects = np.array(rows.column("subject"))
    per_subject = {}
    for name in sorted(set(rows.column("subject"))):
        here = subjects == name
        per_subject[name] = {
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
        "unfinished": rows.unfinished,
        "truncated": rows.truncated,
        "too_long": len(rows.too_long),
        "too_long_ids": list(rows.too_long),
        "per_subject": per_subject,
    }


def score_passages(rows: Predictions) -> dict[str, Any]:
    """Compute the perplexity per token, the perplexity per word and the bits per byte of texts.

    The last two are comparable between models with different tokenizers. They are None where the
    rows have no words or bytes.

    Raises:
        PredictionError: there is no token in any row.
    """
    # Sums are made before the division, so that each token counts the same in every text.
    total = {}
    for key in ("logprob", "tokens", "bytes", "words"):
        total[key] = sum(extra[key] for extra in rows.extras.values())
    if not total["tokens"]:
        raise PredictionError(
            f"{rows.path}: no row has tokens; perplexity needs at least one, so give texts that"
            " are longer"
        )
    word_perplexity = None
    if total["words"]:
        # The bound keeps the exponential within the range of a float.
        word_perplexity = math.exp(min(700.0, -total["logprob"] / total["words"]))
    bits_per_byte = None
    if total["bytes"]:
        # The last division turns nats into bits.
        bits_per_byte = -total["logprob"] / total["bytes"] / math.log(2)
    return {
        "n": len(rows),
        "tokens": total["tokens"],
        "perplexity": math.exp(-total["logprob"] / total["tokens"]),
        "word_perplexity": word_perplexity,
        "bits_per_byte": bits_per_byte,
    }
