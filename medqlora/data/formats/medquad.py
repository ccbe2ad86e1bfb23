"""MedQuAD (Ben Abacha and Demner-Fushman, 2019): open questions with answers from the NIH."""

from __future__ import annotations

from medqlora.core.config import DataEntry
from medqlora.data.examples import OpenAnswer
from medqlora.data.formats.fields import (
    list_names,
    need_text,
    open_answer,
    optional_label,
)
from medqlora.data.formats.options import is_multiple_choice
from medqlora.data.formats.registry import Format, register


def parse_medquad(record: dict, source: str, entry: DataEntry) -> OpenAnswer:
    """Parse a MedQuAD question; "qtype" or "question_type" becomes its subject.

    The disease that a question is about is its "focus", of which there are thousands.
    """
    # The answer of a multiple-choice question is often a letter, which would be learned as text.
    if is_multiple_choice(record):
        raise ValueError(f"the row has options ({list_names(record)}); MedQuAD has none, use mcq")
    subject = optional_label(record, "qtype") or optional_label(record, "question_type")
    return OpenAnswer(
        # MedQuAD's ids repeat across its sources; an empty id is replaced by a hash of the content.
        id="",
        question=need_text(record, "question"),
        # Many answers were removed at the source for copyright; data.drop_invalid leaves such rows
        # out.
        answer=open_answer(record, "answer"),
        dataset="medquad",
        source=source,
        subject=subject,
    )


register(
    Format(
        name="medquad",
        parse=parse_medquad,
        scoring="generate",
        hub=("lavita/MedQuAD", None),
        license="CC BY 4.0",
        language="en",
        published_split="train",
        answers=(),
        signatures=(frozenset({"question", "answer"}),),
    )
)
