"""Data entries become tokenized rows: read, clean, separate, tokenize."""

from __future__ import annotations

import gc
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from medqlora.batches.cache import Prepared, load_table, save_arrays
from medqlora.core.config import Config, Data, DataEntry
from medqlora.core.files import hash_json
from medqlora.data.cleaning import clean, decontaminate, deduplicate
from medqlora.data.examples import DataError, Example, MultipleChoice, Passage, Removal
from medqlora.data.formats.registry import find_format
from medqlora.data.reading import read_examples
from medqlora.data.sources import locate_file
from medqlora.prompts.chat_template import Encoder
from medqlora.prompts.encoding import TokenTable, encode_examples
from medqlora.prompts.fingerprint import fingerprint, hash_tokenizer

DEFAULT_SPLIT = {"train": "train", "eval": "validation", "test": "test"}


def name_entry(role: str, index: int) -> str:
    return f"data.{role}[{index}]"


def check_entries(data: Data) -> None:
    """Every file is there, and no evaluation file is a training file.

    Raises:
        DataError
    """
    if not data.train:
        raise DataError(
            "data.train is empty; give at least one entry, e.g. {format: medmcqa, path: FILE}"
        )
    homes: dict[Any, str] = {}
    for role in ("train", "eval", "test"):
        for index, entry in enumerate(getattr(data, role)):
            find_format(entry.format, f"{name_entry(role, index)}: format")
            split = entry.split or DEFAULT_SPLIT[role]
            path = locate_file(entry, split)
            # Where one file holds several splits, the split tells its parts apart.
            home = (
                (path.resolve(), split if find_format(entry.format).splits_share_a_file else "")
                if path
                else (entry.path or entry.format, split)
            )
            if role != "train" and home in homes:
                raise DataError(
                    f"{name_entry(role, index)} is the same data as {homes[home]} ({home[0]});"
                    " evaluate on other data"
                )
            if role == "train":
                homes[home] = name_entry(role, index)


def read_role(data: Data, role: str) -> tuple[list[list[Example]], list[Removal]]:
    """Clean examples of each entry of data.train, data.eval or data.test."""
    entries = []
    removals = []
    for index, entry in enumerate(getattr(data, role)):
        examples, dropped = read_examples(entry, DEFAULT_SPLIT[role], data.drop_invalid)
        if not examples:
            raise DataError(f"{name_entry(role, index)}: no valid row is left of {len(dropped)}")
        examples = [clean(example, data.lowercase) for example in examples]
        hidden = [e for e in examples if not isinstance(e, Passage) and e.answer is None]
        if hidden and role != "train":
            raise DataError(
                f"{name_entry(role, index)}: {hidden[0].source}: no label; a split with hidden"
                " answers cannot be evaluated on"
            )
        if hidden and not data.drop_invalid:
            raise DataError(
                f"{name_entry(role, index)}: {hidden[0].source}: no label; drop such rows with"
                " --data.drop_invalid true"
            )
        removals += dropped + [Removal(e.source, e.id, "no label") for e in hidden]
        entries.append([e for e in examples if isinstance(e, Passage) or e.answer is not None])
    return entries, removals


