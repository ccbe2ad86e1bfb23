"""Write files that are never half written, and check before any work that they can be written."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medqlora.core.errors import RunError
from medqlora.core.reading import expand_path

LONGEST_NAME = 200  # Most file systems take 255 bytes, and a file that is written aside needs more.
PICTURES = (".png", ".svg", ".pdf")
MANIFEST = "manifest.json"
# The name of a file that write_atomic has not finished. Older versions put a process id in the
# place of the random part.
UNFINISHED = re.compile(r"\..+\.[0-9a-f]+\.tmp", re.DOTALL)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file as a whole: a kill leaves the old file or the new one, never a part of it.

    Raises:
        RunError: The disk refuses.
    """
    # os.replace is atomic within one file system only, so the file aside lies in the same folder.
    # The random part keeps apart processes that write the same file, on any machines.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
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
    expand_path(path, flag)  # A name that is too long would end path.exists() with an OSError.
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise RunError(f"{flag} {str(path)[:80]}…: the name is too long; give a shorter one")
    if path.exists():
        raise RunError(f"{flag} {path} exists; give a new file name")
    if not path.parent.is_dir():
        raise RunError(f"{flag} {path}: no folder {path.parent}; make it first")
    try:
        # Only a file that is really made shows that one can be: root may write anywhere by its
        # rights, but not in /proc or on a disk that is read-only.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".medqlora."):
            pass
    except OSError as error:
        raise RunError(
            f"{flag} {path}: folder {path.parent} cannot be written to ({error.strerror}); give"
            " another"
        ) from None


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


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write the size and hash of every file in a folder to its manifest.json.

    Args:
        folder: The folder, with all its files.
        facts: Further entries of the manifest.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.iterdir())
    }
    tree = {**facts, "files": files}
    (folder / MANIFEST).write_text(json.dumps(tree, indent=2), encoding="utf-8")


def find_problem(folder: Path, names: Iterable[str] = (), **facts: Any) -> str | None:
    """Say what is wrong with a folder of write_manifest.

    Args:
        folder: The folder.
        names: Files that the manifest must list.
        facts: Entries that the manifest must have.

    Returns:
        None where every file is as the manifest says.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        for name, recorded in files.items():
            size = (folder / name).stat().st_size
            if size != recorded["bytes"]:
                return f"{name} has {size} bytes, not {recorded['bytes']}"
            if hash_file(folder / name) != recorded["sha256"]:
                return f"{name} does not have its recorded hash"
        missing = [name for name in names if name not in files]
        if missing:
            return f"{MANIFEST} does not list {missing[0]}"
        for key, value in facts.items():
            if manifest[key] != value:
                return f"{MANIFEST} has another {key}"
    # A manifest that is JSON of another form raises the last four.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def write_checked(path: Path, tree: dict[str, Any]) -> None:
    """Write a JSON object with a hash of its content, for read_checked."""
    write_json(path, tree | {"sha256": hash_json(tree)})


def read_checked(path: Path) -> dict[str, Any] | None:
    """Return the object that write_checked wrote, or None where the file holds something else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        recorded = tree.pop("sha256")
        return tree if recorded == hash_json(tree) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, as far as the system allows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


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
