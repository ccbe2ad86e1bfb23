"""MedQA (Jin et al., 2021): questions of the United States medical licensing examination."""

from __future__ import annotations

import re

from medqlora.core.config import DataEntry
from medqlora.data.examples import MultipleChoice, Written
from medqlora.data.formats.fields import (
    check_answer,
    is_blank,
    need_text,
    optional_label,
    optional_text,
    whole_number,
    written_answer,
)
from medqlora.data.formats.options import read_columns, read_options
from medqlora.data.formats.registry import Format, register


def parse_medqa(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    """Parse a MedQA question, in the original form or in the one of the hub's "-hf" copies.

    The original form has "options" and "answer_idx", the other "sent1", "ending0" ... and "label".
    """
    if "sent1" in record:
        # Each name ends in one digit, so the order of names is the order of numbers.
        endings = sorted(key for key in record if re.fullmatch(r"ending\d", key))
        options = read_columns([record[key] for key in endings])
        label = record.get("label")
        # This form counts options from 0; -1 is a hidden label.
        hidden = is_blank(label) or label in (-1, "-1")
        answer = None if hidden else whole_number(label, "label")
        if entry.answer_is is None:
            check_answer(answer, options)
        elif not hidden:
            answer = Written(label, field="label")
        question = need_text(record, "sent1")
    else:
        options = read_options(record.get("options"))
        question = need_text(record, "question")
        # A copy whose options were shuffled without their letters would train wrong answers, so the
        # text of the answer must agree where the file has it.
        answer = written_answer(record, "answer_idx", optional_text(record, "answer"))
    return MultipleChoice(
        id=optional_label(record, "id") or "",
        question=question,
        options=options,
        answer=answer,
        dataset="medqa",
        source=source,
        subject=optional_label(record, "meta_info"),
    )


register(
    Format(
        name="medqa",
        parse=parse_medqa,
        hub=("GBaker/MedQA-USMLE-4-options", None),
        license="MIT",
        language="en",
        answers=("letter",),
        signatures=(
            frozenset({"question", "options", "answer_idx"}),
            frozenset({"sent1", "ending0", "label"}),
            frozenset({"question", "options", "meta_info"}),
        ),
    )
)
