"""Normalise, de-duplicate and decontaminate examples.

Every example that is dropped is returned as a `Removal` with its reason.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Iterable
from dataclasses import replace

from medqlora.data.examples import Example, MultipleChoice, Passage, Removal

# Two questions with the same stem of at least this many normalised characters are taken for the
# same question, whatever their options are, because MedQA exists with four and with five options
# per question. Different questions share shorter stems such as "Which is true?".
DISTINCTIVE_STEM = 80


def to_nfc(text: str) -> str:
    """Return the text in Unicode normalization form C."""
    # ASCII text is in form NFC already. An accented letter may be one character or two, which look
    # the same but are other tokens and other keys.
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def normalise_line(text: str, lowercase: bool = False) -> str:
    """Return the text in form NFC with one blank between words and none around it."""
    text = " ".join(to_nfc(text).split())
    return text.lower() if lowercase else text


def normalise_paragraphs(text: str | None, lowercase: bool = False) -> str | None:
    """Collapse blanks inside lines and runs of empty lines; paragraphs and line ends stay."""
    if text is None:
        return None
    lines = to_nfc(text).splitlines()
    if len(lines) < 2:
        return normalise_line(text, lowercase)
    joined = "\n".join(" ".join(line.split()) for line in lines)
    text = re.sub(r"\n{3,}", "\n\n", joined).strip()
    return text.lower() if lowercase else text


def clean(example: Example, lowercase: bool = False) -> Example:
    """Return the example with normalised blanks, in Unicode form NFC, optionally in lower case."""
    if isinstance(example, Passage):
        return replace(example, text=normalise_paragraphs(example.text, lowercase))
    changes = {"question": normalise_line(example.question, lowercase)}
    if example.context:
        changes["context"] = tuple([normalise_line(text, lowercase) for text in example.context])
    if isinstance(example, MultipleChoice):
        changes["options"] = tuple([normalise_line(text, lowercase) for text in example.options])
        changes["explanation"] = normalise_paragraphs(example.explanation, lowercase)
    else:
        changes["answer"] = normalise_paragraphs(example.answer, lowercase)
    if all(getattr(example, name) == value for name, value in changes.items()):
        return example
    return replace(example, **changes)


def squash(text: str) -> str:
    """Return the case-folded letters and digits of a text, with the signs that change a value.

    "pH < 7.35!" and "PH <7.35" become the same text.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    # A full stop inside is a decimal point and stays; one at the end is punctuation.
    return re.sub(r"[^\w<>=+%/.-]+", "", folded).strip(".")


def exact_key(example: Example) -> Hashable:
    """Return what two examples have in common that are equal character by character."""
    # A text, four parts and three parts never equal each other, so kinds do not mix.
    if isinstance(example, Passage):
        return example.text
    if isinstance(example, MultipleChoice):
        return example.question, example.options, example.answer, example.context
    return example.question, example.answer, example.context


def normalized_key(example: Example) -> Hashable:
    """Return the normalised stem with the sorted options, the open question, or the text."""
    if isinstance(example, Passage):
        return squash(example.text)
    # Sorted options make a question with shuffled options the same question. The answer is left
    # out, because an evaluation question with another answer would still be a leak.
    if isinstance(example, MultipleChoice):
        return squash(example.question), tuple(sorted(map(squash, example.options)))
    return squash(example.question)


def normalized_training_key(example: Example) -> Hashable:
    """Return the normalized key, with the answer of an open question.

    Two different answers to one open question are two rows to learn from.
    """
    if isinstance(example, MultipleChoice):
        return normalized_key(example), ""
    return normalized_key(example), squash(getattr(example, "answer", None) or "")


def deduplicate(examples: Iterable[Example], method: str) -> tuple[list[Example], list[Removal]]:
    """Keep the first of each group of equal examples.

    Args:
        examples: The examples, in the order in which they are kept.
        method: "none", "exact" or "normalized", as in config.Data.deduplicate.
    """
    if method == "none":
        return list(examples), []
    key_of = {"exact": exact_key, "normalized": normalized_training_key}[method]
    first_of = {}
    kept = []
    removals = []
    for example in examples:
        first = first_of.setdefault(key_of(example), example)
        # Examples with equal fields compare equal, so only identity tells the first from its
        # copies.
        if first is example:
            kept.append(example)
        else:
            removals.append(
                Removal(example.source, example.id, f"duplicate ({method}) of {first.source}")
            )
    return kept, removals


def contamination_keys(example: Example) -> list[Hashable]:
    """Return the keys of an example; two examples that share one are taken for the same."""
    keys = [normalized_key(example)]
    if isinstance(example, Passage):
        return keys
    stem = squash(example.question)
    if len(stem) >= DISTINCTIVE_STEM or not isinstance(example, MultipleChoice):
        # The key has the same form for both kinds. An open question is thereby also found in a
        # multiple-choice question that asks it at length.
        keys.append(("stem", stem))
    return keys


def decontaminate(
    train: Iterable[Example], evaluation: Iterable[Example]
) -> tuple[list[Example], list[Removal]]:
    """Remove the training examples that are also in an evaluation set.

    A multiple-choice question is in it if its normalised stem and its sorted options are, or if its
    stem is and has at least DISTINCTIVE_STEM characters. An open question is in it if its
    normalised question is, a passage if its normalised text is.
    """
    held_out = {}
    for example in evaluation:
        for key in contamination_keys(example):
            held_out[key] = example
    if not held_out:
        return list(train), []
    kept = []
    removals = []
    for example in train:
        shared = [key for key in contamination_keys(example) if key in held_out]
        if not shared:
            kept.append(example)
            continue
        source = held_out[shared[0]].source
        removals.append(Removal(example.source, example.id, f"is in the evaluation data: {source}"))
    return kept, removals
