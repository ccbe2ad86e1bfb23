"""MedMCQA (Pal et al., 2022): Indian medical entrance questions with four options."""

from __future__ import annotations

import contextlib

from medqlora.core.config import DataEntry
from medqlora.data.examples import DataError, MultipleChoice
from medqlora.data.formats.fields import need_option, need_text, optional_text, whole_number
from medqlora.data.formats.registry import (
    Format,
    HarnessPrompt,
    Records,
    letter_options,
    register,
)

# The key under which `number_options` adds the number of option A to each record.
FIRST_OPTION = "first_option"


def number_options(records: Records, entry: DataEntry, on_hub: bool) -> Records:
    """Add to each record the number from which its file counts options."""
    first_option = find_first_option(records, on_hub)
    return [(source, record | {FIRST_OPTION: first_option}) for source, record in records]


def parse_medmcqa(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    """Parse a MedMCQA question: "opa" to "opd" are the options, "cop" numbers the right one."""
    first_option = record[FIRST_OPTION]
    options = tuple(need_option(record, key) for key in ("opa", "opb", "opc", "opd"))
    cop = record.get("cop")
    answer = None
    # The hidden labels of the test split are -1; pandas writes a missing value as NaN.
    if cop not in (None, -1, "", "-1") and cop == cop:
        answer = whole_number(cop, "cop") - first_option
        if not 0 <= answer < 4:
            raise ValueError(
                f"cop is {cop}; this file counts options from {first_option} to {first_option + 3}"
            )
    return MultipleChoice(
        id=optional_text(record, "id") or "",
        question=need_text(record, "question"),
        options=options,
        answer=answer,
        dataset="medmcqa",
        source=source,
        subject=optional_text(record, "subject_name"),
        topic=optional_text(record, "topic_name"),
        choice_type=optional_text(record, "choice_type"),
        explanation=optional_text(record, "exp"),
    )


def find_first_option(records: Records, on_hub: bool) -> int:
    """Return the number of option A in a file: 0 or 1.

    MedMCQA's original files number the options from 1 to 4, the copy on the hub from 0 to 3. The
    values of the whole file tell which; where they fit both, the file's origin decides.

    Raises:
        DataError: The file holds both 0 and 4.
    """
    # The representation of a value is a key for every type, a list or an object included.
    distinct = {repr(record.get("cop")): record.get("cop") for _, record in records}
    values = set()
    for cop in distinct.values():
        # A value that is no number is reported later, with its line.
        with contextlib.suppress(ValueError):
            values.add(str(whole_number(cop, "cop")))
    if "0" in values and "4" in values:
        raise DataError(
            'medmcqa: "cop" takes both 0 and 4; one file counts from 0 (hub) or from 1 (original),'
            " not both"
        )
    if "0" in values:
        return 0
    return 0 if on_hub and "4" not in values else 1


def ask_harness(example: MultipleChoice, context: str) -> str:
    """Return the prompt of lm-evaluation-harness's task medmcqa."""
    lines = [f"Question: {example.question}", "Choices:", *letter_options(example), "Answer:"]
    return "\n".join(lines)


register(
    Format(
        name="medmcqa",
        parse=parse_medmcqa,
        hub=("openlifescienceai/medmcqa", None),
        # Papers report the validation split, because the labels of the test split are hidden.
        published_split="validation",
        signatures=(frozenset({"question", "opa", "opb", "opc", "opd"}),),
        prepare=number_options,
        harness=HarnessPrompt(ask=ask_harness),
    )
)
