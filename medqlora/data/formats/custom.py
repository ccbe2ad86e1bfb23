"""General formats for a user's own files: multiple choice, open questions and plain text.

The column map of a data entry says which columns of the file hold our fields.
"""

from __future__ import annotations

from medqlora.core.config import DataEntry
from medqlora.data.examples import MultipleChoice, OpenAnswer, Passage
from medqlora.data.formats.fields import (
    check_answer,
    find_answer,
    need_text,
    optional_text,
    read_context,
    read_options,
    take_columns,
)
from medqlora.data.formats.registry import Format, register


def parse_mcq(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    """Parse a multiple-choice question with its options in one field."""
    record = take_columns(record, entry)
    options = read_options(record.get("options"))
    answer = None
    # A CSV file has no null, so an empty field stands for an unknown answer.
    if record.get("answer") not in (None, ""):
        answer = find_answer(record["answer"], options)
    check_answer(answer, options)
    return MultipleChoice(
        # `read_examples` replaces an empty id by a hash of the content.
        id=optional_text(record, "id") or "",
        question=need_text(record, "question"),
        options=options,
        answer=answer,
        dataset="mcq",
        source=source,
        subject=optional_text(record, "subject"),
        topic=optional_text(record, "topic"),
        context=read_context(record),
        explanation=optional_text(record, "explanation"),
    )


def parse_qa(record: dict, source: str, entry: DataEntry) -> OpenAnswer:
    """Parse a question that is answered in free text."""
    record = take_columns(record, entry)
    return OpenAnswer(
        id=optional_text(record, "id") or "",
        question=need_text(record, "question"),
        answer=need_text(record, "answer"),
        dataset="qa",
        source=source,
        subject=optional_text(record, "subject"),
        context=read_context(record),
    )


def parse_text(record: dict, source: str, entry: DataEntry) -> Passage:
    """Parse a plain text to learn from or to measure perplexity on."""
    record = take_columns(record, entry)
    return Passage(
        id=optional_text(record, "id") or "",
        text=need_text(record, "text"),
        dataset="text",
        source=source,
    )


# These formats have no signatures, because the column map decides what a record must hold.
register(Format(name="mcq", parse=parse_mcq))
register(Format(name="qa", parse=parse_qa, scoring="generate"))
register(Format(name="text", parse=parse_text, scoring="perplexity"))
