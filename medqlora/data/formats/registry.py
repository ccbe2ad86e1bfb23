"""What the rest of the package knows of a dataset, which registers itself in a file of its own.

To add one, write a file beside this one that calls `register`; nothing else changes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from medqlora.core.config import DataEntry
from medqlora.data.examples import LETTERS, DataError, Example, MultipleChoice

Record = dict
Records = list[tuple[str, Record]]  # the place of each record, and the record


def keep_records(records: Records, entry: DataEntry, on_hub: bool) -> Records:
    return records


def keep_examples(examples: list[Example], entry: DataEntry, split: str) -> list[Example]:
    return examples


def ask_by_letter(example: MultipleChoice, context: str) -> str:
    """Question, lettered options and "Answer:", as most tasks of lm-evaluation-harness ask."""
    return "\n".join([f"Question: {example.question}", *letter_options(example), "Answer:"])


def letter_options(example: MultipleChoice) -> list[str]:
    lettered = zip(LETTERS, example.options, strict=False)
    return [f"{letter}. {option}" for letter, option in lettered]


@dataclass(frozen=True)
class HarnessPrompt:
    """A dataset's prompt in lm-evaluation-harness 0.4.13, character by character.

    Args:
        ask: example and joined context -> all text up to the answer.
        lead: example -> text before everything, worked examples included.
        answer: what completes the prompt, a letter or an option's text; "cloze" is an option's
            text after a question that is asked without options.
        takes_context: whether the prompt has a place for passages.
    """

    ask: Callable[[MultipleChoice, str], str] = ask_by_letter
    lead: Callable[[MultipleChoice], str] = lambda example: ""
    answer: Literal["letter", "text", "cloze"] = "letter"
    takes_context: bool = False


@dataclass(frozen=True)
class Format:
    """One dataset, or one layout of a user's own.

    Args:
        name: how entries and flags call it.
        parse: (record, its place, entry) -> example. A ValueError says what is wrong with the
            record; the caller puts the place before it. An empty id is replaced by a hash.
        scoring: how its questions are scored where nothing else is asked for.
        hub: (hub id, subset) of its home, for entries without a path.
        published_split: the split that scores are published on.
        fewshot_split: the split that worked examples come from.
        fewshot_by_subject: whether they must be of the question's own subject, in their order.
        signatures: keys that only its records have; a record that has all of one group fits.
        prepare: (records, entry, on_hub) -> records, with what only a whole file shows.
        select_split: (examples, entry, split) -> examples, where one file holds several splits.
        splits_share_a_file: whether train and test may lie in one file, told apart by the above.
        harness: its prompt in lm-evaluation-harness.
    """

    name: str
    parse: Callable[[Record, str, DataEntry], Example]
    scoring: Literal["letters", "generate", "perplexity"] = "letters"
    hub: tuple[str, str | None] | None = None
    published_split: str = "test"
    fewshot_split: str = "train"
    fewshot_by_subject: bool = False
    signatures: tuple[frozenset[str], ...] = ()
    prepare: Callable[[Records, DataEntry, bool], Records] = keep_records
    select_split: Callable[[list, DataEntry, str], list] = keep_examples
    splits_share_a_file: bool = False
    harness: HarnessPrompt = HarnessPrompt()


FORMATS: dict[str, Format] = {}


def register(entry: Format) -> None:
    assert entry.name not in FORMATS, f"two files register the format {entry.name}"
    FORMATS[entry.name] = entry


def find_format(name: str, place: str = "format") -> Format:
    """The registered format of this name.

    Raises:
        DataError: there is none.
    """
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise DataError(f"{place} {name}: expected one of {', '.join(sorted(FORMATS))}{hint}")