@contextmanager
def without_collection() -> Iterator[None]:
    """Millions of small objects are made here and none of them in a cycle: looking for cycles would
    take a quarter of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@without_collection()
def prepare(
    config: Config, encoder: Encoder, report: Callable[[str], None] = lambda stage: None
) -> Prepared:
    """Read, clean, separate and tokenize everything the config names; `report` is told each stage.

    Raises:
        DataError: see check_entries, read_examples, encode_examples.
    """
    data = config.data
    check_entries(data)
    report("reading data")
    train_entries, removals = read_role(data, "train")
    eval_entries, dropped = read_role(data, "eval")
    test_entries, dropped_test = read_role(data, "test")
    removals += dropped + dropped_test
    held_out = [
        example
        for entries in (eval_entries, test_entries)
        for examples in entries
        for example in examples
    ]
    test = [example for examples in test_entries for example in examples]
    if other := next(
        (example for example in test if not isinstance(example, MultipleChoice)), None
    ):
        raise DataError(
            f"data.test: {other.source}: not a multiple-choice question; put open answers and text"
            " in data.eval"
        )

    origin = {
        id(example): index for index, examples in enumerate(train_entries) for example in examples
    }
    train = [example for examples in train_entries for example in examples]
    report(f"cleaning {len(train):,} rows")
    train, dropped = deduplicate(train, data.deduplicate)
    removals += dropped
    if data.decontaminate:
        train, dropped = decontaminate(train, held_out)
        removals += dropped
    if not train:
        raise DataError(
            "data.train: every row was removed as duplicate or as part of the evaluation data"
        )

    report(f"tokenizing {len(train):,} rows")
    folders = {}
    data_sha256 = hash_examples(train)
    folders["train"], table, dropped = tokenize(encoder, train, data, data_sha256)
    removals += dropped
    # A passage gives several rows; its example's name ties them together.
    entry_of = {example.id: origin[id(example)] for example in train}
    source = np.array([entry_of[name] for name in table.names])
    repeats = count_repeats(data.train, source)
    eval_table = None
    if eval_entries:
        held = [example for examples in eval_entries for example in examples]
        folders["eval"], eval_table, dropped = tokenize(encoder, held, data, hash_examples(held))
        removals += dropped
    hashes = {
        "data_sha256": data_sha256,
        "prompt_sha256": fingerprint(encoder),
        "tokenizer_sha256": hash_tokenizer(encoder),
    }
    mixture = describe_mixture(data.train, source, repeats, table.lengths)
    return Prepared(table, eval_table, repeats, test, removals, mixture, hashes, folders)


def count_repeats(entries: list[DataEntry], source: np.ndarray) -> np.ndarray:
    """Weight, or the weight that gives an entry its share of all rows, for each row."""
    rows = np.bincount(source, minlength=len(entries)).astype(float)
    shares = np.array([entry.share or 0.0 for entry in entries])
    weights = np.array([entry.weight for entry in entries])
    others = (rows * weights)[shares == 0].sum()
    total = others / (1 - shares.sum())
    weights = np.where(shares > 0, shares * total / np.maximum(rows, 1), weights)
    return weights[source]


def describe_mixture(
    entries: list[DataEntry], source: np.ndarray, repeats: np.ndarray, lengths: np.ndarray
) -> list[dict]:
    return [
        {
            "entry": name_entry("train", index),
            "format": entry.format,
            "path": entry.path,
            "rows": int((source == index).sum()),
            "rows_per_epoch": round(float(repeats[source == index].sum())),
            "row_share": float(repeats[source == index].sum() / repeats.sum()),
            "token_share": float(
                (repeats * lengths)[source == index].sum() / (repeats * lengths).sum()
            ),
        }
        for index, entry in enumerate(entries)
    ]


def hash_examples(examples: list[Example]) -> str:
    """SHA-256 over everything but where the examples stood."""
    digest = hashlib.sha256()
    read = {
        kind: attrgetter(*(field.name for field in fields(kind) if field.name != "source"))
        for kind in {type(e) for e in examples}
    }
    for example in examples:
        digest.update(repr((type(example).__name__, read[type(example)](example))).encode())
    return digest.hexdigest()


def tokenize(
    encoder: Encoder, examples: list[Example], data: Data, sha256: str
) -> tuple[str, TokenTable, list[Removal]]:
    """encode_examples, from the cache where the same was done before; -> name of the cache folder
    too.
    """
    key = hash_json(
        [
            sha256,
            hash_tokenizer(encoder),
            fingerprint(encoder),
            data.max_length,
            data.drop_invalid,
        ]
    )
    folder = Path(data.cache_dir).expanduser() / f"tokens-{key[:24]}"
    if not (folder / "names.npy").is_file():
        table, removals = encode_examples(encoder, examples, data.max_length, data.drop_invalid)
        notes = np.array(
            json.dumps({"names": list(table.names), "removals": [asdict(r) for r in removals]})
        )
        save_arrays(
            folder,
            {
                "ids": table.ids,
                "offsets": table.offsets,
                "prompt_lengths": table.prompt_lengths,
                "names": notes,
            },
        )
    return folder.name, *load_table(folder)


def count_reasons(removals: list[Removal]) -> dict[str, int]:
    """How many were dropped for each kind of reason."""
    return dict(
        Counter(
            removal.reason.partition(":")[0].partition(" of ")[0] for removal in removals
        ).most_common()
    )
