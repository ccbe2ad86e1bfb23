"""PubMedQA (Jin et al., 2019): questions answered by yes, no or maybe from an abstract."""

from __future__ import annotations

import itertools
from pathlib import Path

from medqlora.core.config import DataEntry
from medqlora.core.json_reading import parse_json
from medqlora.data.examples import DataError, MultipleChoice
from medqlora.data.formats.fields import (
    is_blank,
    need_text,
    optional_label,
    optional_text,
    parse_literal,
    read_context,
)
from medqlora.data.formats.registry import FILE, Format, HarnessPrompt, register

# The order gives the options their letters in the styles plain and chat, so changing it would
# change every such prompt.
PUBMEDQA_OPTIONS = ("yes", "no", "maybe")
# The files of the repository's folder data/, by the names that the sets have on the hub.
SETS = {
    "pqa_labeled": "ori_pqal.json",
    "pqa_unlabeled": "ori_pqau.json",
    "pqa_artificial": "ori_pqaa.json",
}
FOLD = "pqal_fold"  # The folders of cross-validation begin so; each has a train_set and a dev_set.
TEST_LISTS = ("test_pmids.txt", "test_ground_truth.json")  # files looked for beside the data


def parse_pubmedqa(record: dict, source: str, entry: DataEntry) -> MultipleChoice:
    """Parse a PubMedQA question, in the original form or in the hub's.

    The original form has keys in capitals and the passages under "CONTEXTS"; the hub's has them
    under "contexts" inside "context".
    """
    record = {key.lower(): value for key, value in record.items()}
    context = record.get("contexts", record.get("context"))
    # In a table the hub's object is a text.
    if isinstance(context, str) and context.lstrip().startswith("{"):
        context = parse_literal(context, "contexts are")
    passages = context.get("contexts") if isinstance(context, dict) else context
    passages = read_context({"context": passages})
    if not passages:
        raise ValueError('"contexts" is empty; every question needs its abstract')
    decision = record.get("final_decision")
    if isinstance(decision, bool):  # YAML 1.1 reads a bare no as False
        decision = "yes" if decision else "no"
    answer = None
    if not is_blank(decision):
        answer = find_decision(decision)
    return MultipleChoice(
        # The id is the PMID as text, as the official list spells it. An integer would be in no
        # list, and test questions would be trained on.
        id=optional_label(record, "pubid") or optional_label(record, "id") or "",
        question=need_text(record, "question"),
        options=PUBMEDQA_OPTIONS,
        answer=answer,
        dataset="pubmedqa",
        source=source,
        context=tuple(passage for passage in passages if passage.strip()),
        explanation=optional_text(record, "long_answer"),
    )


def find_decision(decision: object) -> int:
    """Return the index of yes, no or maybe."""
    if isinstance(decision, str) and decision.strip().lower() in PUBMEDQA_OPTIONS:
        return PUBMEDQA_OPTIONS.index(decision.strip().lower())
    raise ValueError(f"final_decision is {decision!r}; expected yes, no or maybe")


def select_pubmedqa_split(
    examples: list[MultipleChoice], entry: DataEntry, split: str
) -> list[MultipleChoice]:
    """Keep the questions of a split.

    The official test set is a list of 500 PMIDs; every other question belongs to the training set.
    Without a list, at most 500 rows are taken to be a part that holds no test questions. Of a file
    that is evaluated, the official questions are taken, or all where it holds none of them and no
    list was named.

    Raises:
        DataError: A list is needed and there is none, or it cannot be read, or the split is empty.
    """
    if split == "all":
        return examples
    pmids, list_file = read_test_list(entry)
    if pmids is None:
        # A file with more than 500 of the 1,000 labelled questions holds some of the 500 test
        # questions.
        if len(examples) > 500 or split == "test":
            raise DataError(
                f"pubmedqa: split {split} of {len(examples)} rows needs the official list of test"
                " PMIDs; set test_pmids to test_ground_truth.json of PubMedQA's repository, or"
                " split: all to take every row"
            )
        return examples
    wants_official = split in ("test", FILE)
    # Train and validation are the same questions here: all that are not on the list.
    kept = [example for example in examples if (example.id in pmids) == wants_official]
    if not kept and split == FILE and entry.test_pmids is None:
        return examples
    if not kept:
        name = "test" if wants_official else split
        raise DataError(
            f"pubmedqa: none of the {len(examples)} rows belongs to split {name} by {list_file}"
        )
    return kept


