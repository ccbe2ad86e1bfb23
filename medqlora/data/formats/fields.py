"""Readers of single fields of a record, shared by the parsers of all datasets.

They raise ValueError where a field cannot be used. `read_entry` turns that into a DataError which
also names the file and the line. A value that is no text is refused by its type: turned into text,
a list or an object would be trained on as "['B']".
"""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import math
import tokenize
from collections.abc import Mapping

from medqlora.core.config import DataEntry
from medqlora.core.json_reading import parse_json
from medqlora.data.examples import Columns, Unanswered, Written

# read_csv puts this into the cells that a short row lacks.
MISSING_CELL = object()
# read_book puts the document of a passage and the passage's number under this key. It is no text,
# so no column of a file can have it.
PLACE = ("document", "number")
# These are the fields of the layouts for a user's own files.
FIELDS = {"id", "question", "options", "choices", "answer", "text"}
FIELDS |= {"subject", "topic", "context", "explanation"}


def is_blank(value: object) -> bool:
    """Whether a field holds nothing but blanks."""
    # pandas writes a missing value as NaN, the only value that differs from itself.
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def need_text(record: Mapping, key: str) -> str:
    """Return a text that every record must have.

    Raises:
        ValueError: The record has no such field, or it is blank or no text.
    """
    value = need_field(record, key)
    if not isinstance(value, str):
        raise ValueError(f'"{key}" is {describe_type(value)}; expected text')
    return value


def open_answer(record: Mapping, key: str) -> str | Unanswered:
    """Return the text of an open answer, which may also be a number, or what the record lacks.

    Raises:
        ValueError: The field is neither.
    """
    try:
        value = need_field(record, key)
    except ValueError as error:
        return Unanswered(str(error))
    return to_text(value, f'"{key}"')


def need_field(record: Mapping, key: str) -> object:
    """Return a field that is not blank.

    Raises:
        ValueError: The record has no such field, or it is blank.
    """
    if key not in record:
        raise ValueError(
            f'the row has no "{key}"; it has {list_names(record)}; name the column with columns'
        )
    if is_blank(record[key]):
        raise ValueError(f'"{key}" is empty; every row needs text there')
    return record[key]


def optional_text(record: Mapping, key: str) -> str | None:
    """Return a text, or None where it is missing, blank or the word "nan".

    Raises:
        ValueError: The field is no text.
    """
    value = record.get(key)
    # pandas writes a missing text as the word "nan".
    if is_blank(value) or (isinstance(value, str) and value.strip().lower() == "nan"):
        return None
    return need_text(record, key)


def optional_label(record: Mapping, key: str) -> str | None:
    """Return an id or the name of a subject, which may be a number, or None where it is missing.

    Raises:
        ValueError: The field is neither a text nor a number.
    """
    value = record.get(key)
    # pandas makes the whole numbers of a column with gaps floats.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return None if value != value else str(value)
    return optional_text(record, key)


def take_kept(record: Mapping, entry: DataEntry) -> Columns:
    """Return the columns of a record that the entry's `keep` names; a missing value is None.

    Raises:
        ValueError: A value is neither a text, a number nor a truth value.
    """
    kept = []
    for name in entry.keep:
        value = record.get(name)
        # JSON's own spelling is also what a CSV file holds.
        text = str(value).lower() if isinstance(value, bool) else optional_label(record, name)
        kept.append((name, text))
    return tuple(kept)


def to_text(value: object, name: str) -> str:
    """Return a text, or a number as it is written.

    Args:
        value: The value.
        name: What messages call it.

    Raises:
        ValueError: The value is neither, or a number that may have been written in two ways.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {describe_type(value)}; expected text")
    # pandas makes 2 to 2.0 where a column has gaps, so nobody knows which of the two it was.
    if isinstance(value, float) and value.is_integer():
        raise ValueError(f"{name} is the float {value}; write it as text, such as {int(value)}")
    return str(value)


def describe_type(value: object) -> str:
    """Return the type of a value with its beginning, for messages."""
    kinds = {dict: "an object", list: "a list", tuple: "a list", bool: "a truth value"}
    text = repr(value)
    shown = text if len(text) <= 60 else text[:57] + "..."
    return f"{kinds.get(type(value), f'of type {type(value).__name__}')} ({shown})"


def list_names(record: Mapping) -> str:
    """Return the names of a record's fields, for messages."""
    names = ", ".join(name for name in record if isinstance(name, str))
    return names if len(names) <= 200 else names[:197] + "..."


