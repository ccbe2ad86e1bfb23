"""Raw records -> examples: one reader per dataset format.

A record is a row as it stands in a file; an example is what the rest of the package works on. Every
error names the format, the file and the line (JSON lines) or row.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from medqlora.config import DataEntry, UserError

LETTERS = "ABCDEFGHIJ"


class DataError(UserError):
    """A record, file or data entry that cannot be used."""


@dataclass(frozen=True, slots=True)
class MultipleChoice:
    """A question with options of which one is right."""

    id: str
    question: str
    options: tuple[str, ...]
    answer: int | None  # index into options; None where the dataset hides it
    dataset: str
    source: str  # file and line, for messages
    subject: str | None = None
    topic: str | None = None
    choice_type: str | None = None
    context: tuple[str, ...] = ()  # passages to read before answering
    explanation: str | None = None


@dataclass(frozen=True, slots=True)
class OpenAnswer:
    """A question answered in free text."""

    id: str
    question: str
    answer: str | None
    dataset: str
    source: str
    subject: str | None = None
    context: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Passage:
    """Plain text to learn from or to measure perplexity on."""

    id: str
    text: str
    dataset: str
    source: str


Example = MultipleChoice | OpenAnswer | Passage


@dataclass(frozen=True, slots=True)
class Removal:
    """A record or example that was dropped, and why."""

    source: str
    id: str
    reason: str


# ---- files ---------------------------------------------------------------------------------------

HUB_HOMES = {
    "medmcqa": ("openlifescienceai/medmcqa", None),
    "medqa": ("GBaker/MedQA-USMLE-4-options", None),
    "pubmedqa": ("qiaojin/PubMedQA", "pqa_labeled"),
    "medquad": ("lavita/MedQuAD", None),
    "mmlu": ("cais/mmlu", "all"),
    "headqa": ("EleutherAI/headqa", "en"),
}
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
# MMLU's medical subjects, as medical papers report them (Singhal et al., Nature 620, 2023, "MMLU
# clinical topics").
MMLU_SUBJECTS = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
)
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def locate_file(entry: DataEntry, split: str) -> Path | None:
    """The entry's file, or None where its path is a hub id.

    Raises:
        DataError: no such file, or a folder without one file for the split.
    """
    if entry.path is None:
        if entry.format not in HUB_HOMES:
            raise DataError(f"{entry.format}: no path; give a file, folder or hub id with `path`")
        return None
    path = Path(entry.path).expanduser()
    suffixes = (*SUFFIXES, ".txt") if entry.format == "text" else SUFFIXES
    if path.is_dir():
        names = SPLIT_NAMES.get(split, (split,))
        found = [
            p for p in sorted(path.iterdir()) if p.suffix in suffixes and p.stem.lower() in names
        ]
        if not found:
            found = [
                p
                for p in sorted(path.iterdir())
                if p.suffix in suffixes and p.stem.lower().startswith(names)
            ]
        if len(found) != 1:
            listed = ", ".join(p.name for p in found) or "none"
            raise DataError(
                f"{entry.format}: folder {path} has {listed} for split {split}; name the file in"
                " `path`"
            )
        return found[0]
    if path.is_file():
        if path.suffix not in suffixes:
            raise DataError(
                f"{entry.format}: {path} ends in {path.suffix or 'nothing'}; expected"
                f" {' '.join(suffixes)}"
            )
        return path
    if (
        path.suffix in (*SUFFIXES, ".txt")
        or entry.path.startswith((".", "/", "~"))
        or entry.path.count("/") != 1
    ):
        raise DataError(
            f"{entry.format}: no file or folder {entry.path}; give an existing one or a hub id"
            " (owner/name)"
        )
    return None


def read_records(entry: DataEntry, split: str) -> tuple[str, list[tuple[str, dict]]]:
    """All records of an entry -> (name of the file or hub dataset, [(source, record)])."""
    path = locate_file(entry, split)
    if path is None:
        hub, subset = HUB_HOMES.get(entry.format, (None, None))
        hub = entry.path or hub
        subset = entry.subset or subset
        return hub, read_hub(hub, subset, split, entry.revision)
    name = path.name
    try:
        if path.suffix == ".jsonl":
            return name, read_json_lines(path)
        if path.suffix == ".json":
            return name, read_json(path)
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                return name, [
                    (f"{name} row {i}", row) for i, row in enumerate(csv.DictReader(file), 1)
                ]
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return name, [
                (f"{name} row {i}", r)
                for i, r in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
            ]
        return name, [
            (f"{name} passage {i}", {"text": t})
            for i, t in enumerate(split_text(path.read_text("utf-8")), 1)
        ]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{entry.format}: {name} is not UTF-8 text (byte {error.start}); convert the file"
        ) from None
    except OSError as error:
        raise DataError(f"{entry.format}: cannot read {path}: {error.strerror or error}") from None
    except (csv.Error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{entry.format}: {name} is not a valid {path.suffix} file: {error}"
        ) from None


def read_json_lines(path: Path) -> list[tuple[str, dict]]:
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            source = f"{path.name} line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{source}: not valid JSON ({error.msg} at column {error.colno}); mend the line"
                ) from None
            if not isinstance(record, dict):
                raise DataError(f"{source}: expected an object, got {type(record).__name__}")
            records.append((source, record))
    return records


def read_json(path: Path) -> list[tuple[str, dict]]:
    """A list of objects, or PubMedQA's original {id: object}."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path.name} line {error.lineno}: not valid JSON ({error.msg}); a file of one object"
            " per line is .jsonl"
        ) from None
    if isinstance(tree, dict) and tree and all(isinstance(value, dict) for value in tree.values()):
        return [(f"{path.name} key {key}", {"id": key, **value}) for key, value in tree.items()]
    if not isinstance(tree, list) or not all(isinstance(row, dict) for row in tree):
        raise DataError(f"{path.name}: expected a list of objects or an object of objects")
    return [(f"{path.name} row {i}", row) for i, row in enumerate(tree, 1)]


