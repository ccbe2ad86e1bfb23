"""MedQA (Jin et al., 2021): questions of the United States medical licensing examination."""

from __future__ import annotations

import re

from medqlora.core.config import DataEntry
from medqlora.data.examples import MultipleChoice
from medqlora.data.formats.fields import (
    check_answer,
    find_answer,
    need_option,
    need_text,
    optional_text,
    read_options,
    whole_number,
)
from medqlora.data.formats.registry import Format, register


def parse_medqa(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    """Parse a MedQA question, in the original form or in the one of the hub's "-hf" copies.

    The original form has "options" and "answer_idx", the other "sent1", "ending0" ... and "label".
    """
    if "sent1" in record:
        # Each name ends in one digit, so the order of names is the order of numbers.
        endings = sorted(key for key in record if re.fullmatch(r"ending\d", key))
        options = tuple(need_option(record, key) for key in endings)
        label = record.get("label")
        # This form counts options from 0; -1 is a hidden label.
        answer = None if label in (None, -1) else whole_number(label, "label")
        check_answer(answer, options)
        question = need_text(record, "sent1")
    else:
        options = read_options(record.get("options"))
        question = need_text(record, "question")
        letter = record.get("answer_idx")
        answer = None if letter is None else find_answer(letter, options)
        check_answer(answer, options)
        text = record.get("answer")
        # A copy whose options were shuffled without their letters would train wrong answers.
        if answer is not None and text is not None and not same_words(str(text), options[answer]):
            raise ValueError(
                f'answer_idx {letter} is "{options[answer]}" but answer is "{text}"; they must'
                " agree"
            )
    return MultipleChoice(
        id=optional_text(record, "id") or "",
        question=question,
        options=options,
        answer=answer,
        dataset="medqa",
        source=source,
        subject=optional_text(record, "meta_info"),
    )


def same_words(first: str, second: str) -> bool:
    """Whether two texts differ at most in their blanks."""
    return first.split() == second.split()


register(
    Format(
        name="medqa",
        parse=parse_medqa,
        hub=("GBaker/MedQA-USMLE-4-options", None),
        signatures=(
            frozenset({"question", "options", "answer_idx"}),
            frozenset({"sent1", "ending0", "label"}),
            frozenset({"question", "options", "meta_info"}),
        ),
    )
)
