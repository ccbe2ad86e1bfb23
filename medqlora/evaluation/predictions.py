"""Prediction rows: what they hold, and how they are checked and read into columns.

A predictions file is JSON lines, one row per example; docs/outputs.md explains every key.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medqlora.core.errors import UserError
from medqlora.data.examples import LETTERS


class PredictionError(UserError):
    """A predictions file or a journal that cannot be used."""


KINDS = ("choice", "open", "text")
REQUIRED = {
    "choice": ("id", "gold", "prediction"),
    "open": ("id", "gold", "prediction"),
    "text": ("id", "logprob", "tokens"),
}
# The text is lower-cased before this is searched.
NEGATION = re.compile(
    r"\b(?:not|no|never|none|neither|nor|except|false|incorrect|least|without)\b|n't\b"
)
NUMBER = re.compile(r"\d")


@dataclass
class Predictions:
    """The rows of one file as columns; entry i of each column belongs to row i.

    Attributes:
        path: the file.
        kind: what the rows are: choice, open or text.
        ids: the examples' ids.
        columns: values by the name of the key (see COLUMNS); None where a row has none.
        gold: right answers; None where the data hide them.
        prediction: the model's answers; None where it named no option.
        logprobs: log-probabilities of the options in nats, float64 [rows, options]; NaN where a row
            has fewer options or none.
        letter_mass: the letters' summed probabilities, float64 [rows]; NaN where unknown.
        confidence: the model's probability of its own prediction among the options, or the
            prediction's share of the votes, float64 [rows]; NaN where unknown.
        truncated: how many rows have a prompt that was cut to fit.
        too_long: the questions that were left out because the model cannot read them, id -> the
            byte at which the line starts; no column has them.
        unfinished: how many rows have no prediction, and a text whose thoughts have no end.
        extras: further values by row number, for the rows that have them: the keys of EXTRAS, or
            the log-probability and the lengths of a text.
        offsets: the byte at which each row's line starts.
        length: words of each question.
        negated: whether the question has a word such as "not" or "except".
        numeric: whether the question has a digit.
    """

    path: Path
    kind: str
    ids: list[str] = field(default_factory=list)
    columns: dict[str, list[str | None]] = field(default_factory=dict)
    gold: list[str | None] = field(default_factory=list)
    prediction: list[str | None] = field(default_factory=list)
    logprobs: np.ndarray | None = None
    letter_mass: np.ndarray | None = None
    confidence: np.ndarray | None = None
    truncated: int = 0
    too_long: dict[str, int] = field(default_factory=dict)
    unfinished: int = 0
    extras: dict[int, dict[str, Any]] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    negated: list[bool] = field(default_factory=list)
    numeric: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def right(self) -> np.ndarray:
        """Whether each prediction is right, bool [rows]; a row without a prediction is wrong."""
        return np.array(
            [
                prediction is not None and prediction == gold
                for prediction, gold in zip(self.prediction, self.gold, strict=True)
            ],
            bool,
        )

    def column(self, name: str) -> list[str]:
        """Return a column with "none" in place of missing values."""
        return [value or "none" for value in self.columns[name]]


# These are the types of values that a row may leave out.
TYPES: dict[str, Any] = {
    "option_logprobs": dict,
    "options": list,
    "question": str,
    "letter_mass": (int, float),
    "permutations": dict,
    "predictions": dict,
    "votes": dict,
    "unfinished": int,
    "too_long": int,
    "bytes": (int, float),
    "words": (int, float),
}
COLUMNS = ("dataset", "subject", "topic", "choice_type", "engine", "model", "prompt_sha256")
EXTRAS = ("permutations", "votes", "predictions")


def read_predictions(path: Path, labelled: bool = True) -> Predictions:
    """Read and check a predictions file.

    Args:
        path: the file.
        labelled: whether every row must have a label.

    Raises:
        PredictionError: the file cannot be read, or one of its rows cannot be scored: it is not
            JSON, a key or the label is missing, its id is empty or stands twice, a letter is not
            among the options, or a log-probability is no number. The message names the line.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise PredictionError(
            f"{path}: cannot be read ({error.strerror}); give a file of eval/predict.py"
        ) from None
    with file:
        return collect_lines(path, file, labelled)


def read_all_predictions(paths: Sequence[Path]) -> dict[Path, Predictions]:
    """Read several files, each in a process of its own.

    Parsing takes nearly all of the time of every command that reads predictions.

    Raises:
        PredictionError: see read_predictions.
    """
    if len(paths) < 2:
        return {path: read_predictions(path) for path in paths}
    # Threads would wait for each other, because parsing JSON holds the interpreter's lock.
    with ProcessPoolExecutor(min(len(paths), os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(read_predictions, paths), strict=True))


