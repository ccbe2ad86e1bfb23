"""Records become examples.

Every error names the format, the file and the line (JSON lines) or row.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from medqlora.core.config import DataEntry
from medqlora.data.examples import DataError, Example, Removal
from medqlora.data.formats.custom import parse_mcq, parse_qa, parse_text
from medqlora.data.formats.headqa import parse_headqa
from medqlora.data.formats.medmcqa import find_first_option, parse_medmcqa
from medqlora.data.formats.medqa import parse_medqa
from medqlora.data.formats.medquad import parse_medquad
from medqlora.data.formats.mmlu import MMLU_SUBJECTS, parse_mmlu
from medqlora.data.formats.pubmedqa import parse_pubmedqa, select_pubmedqa_split
from medqlora.data.sources import locate_file, read_records

# Formats, and the split that scores are published on.
DATASETS = {
    "medmcqa": "validation",
    "medqa": "test",
    "pubmedqa": "test",
    "mmlu": "test",
    "headqa": "test",
    "medquad": "train",
    "mcq": "test",
    "qa": "test",
    "text": "test",
}
PARSERS = {
    "medmcqa": parse_medmcqa,
    "medqa": parse_medqa,
    "pubmedqa": parse_pubmedqa,
    "medquad": parse_medquad,
    "mmlu": parse_mmlu,
    "headqa": parse_headqa,
    "mcq": parse_mcq,
    "qa": parse_qa,
    "text": parse_text,
}
# Keys that only a record of this format has; any one group marks it.
SIGNATURES = {
    "medmcqa": ({"question", "opa", "opb", "opc", "opd"},),
    "medqa": (
        {"question", "options", "answer_idx"},
        {"sent1", "ending0", "label"},
        {"question", "options", "meta_info"},
    ),
    "pubmedqa": ({"QUESTION", "CONTEXTS"}, {"question", "context", "long_answer"}),
    "medquad": ({"question", "answer"},),
    "mmlu": ({"question", "choices", "answer"},),
    "headqa": ({"qtext", "answers", "ra"},),
}


def check_format(entry: DataEntry, source: str, record: dict) -> None:
    groups = SIGNATURES.get(entry.format, ())
    if not groups or any(group <= set(record) for group in groups):
        return
    fits = [
        name for name, other in SIGNATURES.items() if any(group <= set(record) for group in other)
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
    split = entry.split or split
    name, records = read_records(entry, split)
    if not records:
        raise DataError(f"{entry.format}: {name} holds no rows; expected at least one")
    check_format(entry, *records[0])
    extra = ()
    if entry.format == "medmcqa":
        extra = (find_first_option(records, hub=locate_file(entry, split) is None),)
    if entry.format == "mmlu" and entry.subset is None:
        records = [
            (source, record)
            for source, record in records
            if record.get("subject", "anatomy") in MMLU_SUBJECTS
        ]
        if not records:
            raise DataError(
                f"mmlu: {name} holds none of the medical subjects {', '.join(MMLU_SUBJECTS)}; name"
                " another with subset"
            )
    examples = []
    removals = []
    for source, record in records:
        try:
            examples.append(PARSERS[entry.format](record, source, entry, *extra))
        except (ValueError, TypeError, AttributeError) as error:
            if not drop_invalid:
                fix = "mend the row or drop such rows with --data.drop_invalid true"
                raise DataError(f"{entry.format}: {source}: {error} ({fix})") from None
            removals.append(Removal(source, str(record.get("id") or ""), str(error)))
    if entry.format == "pubmedqa":
        examples = select_pubmedqa_split(examples, entry, split)
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
