"""Scores of free text: exact match, F1, ROUGE-L and perplexity."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from typing import Any

import numpy as np

from medqlora.evaluation.predictions import PredictionError, Predictions
from medqlora.evaluation.statistics import mean_interval

# Each score of an open answer, with the key of its interval.
OPEN_SCORES = {"exact_match": "exact_match_ci95", "f1": "f1_ci95", "rouge_l": "rouge_l_ci95"}


def normalise_answer(text: str) -> str:
    """Normalise a text as SQuAD does (Rajpurkar et al., EMNLP 2016; official script v1.1).

    The result is in lower case, without punctuation and articles, and with single spaces.
    """
    # The order is that of the official script: punctuation goes before the articles.
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(prediction: str, gold: str) -> float:
    """Compute SQuAD's F1, the overlap of normalised words, from 0 to 1.

    A text without words has nothing in common with any other. SQuAD 2.0 rewards an empty answer
    where there is no answer; questions here always have one.
    """
    predicted_words = normalise_answer(prediction).split()
    gold_words = normalise_answer(gold).split()
    if not predicted_words or not gold_words:
        return 0.0
    # A repeated word counts as often as both texts have it.
    common = sum((Counter(predicted_words) & Counter(gold_words)).values())
    # This is 2PR / (P + R), where P = common / predicted and R = common / gold.
    return 2 * common / (len(predicted_words) + len(gold_words))


def matches(prediction: str, gold: str) -> bool:
    """Whether a normalised answer is the right one; one without words never is."""
    return normalise_answer(prediction) == normalise_answer(gold) != ""


def is_latin(text: str) -> bool:
    """Whether ROUGE's own words, of the letters a to z and digits, hold most of a text.

    The package drops every other letter without a word, so a text in another script has no words.
    """
    characters = [character for character in text.lower() if character.isalnum()]
    read = sum(character.isascii() for character in characters)
    return 2 * read >= len(characters) > 0


def measure_open(rows: Predictions) -> dict[str, np.ndarray]:
    """Measure each open answer by exact match, SQuAD's F1 and ROUGE-L.

    ROUGE-L is the F-measure of the longest common subsequence of words (Lin, ROUGE: A Package for
    Automatic Evaluation of Summaries, 2004), without stemming. All scores of an empty answer are 0.

    Returns:
        Score -> float64 [rows]. ROUGE-L is NaN where the right answer is not in Latin letters, see
        is_latin.
    """
    # Multiple-choice questions are scored without the slow import of this package.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    columns: dict[str, list[float]] = {name: [] for name in OPEN_SCORES}
    for prediction, gold in zip(rows.prediction, rows.gold, strict=True):
        text = prediction or ""
        columns["exact_match"].append(matches(text, gold))
        columns["f1"].append(token_f1(text, gold))
        # ROUGE's words include articles, by which an answer without other words would score.
        rouge = scorer.score(gold, text if normalise_answer(text) else "")["rougeL"].fmeasure
        columns["rouge_l"].append(rouge if is_latin(gold) else math.nan)
    return {name: np.array(column, float) for name, column in columns.items()}


def score_open(rows: Predictions, values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the mean scores of open answers with 95 % intervals, also by subject.

    An empty answer counts as unparsed.

    Args:
        rows: the answers.
        values: what measure_open returns for them.
    """
    return {
        **summarise_open(values, np.ones(len(rows), bool)),
        "unparsed": sum(not (prediction or "").strip() for prediction in rows.prediction),
        "unfinished": rows.unfinished,
        "reached_limit": rows.reached_limit,
        "wordless_references": sum(not normalise_answer(gold) for gold in rows.gold),
        "truncated": rows.truncated,
        "too_long": len(rows.too_long),
        "too_long_ids": list(rows.too_long),
        "per_subject": group_open(rows.column("subject"), values),
    }


def group_open(names: list[str], values: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return the scores of each group of open answers.

    Args:
        names: the group of each answer.
        values: what measure_open returns.
    """
    column = np.array(names, dtype=object)
    return {name: summarise_open(values, column == name) for name in sorted(set(names))}


def summarise_open(values: dict[str, np.ndarray], here: np.ndarray) -> dict[str, Any]:
    """Return the number of some answers, and the mean of each score with its interval.

    Args:
        values: score -> float64 [n], NaN where an answer has no such score.
        here: bool [n], which answers are meant.
    """
    summary: dict[str, Any] = {"n": int(here.sum())}
    for name, column in values.items():
        known = column[here & ~np.isnan(column)]
        summary[name] = float(known.mean()) if len(known) else None
        summary[OPEN_SCORES[name]] = list(mean_interval(known)) if len(known) else None
    summary["rouge_l_n"] = int((here & ~np.isnan(values["rouge_l"])).sum())
    return summary


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
        word_perplexity = exponential(-total["logprob"] / total["words"])
    bits_per_byte = None
    if total["bytes"]:
        # The last division turns nats into bits.
        bits_per_byte = -total["logprob"] / total["bytes"] / math.log(2)
    return {
        "n": len(rows),
        "tokens": total["tokens"],
        "perplexity": exponential(-total["logprob"] / total["tokens"]),
        "word_perplexity": word_perplexity,
        "bits_per_byte": bits_per_byte,
    }


def exponential(loss: float) -> float:
    """Return the exponential of a loss in nats, bounded to the range of a float."""
    return math.exp(min(700.0, loss))
