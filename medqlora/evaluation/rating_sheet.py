"""Sheets on which people rate answers without knowing which model gave them.

A sheet is a CSV file that spreadsheet programs open and save. Its key is a JSON file that says
which answer belongs to which file of predictions.
"""

from __future__ import annotations

import csv
import io
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from medqlora.core.errors import UserError
from medqlora.core.files import hash_json
from medqlora.core.reading import check_types, read_object, shorten
from medqlora.data.examples import LETTERS
from medqlora.evaluation.predictions import Predictions, read_rows
from medqlora.prompts.answers import find_final

CRITERIA = ("accuracy", "completeness", "relevance", "fluency", "safety")
LOWEST, HIGHEST = 1, 5  # the ratings that there are
HEAD = ("item", "question", "reference", "answer", *CRITERIA, "comment")
NO_ANSWER = "(no answer)"
# A cell of Excel holds 32,767 characters; a longer one would be divided into several rows.
LONGEST_CELL = 32_000
# Spreadsheet programs compute a cell that begins with one of the first signs. The apostrophe tells
# them not to, so a cell that begins with it needs another one.
FORMULA_SIGNS = tuple("=+-@\t'")


class RatingError(UserError):
    """A rating sheet or key that cannot be made or used."""


class KeyItem(BaseModel):
    """Where the answer of an item is from."""

    model_config = ConfigDict(strict=True)

    question: str
    file: str


class Key(BaseModel):
    """The content of a key file: which answer each item shows.

    Attributes:
        seed: of the draw.
        files: file of predictions -> the name of its model.
        items: item -> question and file.
    """

    model_config = ConfigDict(strict=True)

    seed: int
    files: dict[str, str]
    items: dict[str, KeyItem]


@dataclass(frozen=True)
class Sheet:
    """A sheet that was drawn, with its key.

    Attributes:
        text: the CSV file.
        key: which answer each item shows.
        telling: items whose answer names a model, by which raters may know it.
        cut: items with a text of over LONGEST_CELL characters, which was cut.
    """

    text: str
    key: Key
    telling: list[str]
    cut: list[str]


def draw_sheet(files: Sequence[Predictions], seed: int, limit: int | None = None) -> Sheet:
    """Draw a sheet with the answers of several files to the same questions.

    The answers to one question stand one below the other. The order of the questions, and that of
    the answers to each, are drawn.

    Args:
        files: predictions of multiple-choice or open questions.
        seed: the same seed draws the same sheet.
        limit: how many questions are drawn; None takes all.

    Raises:
        RatingError: the files are of different questions, or hold no texts of questions.
    """
    rows = [{row["id"]: row for row in read_rows(some.path, some.offsets)} for some in files]
    check_files(files, rows)
    drawn = random.Random(seed)
    questions = drawn.sample(sorted(rows[0]), min(limit or len(rows[0]), len(rows[0])))
    names = [str(some.path) for some in files]
    # Items begin with a hash of what was drawn, so that no sheet is read with another one's key.
    digest = hash_json([seed, questions, names, rows])[:6].upper()
    models = {name: str(first_of(some)["model"]) for name, some in zip(names, rows, strict=True)}
    key = Key(seed=seed, files=models, items={})
    lines, telling, cut = [], [], []
    for question in questions:
        for number in drawn.sample(range(len(files)), len(files)):
            item = f"Q{digest}-{len(lines) + 1:04d}"
            cells = describe_cells(rows[number][question])
            key.items[item] = KeyItem(question=question, file=names[number])
            lines.append([item, *(clean_cell(cell) for cell in cells)])
            if any(len(cell) > LONGEST_CELL for cell in cells):
                cut.append(item)
            if names_model(cells[-1], models.values()):
                telling.append(item)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(HEAD)
    writer.writerows([*line, *[""] * (len(HEAD) - len(line))] for line in lines)
    # Without this mark Excel reads a CSV file in the code page of its country.
    return Sheet("\ufeff" + text.getvalue(), key, telling, cut)


def check_files(files: Sequence[Predictions], rows: Sequence[dict[str, dict[str, Any]]]) -> None:
    """Refuse files that do not answer the same questions.

    Args:
        files: the files.
        rows: the whole rows of each of them, by id.
    """
    first = files[0]
    for some, own in zip(files, rows, strict=True):
        if some.kind == "text":
            raise RatingError(f"{some.path}: kind text; people rate answers to questions")
        if own.keys() != rows[0].keys():
            only = len(rows[0].keys() - own.keys()), len(own.keys() - rows[0].keys())
            raise RatingError(
                f"{first.path} and {some.path} hold different questions ({only[0]} only in the"
                f" first, {only[1]} only in the second); predict the same questions with both"
            )
        for id, row in own.items():
            if not row.get("question"):
                raise RatingError(
                    f"{some.path}: id {shorten(id)} holds no text of its question, which a rater"
                    " must see; run eval/predict.py again"
                )
            for key in ("question", "options", "gold"):
                if row.get(key) != rows[0][id].get(key):
                    raise RatingError(
                        f"id {shorten(id)} has another {key} in {some.path} than in {first.path};"
                        " the files are of different data"
                    )


