"""Prediction rows: what they hold, and how they are checked and read into columns.

A predictions file is JSON lines, one row per example; docs/outputs.md explains every key.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import signal
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medqlora.core.errors import UserError
from medqlora.core.json_reading import parse_json
from medqlora.evaluation.row_checks import check_row, name_columns, quote


class PredictionError(UserError):
    """A predictions file or a journal that cannot be used."""


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
        kept: values of the data file's own columns that the rows keep: name -> row number -> value,
            for the rows that have one.
        gold: right answers; None where the data hide them.
        prediction: the model's answers; None where it named no option.
        logprobs: log-probabilities of the options in nats, float64 [rows, options]; NaN where a row
            has fewer options or none.
        deciding: the values that chose the predictions, as `logprobs`: with cloze scoring they are
            divided by the options' lengths; NaN where the file does not hold them.
        letter_mass: the letters' summed probabilities, float64 [rows]; NaN where unknown.
        confidence: the model's probability of its own prediction among the options, or the
            prediction's share of the votes, float64 [rows]; NaN where unknown.
        truncated: how many rows have a prompt that was cut to fit.
        too_long: the questions that were left out because the model cannot read them, id -> the
            byte at which the line starts; no column has them.
        unfinished: how many rows have no prediction, and a text whose thoughts have no end.
        reached_limit: how many rows have a text that ended at the limit of new tokens.
        shown: how many questions were shown passages.
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
    kept: dict[str, dict[int, str]] = field(default_factory=dict)
    gold: list[str | None] = field(default_factory=list)
    prediction: list[str | None] = field(default_factory=list)
    logprobs: np.ndarray | None = None
    deciding: np.ndarray | None = None
    letter_mass: np.ndarray | None = None
    confidence: np.ndarray | None = None
    truncated: int = 0
    too_long: dict[str, int] = field(default_factory=dict)
    unfinished: int = 0
    reached_limit: int = 0
    shown: int = 0
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


COLUMNS = ("dataset", "subject", "topic", "choice_type", "engine", "model", "prompt_sha256")
EXTRAS = (
    "permutations",
    "votes",
    "predictions",
    "citations",
    "unknown_citations",
    "truncated",
    "unfinished",
    "reached_limit",
)


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
    # Ctrl-C reaches all processes of the terminal; only this one may say so.
    ignore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    workers = min(len(paths), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, initializer=ignore) as pool:
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
    deciding: list[list[float]] = []
    masses = []
    confidences = []
    offset = 0
    first: dict[str, Any] = {}
    for number, line in enumerate(lines, 1):
        row = parse_line(path, number, line)
        # The first row decides what the file holds; check_row refuses any other kind or model.
        first = first or row
        problem = check_row(row, first, labelled)
        if problem is None and row["id"] in line_of_id:
            problem = (
                f"id {quote(row['id'])[1:-1]} stands on line {line_of_id[row['id']]} too; every"
                " question may stand once"
            )
        if problem is not None:
            raise PredictionError(f"{path} line {number}: {problem}")
        line_of_id[row["id"]] = number
        kind = predictions.kind = row.get("kind", "choice")
        if row.get("too_long"):
            predictions.too_long[row["id"]] = offset
            offset += len(line)
            continue
        predictions.ids.append(row["id"])
        for name, values in predictions.columns.items():
            value = row.get(name)
            # A column repeats a few values many times; interned, each is one object.
            values.append(None if value is None else sys.intern(value))
        for name, value in (row.get("columns") or {}).items():
            known = predictions.kept.setdefault(name, {})
            if value is not None:
                known[len(predictions.ids) - 1] = sys.intern(value)
        predictions.gold.append(read_answer(row, "gold", kind))
        predictions.prediction.append(read_answer(row, "prediction", kind))
        chosen_by = find_deciding(row)
        letters = name_columns(row) if row.get("option_logprobs") else ""
        scores.append([row["option_logprobs"].get(letter, np.nan) for letter in letters])
        deciding.append([chosen_by.get(letter, np.nan) for letter in letters])
        masses.append(np.nan if row.get("letter_mass") is None else row["letter_mass"])
        confidences.append(find_confidence(row, chosen_by))
        predictions.truncated += bool(row.get("truncated"))
        predictions.unfinished += bool(row.get("unfinished")) and not row.get("prediction")
        predictions.reached_limit += bool(row.get("reached_limit"))
        predictions.shown += bool(row.get("passages"))
        predictions.offsets.append(offset)
        question = row.get("question") or ""
        # Spaces stand for words here, because only groups of lengths are made of them.
        predictions.length.append(question.count(" ") + 1)
        predictions.negated.append(NEGATION.search(question.lower()) is not None)
        predictions.numeric.append(NUMBER.search(question) is not None)
        if kind == "text":
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
    # Only cloze scoring decides by other values than the log-probabilities, which takes memory.
    cloze = any("predictions" in extra for extra in predictions.extras.values())
    predictions.deciding = stack_rows(deciding) if cloze else predictions.logprobs
    predictions.letter_mass = np.array(masses, float)
    predictions.confidence = np.array(confidences, float)
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
        row = parse_json(line.decode(), nan=True)
    except UnicodeDecodeError:
        raise PredictionError(
            f"{path} line {number}: not UTF-8; expected a file of eval/predict.py"
        ) from None
    except ValueError as error:
        raise PredictionError(
            f"{path} line {number}: {error}; was the file cut short? Run eval/predict.py again"
        ) from None
    if not isinstance(row, dict):
        raise PredictionError(f"{path} line {number}: expected an object, got {type(row).__name__}")
    return row


def find_deciding(row: dict[str, Any]) -> dict[str, float]:
    """Return the values that chose a row's prediction, by letter; empty where it holds none."""
    if row.get("predictions"):
        # Cloze rows of earlier versions hold only the values before the division by length.
        return row.get("normalized_logprobs") or {}
    return row.get("option_logprobs") or {}


def find_confidence(row: dict[str, Any], deciding: dict[str, float]) -> float:
    """Return the probability of a row's prediction among its options, or its share of the votes.

    Args:
        row: the row.
        deciding: what find_deciding returns for it.

    NaN stands for a row without a prediction, or with neither log-probabilities nor votes.
    """
    prediction = row.get("prediction")
    if prediction is None:
        return np.nan
    if deciding:
        # The largest value is subtracted so that not all exponentials underflow to 0.
        top = max(deciding.values())
        if top == -math.inf:
            return np.nan
        total = sum(math.exp(value - top) for value in deciding.values())
        return math.exp(deciding[prediction] - top) / total
    votes = row.get("votes")
    return votes[prediction] / sum(votes.values()) if votes else np.nan


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
