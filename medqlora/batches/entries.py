"""Data entries: what they name is there, is no evaluation data of another one, and is read."""

from __future__ import annotations

from typing import Any

from medqlora.core.config import Data, DataEntry
from medqlora.data.cleaning import clean
from medqlora.data.examples import (
    DataError,
    Example,
    MultipleChoice,
    OpenAnswer,
    Passage,
    Removal,
)
from medqlora.data.formats.registry import find_format
from medqlora.data.reading import WHOLE, read_entry
from medqlora.data.retrieval import add_evidence, locate_library, open_library
from medqlora.data.selection import check_part
from medqlora.data.sources import locate_file

DEFAULT_SPLIT = {"train": "train", "eval": "validation", "test": "test"}


def name_entry(role: str, index: int) -> str:
    """Return what error messages call a data entry."""
    return f"data.{role}[{index}]"


def check_entries(data: Data) -> None:
    """Check that every file is there and that no evaluation data is also training data.

    Raises:
        DataError: One of the two does not hold, or data.train is empty.
    """
    if not data.train:
        raise DataError(
            "data.train is empty; give at least one entry, e.g. {format: medmcqa, path: FILE}"
        )
    # The training entries that read each home, with the part that they take of it.
    trained: dict[Any, list[tuple[str | None, str]]] = {}
    for role in ("train", "eval", "test"):
        for index, entry in enumerate(getattr(data, role)):
            name = name_entry(role, index)
            find_format(entry.format, f"{name}: format")
            split = entry.split or DEFAULT_SPLIT[role]
            check_part(entry, split)
            home = find_home(entry, split)
            # A whole file holds every part of itself.
            part = split if entry.split_by else None
            if role == "train":
                trained.setdefault(home, []).append((part, name))
                continue
            for other, training in trained.get(home, []):
                if other is None or part is None or other == part:
                    raise DataError(
                        f"{name} is the same data as {training} ({home[0]}); evaluate on other"
                        " data, or on another split of it, with split_by: hash in both entries"
                    )
    if data.retrieval is not None:
        locate_library(data.retrieval)


def find_home(entry: DataEntry, split: str) -> tuple[Any, str]:
    """Return what two entries have in common that read the same data: a place and a split."""
    split = WHOLE if entry.split_by else split
    path = locate_file(entry, split)
    if path is None:
        return entry.path or entry.format, split
    # A file is the same data whatever split is named, unless its format keeps several in one file,
    # or its sets have names.
    part = split if find_format(entry.format).splits_share_a_file else ""
    named_set = entry.subset if path.suffix == ".json" else None
    return path.resolve(), named_set or part


def read_role(data: Data, role: str) -> tuple[list[list[Example]], list[Removal], list[str]]:
    """Read and clean the entries of data.train, data.eval or data.test.

    Args:
        data: The configuration's section.
        role: "train", "eval" or "test".

    Returns:
        The labelled examples of each entry, everything that was dropped, and what each entry's file
        was found to be.

    Raises:
        DataError: An entry cannot be used, or has rows without a label that may not be dropped.
    """
    entries = []
    removals = []
    descriptions = []
    for index, entry in enumerate(getattr(data, role)):
        reading = read_entry(entry, DEFAULT_SPLIT[role], data.drop_invalid)
        if not reading.examples:
            raise DataError(
                f"{name_entry(role, index)}: no valid row is left of {len(reading.removals)}"
            )
        descriptions.append(f"{name_entry(role, index)} {reading.description}")
        # Cleaning goes before every comparison and before hashing, so blanks never tell rows apart.
        examples = [clean(example, data.lowercase) for example in reading.examples]
        unlabelled = [example for example in examples if not is_labelled(example)]
        if unlabelled and role != "train":
            raise DataError(
                f"{name_entry(role, index)}: {unlabelled[0].source}: no label; a split with hidden"
                " answers cannot be evaluated on"
            )
        if unlabelled and not data.drop_invalid:
            raise DataError(
                f"{name_entry(role, index)}: {unlabelled[0].source}: no label; drop such rows with"
                " --data.drop_invalid true"
            )
        removals += reading.removals
        removals += [Removal(example.source, example.id, "no label") for example in unlabelled]
        entries.append([example for example in examples if is_labelled(example)])
    return entries, removals, descriptions


def show_passages(data: Data, roles: dict[str, list[list[Example]]]) -> tuple[str, list[str]]:
    """Give all questions their passages, in place.

    Args:
        data: The configuration's section.
        roles: The examples of each entry, by role.

    Returns:
        The SHA-256 of the texts that were searched, and what was found, for the user.

    Raises:
        DataError: The texts cannot be read, or an entry's questions find nothing.
    """
    library = open_library(data.retrieval, data.lowercase)
    descriptions = [f"data.retrieval {library.description}"]
    for role, entries in roles.items():
        for index, examples in enumerate(entries):
            entries[index], found = add_evidence(examples, library, data.num_passages)
            descriptions.append(f"{name_entry(role, index)}: {found}")
    return library.sha256, descriptions


def is_labelled(example: Example) -> bool:
    """Whether an example can be learned from; a passage needs no label."""
    return isinstance(example, Passage) or example.answer is not None


def check_test(examples: list[Example]) -> None:
    """Refuse test data that is not asked, or that one table of scores cannot hold.

    Raises:
        DataError: There are texts, or both multiple-choice and open questions.
    """
    first = {}
    for example in examples:
        first.setdefault(type(example), example.source)
    if Passage in first:
        raise DataError(
            f"data.test: {first[Passage]}: not a question; put text in data.eval, which measures"
            " its perplexity"
        )
    if len(first) > 1:
        raise DataError(
            f"data.test holds multiple-choice questions ({first[MultipleChoice]}) and open ones"
            f" ({first[OpenAnswer]}), which have no score in common; keep one kind, and ask the"
            " other with eval/predict.py --adapter after the training"
        )