def read_hub(
    hub: str, subset: str | None, split: str, revision: str | None
) -> list[tuple[str, dict]]:
    import datasets

    try:
        table = datasets.load_dataset(hub, subset, split=split, revision=revision)
    # the library raises a dozen unrelated types for one mistake of the user
    except Exception as error:  # noqa: BLE001
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"hub dataset {hub} (subset {subset}, split {split}) cannot be loaded: {reason}"
        ) from None
    return [(f"{hub} {split} row {i}", dict(row)) for i, row in enumerate(table, 1)]


def split_text(text: str, characters: int = 2_000) -> list[str]:
    """Paragraphs joined up to about `characters`, so that a book becomes rows."""
    passages = []
    current = ""
    for paragraph in re.split(r"\n\s*\n", text):
        if current and len(current) + len(paragraph) > characters:
            passages.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
    return [*passages, current] if current.strip() else passages


# ---- one parser per format -----------------------------------------------------------------------
# Each takes (record, source, entry) and returns an example; a ValueError becomes a DataError with
# the place before it.


def need_text(record: dict, key: str) -> str:
    value = record.get(key)
    # NaN is how pandas writes nothing
    if value is None or value != value or not str(value).strip():
        raise ValueError(f'"{key}" is empty; every row needs text there')
    return str(value)


def optional_text(record: dict, key: str) -> str | None:
    value = record.get(key)
    text = "" if value is None else str(value)
    return text if text[:4].lower() != "nan" and text.strip() else None


