"""Turn the records of a data entry into examples.

Every error names the format, the file, and the line (of JSON lines) or the row.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from medqlora.core.config import DataEntry
from medqlora.data.answer_reading import NAMES, settle_answers
from medqlora.data.examples import (
    DataError,
    Example,
    MultipleChoice,
    OpenAnswer,
    Removal,
    Unanswered,
)
from medqlora.data.formats.fields import check_cells, list_names, take_kept
from medqlora.data.formats.registry import FILE, FORMATS, Format, Records, find_format
from medqlora.data.selection import check_part, take_part, take_subjects
from medqlora.data.sources import read_records

FIX = "correct the row, or leave such rows out with drop_invalid"
# A division by hash reads this split of a folder or hub dataset: it is the only one of many.
WHOLE = "train"
# A prediction row has these values of the example itself, and scores are grouped by them too.
STRATA = ("dataset", "subject", "topic", "choice_type")


def check_signature(entry: DataEntry, source: str, record: dict) -> None:
    """Raise DataError where a record has the keys of another format, or of no format."""
    expected = find_format(entry.format)
    if not expected.signatures or has_signature(record, expected):
        return
    fitting = [other.name for other in FORMATS.values() if has_signature(record, other)]
    hint = "for a layout of your own use mcq or qa with columns"
    if fitting:
        hint = f"this looks like {fitting[0]}"
    groups = [", ".join(sorted(group)) for group in expected.signatures]
    raise DataError(
        f"{entry.format}: {source}: has {list_names(record)}; {entry.format} needs "
        f"{' or '.join(groups)}; {hint}"
    )


def has_signature(record: dict, kind: Format) -> bool:
    """Whether a record has all keys of one of a format's signatures."""
    return any(group <= set(record) for group in kind.signatures)


@dataclass(frozen=True)
class Reading:
    """What was read of one data entry.

    Args:
        examples: The examples, at most the entry's `limit`, with non-empty ids.
        removals: The rows that were left out.
        description: The name of the file, the split, the number of rows, and how the file was read.
    """

    examples: list[Example]
    removals: list[Removal]
    description: str


def read_examples(
    entry: DataEntry, split: str, drop_invalid: bool = False
) -> tuple[list[Example], list[Removal]]:
    """Return the examples and the removals of read_entry."""
    reading = read_entry(entry, split, drop_invalid)
    return reading.examples, reading.removals


def read_entry(
    entry: DataEntry, split: str, drop_invalid: bool = False, unlabelled: bool = False
) -> Reading:
    """Read the examples of one data entry.

    A missing id becomes "<dataset>-<hash of the content>".

    Args:
        entry: The entry. Its own `split`, if it has one, is used instead of `split`.
        split: The split to read.
        drop_invalid: Return bad rows as removals instead of raising at the first one.
        unlabelled: Whether open questions may come from a file without any answers.

    Raises:
        DataError: The entry or a row cannot be used, or the file's answers can be read in two ways.
    """
    kind = find_format(entry.format)
    split = entry.split or split
    check_meaning(entry, kind)
    check_part(entry, split)
    # A division by hash is one of the rows that would be trained on without it.
    home = split if entry.split_by is None else WHOLE
    name, records = read_records(entry, home)
    if not records:
        raise DataError(f"{entry.format}: {name} holds no rows; expected at least one")
    # The first record stands for its file. A later one with other keys fails in its parser, which
    # names the line.
    check_signature(entry, *records[0])
    check_kept(entry, name, records)
    examples, removals = parse_records(kind, kind.prepare(records, entry), entry, drop_invalid)
    # Every row of the file takes part in this, whatever the split and the limit are.
    known = kind.answers
    if kind.hub_answers and entry.path in (None, kind.hub[0]):
        known = (kind.hub_answers,)
    examples, misfits, answers = settle_answers(examples, known, entry.answer_is, drop_invalid)
    removals += misfits
    examples, unanswered = settle_open_answers(examples, entry, drop_invalid, unlabelled)
    removals += unanswered
    examples = kind.select_split(examples, entry, home)
    if entry.subjects is not None:
        examples = take_subjects(examples, entry)
    if entry.split_by is not None:
        examples = take_part(examples, entry, split)
    examples = [
        example if example.id else replace(example, id=content_id(example)) for example in examples
    ]
    # The limit counts usable examples of the split, so it is applied last.
    examples = examples[: entry.limit]
    place = f"{entry.format} {name}, {name_split(entry, split)}"
    return Reading(examples, removals, describe_reading(entry, place, examples, answers))


def name_split(entry: DataEntry, split: str) -> str:
    """Return a split in words."""
    if entry.split_by is not None:
        return f"split {split} by a hash of each question"
    return "the file as it is" if split == FILE else f"split {split}"


