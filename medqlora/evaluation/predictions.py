"""Prediction rows: what they hold, how they are read into columns, and a journal that a kill cannot
damage.

A predictions file is JSON lines, one row per example (keys in README). While it is being made,
finished batches are appended to journals in `FILE.parts/`, one line per batch: a line is whole or
it is not there.
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
    """A predictions file or journal that cannot be used."""


KINDS = ("choice", "open", "text")
REQUIRED = {
    "choice": ("id", "gold", "prediction"),
    "open": ("id", "gold", "prediction"),
    "text": ("id", "logprob", "tokens"),
}
# of lower-cased text
NEGATION = re.compile(
    r"\b(?:not|no|never|none|neither|nor|except|false|incorrect|least|without)\b|n't\b"
)
NUMBER = re.compile(r"\d")


@dataclass
class Predictions:
    """The rows of one file as columns; entry i of each belongs to row i.

    logprobs float64 [rows, options]: natural log, NaN where a row has fewer options or none;
    confidence float64 [rows]: the model's probability of its own prediction (among the options, or
    its share of the votes), NaN where unknown; extras: rows that carry permutations, samples' votes
    or cloze normalisations, by number; offsets [rows]: where the line starts.
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
    extras: dict[int, dict[str, Any]] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)  # words of the question
    negated: list[bool] = field(default_factory=list)
    numeric: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def right(self) -> np.ndarray:
        """bool [rows]; a row without a prediction is wrong."""
        return np.array(
            [p is not None and p == g for p, g in zip(self.prediction, self.gold, strict=True)],
            bool,
        )

    def column(self, name: str) -> list[str]:
        return [value or "none" for value in self.columns[name]]


TYPES: dict[str, Any] = {
    "option_logprobs": dict,
    "options": list,
    "question": str,
    "letter_mass": (int, float),
    "permutations": dict,
    "predictions": dict,
    "votes": dict,
    "bytes": (int, float),
    "words": (int, float),
}
COLUMNS = ("dataset", "subject", "topic", "choice_type", "engine", "model", "prompt_sha256")
EXTRAS = ("permutations", "votes", "predictions")


