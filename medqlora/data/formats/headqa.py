"""HEAD-QA (Vilares and Gomez-Rodriguez, 2019): Spanish healthcare examinations."""

from __future__ import annotations

from medqlora.core.config import DataEntry
from medqlora.data.examples import MultipleChoice
from medqlora.data.formats.fields import need_text, optional_text, read_options, whole_number
from medqlora.data.formats.registry import Format, HarnessPrompt, register


def parse_headqa(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    """`answers` is [{aid: 1…, atext}], `ra` the number of the right one."""
    answers = record.get("answers")
    if isinstance(answers, dict):  # how older versions of datasets give a list of objects
        answers = [
            {"aid": aid, "atext": text}
            for aid, text in zip(answers["aid"], answers["atext"], strict=True)
        ]
    if not isinstance(answers, list) or not all(
        isinstance(a, dict) and "atext" in a for a in answers
    ):
        raise ValueError(
            f'"answers" is {answers!r}; expected a list of {{"aid": number, "atext": text}}'
        )
    options = read_options([a["atext"] for a in answers])
    right = record.get("ra")
    numbers = [whole_number(a.get("aid", i), "aid") for i, a in enumerate(answers, 1)]
    if right not in (None, -1) and whole_number(right, "ra") not in numbers:
        raise ValueError(f"ra is {right}; the answers are numbered {', '.join(map(str, numbers))}")
    name = optional_text(record, "name")
    number = optional_text(record, "qid")
    return MultipleChoice(
        id=f"{name}-{number}" if name and number else "",
        question=need_text(record, "qtext"),
        options=options,
        dataset="headqa",
        answer=None if right in (None, -1) else numbers.index(whole_number(right, "ra")),
        source=source,
        subject=optional_text(record, "category"),
    )


def ask_harness(example: MultipleChoice, context: str) -> str:
    return f"Question: {example.question}\nAnswer:"


register(
    Format(
        name="headqa",
        parse=parse_headqa,
        hub=("EleutherAI/headqa", "en"),
        signatures=(frozenset({"qtext", "answers", "ra"}),),
        harness=HarnessPrompt(ask=ask_harness, answer="cloze"),
    )
)
