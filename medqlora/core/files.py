"""Files that survive a kill, and checks before anything is written."""

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
    """Write aside, flush to disk, rename: the file is the old one or the new one, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place"
        ) from None


def check_new(path: Path | None, flag: str = "--output") -> None:
    """Raises RunError where a file to be written exists, or its folder does not: before any work,
    nothing is written over.
    """
    if path is not None and path.exists():
        raise RunError(f"{flag} {path} exists; give a new file name")
    if path is not None and not path.parent.is_dir():
        raise RunError(f"{flag} {path}: no folder {path.parent}; make it first")
    if path is not None and not os.access(path.parent, os.W_OK):
        raise RunError(f"{flag} {path}: folder {path.parent} cannot be written to; give another")


def check_picture(path: Path | None) -> None:
    """Raises RunError where --plot names a file that exists, a format that is not drawn, or
    matplotlib is missing.
    """
    if path is None:
        return
    check_new(path, "--plot")
    if path.suffix not in PICTURES:
        raise RunError(f"--plot {path}: expected a name that ends in {', '.join(PICTURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise RunError("--plot needs matplotlib; pip install 'medqlora[bench]', or leave it out")


def write_json(path: Path, tree: Any) -> None:
    write_atomic(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: list[dict]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_line(path: Path, row: dict) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; free space and continue with --resume"
        ) from None


def read_lines(path: Path) -> list[dict]:
    """All complete lines of an append-only log; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def check_disk(folder: Path, needed: int, purpose: str) -> None:
    """Raises RunError where the folder's disk has less than `needed` bytes."""
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RunError(
            f"--output_dir {folder}: {purpose} needs {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f}"
            " MiB are free; free space, choose another folder, or lower training.keep_checkpoints"
        )


def hash_json(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
