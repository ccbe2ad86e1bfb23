"""General formats for a user's own files: multiple choice, open questions and plain text.

The column map of a data entry says which columns of the file hold our fields.
"""

from __future__ import annotations

from medqlora.core.config import DataEntry
from medqlora.data.examples import MultipleChoice, OpenAnswer, Passage
from medqlora.data.formats.fields import (
    PLACE,
    list_names,
    need_text,
    open_answer,
    optional_label,
    optional_text,
    read_context,
    take_columns,
    written_answer,
)
from medqlora.data.formats.options import find_options, is_multiple_choice
from medqlora.data.formats.registry import Format, register


def parse_mcq(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    """Parse a multiple-choice question with its options in one field."""
    record = take_columns(record, entry)
    return MultipleChoice(
        # `read_entry` replaces an empty id by a hash of the content.
        id=optional_label(record, "id") or "",
        question=need_text(record, "question"),
        options=find_options(record, entry),
        answer=written_answer(record, "answer"),
        dataset="mcq",
        source=source,
        subject=optional_label(record, "subject"),
        topic=optional_label(record, "topic"),
        context=read_context(record),
        explanation=optional_text(record, "explanation"),
    )


def parse_qa(record: dict, source: str, entry: DataEntry) -> OpenAnswer:
    """Parse a question that is answered in free text."""
    # The answer of a multiple-choice question is often a letter, which would be learned as text.
    if not entry.columns and is_multiple_choice(record):
        raise ValueError(
            f"the row has options ({list_names(record)}); read it as mcq, or name question and"
            " answer with columns"
        )
    record = take_columns(record, entry)
    return OpenAnswer(
        id=optional_label(record, "id") or "",
        question=need_text(record, "question"),
        answer=open_answer(record, "answer"),
        dataset="qa",
        source=source,
        subject=optional_label(record, "subject"),
        context=read_context(record),
    )


def parse_text(record: dict, source: str, entry: DataEntry) -> Passage:
    """Parse a plain text to learn from or to measure perplexity on."""
    record = take_columns(record, entry)
    # The passages of a book belong together; every other record is a document of its own.
    document, place = record.get(PLACE, (source, 0))
    return Passage(
        id=optional_label(record, "id") or "",
        text=need_text(record, "text"),
        dataset="text",
        source=source,
        document=document,
        place=place,
    )


# These formats have no signatures, because the column map decides what a record must hold.
register(Format(name="mcq", parse=parse_mcq, takes_columns=True))
register(
    Format(
        name="qa",
        parse=parse_qa,
        scoring="generate",
        answers=(),
        takes_columns=True,
        line_field="question",
    )
)
register(
    Format(name="text", parse=parse_text, scoring="perplexity", answers=(), takes_columns=True)
)
