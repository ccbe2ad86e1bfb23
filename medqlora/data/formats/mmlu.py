"""The medical subjects of MMLU (Hendrycks et al., 2021)."""

from __future__ import annotations

from medqlora.core.config import DataEntry
from medqlora.data.examples import DataError, MultipleChoice
from medqlora.data.formats.fields import need_text, optional_label, written_answer
from medqlora.data.formats.options import find_option_columns, read_columns, read_options
from medqlora.data.formats.registry import (
    Format,
    HarnessPrompt,
    Records,
    letter_options,
    register,
)

# Medical papers report these subjects (Singhal et al., Nature 620, 2023, "MMLU clinical topics").
MMLU_SUBJECTS = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
)


def parse_mmlu(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    """Parse an MMLU question: "choices" is a list of texts, "answer" an index or a letter."""
    # The files of the original download have one column per option instead of "choices".
    columns = [] if "choices" in record else find_option_columns(record)
    if columns:
        options = read_columns([record[name] for name in columns])
    else:
        options = read_options(record.get("choices"))
    hidden = record.get("answer") in (-1, "-1")
    return MultipleChoice(
        id=optional_label(record, "id") or "",
        question=need_text(record, "question"),
        options=options,
        answer=None if hidden else written_answer(record, "answer"),
        dataset="mmlu",
        source=source,
        subject=optional_label(record, "subject"),
    )


def choose_subjects(records: Records, entry: DataEntry) -> Records:
    """Keep the records of the medical subjects, unless the entry names a subset.

    A record without a subject is kept.

    Raises:
        DataError: No record is left.
    """
    if entry.subset is not None:
        return records
    kept = [
        (source, record)
        for source, record in records
        if record.get("subject", MMLU_SUBJECTS[0]) in MMLU_SUBJECTS
    ]
    if not kept:
        raise DataError(
            f"mmlu: {records[0][0]} and the rows after it hold none of the medical subjects"
            f" {', '.join(MMLU_SUBJECTS)}; name another with subset"
        )
    return kept


def ask_harness(example: MultipleChoice, context: str) -> str:
    """Return the prompt of one question in lm-evaluation-harness's task mmlu."""
    # This task has no "Question:" before the question.
    return "\n".join([example.question.strip(), *letter_options(example), "Answer:"])


def lead_harness(example: MultipleChoice) -> str:
    """Return the line that stands before all questions in lm-evaluation-harness's task mmlu."""
    subject = (example.subject or "medicine").replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


register(
    Format(
        name="mmlu",
        parse=parse_mmlu,
        hub=("cais/mmlu", "all"),
        license="MIT",
        language="en",
        # The dev split holds five worked examples per subject.
        fewshot_split="dev",
        fewshot_by_subject=True,
        signatures=(
            frozenset({"question", "choices", "answer"}),
            frozenset({"question", "A", "B", "C", "D", "answer"}),
        ),
        header=("question", "A", "B", "C", "D", "answer"),
        answers=("letter", "index0"),
        prepare=choose_subjects,
        harness=HarnessPrompt(ask=ask_harness, lead=lead_harness),
    )
)
