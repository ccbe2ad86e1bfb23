"""JSON without what Python's reader passes over: a repeated key, NaN, half a surrogate pair."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

# An escape such as \ud800 gives a character that no file can hold.
SURROGATE = re.compile("[\ud800-\udfff]")


def refuse_repeated_keys(pairs: list[tuple[str, object]]) -> dict:
    """Return an object of JSON; json.loads would keep the last of two equal keys without a word."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [key for key, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'the key "{repeated}" stands twice in one object')
    return tree


def refuse_constant(name: str) -> NoReturn:
    """Refuse NaN, Infinity and -Infinity, which Python reads and JSON does not have."""
    raise ValueError(f"{name} is no number")


def read_finite(text: str) -> float:
    """Return a number; Python reads 1e999 as infinity."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is larger than any number of a computer")
    return number


# json.loads would make a decoder for each text.
STRICT = json.JSONDecoder(
    object_pairs_hook=refuse_repeated_keys, parse_constant=refuse_constant, parse_float=read_finite
)
WITH_NAN = json.JSONDecoder(object_pairs_hook=refuse_repeated_keys)


def parse_json(text: str, nan: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        text: The text.
        nan: Whether NaN and Infinity are read. pandas writes NaN for a cell that is missing.

    Raises:
        ValueError: The text is not valid, an object has a key twice, a number is not finite, values
            are nested too deeply, or a text holds half a surrogate pair. The message is one line
            without the place.
    """
    try:
        value = (WITH_NAN if nan else STRICT).decode(text)
        # Only an escape can give such a character, so most texts need no second look.
        if "\\u" in text and SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            raise ValueError("not valid JSON (half of a surrogate pair, such as \\ud800)")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text.strip() else ""
        raise ValueError(f"not valid JSON ({error.msg} at {line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("not valid JSON (values are nested too deeply)") from None
    # Python refuses whole numbers of over 4,300 digits, with advice for programmers.
    except ValueError as error:
        if "digits" in str(error):
            raise ValueError("not valid JSON (a number of thousands of digits)") from None
        raise
    return value
