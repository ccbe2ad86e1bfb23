"""Normalise, de-duplicate and decontaminate examples.

Every example that is dropped is returned as a `Removal` with its reason.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Hashable, Iterable
from dataclasses import replace

from medqlora.data.examples import LETTERS, DataError, Example, MultipleChoice, Passage, Removal

# Two questions with the same stem of at least this many normalised characters are taken for the
# same question, whatever their options are, because MedQA exists with four and with five options
# per question. Different questions share shorter stems such as "Which is true?".
DISTINCTIVE_STEM = 80


# An entity needs its semicolon here: "R&D" and "&copy" are texts.
ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|[A-Za-z][A-Za-z0-9]*);")
# Zero-width space, word joiner, byte order mark and soft hyphen cannot be seen.
INVISIBLE = re.compile("[\u200b\u2060\ufeff\u00ad]")
# An option may begin with its own letter, as in "A) Liver" or "(b) Spleen". "(a) and (b)" names
# other options and is no label.
LABEL = re.compile(r"\s*\(?([A-Ja-j])([).:])\s*(?!(?:and|or|only)\b|[&,+/])(?=\S)", re.IGNORECASE)


def to_nfc(text: str) -> str:
    """Return the text in Unicode normalization form C, without entities and invisible characters.

    An entity of HTML, such as "&amp;" or "&lt;", becomes its character.
    """
    if "&" in text:
        # Texts that were taken from the web twice have "&amp;lt;".
        for _ in range(2):
            text = ENTITY.sub(lambda found: html.unescape(found[0]), text)
    # ASCII text is in form NFC already. An accented letter may be one character or two, which look
    # the same but are other tokens and other keys.
    return text if text.isascii() else unicodedata.normalize("NFC", INVISIBLE.sub("", text))


def strip_labels(options: tuple[str, ...]) -> tuple[str, ...]:
    """Return options without the letters of their own places: "A) Liver" becomes "Liver".

    With a bracket at least two options must have such a letter. With a full stop or a colon all of
    them must, because "E. coli" may well be the fifth option.
    """
    labels = []
    for letter, option in zip(LETTERS, options, strict=False):
        found = LABEL.match(option)
        labels.append(found if found is not None and found[1].upper() == letter else None)
    found = [label for label in labels if label is not None]
    in_brackets = len(found) >= 2 and all(label[2] == ")" for label in found)
    if not found or not (in_brackets or len(found) == len(options)):
        return options
    return tuple(
        [
            option if label is None else option[label.end() :]
            for label, option in zip(labels, options, strict=True)
        ]
    )


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
    """Return the example with normalised blanks, in Unicode form NFC, optionally in lower case.

    Entities become characters, and options lose letters of their own.
    """
    if isinstance(example, Passage):
        return replace(example, text=normalise_paragraphs(example.text, lowercase))
    changes = {"question": normalise_line(example.question, lowercase)}
    if example.context:
        changes["context"] = tuple([normalise_line(text, lowercase) for text in example.context])
    if isinstance(example, MultipleChoice):
        options = strip_labels(example.options)
        changes["options"] = tuple([normalise_line(text, lowercase) for text in options])
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


def drop_repeated_ids(
    examples: Iterable[Example], place: str, flag: str | None
) -> tuple[list[Example], list[Removal]]:
    """Return the examples with unique ids, because predictions are told apart by them.

    Args:
        examples: The questions that will be asked.
        place: What messages call their data entry.
        flag: The flag that keeps the first question of each id, or None where it is set.

    Raises:
        DataError: Two questions have the same id, and the flag is not set.
    """
    first_source: dict[str, str] = {}
    unique = []
    removals = []
    for example in examples:
        first = first_source.get(example.id)
        if first is None:
            first_source[example.id] = example.source
            unique.append(example)
            continue
        if flag is not None:
            raise DataError(
                f"{place}: {example.source}: id {example.id} stands at {first} too; ids must be"
                f" unique ({flag} keeps the first)"
            )
        removals.append(Removal(example.source, example.id, f"its id stands at: {first}"))
    return unique, removals


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
