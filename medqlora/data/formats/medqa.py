"""MedQA (Jin et al., 2021): questions of the United States medical licensing examination."""

from __future__ import annotations

import re
from pathlib import Path

from medqlora.core.config import DataEntry
from medqlora.data.examples import DataError, MultipleChoice, Written
from medqlora.data.formats.fields import (
    check_answer,
    is_blank,
    need_text,
    optional_label,
    optional_text,
    whole_number,
    written_answer,
)
from medqlora.data.formats.options import read_columns, read_options
from medqlora.data.formats.registry import Format, register

# Where the questions lie in the download, below a folder of it.
PLACES = ("", "US", "questions/US", "data_clean/questions/US")
# The two forms of the questions there, with the file of a split. Published scores are of the first.
FORMS = {"4_options": "4_options/phrases_no_exclude_{}.jsonl", "5_options": "{}.jsonl"}


def parse_medqa(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    """Parse a MedQA question, in the original form or in the one of the hub's "-hf" copies.

    The original form has "options" and "answer_idx", the other "sent1", "ending0" ... and "label".
    """
    if "sent1" in record:
        # Each name ends in one digit, so the order of names is the order of numbers.
        endings = sorted(key for key in record if re.fullmatch(r"ending\d", key))
        options = read_columns([record[key] for key in endings])
        label = record.get("label")
        # This form counts options from 0; -1 is a hidden label.
        hidden = is_blank(label) or label in (-1, "-1")
        answer = None if hidden else whole_number(label, "label")
        if entry.answer_is is None:
            check_answer(answer, options)
        elif not hidden:
            answer = Written(label, field="label")
        question = need_text(record, "sent1")
    else:
        options = read_options(record.get("options"))
        question = need_text(record, "question")
        # A copy whose options were shuffled without their letters would train wrong answers, so the
        # text of the answer must agree where the file has it.
        answer = written_answer(record, "answer_idx", optional_text(record, "answer"))
    return MultipleChoice(
        id=optional_label(record, "id") or "",
        question=question,
        options=options,
        answer=answer,
        dataset="medqa",
        source=source,
        subject=optional_label(record, "meta_info"),
    )


def find_published_file(folder: Path, names: tuple[str, ...], subset: str | None) -> Path | None:
    """Return the file of a split in MedQA's download, or in its folder 4_options alone.

    The download has each question in two forms, with 5 options and with 4. An entry names one of
    FORMS as its subset.

    Raises:
        DataError: Both forms are there and none is named, or the named one lacks the split.
    """
    if subset in (None, "4_options"):
        flat = [folder / Path(FORMS["4_options"]).name.format(name) for name in names]
        if any(file.is_file() for file in flat):
            return next(file for file in flat if file.is_file())
    homes = [folder / place for place in PLACES if (folder / place / "4_options").is_dir()]
    if not homes:
        return None
    if subset not in FORMS:
        got = "no subset is given" if subset is None else f"subset {subset} is neither"
        raise DataError(
            f"medqa: folder {homes[0]} holds each question with 4 options and with 5, and {got};"
            " set subset to 4_options, as in published scores, or to 5_options"
        )
    files = [homes[0] / FORMS[subset].format(name) for name in names]
    found = [file for file in files if file.is_file()]
    if not found:
        raise DataError(
            f"medqa: folder {homes[0]} has no {FORMS[subset].format(names[-1])}; restore it, or"
            " name a file in `path`"
        )
    return found[0]


register(
    Format(
        name="medqa",
        parse=parse_medqa,
        hub=("GBaker/MedQA-USMLE-4-options", None),
        license="MIT",
        language="en",
        answers=("letter",),
        find_published=find_published_file,
        signatures=(
            frozenset({"question", "options", "answer_idx"}),
            frozenset({"sent1", "ending0", "label"}),
            frozenset({"question", "options", "meta_info"}),
        ),
    )
)
