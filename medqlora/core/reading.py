"""Read what a user names: paths that the system can look up, and files that hold a JSON object."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from medqlora.core.errors import RunError, UserError
from medqlora.core.json_reading import parse_json


def expand_path(path: str | Path, place: str) -> Path:
    """Return a path with `~` replaced; it need not exist.

    Args:
        path: What the user gave.
        place: The flag or key that named it, for messages.

    Raises:
        RunError: The system cannot look it up: no such user, a name that is too long, a symbolic
            link that leads to itself, or a folder that may not be read.
    """
    try:
        expanded = Path(path).expanduser()
        os.stat(expanded)
    # Whether a path must exist is a question of its use.
    except (FileNotFoundError, NotADirectoryError):
        pass
    # An unknown user is a RuntimeError, a NUL or a lone surrogate a ValueError.
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"{place} {shorten(path)}: no path that can be looked up ({reason}); give another"
        ) from None
    return expanded


def shorten(value: Any, length: int = 80) -> str:
    """Return a value from a user in one printable line of limited length."""
    text = str(value)
    if not text.isprintable():
        text = repr(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def read_object(
    path: Path, place: str, error: type[UserError] = RunError, infinite: bool = False
) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Args:
        path: The file.
        place: What the file belongs to, for messages.
        error: The class of errors.
        infinite: Whether the file may hold NaN and Infinity, which are no JSON. The configs of some
            models have them.

    Raises:
        UserError: The file cannot be read or holds something else than one whole JSON object.
    """
    try:
        tree = parse_json(path.read_text(encoding="utf-8"), nan=infinite)
    except (OSError, ValueError) as cause:
        reason = getattr(cause, "strerror", None) or shorten(cause)
        raise error(f"{place}: {path.name} cannot be read ({reason}); restore the file") from None
    if not isinstance(tree, dict):
        raise error(
            f"{place}: {path.name} holds a {type(tree).__name__}, expected an object; restore the"
            " file"
        )
    return tree


def check_types(
    tree: dict[str, Any], schema: type[BaseModel], place: str, error: type[UserError] = RunError
) -> None:
    """Refuse an object whose values have other types than a schema says.

    Args:
        tree: The object.
        schema: The types of its keys.
        place: What holds the object, for messages.
        error: The class of errors.

    Raises:
        UserError: The message names the first such key.
    """
    try:
        schema.model_validate(tree)
    except ValidationError as cause:
        problem = cause.errors()[0]
        key = shorten(".".join(map(str, problem["loc"])))
        value = "" if problem["type"] == "missing" else f" {shorten(problem['input'])}"
        raise error(f"{place} has {key}{value}: {problem['msg']}; restore the file") from None
