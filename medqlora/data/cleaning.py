"""Normalise, de-duplicate and decontaminate examples. Every removal is returned with its reason."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace

from medqlora.data.examples import Example, MultipleChoice, Passage, Removal

# A stem this long (normalised characters) is the same question whatever its options: MedQA ships
# each question with four and with five options. Shorter stems ("Which is true?") are shared by
# different questions.
SELF_TELLING_STEM = 80


def compose(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def normalise_line(text: str, lowercase: bool = False) -> str:
    """One blank between words."""
    text = " ".join(compose(text).split())
    return text.lower() if lowercase else text


def normalise_paragraphs(text: str | None, lowercase: bool = False) -> str | None:
    """Collapse blanks inside lines and runs of empty lines; keep paragraphs."""
    if text is None:
        return None
    lines = compose(text).splitlines()
    if len(lines) < 2:  # most explanations
        return normalise_line(text, lowercase)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(" ".join(line.split()) for line in lines)).strip()
    return text.lower() if lowercase else text


def clean(example: Example, lowercase: bool = False) -> Example:
    """Whitespace normalised (NFC text), optionally lower-cased."""
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
    return (
        example
        if all(getattr(example, name) == value for name, value in changes.items())
        else replace(example, **changes)
    )


def squash(text: str) -> str:
    """Letters, digits and signs that change a value, case-folded: "pH < 7.35!" and "PH <7.35" are
    one.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[^\w<>=+%/.-]+", "", folded).strip(".")


def exact_key(example: Example) -> Hashable:
    if isinstance(example, Passage):
        return example.text
    if isinstance(example, MultipleChoice):
        return example.question, example.options, example.answer, example.context
    return example.question, example.answer, example.context


def normalized_key(example: Example) -> Hashable:
    """Normalised stem + sorted options, or question, or text."""
    if isinstance(example, Passage):
        return squash(example.text)
    if isinstance(example, MultipleChoice):
        return squash(example.question), tuple(sorted(map(squash, example.options)))
    return squash(example.question)


def deduplicate(examples: Iterable[Example], how: str) -> tuple[list[Example], list[Removal]]:
    """Keep the first of each group of equal examples; `how` is none, exact or normalized
    (config.Data).
    """
    if how == "none":
        return list(examples), []
    key: Callable[[Example], Hashable] = {"exact": exact_key, "normalized": normalized_key}[how]
    if how == "normalized":  # two answers to one open question are two rows to learn from

        def key(e):
            return (
                normalized_key(e),
                squash(getattr(e, "answer", None) or "")
                if not isinstance(e, MultipleChoice)
                else "",
            )

    first = {}
    kept = []
    removals = []
    for example in examples:
        seen = first.setdefault(key(example), example)
        if seen is example:
            kept.append(example)
        else:
            removals.append(
                Removal(example.source, example.id, f"duplicate ({how}) of {seen.source}")
            )
    return kept, removals


def contamination_keys(example: Example) -> list[Hashable]:
    keys = [normalized_key(example)]
    if not isinstance(example, Passage):
        stem = squash(example.question)
        keys += (
            [("stem", stem)]
            if len(stem) >= SELF_TELLING_STEM or not isinstance(example, MultipleChoice)
            else []
        )
    return keys


def decontaminate(
    train: Iterable[Example], evaluation: Iterable[Example]
) -> tuple[list[Example], list[Removal]]:
    """Remove training examples that stand in an evaluation set.

    A multiple-choice question stands there if normalised stem and sorted options do, or a stem of
    at least SELF_TELLING_STEM characters does; an open question if its normalised question does.
    """
    held_out = {key: example for example in evaluation for key in contamination_keys(example)}
    if not held_out:
        return list(train), []
    kept = []
    removals = []
    for example in train:
        hit = next((held_out[key] for key in contamination_keys(example) if key in held_out), None)
        if hit is None:
            kept.append(example)
        else:
            removals.append(
                Removal(example.source, example.id, f"stands in evaluation data: {hit.source}")
            )
    return kept, removals