def describe_reading(
    entry: DataEntry, place: str, examples: list[Example], answers: str | None
) -> str:
    """Return in words how many examples were read, and how.

    Args:
        entry: The entry.
        place: What the examples were read from.
        examples: The examples.
        answers: How the file writes its answers (see answer_reading); None where that is known.
    """
    kind = find_format(entry.format)
    unit = "passages" if kind.scoring == "perplexity" else "rows"
    subjects = [" ".join(subject.split()) for subject in entry.subjects or ()]
    of_subjects = f" of {', '.join(subjects)}" if subjects else ""
    parts = [f"{place}: {len(examples):,} {unit}{of_subjects}"]
    if answers is not None:
        parts.append(f"answers are {NAMES[answers]}")
    hidden = sum(getattr(example, "answer", "") is None for example in examples)
    if hidden and isinstance(examples[0], OpenAnswer):
        parts.append("no row has an answer (if a column holds it, name it with columns)")
    elif hidden:
        parts.append(f"{hidden:,} without an answer")
    parts.append(describe_repeated_options(examples))
    parts.append(kind.describe(examples, entry))
    return "; ".join(part for part in parts if part)


def settle_open_answers(
    examples: list[Example], entry: DataEntry, drop_invalid: bool, unlabelled: bool
) -> tuple[list[Example], list[Removal]]:
    """Return the examples without those open questions that lack an answer.

    Where no question of the file has an answer and that is allowed, all of them stay, with the
    answer None. All rows of the file decide this together, so that a single empty answer stays a
    fault of its row.

    Raises:
        DataError: An answer is missing, and the row may not be dropped.
    """
    bare = [example for example in examples if is_unanswered(example)]
    if not bare:
        return examples, []
    if unlabelled and len(bare) == len(examples):
        return [replace(example, answer=None) for example in examples], []
    if not drop_invalid:
        raise DataError(f"{entry.format}: {bare[0].source}: {bare[0].answer.reason} ({FIX})")
    removals = [Removal(example.source, example.id, example.answer.reason) for example in bare]
    return [example for example in examples if not is_unanswered(example)], removals


def is_unanswered(example: Example) -> bool:
    """Whether an example is an open question whose record holds no answer."""
    return isinstance(example, OpenAnswer) and isinstance(example.answer, Unanswered)


def check_meaning(entry: DataEntry, kind: Format) -> None:
    """Refuse keys of an entry that its format would pass over.

    Raises:
        DataError: A key has no meaning for the format.
    """
    meaningless = {
        "answer_is": entry.answer_is is not None and not kind.answers,
        "columns": bool(entry.columns) and not kind.takes_columns,
        "test_pmids": entry.test_pmids is not None and not kind.splits_share_a_file,
    }
    for key, wrong in meaningless.items():
        if wrong:
            raise DataError(f"{entry.format}: {key} has no meaning for this format; leave it out")


def check_kept(entry: DataEntry, name: str, records: Records) -> None:
    """Refuse columns to keep that no row has, and names that a row has a field of its own for.

    Raises:
        DataError: `keep` names such a column.
    """
    for column in entry.keep:
        if column in STRATA:
            raise DataError(
                f"{entry.format}: keep names {column}, and every prediction row has a {column} of"
                " its own, which may be another one: leave it out of keep, or give the file's"
                " column another name"
            )
        if not any(column in record for _, record in records):
            raise DataError(
                f"{entry.format}: keep names {column}, which no row of {name} has; the first row"
                f" has {list_names(records[0][1])}"
            )


def parse_records(
    kind: Format, records: Records, entry: DataEntry, drop_invalid: bool
) -> tuple[list[Example], list[Removal]]:
    """Parse every record; answers may stay as written.

    Raises:
        DataError: A record is invalid and may not be dropped.
    """
    examples = []
    removals = []
    for source, record in records:
        try:
            check_cells(record)
            example = kind.parse(record, source, entry)
        except (ValueError, TypeError, AttributeError) as error:
            if not drop_invalid:
                raise DataError(f"{entry.format}: {source}: {error} ({FIX})") from None
            removals.append(Removal(source, str(record.get("id") or ""), str(error)))
            continue
        examples.append(keep_columns(example, record, source, entry) if entry.keep else example)
    return examples, removals


def keep_columns(example: Example, record: dict, source: str, entry: DataEntry) -> Example:
    """Return the example with the columns of its record that the entry keeps.

    Raises:
        DataError: A column holds a list or an object. Such a row is a good one, so it is not
            dropped as an invalid one is.
    """
    try:
        return replace(example, columns=take_kept(record, entry))
    except ValueError as error:
        raise DataError(f"{entry.format}: {source}: keep: {error}; leave it out of keep") from None


def describe_repeated_options(examples: list[Example]) -> str:
    """Return how many questions have two equal options, in words, or nothing."""
    questions = [example for example in examples if isinstance(example, MultipleChoice)]
    repeated = [item for item in questions if len(set(item.options)) < len(item.options)]
    if not repeated:
        return ""
    return f"{len(repeated):,} with two equal options, such as {repeated[0].source}"


def content_id(example: Example) -> str:
    """Return an id made from the example's own text.

    The id stays the same when a file is reordered or split.
    """
    # Evaluation divides questions into batches by their ids. Another list of keys would give every
    # example without an id of its own another one.
    keys = ("question", "options", "answer", "context", "text")
    parts = [getattr(example, key, None) for key in keys]
    digest = hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()
    return f"{example.dataset}-{digest[:16]}"
