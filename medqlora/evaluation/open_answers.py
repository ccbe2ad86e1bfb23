"""Scores of free text: exact match, F1, ROUGE-L, perplexity."""

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
