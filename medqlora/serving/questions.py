"""Read new questions: typed ones, and those of a file, whose answers are not needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from medqlora.core.config import DataEntry
from medqlora.data.examples import DataError, MultipleChoice, OpenAnswer
from medqlora.data.formats.custom import parse_mcq
from medqlora.data.formats.fields import (
    FIELDS,
    MISSING_CELL,
    check_cells,
    is_blank,
    need_text,
    optional_label,
    read_context,
    take_columns,
)
from medqlora.data.formats.options import find_option_columns, is_multiple_choice
from medqlora.data.formats.registry import FILE, FORMATS, Format
from medqlora.data.readers import read_text
from medqlora.data.reading import content_id
from medqlora.data.sources import read_records
from medqlora.serving.settings import AskedSettings

LINES = ".txt"  # The ending of a file that has one question a line.
Question = MultipleChoice | OpenAnswer


def make_question(text: str, options: tuple[str, ...], source: str) -> Question:
    """Return a typed question.

    Args:
        text: the question.
        options: its options; empty for an open question.
        source: where it was typed, for messages.
    """
    if options:
        return with_id(MultipleChoice("", text, options, None, "mcq", source))
    return with_id(OpenAnswer("", text, None, "qa", source))


def read_questions(settings: AskedSettings) -> list[Question]:
    """Return the question of --question or those of --file, with ids and without answers.

    Raises:
        DataError: the file cannot be read, holds no question, or one of its rows is none.
    """
    if settings.question is not None:
        return [make_question(settings.question, settings.option, "--question")]
    path = settings.file
    if not path.is_file():
        problem = "a folder" if path.is_dir() else "no such file"
        raise DataError(f"--file {path}: {problem}; give a file with questions")
    if path.suffix == LINES:
        if settings.columns:
            raise DataError(f"--file {path}: a text has no columns; leave --columns out")
        questions = read_lines(path)
    else:
        questions = read_rows(path, settings.columns)
    if not questions:
        raise DataError(f"--file {path}: no question in it; expected at least one")
    return questions


def read_lines(path: Path) -> list[Question]:
    """Return the questions of a text, one for each line that is not blank."""
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"--file {path}: not UTF-8 text (byte {error.start}); convert the file"
        ) from None
    return [
        make_question(line.strip(), (), f"{path.name} line {number}")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def read_rows(path: Path, columns: dict[str, str | list[str]]) -> list[Question]:
    """Return the questions of a file of records."""
    entry = DataEntry(format="mcq", path=str(path), columns=columns)
    _, records = read_records(entry, FILE)
    published = None if columns or not records else find_published(records[0][1])
    questions = []
    for source, record in records:
        try:
            check_cells(record)
            parsed = (published.parse if published else parse_row)(record, source, entry)
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"--file {path}: {source}: {error}; correct the row") from None
        # Any answer of the file is left behind, so that none can reach a prompt.
        hidden = {"answer": None}
        if isinstance(parsed, MultipleChoice):
            hidden["explanation"] = None
        questions.append(with_id(replace(parsed, **hidden)))
    return questions


def find_published(record: Mapping) -> Format | None:
    """Return the published format of a record whose fields the general layouts do not know.

    PubMedQA's passages, for instance, stand in a field that `parse_row` would pass over.
    """
    for kind in FORMATS.values():
        if any(group <= set(record) and group - FIELDS for group in kind.signatures):
            return kind
    return None


def parse_row(record: dict, source: str, entry: DataEntry) -> Question:
    """Parse a row with a question, and with options or without.

    Raises:
        ValueError: the row has no question, or its options cannot be used.
    """
    filled = {
        name: value
        for name, value in record.items()
        if not is_blank(value) and value not in ([], {}, MISSING_CELL)
    }
    named = "options" in entry.columns
    if named or is_multiple_choice(filled) or find_option_columns(filled):
        return parse_mcq(record | {"answer": None}, source, without_answer(entry))
    fields = take_columns(record, without_answer(entry))
    return OpenAnswer(
        id=optional_label(fields, "id") or "",
        question=need_text(fields, "question"),
        answer=None,
        dataset="qa",
        source=source,
        subject=optional_label(fields, "subject"),
        context=read_context(fields),
    )


def without_answer(entry: DataEntry) -> DataEntry:
    """Return an entry whose column map names no answer, which a file need not have."""
    columns = {field: column for field, column in entry.columns.items() if field != "answer"}
    return entry.model_copy(update={"columns": columns})


def with_id(question: Question) -> Question:
    """Return a question that has an id."""
    return question if question.id else replace(question, id=content_id(question))
