"""Records become examples.

Every error names the format, the file and the line (JSON lines) or row.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from medqlora.core.config import DataEntry
from medqlora.data.examples import DataError, Example, Removal
from medqlora.data.formats.registry import FORMATS, find_format
from medqlora.data.sources import locate_file, read_records


def check_signature(entry: DataEntry, source: str, record: dict) -> None:
    """Raises DataError where a record has the keys of another format, or of none."""
    groups = find_format(entry.format).signatures
    if not groups or any(group <= set(record) for group in groups):
        return
    fits = [
        other.name
        for other in FORMATS.values()
        if any(group <= set(record) for group in other.signatures)
    ]
    hint = (
        f"; this looks like {fits[0]}"
        if fits
        else "; for a layout of your own use mcq or qa with columns"
    )
    raise DataError(
        f"{entry.format}: {source}: has {', '.join(map(str, record))}; {entry.format} needs "
        f"{' or '.join(', '.join(sorted(group)) for group in groups)}{hint}"
    )


def read_examples(
    entry: DataEntry, split: str, drop_invalid: bool = False
) -> tuple[list[Example], list[Removal]]:
    """Read one data entry.

    Args:
        entry: what to read; its own `split` wins over `split`.
        drop_invalid: list bad rows as removals instead of raising at the first.

    Returns: examples with unique non-empty ids (a missing id becomes "<format>-<hash of the
        content>"), and removals.

    Raises:
        DataError: one line naming format, file and line.
    """
    kind = find_format(entry.format)
    split = entry.split or split
    name, records = read_records(entry, split)
    if not records:
        raise DataError(f"{entry.format}: {name} holds no rows; expected at least one")
    check_signature(entry, *records[0])
    records = kind.prepare(records, entry, locate_file(entry, split) is None)
    examples = []
    removals = []
    for source, record in records:
        try:
            examples.append(kind.parse(record, source, entry))
        except (ValueError, TypeError, AttributeError) as error:
            if not drop_invalid:
                fix = "mend the row or drop such rows with --data.drop_invalid true"
                raise DataError(f"{entry.format}: {source}: {error} ({fix})") from None
            removals.append(Removal(source, str(record.get("id") or ""), str(error)))
    examples = kind.select_split(examples, entry, split)
    examples = [
        example if example.id else replace(example, id=content_id(example)) for example in examples
    ]
    return (examples[: entry.limit], removals)


def content_id(example: Example) -> str:
    """An id from the example's own text, so that it does not change when a file is reordered or
    split.
    """
    parts = [
        getattr(example, key, None) for key in ("question", "options", "answer", "context", "text")
    ]
    digest = hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()
    return f"{example.dataset}-{digest[:16]}"