def read_test_list(entry: DataEntry) -> tuple[set[str] | None, str | None]:
    """Return the official test PMIDs and the file that lists them, or None for both.

    Raises:
        DataError: The list cannot be read.
    """
    list_file = entry.test_pmids or find_test_list(entry)
    if list_file is None:
        return None, None
    try:
        text = Path(list_file).expanduser().read_text(encoding="utf-8-sig")
        pmids = parse_json(text) if list_file.endswith(".json") else text.split()
    except (OSError, ValueError) as error:
        raise DataError(f"pubmedqa: test_pmids {list_file} cannot be read: {error}") from None
    # The official file is an object whose keys are the PMIDs; a list is an array of them.
    if not isinstance(pmids, (list, dict)) or not all(
        isinstance(pmid, str) and pmid.isdecimal() for pmid in pmids
    ):
        raise DataError(
            f"pubmedqa: test_pmids {list_file}: expected PMIDs, as the keys of a JSON object, in a"
            " JSON list of texts, or one per line of a .txt file"
        )
    return set(pmids), list_file


def describe_official(examples: list[MultipleChoice], entry: DataEntry) -> str:
    """Return how many of the questions belong to the official test set."""
    pmids, _ = read_test_list(entry)
    if pmids is None:
        return "the official list of test questions is not at hand"
    official = sum(example.id in pmids for example in examples)
    return f"{official:,} of them official test questions"


def find_test_list(entry: DataEntry) -> str | None:
    """Return the official list of test PMIDs that lies beside the entry's file, if there is one."""
    path = Path(entry.path).expanduser() if entry.path else None
    if path is None or not path.exists():
        return None
    homes = [path, path / "data"] if path.is_dir() else [path.parent]
    # A fold's folder lies beside the list.
    homes += [home.parent for home in homes if home.name.startswith(FOLD)]
    for home, name in itertools.product(homes, TEST_LISTS):
        if (home / name).is_file():
            return str(home / name)
    return None


def find_published_file(folder: Path, names: tuple[str, ...], subset: str | None) -> Path | None:
    """Return the file of a split in PubMedQA's repository, its folder data/, or a fold.

    All splits of a set are in one file, which select_pubmedqa_split divides. A fold has files of
    its own for training and validation, and the test questions of the whole set.

    Raises:
        DataError: The subset is no set of the repository, or its file is missing.
    """
    fold = folder.name.startswith(FOLD)
    if fold and "test" not in names:
        return None
    homes = [folder.parent] if fold else [folder, folder / "data"]
    homes = [home for home in homes if any((home / name).is_file() for name in SETS.values())]
    if not homes:
        return None
    file = homes[0] / SETS.get(subset or "pqa_labeled", "")
    if not file.is_file():
        there = [name for name, file in SETS.items() if (homes[0] / file).is_file()]
        raise DataError(
            f"pubmedqa: folder {homes[0]} has the sets {', '.join(there)}, not"
            f" {subset or 'pqa_labeled'}; name one of them with subset"
        )
    return file


def ask_harness(example: MultipleChoice, context: str) -> str:
    """Return the prompt of lm-evaluation-harness's task pubmedqa."""
    return f"Abstract: {context}\nQuestion: {example.question}\nAnswer:"


register(
    Format(
        name="pubmedqa",
        parse=parse_pubmedqa,
        hub=("qiaojin/PubMedQA", "pqa_labeled"),
        license="MIT",
        language="en",
        signatures=(
            frozenset({"QUESTION", "CONTEXTS"}),
            frozenset({"question", "context", "long_answer"}),
        ),
        find_published=find_published_file,
        select_split=select_pubmedqa_split,
        answers=(),
        splits_share_a_file=True,
        describe=describe_official,
        harness=HarnessPrompt(ask=ask_harness, answer="text", takes_context=True),
    )
)