def check_cells(record: Mapping) -> None:
    """Raise ValueError where a row of a table has more or fewer cells than its header.

    A cell with a comma that is not quoted moves all cells behind it to other columns.
    """
    if None in record:
        surplus = len(record[None])
        columns = len(record) - 1
        raise ValueError(
            f"the row has {columns + surplus} cells, the header {columns}; quote cells that hold a"
            " comma"
        )
    missing = [name for name, value in record.items() if value is MISSING_CELL]
    if missing:
        raise ValueError(
            f"the row has {len(record) - len(missing)} cells, the header {len(record)}; it ends"
            f' before "{missing[0]}"'
        )


def looks_like_literal(value: object) -> bool:
    """Whether a text may be a list or an object, as pandas writes them into a table."""
    return isinstance(value, str) and value.strip()[:1] in ("[", "{")


def parse_literal(text: str, subject: str) -> object:
    """Return the value of a text in JSON, or in Python's form.

    Args:
        text: The text.
        subject: The beginning of the error message.

    Raises:
        ValueError: The text is neither.
    """
    text = text.strip()
    try:
        return parse_json(text, nan=True)
    except ValueError:
        pass
    problem = f"{subject} {text[:60]!r}, neither JSON nor a Python list"
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError):
        raise ValueError(problem) from None
    strings = [token.type == tokenize.STRING for token in tokens if token.type != tokenize.NL]
    # Python joins texts that only a blank separates, and numpy writes arrays in that way.
    if any(first and second for first, second in itertools.pairwise(strings)):
        raise ValueError(f"{problem} but a numpy array, whose texts nothing separates")
    return value


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


def written_answer(record: Mapping, field: str, text: str | None = None) -> Written | None:
    """Return an answer as the file writes it, or None where it is blank.

    Args:
        record: The record.
        field: The field of the answer. A list of one element stands for that element.
        text: The text of the right option, where the record gives it too.
    """
    value = record.get(field)
    if looks_like_literal(value):
        # A text such as "[sic]" stays a text.
        with contextlib.suppress(ValueError):
            value = parse_literal(value, field)
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    # An empty list of right answers is no answer, as null is.
    if is_blank(value) or (isinstance(value, (list, tuple)) and not value):
        return None
    return Written(value, text, field)


def check_answer(answer: int | None, options: tuple[str, ...]) -> None:
    """Raise ValueError where a known answer is not the index of an option."""
    # Python would take a negative index without a word and count it from the end.
    if answer is not None and not 0 <= answer < len(options):
        raise ValueError(
            f"answer is option {answer} (from 0) of {len(options)}; it must be one of the options"
        )


def take_columns(record: Mapping, entry: DataEntry) -> dict:
    """Add our fields to a record by the entry's column map {our field: the file's column}.

    A field that the record lacks is also found where its name has capitals.

    Raises:
        ValueError: The record lacks a column that the map names.
    """
    renamed = dict(record)
    for name, value in record.items():
        if isinstance(name, str) and name.lower() in FIELDS:
            renamed.setdefault(name.lower(), value)
    for field, column in entry.columns.items():
        names = [column] if isinstance(column, str) else column
        missing = [name for name in names if name not in record]
        if missing:
            raise ValueError(
                f'columns.{field} names "{missing[0]}"; the row has {list_names(record)}'
            )
        if isinstance(column, str):
            renamed[field] = record[column]
        else:
            renamed[field] = [record[name] for name in column]
    return renamed


def read_context(record: Mapping) -> tuple[str, ...]:
    """Return the passages of the field "context", which holds one text or a list of texts.

    Raises:
        ValueError: The field is neither.
    """
    value = record.get("context")
    if is_blank(value):
        return ()
    if looks_like_literal(value):
        # A text may begin with a bracket, as "[Letter to the editor]" does.
        with contextlib.suppress(ValueError):
            value = parse_literal(value, "context")
    passages = value if isinstance(value, (list, tuple)) else [value]
    for passage in passages:
        if not isinstance(passage, str):
            raise ValueError(f'"context" is {describe_type(passage)}; expected a text or texts')
    return tuple(passages)
