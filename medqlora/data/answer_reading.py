"""Decide once per file how it writes its answers: as letter, as text, or as an index.

One answer alone can often be read in several ways: "B" is a letter and a blood group, 2 is the
third option and the second. Therefore all answers of a file decide together, and a file that fits
two readings which give different right options is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from medqlora.data.cleaning import strip_labels
from medqlora.data.examples import LETTERS, DataError, Example, MultipleChoice, Removal, Written
from medqlora.data.formats.fields import whole_number

# The order decides between readings that give the same options.
READINGS = ("letter", "text", "index0", "index1")
INDEXES = {"index0", "index1"}
NAMES = {
    "letter": "letters",
    "text": "texts of options",
    "index0": "indexes from 0",
    "index1": "indexes from 1",
}
# A letter may stand in brackets, and the option's text may follow it, as in "B) Liver".
LETTER = re.compile(r"\(?([A-Ja-j])(?:[).:]+\s*(.*))?", re.DOTALL)


def read_as(reading: str, written: Written, options: tuple[str, ...]) -> int | None:
    """Return the index of the right option under one reading, or None where it does not fit.

    Args:
        reading: One of READINGS.
        written: The answer. Where it also gives the option's text, only that option fits.
        options: The texts of the options.
    """
    index = locate(reading, written.value, options)
    if index is None or not 0 <= index < len(options):
        return None
    if written.text is not None and not same_words(written.text, options[index]):
        return None
    return index


def locate(reading: str, value: object, options: tuple[str, ...]) -> int | None:
    """Return the index that a reading makes of a value; it may lie outside the options."""
    if reading == "letter":
        return locate_letter(value, options)
    if reading == "text":
        return locate_text(value, options)
    try:
        return whole_number(value, "answer") - int(reading == "index1")
    except ValueError:
        return None


def locate_letter(value: object, options: tuple[str, ...]) -> int | None:
    """Return the index of a letter such as "b", "(B)" or "B) Liver"."""
    found = LETTER.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        return None
    index = LETTERS.index(found[1].upper())
    # The text behind a letter must be the option's own, or the letter would be only a guess.
    if found[2] and (index >= len(options) or not same_words(found[2], options[index])):
        return None
    return index


def locate_text(value: object, options: tuple[str, ...]) -> int | None:
    """Return the index of the only option with that text."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    text = str(value)
    if options.count(text) == 1:
        return options.index(text)
    # The answer may lack the letter that stands before the options, as in "A) Liver".
    for variant in (options, strip_labels(options)):
        same = [index for index, option in enumerate(variant) if same_words(option, text)]
        if same:
            return same[0] if len(same) == 1 else None
    return None


def same_words(first: str, second: str) -> bool:
    """Whether two texts differ at most in their blanks."""
    return first.split() == second.split()


Golds = list[int | None]  # the index of each question's right option; None where nothing fits


def decide(questions: Sequence[MultipleChoice], expected: Sequence[str]) -> tuple[str, Golds]:
    """Find the reading that fits the answers of a file.

    Args:
        questions: The questions of the file whose answer is a Written; at least one.
        expected: The readings that the dataset is known for. Another one is never chosen.

    Returns:
        The reading and its golds. An answer that is none of the options fits no reading.

    Raises:
        DataError: Two readings give different right options, or only one fits that the dataset is
            not known for.
    """
    known = [reading for reading in READINGS if reading in expected]
    golds = {reading: read_all(reading, questions) for reading in known}
    # Of equal numbers of misfits the first reading is taken.
    best = min(known, key=lambda reading: golds[reading].count(None))
    if None in golds[best]:
        # The other readings may explain the misfits.
        others = [reading for reading in READINGS if reading not in expected]
        golds |= {reading: read_all(reading, questions) for reading in others}
    conflicts = {}
    for rival in golds:
        if rival == best:
            continue
        fits_all = None not in golds[rival]
        if fits_all and rival not in expected:
            raise DataError(describe_surprise(questions, golds[best], best, rival))
        if None not in golds[best] and not fits_all:
            continue
        conflict = find_conflict(golds[best], golds[rival], exclusive={best, rival} == INDEXES)
        if conflict is not None:
            conflicts[rival] = conflict
    if conflicts:
        raise DataError(describe_conflicts(questions, best, conflicts))
    return best, golds[best]


def read_all(reading: str, questions: Sequence[MultipleChoice]) -> Golds:
    """Return the golds of all questions under one reading."""
    return [read_as(reading, question.answer, question.options) for question in questions]


