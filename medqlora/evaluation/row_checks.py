"""What a prediction row must be, so that its numbers can be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from medqlora.data.examples import LETTERS

KINDS = ("choice", "open", "text")
REQUIRED = {
    "choice": ("id", "gold", "prediction"),
    "open": ("id", "gold", "prediction"),
    "text": ("id", "logprob", "tokens"),
}
LARGEST = 2**53  # Every whole number up to here is a float too.
PASSAGE_KEYS = ("id", "source", "text")
# Rounding may take a log-probability slightly over 0, and a sum of probabilities over 1.
ROUNDING = 1e-3


def check_row(row: dict[str, Any], first: dict[str, Any], labelled: bool) -> str | None:
    """Say what is wrong with a row; None where nothing is.

    Args:
        row: the row.
        first: the first row of its file, whose kind and model all others share.
        labelled: whether it must have a label.
    """
    kind = first.get("kind", "choice")
    # The kind is checked first, because the other checks depend on it.
    if row.get("kind", "choice") != kind or kind not in KINDS:
        return (
            f"kind is {quote(row.get('kind'))} in a file of kind {quote(kind)}; one file holds one"
            f" kind of {', '.join(KINDS)}"
        )
    for key in REQUIRED[kind]:
        if key not in row:
            return f'no "{key}"; expected a row of eval/predict.py'
    if not is_text(row["id"]) or not row["id"]:
        return f"id is {quote(row['id'])}; expected a text"
    for key, (check, expected) in VALUES.items():
        value = row.get(key)
        if value is not None and not check(value):
            return f"{key} is {quote(value)}; expected {expected}"
    if row.get("model") != first.get("model"):
        return (
            f"model is {quote(row.get('model'))}, but {quote(first.get('model'))} on line 1; one"
            " file holds the answers of one model"
        )
    if kind == "text":
        return check_passage(row)
    if labelled and row["gold"] is None:
        return "no label (gold is null); a split with hidden answers cannot be scored"
    if kind == "choice":
        return check_letters(row)
    if labelled and not row["gold"].strip():
        return "gold is empty; an open question needs the text of its answer"
    return None


def check_passage(row: dict[str, Any]) -> str | None:
    """Say what is wrong with the row of a text, whose values may not be null."""
    for key in ("logprob", "tokens"):
        if row[key] is None:
            return f"{key} is null; expected {VALUES[key][1]}"
    return None


def check_letters(row: dict[str, Any]) -> str | None:
    """Say which letter of a multiple-choice row names no option, or has a value that is none."""
    letters = list_letters(row)
    for key in ("gold", "prediction"):
        if row[key] is not None and row[key] not in list(letters):
            return f"{key} is {quote(row[key])}, which is not one of the options {letters}"
    for key in ("option_logprobs", "normalized_logprobs"):
        values = row.get(key) or {}
        for letter, value in values.items():
            if letter not in list(letters):
                return f"{key} has {quote(letter)}, which is not one of the options {letters}"
            if not is_logprob(value):
                return f"{key} {letter} is {quote(value)}; expected a log-probability"
        # The confidence is the prediction's own value, which is looked up.
        if values and row["prediction"] is not None and row["prediction"] not in values:
            return (
                f"prediction is {quote(row['prediction'])}, which has no value in {key}; expected a"
                " row of eval/predict.py"
            )
    for key in ("predictions", "votes"):
        for name in row.get(key) or {}:
            letter = row[key][name] if key == "predictions" else name
            if letter is not None and letter not in list(letters):
                return f"{key} names {quote(letter)}, which is not one of the options {letters}"
    votes = row.get("votes")
    if votes and row["prediction"] not in votes:
        return f"prediction is {quote(row['prediction'])}, which has no vote"
    return check_orders(row, letters)


def check_orders(row: dict[str, Any], letters: str) -> str | None:
    """Say which order of the options is none, or has no number or null for each of them."""
    known = bool(row.get("options") or row.get("option_logprobs"))
    for order, values in (row.get("permutations") or {}).items():
        fits = sorted(order) == list(LETTERS[: len(order)]) and len(order) > 1
        if known:
            fits = sorted(order) == sorted(letters)
        fits = fits and isinstance(values, list) and len(values) == len(order)
        # The place of the right option is looked up in each order.
        fits = fits and (row["gold"] is None or row["gold"] in order)
        if not fits or not all(value is None or is_logprob(value) for value in values):
            return (
                f"permutations {quote(order)} is {quote(values)}; expected a log-probability for"
                f" each letter of an order of {letters}"
            )
    return None


def list_letters(row: dict[str, Any]) -> str:
    """Return the letters that a row may name: those of its options, where it says what they are."""
    if row.get("options"):
        return LETTERS[: len(row["options"])]
    named = "".join(letter for letter in LETTERS if letter in (row.get("option_logprobs") or {}))
    return named or LETTERS


def name_columns(row: dict[str, Any]) -> str:
    """Return the letters from A to the last one that a row may name; each has a column.

    A row that does not hold its options may have values of A and C alone, and C keeps its column.
    """
    return LETTERS[: LETTERS.index(list_letters(row)[-1]) + 1]


def quote(value: Any) -> str:
    """Return a value for a message: on one line, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + " …"


