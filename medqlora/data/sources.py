"""Read files and hub datasets into records.

A record is a row as the file holds it. It comes with its source: the file and the line or row.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from medqlora.core.config import DataEntry
from medqlora.data.examples import DataError
from medqlora.data.formats.registry import find_format

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def locate_file(entry: DataEntry, split: str) -> Path | None:
    """Return the entry's file, or None where its path is a hub id.

    In a folder, the file of a split is the one that has one of the split's names (see SPLIT_NAMES),
    or else the one whose name begins with one of them.

    Raises:
        DataError: There is no such file, or a folder does not hold exactly one for the split.
    """
    if entry.path is None:
        if find_format(entry.format).hub is None:
            raise DataError(f"{entry.format}: no path; give a file, folder or hub id with `path`")
        return None
    path = Path(entry.path).expanduser()
    reads_passages = find_format(entry.format).scoring == "perplexity"
    suffixes = (*SUFFIXES, ".txt") if reads_passages else SUFFIXES
    if path.is_dir():
        names = SPLIT_NAMES.get(split, (split,))
        files = [file for file in sorted(path.iterdir()) if file.suffix in suffixes]
        # Exact names go first, because train_extra.jsonl also begins with train.
        candidates = [file for file in files if file.stem.lower() in names]
        if not candidates:
            candidates = [file for file in files if file.stem.lower().startswith(names)]
        if len(candidates) != 1:
            listed = ", ".join(file.name for file in candidates) or "none"
            raise DataError(
                f"{entry.format}: folder {path} has {listed} for split {split}; name the file in"
                " `path`"
            )
        return candidates[0]
    if path.is_file():
        if path.suffix not in suffixes:
            raise DataError(
                f"{entry.format}: {path} ends in {path.suffix or 'nothing'}; expected"
                f" {' '.join(suffixes)}"
            )
        return path
    # A misspelt file name must fail here. Asked of the hub, it would fail late and for another
    # reason.
    looks_like_a_file = path.suffix in (*SUFFIXES, ".txt") or entry.path.startswith((".", "/", "~"))
    if looks_like_a_file or entry.path.count("/") != 1:
        raise DataError(
            f"{entry.format}: no file or folder {entry.path}; give an existing one or a hub id"
            " (owner/name)"
        )
    return None


def read_records(entry: DataEntry, split: str) -> tuple[str, list[tuple[str, dict]]]:
    """Read all records of an entry.

    Returns:
        The name of the file or hub dataset, and a (source, record) for each record.

    Raises:
        DataError: The file or dataset cannot be read.
    """
    path = locate_file(entry, split)
    if path is None:
        hub, subset = find_format(entry.format).hub or (None, None)
        hub = entry.path or hub
        subset = entry.subset or subset
        return hub, read_hub(hub, subset, split, entry.revision)
    name = path.name
    try:
        return name, READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{entry.format}: {name} is not UTF-8 text (byte {error.start}); convert the file"
        ) from None
    except OSError as error:
        raise DataError(f"{entry.format}: cannot read {path}: {error.strerror or error}") from None
    except (csv.Error, ValueError) as error:
        # A DataError is a ValueError too, and it already says file and line.
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{entry.format}: {name} is not a valid {path.suffix} file: {error}"
        ) from None


def read_json_lines(path: Path) -> list[tuple[str, dict]]:
    """Read one object per line; empty lines are skipped."""
    records = []
    with path.open(encoding="utf-8") as file:
        # A file is divided at line ends alone. str.splitlines would also divide at U+2028, which
        # JSON allows inside a text.
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            source = f"{path.name} line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{source}: not valid JSON ({error.msg} at column {error.colno});"
                    " correct the line"
                ) from None
            if not isinstance(record, dict):
                raise DataError(f"{source}: expected an object, got {type(record).__name__}")
            records.append((source, record))
    return records


def read_json(path: Path) -> list[tuple[str, dict]]:
    """Read a list of objects, or an object of objects whose keys are ids (PubMedQA's form)."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path.name} line {error.lineno}: not valid JSON ({error.msg}); a file of one object"
            " per line is .jsonl"
        ) from None
    if isinstance(tree, dict) and tree and all(isinstance(value, dict) for value in tree.values()):
        return [(f"{path.name} key {key}", {"id": key, **value}) for key, value in tree.items()]
    if not isinstance(tree, list) or not all(isinstance(row, dict) for row in tree):
        raise DataError(f"{path.name}: expected a list of objects or an object of objects")
    return number_rows(path.name, tree)


def read_csv(path: Path) -> list[tuple[str, dict]]:
    """Read a table whose first line names the columns."""
    # Spreadsheet programs begin UTF-8 files with a byte order mark, which "utf-8-sig" skips.
    # The csv module itself must see the line ends, because a quoted field may hold some.
    with path.open(encoding="utf-8-sig", newline="") as file:
        return number_rows(path.name, csv.DictReader(file))


def read_parquet(path: Path) -> list[tuple[str, dict]]:
    """Read a Parquet table."""
    import pyarrow.parquet

    return number_rows(path.name, pyarrow.parquet.read_table(path).to_pylist())


def read_passages(path: Path) -> list[tuple[str, dict]]:
    """Read plain text as passages."""
    passages = split_text(path.read_text("utf-8"))
    return [(f"{path.name} passage {i}", {"text": text}) for i, text in enumerate(passages, 1)]


def number_rows(name: str, rows: Iterable[dict]) -> list[tuple[str, dict]]:
    """Return each row with its source, counted from 1."""
    return [(f"{name} row {i}", row) for i, row in enumerate(rows, 1)]


READERS: dict[str, Callable[[Path], list[tuple[str, dict]]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_passages,
}


def read_hub(
    hub: str, subset: str | None, split: str, revision: str | None
) -> list[tuple[str, dict]]:
    """Load one split of a hub dataset.

    Raises:
        DataError: The dataset cannot be loaded.
    """
    import datasets

    try:
        table = datasets.load_dataset(hub, subset, split=split, revision=revision)
    # An unknown dataset, subset, split or revision, a private dataset and a lost connection end in
    # unrelated types (DatasetNotFoundError, ValueError, OSError, errors of httpx and fsspec). Each
    # of them means that the user cannot have this dataset, and the message keeps the reason.
    except Exception as error:  # noqa: BLE001
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"hub dataset {hub} (subset {subset}, split {split}) cannot be loaded: {reason}"
        ) from None
    return number_rows(f"{hub} {split}", map(dict, table))


def split_text(text: str, characters: int = 2_000) -> list[str]:
    """Split a text at empty lines and join paragraphs to passages.

    Args:
        text: The text.
        characters: A passage is closed before it would grow beyond this many characters. A longer
            paragraph is a passage of its own.
    """
    passages = []
    current = ""
    for paragraph in re.split(r"\n\s*\n", text):
        if current and len(current) + len(paragraph) > characters:
            passages.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
    return [*passages, current] if current.strip() else passages
