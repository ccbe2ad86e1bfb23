"""PubMedQA (Jin et al., 2019): yes, no or maybe from an abstract."""

from __future__ import annotations

import json
from pathlib import Path

from medqlora.core.config import DataEntry
from medqlora.data.examples import DataError, MultipleChoice
from medqlora.data.formats.fields import need_text, optional_text
from medqlora.data.formats.registry import Format, HarnessPrompt, register

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


def ask_harness(example: MultipleChoice, context: str) -> str:
    return f"Abstract: {context}\nQuestion: {example.question}\nAnswer:"


register(
    Format(
        name="pubmedqa",
        parse=parse_pubmedqa,
        hub=("qiaojin/PubMedQA", "pqa_labeled"),
        signatures=(
            frozenset({"QUESTION", "CONTEXTS"}),
            frozenset({"question", "context", "long_answer"}),
        ),
        select_split=select_pubmedqa_split,
        splits_share_a_file=True,
        harness=HarnessPrompt(ask=ask_harness, answer="text", takes_context=True),
    )
)
