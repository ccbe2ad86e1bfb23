"""Files and hub datasets become records: rows as they stand there, each with its place."""

from __future__ import annotations

import csv
import json
import re
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
    """The entry's file, or None where its path is a hub id.

    Raises:
        DataError: no such file, or a folder without one file for the split.
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
        found = [
            p for p in sorted(path.iterdir()) if p.suffix in suffixes and p.stem.lower() in names
        ]
        if not found:
            found = [
                p
                for p in sorted(path.iterdir())
                if p.suffix in suffixes and p.stem.lower().startswith(names)
            ]
        if len(found) != 1:
            listed = ", ".join(p.name for p in found) or "none"
            raise DataError(
                f"{entry.format}: folder {path} has {listed} for split {split}; name the file in"
                " `path`"
            )
        return found[0]
    if path.is_file():
        if path.suffix not in suffixes:
            raise DataError(
                f"{entry.format}: {path} ends in {path.suffix or 'nothing'}; expected"
                f" {' '.join(suffixes)}"
            )
        return path
    if (
        path.suffix in (*SUFFIXES, ".txt")
        or entry.path.startswith((".", "/", "~"))
        or entry.path.count("/") != 1
    ):
        raise DataError(
            f"{entry.format}: no file or folder {entry.path}; give an existing one or a hub id"
            " (owner/name)"
        )
    return None


def read_records(entry: DataEntry, split: str) -> tuple[str, list[tuple[str, dict]]]:
    """All records of an entry -> (name of the file or hub dataset, [(source, record)])."""
    path = locate_file(entry, split)
    if path is None:
        hub, subset = find_format(entry.format).hub or (None, None)
        hub = entry.path or hub
        subset = entry.subset or subset
        return hub, read_hub(hub, subset, split, entry.revision)
    name = path.name
    try:
        if path.suffix == ".jsonl":
            return name, read_json_lines(path)
        if path.suffix == ".json":
            return name, read_json(path)
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                return name, [
                    (f"{name} row {i}", row) for i, row in enumerate(csv.DictReader(file), 1)
                ]
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return name, [
                (f"{name} row {i}", r)
                for i, r in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
            ]
        return name, [
            (f"{name} passage {i}", {"text": t})
            for i, t in enumerate(split_text(path.read_text("utf-8")), 1)
        ]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{entry.format}: {name} is not UTF-8 text (byte {error.start}); convert the file"
        ) from None
    except OSError as error:
        raise DataError(f"{entry.format}: cannot read {path}: {error.strerror or error}") from None
    except (csv.Error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{entry.format}: {name} is not a valid {path.suffix} file: {error}"
        ) from None


def read_json_lines(path: Path) -> list[tuple[str, dict]]:
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            source = f"{path.name} line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{source}: not valid JSON ({error.msg} at column {error.colno}); mend the line"
                ) from None
            if not isinstance(record, dict):
                raise DataError(f"{source}: expected an object, got {type(record).__name__}")
            records.append((source, record))
    return records


def read_json(path: Path) -> list[tuple[str, dict]]:
    """A list of objects, or PubMedQA's original {id: object}."""
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
    return [(f"{path.name} row {i}", row) for i, row in enumerate(tree, 1)]


def read_hub(
    hub: str, subset: str | None, split: str, revision: str | None
) -> list[tuple[str, dict]]:
    import datasets

    try:
        table = datasets.load_dataset(hub, subset, split=split, revision=revision)
    # the library raises a dozen unrelated types for one mistake of the user
    except Exception as error:  # noqa: BLE001
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"hub dataset {hub} (subset {subset}, split {split}) cannot be loaded: {reason}"
        ) from None
    return [(f"{hub} {split} row {i}", dict(row)) for i, row in enumerate(table, 1)]


def split_text(text: str, characters: int = 2_000) -> list[str]:
    """Paragraphs joined up to about `characters`, so that a book becomes rows."""
    passages = []
    current = ""
    for paragraph in re.split(r"\n\s*\n", text):
        if current and len(current) + len(paragraph) > characters:
            passages.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
    return [*passages, current] if current.strip() else passages
