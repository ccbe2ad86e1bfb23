"""Readers of single fields of a record, shared by the parsers of all datasets.

They raise ValueError where a field cannot be used. `read_examples` turns that into a DataError
which also names the file and the line.
"""

from __future__ import annotations

import json

from medqlora.core.config import DataEntry
from medqlora.data.examples import LETTERS


def is_blank(value: object) -> bool:
    """Whether a field holds nothing but blanks."""
    # pandas writes a missing value as NaN, the only value that differs from itself.
    return value is None or value != value or not str(value).strip()


def need_text(record: dict, key: str) -> str:
    """Return a field that every record must have.

    Raises:
        ValueError: The field is missing or blank.
    """
    value = record.get(key)
    if is_blank(value):
        raise ValueError(f'"{key}" is empty; every row needs text there')
    return str(value)


def optional_text(record: dict, key: str) -> str | None:
    """Return a field, or None where it is missing, blank or the word "nan"."""
    value = record.get(key)
    # pandas writes a missing text as the word "nan".
    text = "" if value is None else str(value)
    if text.lower() == "nan" or not text.strip():
        return None
    return text


def need_option(record: dict, key: str) -> str:
    """Return the text of one option.

    Raises:
        ValueError: The field is missing or blank.
    """
    value = record.get(key)
    if is_blank(value):
        raise ValueError(f'option "{key}" is empty; every option needs text')
    return str(value)


def whole_number(value: object, name: str) -> int:
    """Return a number, or a text that spells one, as an integer.

    Raises:
        ValueError: The value is no whole number. The message calls it `name`.
    """
    try:
        # CSV files hold numbers as text, and pandas makes a column with gaps a float ("2.0").
        # Python counts True as 1, which would make a label of a truth value.
        if float(value) == int(float(value)) and not isinstance(value, bool):
            return int(float(value))
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} is {value!r}; expected a whole number")


def read_options(value: object) -> tuple[str, ...]:
    """Return the texts of the options in the order of their letters.

    Args:
        value: {"A": text, ...}, [{"key": "A", "value": text}, ...] or [text, ...]; a string is
            read as JSON of one of these forms.

    Raises:
        ValueError: The value has none of these forms, or an option is blank.
    """
    if isinstance(value, str) and value.strip()[:1] in "[{":
        value = json.loads(value)
    if is_list_of_pairs(value):
        value = {pair["key"]: pair["value"] for pair in value}
    if isinstance(value, dict):
        value = order_by_letter(value)
    if not isinstance(value, (list, tuple)) or not 2 <= len(value) <= len(LETTERS):
        raise ValueError(
            f"options are {value!r}; expected 2 to {len(LETTERS)} texts, as a list or by letter"
        )
    for letter, text in zip(LETTERS, value, strict=False):
        if text is None or not str(text).strip():
            raise ValueError(f'option "{letter}" is empty; every option needs text')
    return tuple(map(str, value))


def is_list_of_pairs(value: object) -> bool:
    """Whether a value is a list of objects, each with a "key" and a "value"."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(pair, dict) and {"key", "value"} <= set(pair) for pair in value)


def order_by_letter(options: dict) -> list:
    """Return the texts of {"A": text, ...} in the order of their letters; None is left out."""
    # Arrow gives all records the same keys, so a question without an option E has None there.
    present = {letter: text for letter, text in options.items() if text is not None}
    expected = LETTERS[: len(present)]
    # A gap in the letters would move the options behind it to other letters.
    if sorted(present) != list(expected):
        raise ValueError(
            f"options are lettered {', '.join(map(str, present))}; expected {', '.join(expected)}"
        )
    return [present[letter] for letter in expected]


def find_answer(value: object, options: tuple[str, ...]) -> int:
    """Return the index of the right option, given as a letter, its exact text or an index from 0.

    The index may lie beyond the last option; `check_answer` refuses that.

    Raises:
        ValueError: The value is none of the three.
    """
    if isinstance(value, str):
        text = value.strip()
        # A single letter is always read as the letter of an option, even where an option's text is
        # one.
        if len(text) == 1 and text.upper() in LETTERS:
            return LETTERS.index(text.upper())
        if options.count(value) == 1:
            return options.index(value)
    try:
        return whole_number(value, "answer")
    except ValueError:
        raise ValueError(
            f"answer is {value!r}; expected a letter, an index from 0, or the text of one option"
        ) from None


def check_answer(answer: int | None, options: tuple[str, ...]) -> None:
    """Raise ValueError where a known answer is not the index of an option."""
    # Python would take a negative index without a word and count it from the end.
    if answer is not None and not 0 <= answer < len(options):
        raise ValueError(
            f"answer is option {answer} (from 0) of {len(options)}; it must be one of the options"
        )


def take_columns(record: dict, entry: DataEntry) -> dict:
    """Add our fields to a record by the entry's column map {our field: the file's column}.

    Raises:
        ValueError: The record lacks a column that the map names.
    """
    renamed = dict(record)
    for field, column in entry.columns.items():
        names = [column] if isinstance(column, str) else column
        missing = [name for name in names if name not in record]
        if missing:
            raise ValueError(
                f'columns.{field} names "{missing[0]}"; the row has {", ".join(map(str, record))}'
            )
        if isinstance(column, str):
            renamed[field] = record[column]
        else:
            renamed[field] = [record[name] for name in column]
    return renamed


def read_context(record: dict) -> tuple[str, ...]:
    """Return the passages of the field "context", which holds one text or a list of texts."""
    value = record.get("context")
    if isinstance(value, (list, tuple)):
        return tuple(map(str, value))
    return (str(value),) if value else ()
