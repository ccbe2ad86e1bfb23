"""MedMCQA (Pal et al., 2022): Indian medical entrance questions with four options."""

from __future__ import annotations

from medqlora.core.config import DataEntry
from medqlora.data.examples import MultipleChoice
from medqlora.data.formats.fields import need_text, optional_label, optional_text, written_answer
from medqlora.data.formats.options import need_option
from medqlora.data.formats.registry import Format, HarnessPrompt, letter_options, register


def parse_medmcqa(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    """Parse a MedMCQA question: "opa" to "opd" are the options, "cop" numbers the right one."""
    # The labels of the test split are hidden behind -1.
    hidden = record.get("cop") in (-1, "-1")
    return MultipleChoice(
        id=optional_label(record, "id") or "",
        question=need_text(record, "question"),
        options=tuple(need_option(record, key) for key in ("opa", "opb", "opc", "opd")),
        answer=None if hidden else written_answer(record, "cop"),
        dataset="medmcqa",
        source=source,
        subject=optional_label(record, "subject_name"),
        topic=optional_label(record, "topic_name"),
        choice_type=optional_label(record, "choice_type"),
        explanation=optional_text(record, "exp"),
    )


def ask_harness(example: MultipleChoice, context: str) -> str:
    """Return the prompt of lm-evaluation-harness's task medmcqa."""
    lines = [f"Question: {example.question}", "Choices:", *letter_options(example), "Answer:"]
    return "\n".join(lines)


register(
    Format(
        name="medmcqa",
        parse=parse_medmcqa,
        hub=("openlifescienceai/medmcqa", None),
        license="MIT (its repository), Apache-2.0 (its home on the hub)",
        language="en",
        # Papers report the validation split, because the labels of the test split are hidden.
        published_split="validation",
        signatures=(frozenset({"question", "opa", "opb", "opc", "opd"}),),
        # The original files count from 1 and the dataset's home on the hub from 0.
        answers=("index0", "index1"),
        hub_answers="index0",
        harness=HarnessPrompt(ask=ask_harness),
    )
)
