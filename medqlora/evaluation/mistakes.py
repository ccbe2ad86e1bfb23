"""The kinds of mistakes in a predictions file, counted by subject, with samples of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medqlora.evaluation.comparison import FORM
from medqlora.evaluation.journal import hash_id
from medqlora.evaluation.metrics import NEAR_TIE, choose_option, find_margins
from medqlora.evaluation.open_answers import matches, normalise_answer, token_f1
from medqlora.evaluation.predictions import PredictionError, Predictions, read_rows
from medqlora.evaluation.statistics import wilson_interval

CONFIDENT = 0.9  # A wrong answer with at least this probability among the options is confident.
# An open answer of this many times the words of the right one is much longer; one of the inverse
# share is much shorter.
LENGTH_RATIO = 3
# An answer repeats itself where the same words in a row, so many of them, stand in it so often.
REPEATED_WORDS = 5
REPETITIONS = 3
SAMPLES = 5  # whole answers that are shown of each kind
# A sample shows these keys of its row.
KEPT = ("id", "subject", "question", "options", "gold", "prediction", "text")


@dataclass(frozen=True)
class Kind:
    """One kind of mistake.

    Attributes:
        meaning: what it says of a wrong answer.
        here: bool [rows], which answers are of this kind.
        known: bool [rows], of which answers the file tells whether they are.
    """

    meaning: str
    here: np.ndarray
    known: np.ndarray


def find_mistakes(rows: Predictions) -> dict[str, Any]:
    """Sort the wrong answers of a predictions file by their kinds; one answer may be of several.

    An open answer is wrong where it is no exact match, so many of them are good answers in other
    words: the kinds there say which of them look broken.

    Returns:
        The counts of all rows and of each subject, and samples of each kind. What the file does not
        tell of any wrong answer, such as the effect of the options' order in a file without
        permutations, has None for a count; docs/outputs.md explains the keys.

    Raises:
        PredictionError: the rows are texts, which have no right answer.
    """
    if rows.kind == "text":
        raise PredictionError(
            f"{rows.path}: --errors is for answers to questions, got rows of kind text; leave it"
            " out"
        )
    if rows.kind == "open":
        pairs = zip(rows.prediction, rows.gold, strict=True)
        wrong = np.array([not matches(text or "", gold) for text, gold in pairs])
        kinds = list_open_kinds(rows)
    else:
        wrong = ~rows.right
        kinds = list_choice_kinds(rows)
    # An answer of which nothing is known to be odd is wrong all the same.
    odd = np.any([kind.here for kind in kinds.values()], axis=0)
    everything = np.ones(len(rows), bool)
    kinds["other"] = Kind("none of the others", ~odd, everything)
    subjects = np.array(rows.column("subject"), dtype=object)
    described = count_kinds(kinds, wrong, everything)
    for name, kind in kinds.items():
        counted = described["kinds"][name]
        counted["meaning"] = kind.meaning
        counted["samples"] = sample(rows, np.flatnonzero(kind.here & kind.known & wrong))
    return described | {
        "per_subject": {
            name: count_kinds(kinds, wrong, subjects == name) for name in sorted(set(subjects))
        }
    }


def count_kinds(kinds: dict[str, Kind], wrong: np.ndarray, among: np.ndarray) -> dict[str, Any]:
    """Count the wrong answers of each kind.

    Args:
        kinds: the kinds by name.
        wrong: bool [rows].
        among: bool [rows], which rows are meant.
    """
    counted = {}
    for name, kind in kinds.items():
        asked = kind.known & wrong & among
        counted[name] = describe_count(int((kind.here & asked).sum()), int(asked.sum()))
    return {"n": int(among.sum()), "wrong": int((wrong & among).sum()), "kinds": counted}


def describe_count(n: int, known: int) -> dict[str, Any]:
    """Return how many of some wrong answers are of a kind; None where the file tells of none.

    Args:
        n: the answers of the kind.
        known: of how many wrong answers it is known whether they are.
    """
    return {
        "n": n if known else None,
        "known": known,
        "share": n / known if known else None,
        "share_ci95": list(wilson_interval(n, known)) if known else None,
    }


def list_choice_kinds(rows: Predictions) -> dict[str, Kind]:
    """Return the kinds of mistakes in multiple-choice answers, by name."""
    n = len(rows)
    everything = np.ones(n, bool)
    no_option = np.array([prediction is None for prediction in rows.prediction])
    unfinished = no_option & mark(rows, "unfinished")
    margins = find_margins(rows)
    permuted = mark(rows, "permutations")
    flips = np.zeros(n, bool)
    for i in np.flatnonzero(permuted):
        orders = rows.extras[i]["permutations"]
        flips[i] = len({choose_option(*order) for order in orders.items()}) > 1
    # A comparison with NaN is false, so no answer is of a kind that is not known of it.
    return {
        "unparsed": Kind("the text names no option", no_option & ~unfinished, everything),
        "unfinished": Kind("the text broke off while thinking", unfinished, everything),
        "cut": Kind(
            "the text was cut at --max_new_tokens", mark(rows, "reached_limit"), everything
        ),
        "truncated": Kind("the prompt was cut to fit", mark(rows, "truncated"), everything),
        "position_bound": Kind("it changes with the order of the options", flips, permuted),
        "low_letter_mass": Kind(
            f"letters get less than {FORM:.0%} of the probability",
            rows.letter_mass < FORM,
            ~np.isnan(rows.letter_mass),
        ),
        "near_tie": Kind(
            f"the best two options lie less than {NEAR_TIE} nats apart",
            margins < NEAR_TIE,
            ~np.isnan(margins),
        ),
        "confident": Kind(
            f"its probability, or share of the votes, is {CONFIDENT:.0%} or more",
            rows.confidence >= CONFIDENT,
            ~np.isnan(rows.confidence),
        ),
    }


def list_open_kinds(rows: Predictions) -> dict[str, Kind]:
    """Return the kinds of mistakes in open answers, by name."""
    everything = np.ones(len(rows), bool)
    texts = [(prediction or "").strip() for prediction in rows.prediction]
    empty = np.array([not text for text in texts])
    unfinished = empty & mark(rows, "unfinished")
    written = ~empty  # An answer without text has no end, no length and no words.
    words = np.array([len(normalise_answer(text).split()) for text in texts])
    expected = np.array([len(normalise_answer(gold).split()) for gold in rows.gold])
    pairs = list(zip(texts, rows.gold, strict=True))
    strange = np.array([token_f1(text, gold) == 0 for text, gold in pairs])
    repeated = np.array([repeats(text) and not repeats(gold) for text, gold in pairs])
    return {
        "empty": Kind("nothing was written", empty & ~unfinished, everything),
        "unfinished": Kind("the text broke off while thinking", unfinished, everything),
        "truncated": Kind("the prompt was cut to fit", mark(rows, "truncated"), everything),
        "cut": Kind(
            "the text was cut at --max_new_tokens", mark(rows, "reached_limit"), everything
        ),
        "repeated": Kind(
            f"{REPEATED_WORDS} words in a row stand in it {REPETITIONS} times or more",
            repeated,
            everything,
        ),
        "no_shared_word": Kind(
            "no word is shared with the right answer", strange & written, everything
        ),
        "much_longer": Kind(
            f"over {LENGTH_RATIO} times the words of the right answer",
            words > LENGTH_RATIO * expected,
            everything,
        ),
        "much_shorter": Kind(
            f"under 1/{LENGTH_RATIO} of the words of the right answer",
            (LENGTH_RATIO * words < expected) & written,
            everything,
        ),
    }


def mark(rows: Predictions, key: str) -> np.ndarray:
    """Return which rows have one of predictions.EXTRAS, bool [rows]."""
    return np.array([key in rows.extras.get(i, {}) for i in range(len(rows))], bool)


def repeats(text: str) -> bool:
    """Whether the same REPEATED_WORDS words in a row stand in a text REPETITIONS times or more."""
    words = text.lower().split()
    starts = range(len(words) - REPEATED_WORDS + 1)
    runs = Counter(tuple(words[start : start + REPEATED_WORDS]) for start in starts)
    return bool(runs) and max(runs.values()) >= REPETITIONS


def sample(rows: Predictions, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Return up to SAMPLES whole answers, each with its confidence and letter mass where known.

    A hash of the id draws them, the same ones in every run.
    """
    drawn = sorted(numbers, key=lambda i: hash_id(rows.ids[i]))[:SAMPLES]
    whole = read_rows(rows.path, [rows.offsets[i] for i in drawn])
    shown = []
    for i, row in zip(drawn, whole, strict=True):
        kept = {key: row[key] for key in KEPT if row.get(key) is not None}
        known = {"confidence": rows.confidence[i], "letter_mass": rows.letter_mass[i]}
        for key, value in known.items():
            if not np.isnan(value):
                kept[key] = float(value)
        shown.append(kept)
    return shown