def parse_medmcqa(record: dict, source: str, entry: DataEntry, first_option: int) -> MultipleChoice:
    options = tuple(need_option(record, key) for key in ("opa", "opb", "opc", "opd"))
    cop = record.get("cop")
    answer = (
        None
        if cop in (None, -1, "", "-1") or cop != cop
        else whole_number(cop, "cop") - first_option
    )
    if answer is not None and not 0 <= answer < 4:
        raise ValueError(
            f"cop is {cop}; this file counts options from {first_option} to {first_option + 3}"
        )
    return MultipleChoice(
        id=optional_text(record, "id") or "",
        question=need_text(record, "question"),
        options=options,
        answer=answer,
        dataset="medmcqa",
        source=source,
        subject=optional_text(record, "subject_name"),
        topic=optional_text(record, "topic_name"),
        choice_type=optional_text(record, "choice_type"),
        explanation=optional_text(record, "exp"),
    )


def need_option(record: dict, key: str) -> str:
    value = record.get(key)
    if value is None or value != value or not str(value).strip():
        raise ValueError(f'option "{key}" is empty; every option needs text')
    return str(value)


def whole_number(value: object, name: str) -> int:
    try:
        if float(value) == int(float(value)) and not isinstance(value, bool):
            return int(float(value))
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} is {value!r}; expected a whole number")


def find_first_option(records: list[tuple[str, dict]], hub: bool) -> int:
    """MedMCQA's original files number the right option 1-4, the hub copy 0-3; a file shows which by
    its values.
    """
    values = set()
    for cop in {repr(record.get("cop")): record.get("cop") for _, record in records}.values():
        with contextlib.suppress(ValueError):
            values.add(str(whole_number(cop, "cop")))
    if "0" in values and "4" in values:
        raise DataError(
            'medmcqa: "cop" takes both 0 and 4; one file counts from 0 (hub) or from 1 (original),'
            " not both"
        )
    return 0 if "0" in values or (hub and "4" not in values) else 1


def parse_medqa(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    if "sent1" in record:  # the hub's "-hf" form
        endings = sorted(key for key in record if re.fullmatch(r"ending\d", key))
        options = tuple(need_option(record, key) for key in endings)
        letter = record.get("label")
        answer = None if letter in (None, -1) else whole_number(letter, "label")
        check_answer(answer, options)
        question = need_text(record, "sent1")
    else:
        options = read_options(record.get("options"))
        question = need_text(record, "question")
        letter = record.get("answer_idx")
        answer = None if letter is None else find_answer(letter, options)
        check_answer(answer, options)
        text = record.get("answer")
        if (
            answer is not None
            and text is not None
            and " ".join(str(text).split()) != " ".join(options[answer].split())
        ):
            raise ValueError(
                f'answer_idx {letter} is "{options[answer]}" but answer is "{text}"; they must'
                " agree"
            )
    return MultipleChoice(
        id=optional_text(record, "id") or "",
        question=question,
        options=options,
        answer=answer,
        dataset="medqa",
        source=source,
        subject=optional_text(record, "meta_info"),
    )


def read_options(value: object) -> tuple[str, ...]:
    """{"A": …}, [{"key": "A", "value": …}] or a list of texts, in the order of their letters."""
    if isinstance(value, str) and value.strip()[:1] in "[{":
        value = json.loads(value)
    if (
        isinstance(value, list)
        and value
        and all(isinstance(v, dict) and {"key", "value"} <= set(v) for v in value)
    ):
        value = {v["key"]: v["value"] for v in value}
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if v is not None}
        if sorted(value) != list(LETTERS[: len(value)]):
            raise ValueError(
                f"options are lettered {', '.join(map(str, value))}; expected"
                f" {', '.join(LETTERS[: len(value)])}"
            )
        value = [value[letter] for letter in LETTERS[: len(value)]]
    if not isinstance(value, (list, tuple)) or not 2 <= len(value) <= len(LETTERS):
        raise ValueError(
            f"options are {value!r}; expected 2 to {len(LETTERS)} texts, as a list or by letter"
        )
    for letter, text in zip(LETTERS, value, strict=False):
        if text is None or not str(text).strip():
            raise ValueError(f'option "{letter}" is empty; every option needs text')
    return tuple(map(str, value))


