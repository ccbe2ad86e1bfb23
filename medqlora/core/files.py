"""Write files that are never half written, and check before any work that they can be written."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

from medqlora.core.errors import RunError

PICTURES = (".png", ".svg", ".pdf")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file as a whole: a kill leaves the old file or the new one, never a part of it.

    Raises:
        RunError: The disk refuses.
    """
    # os.replace is atomic within one file system only, so the file aside lies in the same folder.
    # The process id keeps apart processes of one machine that write the same file.
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            # The content must be on disk before the name points to it. After a power failure the
            # name could otherwise stand for an empty file.
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place"
        ) from None


def check_new(path: Path | None, flag: str = "--output") -> None:
    """Check before any work that a new file can be written; None is no file and passes.

    Args:
        path: The file.
        flag: The flag that named the file, for messages.

    Raises:
        RunError: The file exists, its folder does not, or the folder cannot be written to.
    """
    if path is None:
        return
    if path.exists():
        raise RunError(f"{flag} {path} exists; give a new file name")
    if not path.parent.is_dir():
        raise RunError(f"{flag} {path}: no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise RunError(f"{flag} {path}: folder {path.parent} cannot be written to; give another")


def check_picture(path: Path | None) -> None:
    """Check before any work that the picture of --plot can be written.

    Raises:
        RunError: The file cannot be written, its format is unknown, or matplotlib is missing.
    """
    if path is None:
        return
    check_new(path, "--plot")
    if path.suffix not in PICTURES:
        raise RunError(f"--plot {path}: expected a name that ends in {', '.join(PICTURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise RunError("--plot needs matplotlib; pip install -e '.[bench]', or leave it out")


def write_json(path: Path, tree: Any) -> None:
    """Write one JSON document; see write_atomic."""
    write_atomic(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line; see write_atomic."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_line(path: Path, row: dict) -> None:
    """Append one JSON object to a log.

    Raises:
        RunError: The disk refuses.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            # Without ensure_ascii=False a line holds ASCII alone, and json.dumps escapes every line
            # break. Exactly one line is written, and a kill can cut short the last line alone.
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; free space and continue with --resume"
        ) from None


def read_lines(path: Path) -> list[dict]:
    """Return the rows of a log; a file that does not exist has none.

    A line that is no complete JSON, such as one that a kill cut short, is left out; so is one that
    Python cannot hold, as a number of thousands of digits.
    """
    if not path.is_file():
        return []
    rows = []
    # str.splitlines would also divide at U+2028, which JSON allows inside a text.
    for line in path.read_text(encoding="utf-8").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return rows


def check_disk(folder: Path, needed: int, purpose: str) -> None:
    """Check that the disk of the output folder has enough space.

    Args:
        folder: The output folder, which need not exist yet.
        needed: The bytes that are needed.
        purpose: What they are needed for, for the message.

    Raises:
        RunError: Less is free.
    """
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RunError(
            f"--output_dir {folder}: {purpose} needs {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f}"
            " MiB are free; free space, choose another folder, or lower training.keep_checkpoints"
        )


def hash_json(tree: Any) -> str:
    """Return the SHA-256 of a JSON document, whatever the order of its keys."""
    # Folders of the cache are named by this hash. Another form of the text would orphan all of
    # them.
    text = json.dumps(tree, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
