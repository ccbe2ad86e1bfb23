"""The registry of dataset formats, through which the rest of the package knows a dataset.

To add a dataset, write a module in this folder that calls `register`; nothing else changes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medqlora.core.config import DataEntry
from medqlora.data.examples import LETTERS, DataError, Example, MultipleChoice

FILE = "file"  # the split of a file that is evaluated as it is

Record = dict
Records = list[tuple[str, Record]]  # each record with its source: the file and the line


def keep_records(records: Records, entry: DataEntry) -> Records:
    """Return the records as they are: the default of `Format.prepare`."""
    return records


def keep_examples(examples: list[Example], entry: DataEntry, split: str) -> list[Example]:
    """Return the examples as they are: the default of `Format.select_split`."""
    return examples


def say_nothing(examples: list[Example], entry: DataEntry) -> str:
    """Return no words: the default of `Format.describe`."""
    return ""


def find_nothing(folder: Path, names: tuple[str, ...], subset: str | None) -> Path | None:
    """Return no file: the default of `Format.find_published`."""
    return None


def ask_by_letter(example: MultipleChoice, context: str) -> str:
    """Return question, lettered options and "Answer:", as most tasks of lm-evaluation-harness."""
    # No blank may follow "Answer:", because the completion begins with one.
    return "\n".join([f"Question: {example.question}", *letter_options(example), "Answer:"])


def letter_options(example: MultipleChoice) -> list[str]:
    """Return one line per option, each with its letter."""
    lettered = zip(LETTERS, example.options, strict=False)
    return [f"{letter}. {option}" for letter, option in lettered]


@dataclass(frozen=True)
class HarnessPrompt:
    """A dataset's prompt in lm-evaluation-harness 0.4.13, character by character.

    Args:
        ask: Takes an example and its joined passages; returns the text up to the answer.
        lead: Takes an example; returns the text before everything else, worked examples included.
        answer: Says how the prompt is completed: by a letter, by an option's text, or ("cloze") by
            an option's text after a question that is asked without its options.
        takes_context: Whether the prompt has a place for passages.
    """

    ask: Callable[[MultipleChoice, str], str] = ask_by_letter
    lead: Callable[[MultipleChoice], str] = lambda example: ""
    answer: Literal["letter", "text", "cloze"] = "letter"
    takes_context: bool = False


@dataclass(frozen=True)
class Format:
    """One dataset, or one general layout for a user's own files.

    Args:
        name: The name in data entries and in the flag --format.
        parse: Takes a record, its source and the data entry; returns an example. It raises a
            ValueError that says what is wrong with the record, and the caller adds the source.
            An example may have an empty id, which is replaced by a hash of its content, and an
            answer that is still as written (see answer_reading).
        scoring: How the questions are scored unless the user asks for another method.
        hub: (hub id, subset) of the dataset, for entries without a path.
        license: The licence of the dataset, as its authors name it.
        language: The language of the dataset, by its code of two letters.
        published_split: The split on which published scores are measured.
        fewshot_split: The split from which worked examples are taken.
        fewshot_by_subject: Whether worked examples must have the question's subject and keep the
            order of their split.
        signatures: Groups of keys. A record that has all keys of one group has this format.
        header: The columns of a table whose first line is a row already, not the names of columns.
        answers: The ways in which the dataset is known to write its answers (see answer_reading);
            none where `parse` itself knows the right option, or where there are no options.
        hub_answers: The way in which the dataset's home on the hub writes them, if it differs.
        takes_columns: Whether `parse` uses the entry's column map.
        line_field: The field that each line of a .txt file is; None where no such file is read, or
            where it is a book.
        find_published: Takes a folder, the names of a split and the entry's subset, and returns the
            file of the split where the folder is laid out as the dataset's authors publish it, or
            None where it is not.
        prepare: Takes (records, entry) and returns the records that are read.
        select_split: Takes (examples, entry, split) and returns the examples of that split, for a
            file that holds several splits. The split is FILE where a file is evaluated whose split
            nobody has named.
        describe: Takes (examples, entry) and returns what is said of them to the user.
        splits_share_a_file: Whether one file may hold both train and test, which `select_split`
            then tells apart.
        harness: The dataset's prompt in lm-evaluation-harness.
    """

    name: str
    parse: Callable[[Record, str, DataEntry], Example]
    scoring: Literal["letters", "generate", "perplexity"] = "letters"
    hub: tuple[str, str | None] | None = None
    license: str | None = None
    language: str | None = None
    published_split: str = "test"
    fewshot_split: str = "train"
    fewshot_by_subject: bool = False
    signatures: tuple[frozenset[str], ...] = ()
    header: tuple[str, ...] = ()
    answers: tuple[str, ...] = ("letter", "text", "index0", "index1")
    hub_answers: str | None = None
    takes_columns: bool = False
    line_field: str | None = None
    find_published: Callable[[Path, tuple[str, ...], str | None], Path | None] = find_nothing
    prepare: Callable[[Records, DataEntry], Records] = keep_records
    select_split: Callable[[list, DataEntry, str], list] = keep_examples
    describe: Callable[[list, DataEntry], str] = say_nothing
    splits_share_a_file: bool = False
    harness: HarnessPrompt = HarnessPrompt()


# Whoever imports this module by its full name finds every dataset here, because Python first runs
# the package's __init__, which imports them all.
FORMATS: dict[str, Format] = {}


def register(new: Format) -> None:
    """Make a format known under its name."""
    assert new.name not in FORMATS, f"two files register the format {new.name}"
    FORMATS[new.name] = new


def find_format(name: str, place: str = "format") -> Format:
    """Return the registered format of a name.

    Args:
        name: The name.
        place: Where the name was given; it begins the error message.

    Raises:
        DataError: No format has this name.
    """
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise DataError(f"{place} {name}: expected one of {', '.join(sorted(FORMATS))}{hint}")
