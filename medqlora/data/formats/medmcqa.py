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

FIRST_OPTION = "first_option"  # the number of option A, which `number_options` adds to each record


def number_options(records: Records, entry: DataEntry, on_hub: bool) -> Records:
    """Say in each record from which number its file counts options."""
    first = find_first_option(records, on_hub)
    return [(source, record | {FIRST_OPTION: first}) for source, record in records]


def parse_medmcqa(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    first_option = record[FIRST_OPTION]
    options = tuple(need_option(record, key) for key in ("opa", "opb", "opc", "opd"))
    cop = record.get("cop")
    answer = (
        None
        if cop in (None, -1, "", "-1") or cop != cop
        else whole_number(cop, "cop") - first_option
    )
    if answer is not None and not 0 <= answer < 4:
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


def find_first_option(records: list[tuple[str, dict]], hub: bool) -> int:
    """MedMCQA's original files number the right option 1-4, the hub copy 0-3; a file shows which by
    its values.
    """
    values = set()
    for cop in {repr(record.get("cop")): record.get("cop") for _, record in records}.values():
        with contextlib.suppress(ValueError):
            values.add(str(whole_number(cop, "cop")))
    if "0" in values and "4" in values:
        raise DataError(
            'medmcqa: "cop" takes both 0 and 4; one file counts from 0 (hub) or from 1 (original),'
            " not both"
        )
    return 0 if "0" in values or (hub and "4" not in values) else 1


def ask_harness(example: MultipleChoice, context: str) -> str:
    lines = [f"Question: {example.question}", "Choices:", *letter_options(example), "Answer:"]
    return "\n".join(lines)


register(
    Format(
        name="medmcqa",
        parse=parse_medmcqa,
        hub=("openlifescienceai/medmcqa", None),
        published_split="validation",  # The labels of its test split are hidden.
        signatures=(frozenset({"question", "opa", "opb", "opc", "opd"}),),
        prepare=number_options,
        harness=HarnessPrompt(ask=ask_harness),
    )
)