def collect_rows(rows: Iterable[dict[str, Any]], labelled: bool = True) -> Predictions:
    """Check rows in memory and return their columns, as read_predictions does for a file."""
    # Rows in memory go through JSON, so that they pass the very checks of a file.
    return collect_lines(
        Path("predictions"), (json.dumps(row).encode() + b"\n" for row in rows), labelled
    )


def collect_lines(path: Path, lines: Iterable[bytes], labelled: bool) -> Predictions:
    """Check the lines of a predictions file and return their columns."""
    predictions = Predictions(path, "choice", columns={name: [] for name in COLUMNS})
    line_of_id: dict[str, int] = {}
    scores: list[list[float]] = []
    masses = []
    confidences = []
    offset = 0
    for number, line in enumerate(lines, 1):
        row = parse_line(path, number, line)
        if number == 1:
            # The first row decides what the file holds; check_row refuses any other kind.
            predictions.kind = row.get("kind", "choice")
        problem = check_row(row, predictions.kind, labelled)
        if problem is None and row["id"] in line_of_id:
            problem = (
                f"id {row['id']} stands on line {line_of_id[row['id']]} too; every question may"
                " stand once"
            )
        if problem is not None:
            raise PredictionError(f"{path} line {number}: {problem}")
        line_of_id[row["id"]] = number
        if row.get("too_long"):
            predictions.too_long[row["id"]] = offset
            offset += len(line)
            continue
        predictions.ids.append(row["id"])
        for name, values in predictions.columns.items():
            value = row.get(name)
            # A column repeats a few values many times; interned, each is one object.
            values.append(None if value is None else sys.intern(str(value)))
        predictions.gold.append(read_answer(row, "gold", predictions.kind))
        predictions.prediction.append(read_answer(row, "prediction", predictions.kind))
        option_logprobs = row.get("option_logprobs") or {}
        # Values are taken by their letters, so the order of keys in the file does not matter. A
        # letter without a value is NaN and keeps its column.
        letters = LETTERS[: len(row.get("options") or option_logprobs)] if option_logprobs else ""
        scores.append([option_logprobs.get(letter, np.nan) for letter in letters])
        masses.append(np.nan if row.get("letter_mass") is None else row["letter_mass"])
        confidences.append(find_confidence(row, option_logprobs))
        predictions.truncated += bool(row.get("truncated"))
        predictions.unfinished += bool(row.get("unfinished")) and not row.get("prediction")
        predictions.offsets.append(offset)
        question = row.get("question") or ""
        # Spaces stand for words here, because only groups of lengths are made of them.
        predictions.length.append(question.count(" ") + 1)
        predictions.negated.append(NEGATION.search(question.lower()) is not None)
        predictions.numeric.append(NUMBER.search(question) is not None)
        if predictions.kind == "text":
            extras = {key: row.get(key) or 0 for key in ("logprob", "tokens", "bytes", "words")}
        else:
            extras = {key: row[key] for key in EXTRAS if row.get(key)}
        if extras:
            predictions.extras[len(predictions.ids) - 1] = extras
        # Lines are bytes and not text, so that read_rows can seek to these offsets.
        offset += len(line)
    if not predictions.ids and predictions.too_long:
        raise PredictionError(
            f"{path}: all {len(predictions.too_long)} questions are longer than the model can read;"
            " there is nothing to score"
        )
    if not predictions.ids:
        raise PredictionError(f"{path} is empty; expected one prediction per line")
    predictions.logprobs = stack_rows(scores)
    predictions.letter_mass = np.array(masses)
    predictions.confidence = np.array(confidences)
    return predictions


def read_answer(row: dict[str, Any], key: str, kind: str) -> str | None:
    """Return a row's answer; equal letters become one object, which saves memory."""
    answer = row.get(key)
    if kind == "choice" and answer:
        return sys.intern(answer)
    return answer


def stack_rows(rows: list[list[float]]) -> np.ndarray:
    """Return rows of different lengths as float64 [rows, longest], with NaN after their ends."""
    stacked = np.full((len(rows), max(map(len, rows))), np.nan)
    # Rows of one length are copied at once, because one assignment per row would be slow.
    for width in set(map(len, rows)):
        numbers = [number for number, row in enumerate(rows) if len(row) == width]
        stacked[numbers, :width] = [rows[number] for number in numbers]
    return stacked


def parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """Return the row of a line, or raise PredictionError with the line's number."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise PredictionError(
            f"{path} line {number}: not UTF-8; expected a file of eval/predict.py"
        ) from None
    except json.JSONDecodeError:
        raise PredictionError(
            f"{path} line {number}: not valid JSON; was the file cut short? Run eval/predict.py"
            " again"
        ) from None
    if not isinstance(row, dict):
        raise PredictionError(f"{path} line {number}: expected an object, got {type(row).__name__}")
    return row


def check_row(row: dict[str, Any], kind: str, labelled: bool) -> str | None:
    """Say what is wrong with a row; None where nothing is."""
    # The kind is checked first, because the other checks depend on it.
    if row.get("kind", "choice") != kind or kind not in KINDS:
        return (
            f"kind is {row.get('kind')!r} in a file of kind {kind!r}; one file holds one kind of"
            f" {', '.join(KINDS)}"
        )
    for key in REQUIRED[kind]:
        if key not in row:
            return f'no "{key}"; expected a row of eval/predict.py'
    if not isinstance(row["id"], str) or not row["id"]:
        return f"id is {row['id']!r}; expected a text"
    for key, types in TYPES.items():
        if row.get(key) is not None and not isinstance(row[key], types):
            return f"{key} is {str(row[key])[:40]!r}; expected a row of eval/predict.py"
    if kind == "text":
        for key in ("logprob", "tokens"):
            if not is_number(row[key]):
                return f"{key} is {row[key]!r}; expected a number"
        return None
    if labelled and row["gold"] is None:
        return "no label (gold is null); a split with hidden answers cannot be scored"
    for key in ("gold", "prediction"):
        if row[key] is not None and not isinstance(row[key], str):
            return f"{key} is {row[key]!r}; expected a text or null"
    option_logprobs = row.get("option_logprobs") or {}
    if kind == "choice":
        letters = list_letters(row, option_logprobs)
        for key in ("gold", "prediction"):
            # A list is searched, because the string "ABCD" would also hold "" and "AB".
            if row[key] is not None and row[key] not in list(letters):
                return f"{key} is {row[key]!r}, which is not one of the options {letters}"
    prediction = row["prediction"]
    # find_confidence looks the prediction's own value up.
    if option_logprobs and prediction is not None and prediction not in option_logprobs:
        return (
            f"prediction is {prediction!r}, which has no value in option_logprobs; expected a row"
            " of eval/predict.py"
        )
    for order, values in (row.get("permutations") or {}).items():
        if not is_permutation(order, values):
            return (
                f"permutations {order!r} is {str(values)[:40]}; expected a number for each letter"
                " of an order"
            )
    for letter, value in option_logprobs.items():
        # Rounding may take a log-probability slightly over 0.
        if not is_number(value) or value > 1e-3:
            return f"option_logprobs {letter} is {value!r}; expected a log-probability"
    return None


def is_number(value: Any) -> bool:
    """Whether a value is a number other than NaN."""
    # NaN is the only number that differs from itself.
    return isinstance(value, (int, float)) and value == value


def list_letters(row: dict[str, Any], option_logprobs: dict[str, float]) -> str:
    """Return the letters that a row may name: those of its options, where it says what they are."""
    if row.get("options"):
        return LETTERS[: len(row["options"])]
    return "".join(option_logprobs) or LETTERS


def is_permutation(order: str, values: Any) -> bool:
    """Whether `order` is an order of the first letters, with a number or null for each of them."""
    if sorted(order) != list(LETTERS[: len(order)]):
        return False
    if not isinstance(values, list) or len(values) != len(order):
        return False
    return all(value is None or isinstance(value, (int, float)) for value in values)


def find_confidence(row: dict[str, Any], option_logprobs: dict[str, float]) -> float:
    """Return the probability of a row's prediction among its options, or its share of the votes.

    NaN stands for a row without a prediction, or with neither log-probabilities nor votes.
    """
    prediction = row.get("prediction")
    if prediction is None:
        return np.nan
    if option_logprobs:
        # The largest value is subtracted so that not all exponentials underflow to 0.
        top = max(option_logprobs.values())
        total = sum(math.exp(value - top) for value in option_logprobs.values())
        return math.exp(option_logprobs[prediction] - top) / total
    votes = row.get("votes") or {}
    if prediction not in votes:
        return np.nan
    return votes[prediction] / sum(votes.values())


def read_rows(path: Path, offsets: Sequence[int]) -> list[dict[str, Any]]:
    """Read whole rows again.

    Args:
        path: the predictions file.
        offsets: the byte at which each row starts, from `Predictions.offsets`.
    """
    # Predictions keeps neither questions nor options, so they are read again where they are needed.
    rows = []
    with path.open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            rows.append(json.loads(file.readline()))
    return rows
