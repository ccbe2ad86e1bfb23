"""Read the options of a multiple-choice question in the layouts that people publish.

They raise ValueError where the options cannot be used; see fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from medqlora.core.config import DataEntry
from medqlora.data.examples import LETTERS
from medqlora.data.formats.fields import (
    is_blank,
    list_names,
    looks_like_literal,
    parse_literal,
    to_text,
)

# An option that is an object has its letter under one of these keys and its text under another.
LETTER_KEYS = ("letter", "label", "key", "id")
TEXT_KEYS = ("text", "content", "value", "option")
# A column of one option: A, a, opa, optionA, option_a, "Option A", choice_a; or with a number.
OPTION_COLUMN = re.compile(
    r"(?P<stem>op|opt|option|choice|ending)?[ _-]?(?:(?P<letter>[a-j])|(?P<number>\d))",
    re.IGNORECASE,
)


def need_option(record: Mapping, key: str) -> str:
    """Return the text of one option that stands in a field of its own.

    Raises:
        ValueError: The field is missing or blank, or no text.
    """
    value = record.get(key)
    if is_blank(value):
        raise ValueError(f'option "{key}" is empty; every option needs text')
    return to_text(value, f'option "{key}"')


def find_options(record: Mapping, entry: DataEntry) -> tuple[str, ...]:
    """Return the options of a record of a user's own.

    They stand in the field "options" or "choices", or in one column each.

    Raises:
        ValueError: There are none, or they cannot be used.
    """
    if isinstance(entry.columns.get("options"), list):
        return read_columns(record["options"])
    for name in ("options", "choices"):
        if name in record:
            return read_options(record[name])
    columns = find_option_columns(record)
    if columns:
        return read_columns([record[name] for name in columns])
    raise ValueError(
        f'the row has no "options"; it has {list_names(record)}; name the column, or the list of'
        " columns, with columns"
    )


def find_option_columns(record: Mapping) -> list[str]:
    """Return the columns that hold one option each, in order, or an empty list.

    Their names differ only in a letter from A, or in a number from 0 or 1.

    Raises:
        ValueError: Two columns have the same letter, or two groups of columns have such names.
    """
    groups: dict[tuple, dict[int, str]] = {}
    for name in record:
        found = OPTION_COLUMN.fullmatch(name) if isinstance(name, str) else None
        # A number alone is no name of an option.
        if found is None or (found["number"] and not found["stem"]):
            continue
        letter = found["letter"]
        kind = ((found["stem"] or "").lower(), letter is None)
        number = int(found["number"]) if letter is None else LETTERS.index(letter.upper())
        other = groups.setdefault(kind, {}).setdefault(number, name)
        if other != name:
            raise ValueError(f'the columns "{other}" and "{name}" name the same option')
    complete = []
    for numbered in groups.values():
        first = min(numbered)
        consecutive = sorted(numbered) == list(range(first, first + len(numbered)))
        if len(numbered) > 1 and first <= 1 and consecutive:
            complete.append([numbered[number] for number in sorted(numbered)])
    if len(complete) > 1:
        raise ValueError(
            f"the options may stand in {', '.join(complete[0])} or in {', '.join(complete[1])};"
            " name the columns with columns"
        )
    return complete[0] if complete else []


def read_columns(cells: list) -> tuple[str, ...]:
    """Return the options of a row that has one cell for each; blank cells at the end are none."""
    last = max((i for i, cell in enumerate(cells) if not is_blank(cell)), default=-1)
    return read_list(cells[: last + 1])


def read_options(value: object) -> tuple[str, ...]:
    """Return the texts of the options in the order of their letters.

    Args:
        value: A list of texts, {"A": text, ...}, a list of objects that each have a letter and a
            text (see LETTER_KEYS, TEXT_KEYS), or {"label": letters, "text": texts}. A string is
            read as JSON or as Python's own form of one of these, which pandas writes.

    Raises:
        ValueError: The value has none of these forms, or an option is blank or no text.
    """
    if looks_like_literal(value):
        value = parse_literal(value, "options are")
    if isinstance(value, dict):
        letters = find_key(value, LETTER_KEYS)
        texts = find_key(value, TEXT_KEYS)
        if letters and texts and isinstance(value[texts], (list, tuple)):
            value = order_by_letter(pair_up(value[letters], value[texts]))
        else:
            value = order_by_letter(list(value.items()))
    elif isinstance(value, (list, tuple)) and value and all(isinstance(o, dict) for o in value):
        value = read_objects(value)
    return read_list(value)


def read_list(value: object) -> tuple[str, ...]:
    """Return options that stand in a list, in its order; None and NaN at the end are no options.

    Raises:
        ValueError: It is no list of 2 to 10 texts.
    """
    if isinstance(value, (list, tuple)):
        value = list(value)
        while value and not isinstance(value[-1], str) and is_blank(value[-1]):
            value.pop()
    if not isinstance(value, (list, tuple)) or not 2 <= len(value) <= len(LETTERS):
        raise ValueError(
            f"options are {value!r}; expected 2 to {len(LETTERS)} texts, as a list or by letter"
        )
    options = []
    for letter, text in zip(LETTERS, value, strict=False):
        if is_blank(text):
            raise ValueError(f'option "{letter}" is empty; every option needs text')
        options.append(to_text(text, f'option "{letter}"'))
    return tuple(options)


def find_key(value: dict, names: tuple[str, ...]) -> str | None:
    """Return the first of the names that is a key, in lower case."""
    return next((name for name in names if name in value), None)


def read_objects(objects: list[dict]) -> list:
    """Return the texts of options that are objects with a text, and a letter or none.

    Raises:
        ValueError: An object has no text, or only some have a letter.
    """
    pairs = []
    for item in objects:
        text = find_key(item, TEXT_KEYS)
        letter = find_key(item, LETTER_KEYS)
        # {"letter": "A", "label": "Liver"} has its text under a key that elsewhere holds letters.
        if text is None and "letter" in item and "label" in item:
            text = "label"
        if text is None:
            raise ValueError(
                f"an option has {list_names(item)}; expected its letter under one of"
                f" {', '.join(LETTER_KEYS)} and its text under one of {', '.join(TEXT_KEYS)}"
            )
        pairs.append((item[letter] if letter else None, item[text]))
    if all(letter is None for letter, _ in pairs):
        return [text for _, text in pairs]
    return order_by_letter(pairs)


def pair_up(letters: object, texts: list) -> list[tuple]:
    """Return letters with their texts.

    Raises:
        ValueError: There are not as many of the one as of the other.
    """
    if not isinstance(letters, (list, tuple)) or len(letters) != len(texts):
        raise ValueError(f"options have {letters!r} as letters for {len(texts)} texts")
    return list(zip(letters, texts, strict=True))


def order_by_letter(pairs: list[tuple]) -> list:
    """Return the texts of (letter, text) in the order of their letters; blank texts are left out.

    Raises:
        ValueError: The letters are not those from A on, or numbers from 0 or 1, each once.
    """
    # Arrow gives all records the same keys, so a question without an option E has None there.
    present = {}
    for letter, text in pairs:
        letter = name_option(letter)
        if letter in present:
            raise ValueError(f'two options have the letter "{letter}"')
        if not is_blank(text):
            present[letter] = text
    expected = list(LETTERS[: len(present)])
    if all(letter.isdecimal() for letter in present):
        first = min(map(int, present), default=0)
        if first <= 1:
            expected = [str(first + i) for i in range(len(present))]
    # A gap in the letters would move the options behind it to other letters.
    if set(present) != set(expected):
        raise ValueError(
            f"options are lettered {', '.join(present)}; expected {', '.join(expected)}, each with"
            " text"
        )
    return [present[letter] for letter in expected]


def name_option(letter: object) -> str:
    """Return the letter or number of an option that is called "a", "Option B" or "option1"."""
    found = OPTION_COLUMN.fullmatch(str(letter).strip())
    return (found["letter"] or found["number"] if found else str(letter)).upper()


def is_multiple_choice(record: Mapping) -> bool:
    """Whether a record has options, as a file of multiple-choice questions has."""
    lowered = {str(name).lower() for name in record}
    return bool({"options", "choices", "opa"} & lowered) or len(find_option_columns(record)) > 2
