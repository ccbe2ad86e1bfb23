"""Fields of a record: what every dataset's parser needs to read them.

A ValueError becomes a DataError with the record's place before it.
"""

from __future__ import annotations

import json

from medqlora.core.config import DataEntry
from medqlora.data.examples import LETTERS


def need_text(record: dict, key: str) -> str:
    value = record.get(key)
    # NaN is how pandas writes nothing
    if value is None or value != value or not str(value).strip():
        raise ValueError(f'"{key}" is empty; every row needs text there')
    return str(value)


def optional_text(record: dict, key: str) -> str | None:
    value = record.get(key)
    text = "" if value is None else str(value)
    return text if text[:4].lower() != "nan" and text.strip() else None


def need_option(record: dict, key: str) -> str:
    value = record.get(key)
    if value is None or value != value or not str(value).strip():
        raise ValueError(f'option "{key}" is empty; every option needs text')
    return str(value)


def whole_number(value: object, name: str) -> int:
    try:
        if float(value) == int(float(value)) and not isinstance(value, bool):
            return int(float(value))
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} is {value!r}; expected a whole number")


def read_options(value: object) -> tuple[str, ...]:
    """{"A": …}, [{"key": "A", "value": …}] or a list of texts, in the order of their letters."""
    if isinstance(value, str) and value.strip()[:1] in "[{":
        value = json.loads(value)
    if (
        isinstance(value, list)
        and value
        and all(isinstance(v, dict) and {"key", "value"} <= set(v) for v in value)
    ):
        value = {v["key"]: v["value"] for v in value}
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if v is not None}
        if sorted(value) != list(LETTERS[: len(value)]):
            raise ValueError(
                f"options are lettered {', '.join(map(str, value))}; expected"
                f" {', '.join(LETTERS[: len(value)])}"
            )
        value = [value[letter] for letter in LETTERS[: len(value)]]
    if not isinstance(value, (list, tuple)) or not 2 <= len(value) <= len(LETTERS):
        raise ValueError(
            f"options are {value!r}; expected 2 to {len(LETTERS)} texts, as a list or by letter"
        )
    for letter, text in zip(LETTERS, value, strict=False):
        if text is None or not str(text).strip():
            raise ValueError(f'option "{letter}" is empty; every option needs text')
    return tuple(map(str, value))


def find_answer(value: object, options: tuple[str, ...]) -> int:
    """A letter, an option's exact text, or a 0-based index -> index."""
    if isinstance(value, str):
        text = value.strip()
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
    if answer is not None and not 0 <= answer < len(options):
        raise ValueError(
            f"answer is option {answer} (from 0) of {len(options)}; it must be one of the options"
        )


def take_columns(record: dict, entry: DataEntry) -> dict:
    """Rename by the entry's column map: {our field: the file's column}."""
    taken = dict(record)
    for field, column in entry.columns.items():
        names = [column] if isinstance(column, str) else column
        missing = [name for name in names if name not in record]
        if missing:
            raise ValueError(
                f'columns.{field} names "{missing[0]}"; the row has {", ".join(map(str, record))}'
            )
        taken[field] = (
            record[column] if isinstance(column, str) else [record[name] for name in column]
        )
    return taken


def read_context(record: dict) -> tuple[str, ...]:
    value = record.get("context")
    return (
        tuple(map(str, value))
        if isinstance(value, (list, tuple))
        else ((str(value),) if value else ())
    )
