"""PubMedQA (Jin et al., 2019): questions answered by yes, no or maybe from an abstract."""

from __future__ import annotations

import json
from pathlib import Path

from medqlora.core.config import DataEntry
from medqlora.data.examples import DataError, MultipleChoice
from medqlora.data.formats.fields import need_text, optional_text
from medqlora.data.formats.registry import Format, HarnessPrompt, register

# The order gives the options their letters in the styles plain and chat, so changing it would
# change every such prompt.
PUBMEDQA_OPTIONS = ("yes", "no", "maybe")
TEST_LISTS = ("test_pmids.txt", "test_ground_truth.json")  # files looked for beside the data


def parse_pubmedqa(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    """Parse a PubMedQA question, in the original form or in the hub's.

    The original form has keys in capitals and the passages under "CONTEXTS"; the hub's has them
    under "contexts" inside "context".
    """
    record = {key.lower(): value for key, value in record.items()}
    context = record["contexts"] if "contexts" in record else (record.get("context") or {})
    passages = context.get("contexts") if isinstance(context, dict) else context
    if not isinstance(passages, (list, tuple)) or not passages:
        raise ValueError('"contexts" is empty; every question needs its abstract')
    decision = record.get("final_decision")
    if isinstance(decision, bool):  # YAML 1.1 reads a bare no as False
        decision = "yes" if decision else "no"
    if decision is not None and decision not in PUBMEDQA_OPTIONS:
        raise ValueError(f"final_decision is {decision!r}; expected yes, no or maybe")
    return MultipleChoice(
        # The id is the PMID as text, as the official list spells it. An integer would be in no
        # list, and test questions would be trained on.
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
    """Keep the questions of a split.

    The official test set is a list of 500 PMIDs; every other question belongs to the training set.
    Without a list, at most 500 rows are taken to be a part that holds no test questions.

    Raises:
        DataError: A list is needed and there is none, or it cannot be read, or the split is empty.
    """
    if split == "all":
        return examples
    list_file = entry.test_pmids
    if list_file is None:
        list_file = find_test_list(entry)
    if list_file is None:
        # A file with more than 500 of the 1,000 labelled questions holds some of the 500 test
        # questions.
        if len(examples) > 500 or split == "test":
            raise DataError(
                f"pubmedqa: split {split} of {len(examples)} rows needs the official list of test"
                " PMIDs; set test_pmids to test_ground_truth.json of PubMedQA's repository, or"
                " split: all to take every row"
            )
        return examples
    try:
        text = Path(list_file).expanduser().read_text(encoding="utf-8")
        pmids = set(json.loads(text)) if list_file.endswith(".json") else set(text.split())
    except (OSError, ValueError) as error:
        raise DataError(f"pubmedqa: test_pmids {list_file} cannot be read: {error}") from None
    # Train and validation are the same questions here: all that are not on the list.
    kept = [example for example in examples if (example.id in pmids) == (split == "test")]
    if not kept:
        raise DataError(
            f"pubmedqa: none of the {len(examples)} rows belongs to split {split} by {list_file}"
        )
    return kept


def find_test_list(entry: DataEntry) -> str | None:
    """Return the official list of test PMIDs that lies beside the entry's file, if there is one."""
    path = Path(entry.path).expanduser() if entry.path else None
    if path is None or not path.exists():
        return None
    folder = path if path.is_dir() else path.parent
    for name in TEST_LISTS:
        if (folder / name).is_file():
            return str(folder / name)
    return None


def ask_harness(example: MultipleChoice, context: str) -> str:
    """Return the prompt of lm-evaluation-harness's task pubmedqa."""
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
