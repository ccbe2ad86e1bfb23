"""HEAD-QA (Vilares and Gomez-Rodriguez, 2019): Spanish healthcare examinations."""

from __future__ import annotations

from medqlora.core.config import DataEntry
from medqlora.data.examples import MultipleChoice
from medqlora.data.formats.fields import is_blank, need_text, optional_label, whole_number
from medqlora.data.formats.options import read_options
from medqlora.data.formats.registry import Format, HarnessPrompt, register


def parse_headqa(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    """Parse a HEAD-QA question.

    "answers" is [{"aid": 1, "atext": text}, ...]; "ra" is the "aid" of the right answer.
    """
    answers = record.get("answers")
    # Older versions of the datasets library return a list of objects as an object of lists.
    if isinstance(answers, dict):
        answers = [
            {"aid": aid, "atext": text}
            for aid, text in zip(answers["aid"], answers["atext"], strict=True)
        ]
    if not isinstance(answers, list) or not all(map(is_answer, answers)):
        raise ValueError(
            f'"answers" is {answers!r}; expected a list of {{"aid": number, "atext": text}}'
        )
    # "ra" names an "aid" and not a position, so the numbers are kept beside the options.
    options = read_options([answer["atext"] for answer in answers])
    numbers = [
        whole_number(answer.get("aid", position), "aid")
        for position, answer in enumerate(answers, 1)
    ]
    right = record.get("ra")
    index = None
    if not is_blank(right) and right not in (-1, "-1"):
        if whole_number(right, "ra") not in numbers:
            listed = ", ".join(map(str, numbers))
            raise ValueError(f"ra is {right}; the answers are numbered {listed}")
        index = numbers.index(whole_number(right, "ra"))
    name = optional_label(record, "name")
    number = optional_label(record, "qid")
    return MultipleChoice(
        id=f"{name}-{number}" if name and number else "",
        question=need_text(record, "qtext"),
        options=options,
        dataset="headqa",
        answer=index,
        source=source,
        subject=optional_label(record, "category"),
    )


def is_answer(answer: object) -> bool:
    """Whether an entry of "answers" is an object with a text."""
    return isinstance(answer, dict) and "atext" in answer


def ask_harness(example: MultipleChoice, context: str) -> str:
    """Return the prompt of lm-evaluation-harness's task headqa."""
    return f"Question: {example.question}\nAnswer:"


register(
    Format(
        name="headqa",
        parse=parse_headqa,
        hub=("EleutherAI/headqa", "en"),
        license="MIT",
        language="en",
        answers=(),
        signatures=(frozenset({"qtext", "answers", "ra"}),),
        harness=HarnessPrompt(ask=ask_harness, answer="cloze"),
    )
)