def find_conflict(best: Golds, rival: Golds, exclusive: bool) -> tuple[int, int] | None:
    """Return the numbers of two answers that show that a file can be read in two ways, or None.

    A rival that explains no answer which the best reading does not explain is no rival, unless both
    explain all. A rival that gives the same options as the best wherever both fit leaves no doubt
    about these, and the remaining answers are invalid.

    Args:
        best, rival: The golds under two readings.
        exclusive: Whether the two readings never give the same option, so that they cannot both be
            used in one file.
    """
    pairs = list(enumerate(zip(best, rival, strict=True)))
    gains = [number for number, (mine, other) in pairs if mine is None and other is not None]
    if not gains and None in best:
        return None
    differing = [
        number for number, (mine, other) in pairs if None not in (mine, other) and mine != other
    ]
    if differing:
        return differing[0], differing[0]
    kept = [number for number, (mine, other) in pairs if mine is not None and other is None]
    return (kept[0], gains[0]) if exclusive and kept and gains else None


def describe_conflicts(
    questions: Sequence[MultipleChoice], best: str, conflicts: dict[str, tuple[int, int]]
) -> str:
    """Return the message for a file whose answers can be read in several ways.

    Args:
        questions: The questions.
        best: One reading.
        conflicts: The other readings, each with the numbers of two answers: what the first is under
            `best` and the second under that reading cannot both be right.
    """
    first = next(iter(conflicts.values()))[0]
    cases = [(best, first)] + [(rival, numbers[1]) for rival, numbers in conflicts.items()]
    texts = []
    for reading, number in cases:
        question = questions[number]
        option = question.options[read_as(reading, question.answer, question.options)]
        value = question.answer.value
        texts.append(f'as {NAMES[reading]}, {value!r} at {question.source} is "{option}"')
    flags = " or ".join(f"answer_is: {reading}" for reading, _ in cases)
    return (
        f"{questions[0].dataset}: the answers of this file can be read in {len(cases)} ways:"
        f" {'; '.join(texts)}; say which with {flags}"
    )


def describe_surprise(
    questions: Sequence[MultipleChoice], golds: Golds, best: str, rival: str
) -> str:
    """Return the message for a file that only an unexpected reading fits."""
    question = questions[golds.index(None)]
    return (
        f"{question.dataset}: {question.source}: {question.answer.field} is"
        f" {question.answer.value!r}, which does not fit {NAMES[best]}; all answers of this file"
        f" fit {NAMES[rival]}, which {question.dataset} does not use; if it does here, say"
        f" answer_is: {rival}"
    )


def settle_answers(
    examples: list[Example],
    expected: Sequence[str],
    answer_is: str | None,
    drop_invalid: bool,
) -> tuple[list[Example], list[Removal], str | None]:
    """Replace every written answer of a file by the index of its option.

    Args:
        examples: All examples of the file.
        expected: The readings that the dataset is known for.
        answer_is: The reading that the user names, or None.
        drop_invalid: Return questions whose answer does not fit as removals instead of raising.

    Returns:
        The examples, the removals, and the reading; it is None where no answer was left as written.

    Raises:
        DataError: Two readings are possible, or an answer does not fit the file's reading.
    """
    questions = [
        example
        for example in examples
        if isinstance(example, MultipleChoice) and isinstance(example.answer, Written)
    ]
    if not questions:
        return examples, [], None
    if answer_is is None:
        reading, golds = decide(questions, expected)
    else:
        reading = answer_is
        golds = read_all(reading, questions)
    # Equal questions are equal objects to Python, so a question is known by its identity here.
    gold_of = {id(item): gold for item, gold in zip(questions, golds, strict=True)}
    settled = []
    removals = []
    for example in examples:
        if id(example) not in gold_of:
            settled.append(example)
        elif gold_of[id(example)] is not None:
            settled.append(replace(example, answer=gold_of[id(example)]))
        else:
            problem = describe_misfit(example, reading, any(gold is not None for gold in golds))
            if not drop_invalid:
                raise DataError(
                    f"{example.dataset}: {example.source}: {problem} (correct the row, or leave"
                    " such rows out with drop_invalid)"
                )
            removals.append(Removal(example.source, example.id, problem))
    return settled, removals, reading


def describe_misfit(question: MultipleChoice, reading: str, fits_others: bool) -> str:
    """Return what is wrong with an answer that does not fit the reading of its file.

    Args:
        question: The question.
        reading: The reading.
        fits_others: Whether the reading fits any answer of the file.
    """
    written = question.answer
    options = question.options
    subject = f"{written.field} is {written.value!r}"
    if isinstance(written.value, (list, tuple)):
        return f"{subject}, several right answers; every question needs one"
    index = locate(reading, written.value, options)
    if index is not None and 0 <= index < len(options):
        return (
            f'{subject}, which is option "{options[index]}", but the text of the answer is'
            f' "{written.text}"; they must agree'
        )
    if not fits_others:
        return (
            f"{subject}; expected a letter, an index or the text of exactly one of the options"
            f" {list(options)}"
        )
    return (
        f"{subject}; the answers of this file are {NAMES[reading]}, and this one must be one of the"
        f" {len(options)} options too"
    )