def read_predictions(path: Path, labelled: bool = True) -> Predictions:
    """Read and check a predictions file.

    Raises: PredictionError: file and line of the first row that cannot be scored: not JSON, a key
        missing, an id that is missing or stands twice, no label (where `labelled`), a letter
        outside the options, a probability that is no number.
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
    """Several files, read beside each other: parsing takes nearly all of the time of every command
    that reads them.
    """
    if len(paths) < 2:
        return {path: read_predictions(path) for path in paths}
    with ProcessPoolExecutor(min(len(paths), os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(read_predictions, paths), strict=True))


def collect_rows(rows: Iterable[dict[str, Any]], labelled: bool = True) -> Predictions:
    """The same from rows in memory."""
    return collect_lines(
        Path("predictions"), (json.dumps(row).encode() + b"\n" for row in rows), labelled
    )


def collect_lines(path: Path, lines: Iterable[bytes], labelled: bool) -> Predictions:
    found = Predictions(path, "choice", columns={name: [] for name in COLUMNS})
    seen: dict[str, int] = {}
    scores: list[list[float]] = []
    masses = []
    confidences = []
    offset = 0
    for number, line in enumerate(lines, 1):
        row = parse_line(path, number, line)
        if number == 1:
            found.kind = row.get("kind", "choice")
        problem = check_row(row, found.kind, labelled)
        if problem is None and row["id"] in seen:
            problem = (
                f"id {row['id']} stands on line {seen[row['id']]} too; every question may stand"
                " once"
            )
        if problem is not None:
            raise PredictionError(f"{path} line {number}: {problem}")
        seen[row["id"]] = number
        found.ids.append(row["id"])
        for name, values in found.columns.items():
            value = row.get(name)
            values.append(None if value is None else sys.intern(str(value)))
        short = found.kind == "choice"
        found.gold.append(sys.intern(row["gold"]) if short and row["gold"] else row.get("gold"))
        found.prediction.append(
            sys.intern(row["prediction"]) if short and row["prediction"] else row.get("prediction")
        )
        options = row.get("option_logprobs") or {}
        letters = LETTERS[: len(row.get("options") or options)]
        scores.append([options.get(letter, np.nan) for letter in letters] if options else [])
        masses.append(np.nan if row.get("letter_mass") is None else row["letter_mass"])
        confidences.append(find_confidence(row, options))
        found.truncated += bool(row.get("truncated"))
        found.offsets.append(offset)
        question = row.get("question") or ""
        found.length.append(question.count(" ") + 1)
        found.negated.append(NEGATION.search(question.lower()) is not None)
        found.numeric.append(NUMBER.search(question) is not None)
        extras = {key: row[key] for key in EXTRAS if row.get(key)}
        if found.kind == "text":
            extras = {key: row.get(key) or 0 for key in ("logprob", "tokens", "bytes", "words")}
        if extras:
            found.extras[number - 1] = extras
        offset += len(line)
    if not found.ids:
        raise PredictionError(f"{path} is empty; expected one prediction per line")
    found.logprobs = np.full((len(scores), max(map(len, scores))), np.nan)
    for width in set(map(len, scores)):
        rows = [i for i, values in enumerate(scores) if len(values) == width]
        found.logprobs[rows, :width] = [scores[i] for i in rows]
    found.letter_mass, found.confidence = np.array(masses), np.array(confidences)
    return found


def parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
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
    """What is wrong with a row, or None."""
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
        bad = [
            key
            for key in ("logprob", "tokens")
            if not isinstance(row[key], (int, float)) or row[key] != row[key]
        ]
        return f"{bad[0]} is {row[bad[0]]!r}; expected a number" if bad else None
    if labelled and row["gold"] is None:
        return "no label (gold is null); a split with hidden answers cannot be scored"
    for key in ("gold", "prediction"):
        if row[key] is not None and not isinstance(row[key], str):
            return f"{key} is {row[key]!r}; expected a text or null"
    options = row.get("option_logprobs") or {}
    if kind == "choice":
        letters = (
            LETTERS[: len(row["options"])] if row.get("options") else "".join(options) or LETTERS
        )
        for key in ("gold", "prediction"):
            if row[key] is not None and row[key] not in list(letters):
                return f"{key} is {row[key]!r}, which is not one of the options {letters}"
    if options and row["prediction"] is not None and row["prediction"] not in options:
        return f"prediction is {row['prediction']!r}, of which option_logprobs says nothing"
    for order, values in (row.get("permutations") or {}).items():
        shown = (
            sorted(order) == list(LETTERS[: len(order)])
            and isinstance(values, list)
            and len(values) == len(order)
        )
        if not shown or not all(
            value is None or isinstance(value, (int, float)) for value in values
        ):
            return (
                f"permutations {order!r} is {str(values)[:40]}; expected a number for each letter"
                " of an order"
            )
    for letter, value in options.items():
        if not isinstance(value, (int, float)) or value != value or value > 1e-3:
            return f"option_logprobs {letter} is {value!r}; expected a log-probability"
    return None


def find_confidence(row: dict[str, Any], options: dict[str, float]) -> float:
    prediction = row.get("prediction")
    if prediction is None:
        return np.nan
    if options:
        top = max(options.values())
        return math.exp(options[prediction] - top) / sum(
            math.exp(value - top) for value in options.values()
        )
    votes = row.get("votes") or {}
    return votes[prediction] / sum(votes.values()) if prediction in votes else np.nan


def read_rows(path: Path, offsets: Sequence[int]) -> list[dict[str, Any]]:
    """Whole rows again, by the offsets of `Predictions`."""
    rows = []
    with path.open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            rows.append(json.loads(file.readline()))
    return rows
