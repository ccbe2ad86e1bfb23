"""The kinds of examples that the rest of the package works on, and their error."""

from __future__ import annotations

from dataclasses import dataclass

from medqlora.core.errors import UserError

# The number of letters is the largest number of options that a question can have.
LETTERS = "ABCDEFGHIJ"
# The names and values of the columns that a data entry's `keep` names; None is no value. They are
# no part of a prompt: scores are grouped by them.
Columns = tuple[tuple[str, str | None], ...]


class DataError(UserError):
    """A record, file or data entry that cannot be used."""


@dataclass(frozen=True, slots=True)
class Written:
    """The answer of a multiple-choice question as its file writes it.

    Whether it is a letter, a text or an index is only known when the whole file has been read (see
    answer_reading).

    Args:
        value: The field of the record.
        text: The text of the right option, where the record gives that too. Both must agree.
        field: The name of the field, for messages.
    """

    value: object
    text: str | None = None
    field: str = "answer"


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The answer of an open question that its record does not hold.

    Whether that is a fault of the row or the file has no answers at all is only known when the
    whole file has been read (see reading.settle_open_answers).

    Args:
        reason: What the record lacks, for messages.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """A piece of another text that is shown with a question (see retrieval)."""

    id: str  # the text's name and the number of the piece in it, from 1: "book.txt#12"
    source: str  # the file and its passage, for messages
    text: str
    library: str = ""  # SHA-256 of all texts that were searched


@dataclass(frozen=True, slots=True)
class MultipleChoice:
    """A question with several options, one of which is right."""

    id: str
    question: str
    options: tuple[str, ...]
    # The answer is an index into `options`, or None where the dataset hides the label. A parser may
    # leave it as written; read_entry returns no such example.
    answer: int | Written | None
    dataset: str
    source: str  # the file and the line, for messages
    subject: str | None = None
    topic: str | None = None
    choice_type: str | None = None
    context: tuple[str, ...] = ()  # passages that are shown before the question
    explanation: str | None = None
    evidence: tuple[Evidence, ...] = ()  # its numbers in the prompt count from 1
    columns: Columns = ()


@dataclass(frozen=True, slots=True)
class OpenAnswer:
    """A question that is answered in free text."""

    id: str
    question: str
    # The answer is None where the file holds no answers. A parser may return Unanswered; read_entry
    # returns no such example.
    answer: str | Unanswered | None
    dataset: str
    source: str
    subject: str | None = None
    context: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    columns: Columns = ()


@dataclass(frozen=True, slots=True)
class Passage:
    """Plain text to learn from or to measure perplexity on."""

    id: str
    text: str
    dataset: str
    source: str
    # Training joins a passage to the one before it where both have the same document and the place
    # of the second is one more.
    document: str = ""
    place: int = 0
    columns: Columns = ()


Example = MultipleChoice | OpenAnswer | Passage


@dataclass(frozen=True, slots=True)
class Removal:
    """A record or example that was dropped, with the reason."""

    source: str
    id: str
    reason: str