def find_answer(value: object, options: tuple[str, ...]) -> int:
    """A letter, an option's exact text, or a 0-based index -> index."""
    if isinstance(value, str):
        text = value.strip()
        if len(text) == 1 and text.upper() in LETTERS:
            return LETTERS.index(text.upper())
        if options.count(value) == 1:
            return options.index(value)
    try:
        return whole_number(value, "answer")
    except ValueError:
        raise ValueError(
            f"answer is {value!r}; expected a letter, an index from 0, or the text of one option"
        ) from None


def check_answer(answer: int | None, options: tuple[str, ...]) -> None:
    if answer is not None and not 0 <= answer < len(options):
        raise ValueError(
            f"answer is option {answer} (from 0) of {len(options)}; it must be one of the options"
        )


PUBMEDQA_OPTIONS = ("yes", "no", "maybe")


def parse_pubmedqa(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    record = {key.lower(): value for key, value in record.items()}
    context = record.get("contexts") if "contexts" in record else (record.get("context") or {})
    passages = context.get("contexts") if isinstance(context, dict) else context
    if not isinstance(passages, (list, tuple)) or not passages:
        raise ValueError('"contexts" is empty; every question needs its abstract')
    decision = record.get("final_decision")
    if isinstance(decision, bool):  # YAML 1.1 reads a bare no as False
        decision = "yes" if decision else "no"
    if decision is not None and decision not in PUBMEDQA_OPTIONS:
        raise ValueError(f"final_decision is {decision!r}; expected yes, no or maybe")
    return MultipleChoice(
        id=str(record.get("pubid") or record.get("id") or ""),
        question=need_text(record, "question"),
        options=PUBMEDQA_OPTIONS,
        answer=None if decision is None else PUBMEDQA_OPTIONS.index(decision),
        dataset="pubmedqa",
        source=source,
        context=tuple(str(p) for p in passages if str(p).strip()),
        explanation=optional_text(record, "long_answer"),
    )


def parse_mmlu(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    options = read_options(record.get("choices"))
    answer = None if record.get("answer") in (None, -1) else find_answer(record["answer"], options)
    check_answer(answer, options)
    return MultipleChoice(
        id=optional_text(record, "id") or "",
        question=need_text(record, "question"),
        options=options,
        answer=answer,
        dataset="mmlu",
        source=source,
        subject=optional_text(record, "subject"),
    )


def parse_headqa(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    """`answers` is [{aid: 1…, atext}], `ra` the number of the right one."""
    answers = record.get("answers")
    if isinstance(answers, dict):  # how older versions of datasets give a list of objects
        answers = [
            {"aid": aid, "atext": text}
            for aid, text in zip(answers["aid"], answers["atext"], strict=True)
        ]
    if not isinstance(answers, list) or not all(
        isinstance(a, dict) and "atext" in a for a in answers
    ):
        raise ValueError(
            f'"answers" is {answers!r}; expected a list of {{"aid": number, "atext": text}}'
        )
    options = read_options([a["atext"] for a in answers])
    right = record.get("ra")
    numbers = [whole_number(a.get("aid", i), "aid") for i, a in enumerate(answers, 1)]
    if right not in (None, -1) and whole_number(right, "ra") not in numbers:
        raise ValueError(f"ra is {right}; the answers are numbered {', '.join(map(str, numbers))}")
    name = optional_text(record, "name")
    number = optional_text(record, "qid")
    return MultipleChoice(
        id=f"{name}-{number}" if name and number else "",
        question=need_text(record, "qtext"),
        options=options,
        dataset="headqa",
        answer=None if right in (None, -1) else numbers.index(whole_number(right, "ra")),
        source=source,
        subject=optional_text(record, "category"),
    )


def parse_medquad(record: dict, source: str, entry: DataEntry) -> OpenAnswer:
    subject = optional_text(record, "qtype") or optional_text(record, "question_type")
    return OpenAnswer(
        # ids repeat across its sources: content_id gives one
        id="",
        question=need_text(record, "question"),
        answer=need_text(record, "answer"),
        dataset="medquad",
        source=source,
        subject=subject,
    )


def take_columns(record: dict, entry: DataEntry) -> dict:
    """Rename by the entry's column map: {our field: the file's column}."""
    taken = dict(record)
    for field, column in entry.columns.items():
        names = [column] if isinstance(column, str) else column
        missing = [name for name in names if name not in record]
        if missing:
            raise ValueError(
                f'columns.{field} names "{missing[0]}"; the row has {", ".join(map(str, record))}'
            )
        taken[field] = (
            record[column] if isinstance(column, str) else [record[name] for name in column]
        )
    return taken


def read_context(record: dict) -> tuple[str, ...]:
    value = record.get("context")
    return (
        tuple(map(str, value))
        if isinstance(value, (list, tuple))
        else ((str(value),) if value else ())
    )


def parse_mcq(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    record = take_columns(record, entry)
    options = read_options(record.get("options"))
    answer = None if record.get("answer") in (None, "") else find_answer(record["answer"], options)
    check_answer(answer, options)
    return MultipleChoice(
        id=optional_text(record, "id") or "",
        question=need_text(record, "question"),
        options=options,
        answer=answer,
        dataset="mcq",
        source=source,
        subject=optional_text(record, "subject"),
        topic=optional_text(record, "topic"),
        context=read_context(record),
        explanation=optional_text(record, "explanation"),
    )


def parse_qa(record: dict, source: str, entry: DataEntry) -> OpenAnswer:
    record = take_columns(record, entry)
    return OpenAnswer(
        id=optional_text(record, "id") or "",
        question=need_text(record, "question"),
        answer=need_text(record, "answer"),
        dataset="qa",
        source=source,
        subject=optional_text(record, "subject"),
        context=read_context(record),
    )


def parse_text(record: dict, source: str, entry: DataEntry) -> Passage:
    record = take_columns(record, entry)
    return Passage(
        id=optional_text(record, "id") or "",
        text=need_text(record, "text"),
        dataset="text",
        source=source,
    )


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


def select_pubmedqa_split(
    examples: list[MultipleChoice], entry: DataEntry, split: str
) -> list[MultipleChoice]:
    """The official test is a list of 500 PMIDs; a file that is a part already needs no list.

    Raises: DataError: the file holds the whole labelled set (over 500 rows) and no list tells its
        test questions apart.
    """
    if split == "all":
        return examples
    listed = entry.test_pmids
    path = Path(entry.path).expanduser() if entry.path else None
    if listed is None and path is not None and path.exists():
        folder = path if path.is_dir() else path.parent
        beside = [
            folder / name
            for name in ("test_pmids.txt", "test_ground_truth.json")
            if (folder / name).is_file()
        ]
        listed = str(beside[0]) if beside else None
    if listed is None:
        if len(examples) > 500 or split == "test":
            raise DataError(
                f"pubmedqa: split {split} of {len(examples)} rows needs the official list of test"
                " PMIDs; set test_pmids to test_ground_truth.json of PubMedQA's repository, or"
                " split: all to take every row"
            )
        return examples
    try:
        text = Path(listed).expanduser().read_text(encoding="utf-8")
        pmids = set(json.loads(text)) if listed.endswith(".json") else set(text.split())
    except (OSError, ValueError) as error:
        raise DataError(f"pubmedqa: test_pmids {listed} cannot be read: {error}") from None
    kept = [example for example in examples if (example.id in pmids) == (split == "test")]
    if not kept:
        raise DataError(
            f"pubmedqa: none of the {len(examples)} rows belongs to split {split} by {listed}"
        )
    return kept
