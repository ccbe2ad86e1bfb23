"""Which examples of a file an entry takes: its subjects, and its part of a division by hash."""

from __future__ import annotations

import difflib
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence

from medqlora.core.config import DataEntry
from medqlora.data.cleaning import to_nfc
from medqlora.data.examples import DataError, Example, Passage

# The parts of a file that is divided by hash, with the share of all questions at which each ends.
# The shares are fixed: entries that divided by other shares could hold the same question twice.
PARTS = {"train": 0.8, "validation": 0.9, "test": 1.0}
SHOWN = 5  # So many subjects are named where one is unknown.


def check_part(entry: DataEntry, split: str) -> None:
    """Refuse a part that a division by hash does not have.

    Raises:
        DataError: The split is none of PARTS.
    """
    if entry.split_by is not None and split not in PARTS:
        raise DataError(
            f"{entry.format}: split_by {entry.split_by} has the parts {', '.join(PARTS)}, got split"
            f" {split}; name one of them with split"
        )


def take_part(examples: Sequence[Example], entry: DataEntry, split: str) -> list[Example]:
    """Return the examples of one part of a division by hash.

    An example's part follows from its question alone. So it is the same in every file and in any
    order, and does not change when rows are added.

    Raises:
        DataError: There are examples, but none in this part.
    """
    kept = [example for example in examples if find_part(example) == split]
    if examples and not kept:
        raise DataError(
            f"{entry.format}: split_by {entry.split_by}: none of the {len(examples):,} rows falls"
            f" into split {split}; take more rows, or name a file of each split"
        )
    return kept


def find_part(example: Example) -> str:
    """Return the part that an example falls into: train, validation or test."""
    key = question_key(example.text if isinstance(example, Passage) else example.question)
    # 8 bytes are a whole number below 2**64; as a share of that they are uniform in [0, 1).
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    return next((part for part, end in PARTS.items() if place < end), "test")


def question_key(text: str) -> str:
    """Return the letters and digits of a text, without case, accents, blanks and punctuation.

    Questions that differ in meaning may have one key, such as "pH < 7" and "pH > 7": they only fall
    into the same part. Two spellings of one question must never have two keys.
    """
    folded = unicodedata.normalize("NFKD", to_nfc(text)).casefold()
    # Folding can make characters that decompose once more.
    folded = unicodedata.normalize("NFKD", folded)
    return "".join(character for character in folded if character.isalnum())


def take_subjects(examples: Sequence[Example], entry: DataEntry) -> list[Example]:
    """Return the examples of the entry's subjects, which are compared without case.

    Raises:
        DataError: No example has one of the subjects.
    """
    # A passage has no subject.
    subjects = [fold(getattr(example, "subject", None) or "") for example in examples]
    counts = Counter(filter(None, subjects))
    chosen = {fold(wanted) for wanted in entry.subjects}
    for wanted in entry.subjects:
        if examples and fold(wanted) not in counts:
            raise DataError(
                f"{entry.format}: no row has the subject {wanted!r}; {suggest(wanted, counts)}"
            )
    pairs = zip(examples, subjects, strict=True)
    return [example for example, subject in pairs if subject in chosen]


def fold(name: str) -> str:
    """Return a subject's name as names are compared: without case, with single blanks."""
    return " ".join(name.casefold().split())


def suggest(wanted: str, counts: Counter[str]) -> str:
    """Name the subjects nearest to one that no row has, or the most frequent ones.

    Args:
        wanted: The name that no row has.
        counts: The number of rows of each subject.
    """
    if not counts:
        return "the rows name no subjects, so leave subjects out"
    names = difflib.get_close_matches(fold(wanted), counts, n=SHOWN)
    which = "nearest"
    if not names:
        names = [name for name, _ in counts.most_common(SHOWN)]
        which = "most frequent"
    listed = ", ".join(f"{name} ({counts[name]:,})" for name in names)
    return f"the {which} of {len(counts):,} subjects, with their rows: {listed}"
