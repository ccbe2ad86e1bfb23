"""The medical subjects of MMLU (Hendrycks et al., 2021)."""

from __future__ import annotations

from medqlora.core.config import DataEntry
from medqlora.data.examples import MultipleChoice
from medqlora.data.formats.fields import (
    check_answer,
    find_answer,
    need_text,
    optional_text,
    read_options,
)

# MMLU's medical subjects, as medical papers report them (Singhal et al., Nature 620, 2023, "MMLU
# clinical topics").
MMLU_SUBJECTS = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
)


def parse_mmlu(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    options = read_options(record.get("choices"))
    answer = None if record.get("answer") in (None, -1) else find_answer(record["answer"], options)
    check_answer(answer, options)
    return MultipleChoice(
        id=optional_text(record, "id") or "",
        question=need_text(record, "question"),
        options=options,
        answer=answer,
        dataset="mmlu",
        source=source,
        subject=optional_text(record, "subject"),
    )