def first_of(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the first row."""
    return next(iter(rows.values()))


def describe_cells(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return question, reference and answer of a row as a rater reads them."""
    options = row.get("options") or []
    named = {letter: f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)}
    question = "\n".join([row["question"], *named.values()])
    # Thoughts are no part of the answer.
    written = find_final(row.get("text") or "")
    answer = (written or "").strip() or row.get("prediction") or NO_ANSWER
    gold = row["gold"] or ""
    return question, named.get(gold, gold), named.get(answer, answer)


def names_model(answer: str, models: Sequence[str]) -> bool:
    """Whether an answer holds the name of a model: the last part of its path or hub id."""
    words = {Path(part).name.casefold() for model in models for part in model.split("+")}
    return any(len(word) > 3 and word in answer.casefold() for word in words)


def clean_cell(text: str) -> str:
    """Return a text that a spreadsheet program shows as it is, within the length of a cell.

    A text that begins with one of FORMULA_SIGNS gets an apostrophe in front of it.
    """
    if len(text) > LONGEST_CELL:
        text = text[:LONGEST_CELL] + " … (cut)"
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    return "'" + text if text.startswith(FORMULA_SIGNS) else text


def restore_cell(text: str) -> str:
    """Return the text that clean_cell has changed."""
    return text[1:] if text.startswith("'") and text[1:].startswith(FORMULA_SIGNS) else text


def read_key(path: Path) -> Key:
    """Read a key file.

    Raises:
        RatingError: the file cannot be read or is no key.
    """
    place = f"--key {path}"
    tree = read_object(path, place, RatingError)
    check_types(tree, Key, place, RatingError)
    key = Key.model_validate(tree)
    foreign = [item for item, entry in key.items.items() if entry.file not in key.files]
    if not key.items or foreign:
        raise RatingError(f"{place}: expected items of its files; restore the file")
    return key


def read_sheet(path: Path, key: Key) -> dict[str, tuple[int, ...]]:
    """Read the ratings of a sheet that a person has filled in.

    Rows may stand in any order, and further columns are passed over.

    Args:
        path: the sheet, with commas, semicolons or tabs between cells, as spreadsheet programs of
            different countries save it.
        key: the key of the sheet.

    Returns:
        Item -> the ratings of CRITERIA.

    Raises:
        RatingError: the sheet is of another key, or a rating is missing or out of range. The
            message names the row as a spreadsheet program counts it.
    """
    lines = split_cells(path)
    head = [cell.strip().lower() for cell in lines[0]] if lines else []
    places = {}
    for name in ("item", *CRITERIA):
        if head.count(name) != 1:
            raise RatingError(
                f"{path}: {head.count(name)} columns are called {name}, expected one; give a sheet"
                " of eval/rate.py sheet with its first row as it was"
            )
        places[name] = head.index(name)
    ratings: dict[str, tuple[int, ...]] = {}
    faults = []
    for number, line in enumerate(lines[1:], 2):
        if not any(cell.strip() for cell in line):
            continue
        cells = {name: line[place] if place < len(line) else "" for name, place in places.items()}
        item = restore_cell(cells["item"].strip())
        if item not in key.items or item in ratings:
            reason = "stands twice" if item in ratings else "is none of the key's"
            raise RatingError(f"{path} row {number}: item {shorten(item, 40)!r} {reason}")
        ratings[item] = tuple(read_rating(cells[name]) or 0 for name in CRITERIA)
        for name, rating in zip(CRITERIA, ratings[item], strict=True):
            if not rating:
                faults.append(f"row {number} ({item}): {name} is {shorten(cells[name], 20)!r}")
    missing = [item for item in key.items if item not in ratings]
    faults += [f"item {item} is missing" for item in missing]
    if faults:
        more = f", and {len(faults) - 1} more like this" if len(faults) > 1 else ""
        raise RatingError(
            f"{path} {faults[0]}{more}; every item needs whole numbers from {LOWEST} to {HIGHEST}"
        )
    return ratings


def read_rating(text: str) -> int | None:
    """Return a rating, or None where the text is none; some programs write 4 as 4.0."""
    digits = text.strip().removesuffix(".0")
    known = {str(rating): rating for rating in range(LOWEST, HIGHEST + 1)}
    return known.get(digits)


def split_cells(path: Path) -> list[list[str]]:
    """Return the cells of a CSV file, row by row; see read_sheet."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RatingError(
            f"{path} is not UTF-8; save it as “CSV UTF-8” in the spreadsheet program"
        ) from None
    except OSError as error:
        raise RatingError(f"{path}: cannot be read ({error.strerror}); give a sheet") from None
    # The names of the columns hold none of these signs.
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise RatingError(f"{path}: not a table ({error}); save it as CSV again") from None