def is_text(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def are_texts(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def are_options(value: Any) -> bool:
    """Whether a value is a list of as many texts as a question can have options."""
    return are_texts(value) and 2 <= len(value) <= len(LETTERS)


def is_number(value: Any) -> bool:
    """Whether a value is a number other than NaN that a float can hold; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # NaN is the only number that differs from itself.
    return value == value and (isinstance(value, float) or abs(value) <= LARGEST)


def is_logprob(value: Any) -> bool:
    """Whether a value is a log-probability; that of an impossible option is -inf."""
    return is_number(value) and value <= ROUNDING


def is_finite_logprob(value: Any) -> bool:
    """Whether a value is the log-probability of something that is possible."""
    return is_logprob(value) and value > -math.inf


def is_share(value: Any) -> bool:
    """Whether a value is a share."""
    return is_number(value) and 0 <= value <= 1 + 10 * ROUNDING


def is_count(value: Any) -> bool:
    """Whether a value is a number of things."""
    return isinstance(value, int) and is_number(value) and value >= 0


def is_flag(value: Any) -> bool:
    """Whether a value is true or false."""
    return isinstance(value, bool)


def is_object(value: Any) -> bool:
    """Whether a value is an object, whose entries are checked one by one."""
    return isinstance(value, dict)


def are_columns(value: Any) -> bool:
    """Whether a value is an object of texts or nulls."""
    return is_object(value) and all(v is None or isinstance(v, str) for v in value.values())


def are_votes(value: Any) -> bool:
    """Whether a value is an object of numbers of votes; an empty one has none."""
    return is_object(value) and all(is_count(votes) and votes > 0 for votes in value.values())


def are_counts(value: Any) -> bool:
    """Whether a value is a list of numbers of things."""
    return isinstance(value, list) and all(is_count(number) for number in value)


def are_passages(value: Any) -> bool:
    """Whether a value is a list of passages, each with the texts of its keys."""
    return isinstance(value, list) and all(
        is_object(passage) and all(is_text(passage.get(key)) for key in PASSAGE_KEYS)
        for passage in value
    )


TEXT = (is_text, "a text or null")
# What a key must hold where it is there and not null. A key that is not named here is not read.
VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gold": TEXT,
    "prediction": TEXT,
    "dataset": TEXT,
    "subject": TEXT,
    "topic": TEXT,
    "choice_type": TEXT,
    "question": TEXT,
    "text": TEXT,
    "engine": TEXT,
    "model": TEXT,
    "weights": TEXT,
    "served_model": TEXT,
    "scoring_way": TEXT,
    "prompt_sha256": TEXT,
    "key": TEXT,
    "columns": (are_columns, "an object of texts or nulls"),
    "options": (are_options, f"a list of 2 to {len(LETTERS)} texts"),
    "samples": (are_texts, "a list of texts"),
    "truncated": (is_flag, "true or false"),
    "unfinished": (is_count, "a whole number from 0"),
    "reached_limit": (is_count, "a whole number from 0"),
    "too_long": (is_count, "a whole number from 0"),
    "letter_mass": (is_share, "a number from 0 to 1"),
    "option_logprobs": (is_object, "an object of log-probabilities"),
    "normalized_logprobs": (is_object, "an object of log-probabilities"),
    "permutations": (is_object, "an object of log-probabilities by order"),
    "predictions": (are_columns, "an object of letters"),
    "votes": (are_votes, "an object of numbers of votes"),
    "passages": (are_passages, "a list of objects with id, source and text"),
    "citations": (are_counts, "a list of whole numbers from 0"),
    "unknown_citations": (are_counts, "a list of whole numbers from 0"),
    "logprob": (is_finite_logprob, "a finite log-probability"),
    "tokens": (is_count, "a whole number from 0"),
    "bytes": (is_count, "a whole number from 0"),
    "words": (is_count, "a whole number from 0"),
}
