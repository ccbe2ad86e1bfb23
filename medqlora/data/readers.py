"""Read files of records: JSON, JSON lines, CSV, Parquet and plain text.

Each reader takes a file and what the caller knows of it, and returns records with their sources.
"""

from __future__ import annotations

import codecs
import csv
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from medqlora.core.json_reading import parse_json
from medqlora.data.examples import DataError
from medqlora.data.formats.fields import MISSING_CELL, PLACE

Records = list[tuple[str, dict]]
DELIMITERS = ",;\t"
# The mark of UTF-32 begins with that of UTF-16, so it stands first.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
BINARY = {
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a zip archive, as .docx and .epub files are",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x1f\x8b": "a gzip archive",
}


@dataclass(frozen=True)
class Wanted:
    """What a reader is told of the file.

    Args:
        subset: The name of the wanted set in a file of several sets; None if the user names none.
        splits: Names of the wanted split, which a set may have too.
        header: The columns of a table that has no line with their names (see Format.header).
    """

    subset: str | None = None
    splits: tuple[str, ...] = ()
    header: tuple[str, ...] = ()


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises:
        DataError: The file is no text.
        UnicodeDecodeError: It is text in another encoding, or no text.
    """
    with path.open("rb") as file:
        beginning = file.read(4)
    marked = [name for mark, name in MARKS.items() if beginning.startswith(mark)]
    text = path.read_text(encoding=marked[0] if marked else "utf-8-sig")
    # Zero bytes are valid UTF-8, but no text has them.
    if "\0" in text:
        raise DataError(f"{path.name} is not UTF-8 text: {explain_bytes(path)}")
    return text


def explain_bytes(path: Path) -> str:
    """Say what a file is that holds no UTF-8 text, and what to do with it."""
    with path.open("rb") as file:
        beginning = file.read(4_096)
    for magic, name in BINARY.items():
        if beginning.startswith(magic):
            return f"it is {name}; convert it to text, or take it away"
    # Every second byte of English text in UTF-16 is zero.
    zeros = [beginning[offset::2].count(0) for offset in (0, 1)]
    if max(zeros) * 4 > len(beginning) and min(zeros) * 4 < max(zeros):
        encoding = "UTF-16BE" if zeros[0] > zeros[1] else "UTF-16LE"
        return (
            f"it looks like {encoding} without a byte order mark; convert it with iconv -f"
            f" {encoding} -t UTF-8, or take it away if it is a binary file"
        )
    if max(zeros):
        return "it is a binary file; take it away"
    return (
        "convert it from its encoding, e.g. with iconv -f ISO-8859-1 -t UTF-8, or take it away if"
        " it is a binary file"
    )


def read_json_lines(path: Path, wanted: Wanted) -> Records:
    """Read one object per line; empty lines are skipped."""
    with path.open(encoding="utf-8-sig") as file:
        beginning = file.readline().lstrip()[:1]
        file.seek(0)
        # A list that was named .jsonl is read as the list that it is.
        if beginning == "[":
            return read_tree(path, decode(file.read(), path.name), wanted)
        # A file is divided at line ends alone. str.splitlines would also divide at U+2028, which
        # JSON allows inside a text.
        return parse_json_lines(path, file)


def parse_json_lines(path: Path, lines: Iterable[str]) -> Records:
    """Return the objects of lines that hold one each."""
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        source = f"{path.name} line {number}"
        record = decode(line, source)
        if not isinstance(record, dict):
            raise DataError(f"{source}: expected an object, got {type(record).__name__}")
        records.append((source, record))
    return records


def decode(text: str, source: str) -> object:
    """Return the value of a JSON text.

    Args:
        text: The text.
        source: The file, or the line where the text is one, for messages.

    Raises:
        DataError: parse_json refuses the text.
    """
    try:
        return parse_json(text, nan=True)
    except ValueError as error:
        raise DataError(f"{source}: {error}; correct it") from None


def read_json(path: Path, wanted: Wanted) -> Records:
    """Read a list of objects, an object of objects whose keys are ids, or one object per line.

    A file of several sets, each of them one of the first two, is read where one set is wanted.
    """
    text = read_text(path)
    first_line = text.lstrip().partition("\n")[0]
    # JSON lines are often named .json. Their first line is a whole object.
    if first_line.startswith("{") and first_line.rstrip().endswith("}"):
        try:
            tree = parse_json(first_line, nan=True)
        except ValueError:
            tree = None
        if tree is not None and text.strip() != first_line.strip() and wanted.subset is None:
            return parse_json_lines(path, text.split("\n"))
    return read_tree(path, decode(text, path.name), wanted)


def read_tree(path: Path, tree: object, wanted: Wanted) -> Records:
    """Return the records of a JSON document.

    Raises:
        DataError: It has none of the forms of read_json, or several sets and none is named.
    """
    sets = {}
    if isinstance(tree, dict):
        sets = {name: value for name, value in tree.items() if is_set(value)}
    if sets:
        return read_tree(path, choose_set(path, sets, wanted), Wanted())
    if wanted.subset is not None:
        raise DataError(f"{path.name} has no named sets; leave subset {wanted.subset} out")
    if is_list_of_objects(tree):
        return number_rows(path.name, tree)
    if isinstance(tree, dict):
        if tree and all(isinstance(value, dict) for value in tree.values()):
            return [(f"{path.name} key {key}", {"id": key, **row}) for key, row in tree.items()]
        # A single object may be the only row of its file.
        if is_row(tree):
            return number_rows(path.name, [tree])
    raise DataError(f"{path.name}: expected a list of objects or an object of objects")


def choose_set(path: Path, sets: dict, wanted: Wanted) -> object:
    """Return the set of a file that is named, that has the split's name, or that is the only one.

    Raises:
        DataError: None of them is.
    """
    if wanted.subset in sets:
        return sets[wanted.subset]
    named = [name for name in sets if name in wanted.splits]
    if wanted.subset is None and len(named) == 1:
        return sets[named[0]]
    # Beside the only set there may be a version, a licence or the like.
    if wanted.subset is None and len(sets) == 1:
        return next(iter(sets.values()))
    raise DataError(f"{path.name} holds the sets {', '.join(map(str, sets))}; name one with subset")


def is_list_of_objects(value: object) -> bool:
    """Whether a value is a list of objects, maybe an empty one."""
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def is_set(value: object) -> bool:
    """Whether a value holds rows: a list of objects, or an object of rows."""
    if isinstance(value, dict):
        return bool(value) and all(is_row(row) for row in value.values())
    return bool(value) and is_list_of_objects(value)


def is_row(value: object) -> bool:
    """Whether a value is an object with at least one field that is neither list nor object."""
    return isinstance(value, dict) and any(
        not isinstance(field, (list, dict)) for field in value.values()
    )


def read_csv(path: Path, wanted: Wanted) -> Records:
    """Read a table whose first line names the columns; they end at a comma, semicolon or tab.

    Raises:
        DataError: Two columns have the same name, or a quoted cell has no end.
    """
    # The library's own bound of 131,072 characters would refuse long cells.
    csv.field_size_limit(sys.maxsize)
    # Spreadsheet programs begin UTF-8 files with a byte order mark, which "utf-8-sig" skips.
    # The csv module itself must see the line ends, because a quoted field may hold some.
    with path.open(encoding="utf-8-sig", newline="") as file:
        first_line = file.readline()
        file.seek(0)
        delimiter = max(DELIMITERS, key=first_line.count)
        # Only the strict mode refuses a quotation mark that is never closed, behind which all rows
        # would become one cell.
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        names = next(lines, [])
        records = []
        header = list(wanted.header)
        # The first line is a row already where it lacks the first and the last name. The others may
        # be letters of options, as answers are.
        if header and len(names) == len(header) and not {header[0], header[-1]} & set(names):
            records.append(make_record(header, names))
            names = header
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise DataError(
                f'{path.name}: two columns have the name "{repeated[0]}"; the first line must name'
                " each column once"
            )
        # A line without any cell is an empty line.
        try:
            records += [make_record(names, cells) for cells in lines if cells]
        except csv.Error as error:
            raise DataError(
                f"{path.name} line {lines.line_num}: {error}; close each quotation mark, and write"
                " one inside a quoted cell twice"
            ) from None
    return number_rows(path.name, records)


def make_record(names: list[str], cells: list[str]) -> dict:
    """Return the record of a row; check_cells refuses surplus and missing cells later."""
    record: dict = dict(zip(names, cells, strict=False))
    if len(cells) > len(names):
        record[None] = cells[len(names) :]
    for name in names[len(cells) :]:
        record[name] = MISSING_CELL
    return record


def read_parquet(path: Path, wanted: Wanted) -> Records:
    """Read a Parquet table."""
    import pyarrow.parquet

    return number_rows(path.name, pyarrow.parquet.read_table(path).to_pylist())


def read_lines(path: Path, field: str) -> Records:
    """Read a plain text whose lines are records of one field; empty lines are skipped."""
    # Only line ends divide a file, as in read_json_lines.
    lines = enumerate(read_text(path).split("\n"), 1)
    return [(f"{path.name} line {i}", {field: line.strip()}) for i, line in lines if line.strip()]


def read_book(path: Path, wanted: Wanted) -> Records:
    """Read plain text as passages, which together are one document."""
    passages = split_text(read_text(path))
    return [
        (f"{path.name} passage {i}", {"text": text, PLACE: (path.name, i)})
        for i, text in enumerate(passages, 1)
    ]


def number_rows(name: str, rows: Iterable[dict]) -> Records:
    """Return each row with its source, counted from 1."""
    return [(f"{name} row {i}", row) for i, row in enumerate(rows, 1)]


READERS: dict[str, Callable[[Path, Wanted], Records]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_book,
    ".md": read_book,
}


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
