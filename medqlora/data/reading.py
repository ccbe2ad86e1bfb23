"""Turn the records of a data entry into examples.

Every error names the format, the file, and the line (of JSON lines) or the row.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from medqlora.core.config import DataEntry
from medqlora.data.examples import DataError, Example, Removal
from medqlora.data.formats.registry import FORMATS, Format, find_format
from medqlora.data.sources import locate_file, read_records


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
        f"{entry.format}: {source}: has {', '.join(map(str, record))}; {entry.format} needs "
        f"{' or '.join(groups)}; {hint}"
    )


def has_signature(record: dict, kind: Format) -> bool:
    """Whether a record has all keys of one of a format's signatures."""
    return any(group <= set(record) for group in kind.signatures)


def read_examples(
    entry: DataEntry, split: str, drop_invalid: bool = False
) -> tuple[list[Example], list[Removal]]:
    """Read the examples of one data entry.

    Args:
        entry: The entry. Its own `split`, if it has one, is used instead of `split`.
        split: The split to read.
        drop_invalid: Return bad rows as removals instead of raising at the first one.

    Returns:
        Examples with non-empty ids, at most `entry.limit`, and the removals. A missing id becomes
        "<dataset>-<hash of the content>".

    Raises:
        DataError: The entry or a row cannot be used.
    """
    kind = find_format(entry.format)
    split = entry.split or split
    name, records = read_records(entry, split)
    if not records:
        raise DataError(f"{entry.format}: {name} holds no rows; expected at least one")
    # The first record stands for its file. A later one with other keys fails in its parser, which
    # names the line.
    check_signature(entry, *records[0])
    # `prepare` sees the whole file before any record is parsed. It tells, for example, from which
    # number a file counts its options.
    records = kind.prepare(records, entry, locate_file(entry, split) is None)
    examples = []
    removals = []
    for source, record in records:
        try:
            examples.append(kind.parse(record, source, entry))
        except (ValueError, TypeError, AttributeError) as error:
            if not drop_invalid:
                fix = "correct the row, or leave such rows out with drop_invalid"
                raise DataError(f"{entry.format}: {source}: {error} ({fix})") from None
            removals.append(Removal(source, str(record.get("id") or ""), str(error)))
    examples = kind.select_split(examples, entry, split)
    examples = [
        example if example.id else replace(example, id=content_id(example)) for example in examples
    ]
    # The limit counts usable examples of the split, so it is applied last.
    return examples[: entry.limit], removals


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
