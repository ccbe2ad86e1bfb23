"""Turn data entries into tokenized rows.

The rows are read, cleaned, separated from the evaluation data and tokenized.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import chain
from operator import attrgetter
from pathlib import Path

import numpy as np

from medqlora.batches.cache import (
    TABLE_ARRAYS,
    Prepared,
    describe_code,
    load_table,
    name_files,
    save_arrays,
)
from medqlora.batches.entries import (
    check_entries,
    check_test,
    name_entry,
    read_role,
    show_passages,
)
from medqlora.batches.order import count_repeats
from medqlora.core.config import Config, Data, DataEntry
from medqlora.core.files import find_problem, hash_json
from medqlora.data.cleaning import decontaminate, deduplicate, drop_repeated_ids
from medqlora.data.examples import (
    DataError,
    Example,
    Passage,
    Removal,
)
from medqlora.prompts.chat_template import Encoder
from medqlora.prompts.fingerprint import fingerprint, hash_tokenizer
from medqlora.prompts.rows import TokenTable, encode_examples


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Stop Python's search for reference cycles inside the block.

    Preparing data makes millions of small objects and no cycles; searching for cycles among them
    would take a quarter of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@pause_garbage_collection()
def prepare(
    config: Config, encoder: Encoder, report: Callable[[str], None] = lambda stage: None
) -> Prepared:
    """Read, clean, separate and tokenize all data that the configuration names.

    Args:
        config: The configuration.
        encoder: Makes prompts and token ids of examples.
        report: Is called with the name of each stage as it begins.

    Raises:
        DataError: The data cannot be used; see check_entries, read_examples and encode_examples.
    """
    data = config.data
    check_entries(data)
    report("reading data")
    train_entries, removals, descriptions = read_role(data, "train")
    eval_entries, dropped, described = read_role(data, "eval")
    test_entries, dropped_test, described_test = read_role(data, "test")
    removals += dropped + dropped_test
    descriptions += described + described_test
    library_sha256 = None
    if data.retrieval is not None:
        report("searching passages")
        roles = {"train": train_entries, "eval": eval_entries, "test": test_entries}
        library_sha256, found = show_passages(data, roles)
        descriptions += found
    entries = chain(train_entries, eval_entries, test_entries)
    rows = sum(map(len, entries)) + len(removals)  # all rows that were read
    evaluation = list(chain.from_iterable(eval_entries))
    flag = None if data.drop_invalid else "--data.drop_invalid true"
    test, repeated = drop_repeated_ids(chain.from_iterable(test_entries), "data.test", flag)
    removals += repeated
    check_test(test)

    # Two entries may hold equal examples, so an example's entry is known by its identity.
    # From here on examples are passed on and never copied, and train_entries keeps them alive. A
    # copy would have an id() without an entry, and a freed one could lend its id() to another.
    entry_of_object = {}
    for index, examples in enumerate(train_entries):
        for example in examples:
            entry_of_object[id(example)] = index
    train = list(chain.from_iterable(train_entries))
    report(f"cleaning {len(train):,} rows")
    # The first of equal rows stays, so a row that two entries share belongs to the earlier entry.
    train, dropped = deduplicate(train, data.deduplicate)
    removals += dropped
    if data.decontaminate:
        train, dropped = decontaminate(train, evaluation + test)
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
    # Ids do not tell examples apart: two files may both number their rows from 1.
    entry_of_example = np.array([entry_of_object[id(example)] for example in train])  # int64
    entry_of_row = entry_of_example[table.examples]  # int64 [rows]
    repeats = count_repeats(data.train, entry_of_row, data.temperature)
    eval_table = None
    if eval_entries:
        folders["eval"], eval_table, dropped = tokenize(
            encoder, evaluation, data, hash_examples(evaluation)
        )
        removals += dropped
    hashes = {
        "data_sha256": data_sha256,
        "eval_sha256": hash_examples(evaluation),
        "test_sha256": hash_examples(test),
        "tokens_sha256": hash_tokens(table, repeats, eval_table),
        "prompt_sha256": fingerprint(encoder),
        "tokenizer_sha256": hash_tokenizer(encoder),
        **({} if library_sha256 is None else {"library_sha256": library_sha256}),
    }
    mixture = describe_mixture(data.train, entry_of_row, repeats, table.lengths)
    for role, tokens, examples in (("train", table, train), ("eval", eval_table, evaluation)):
        if tokens is not None:
            texts = [*describe_fill(tokens, examples, data), *describe_cuts(tokens, data)]
            descriptions += [f"data.{role}: {text}" for text in texts]
    descriptions += describe_removals(removals, rows)
    return Prepared(
        table, eval_table, repeats, test, removals, mixture, hashes, folders, descriptions
    )


def describe_mixture(
    entries: list[DataEntry], entry_of_row: np.ndarray, repeats: np.ndarray, lengths: np.ndarray
) -> list[dict]:
    """Return the rows of each entry of data.train and its share of an epoch's rows and tokens."""
    tokens = repeats * lengths  # float64 [rows], per epoch
    mixture = []
    for index, entry in enumerate(entries):
        own = entry_of_row == index
        mixture.append(
            {
                "entry": name_entry("train", index),
                "format": entry.format,
                "path": entry.path,
                "rows": int(own.sum()),
                "rows_per_epoch": round(float(repeats[own].sum())),
                "row_share": float(repeats[own].sum() / repeats.sum()),
                "token_share": float(tokens[own].sum() / tokens.sum()),
            }
        )
    return mixture


def hash_examples(examples: list[Example]) -> str:
    """Return the SHA-256 of the examples, without the file and line that they come from.

    The columns that prediction rows keep are left out too, because no model sees them.
    """
    readers = {}
    for kind in {type(example) for example in examples}:
        left_out = ("source", "columns", "evidence")
        names = [field.name for field in fields(kind) if field.name not in left_out]
        readers[kind] = attrgetter(*names)
    digest = hashlib.sha256()
    for example in examples:
        kind = type(example)
        # repr marks where each field ends and tells None from a text, which joined texts do not.
        digest.update(repr((kind.__name__, readers[kind](example))).encode())
        # Rows without passages keep the hash that they had before there were any.
        if getattr(example, "evidence", ()):
            digest.update(repr([(piece.id, piece.text) for piece in example.evidence]).encode())
    return digest.hexdigest()


def hash_tokens(table: TokenTable, repeats: np.ndarray, eval_table: TokenTable | None) -> str:
    """Return the SHA-256 of all that is trained on and evaluated: token ids, labels, repeats."""
    digest = hashlib.sha256(repeats.tobytes())
    for tokens in (table, eval_table):
        if tokens is not None:
            for array in (tokens.offsets, tokens.prompt_lengths, tokens.ids):
                # The size marks where each array ends. A view of the memory saves a copy of it.
                digest.update(str(array.size).encode())
                digest.update(memoryview(np.ascontiguousarray(array)).cast("B"))
    return digest.hexdigest()


def tokenize(
    encoder: Encoder, examples: list[Example], data: Data, sha256: str
) -> tuple[str, TokenTable, list[Removal]]:
    """Tokenize examples, or open their table where the cache holds it.

    Args:
        encoder: Makes prompts and token ids of examples.
        examples: The examples.
        data: The configuration's section.
        sha256: The hash of the examples (see hash_examples).

    Returns:
        The name of the cache folder, the table, and what was dropped.
    """
    # The key must hold everything that decides the ids; style and completion are in the
    # fingerprint. Its probes are short, so the key also holds the code that cuts rows.
    key = hash_json(
        [
            sha256,
            hash_tokenizer(encoder),
            fingerprint(encoder),
            data.max_length,
            data.drop_invalid,
            data.truncate,
            describe_code(),
        ]
    )
    folder = Path(data.cache_dir).expanduser() / f"tokens-{key[:24]}"
    if find_problem(folder, name_files(TABLE_ARRAYS), key=key) is not None:
        table, removals = encode_examples(
            encoder, examples, data.max_length, data.drop_invalid, data.truncate == "answer"
        )
        notes = {
            "names": list(table.names),
            "cuts": table.cuts,
            "removals": [asdict(removal) for removal in removals],
        }
        arrays = {
            "ids": table.ids,
            "offsets": table.offsets,
            "prompt_lengths": table.prompt_lengths,
            "examples": table.examples,
            "names": np.array(json.dumps(notes)),
        }
        save_arrays(folder, arrays, key)
    return folder.name, *load_table(folder)


def describe_fill(table: TokenTable, examples: list[Example], data: Data) -> list[str]:
    """Return how full the rows of plain text are; nothing where there are none.

    Args:
        table: The tokenized rows.
        examples: The examples that they were made of.
        data: The configuration's section.
    """
    documents = np.array([isinstance(example, Passage) for example in examples])
    lengths = table.lengths[documents[table.examples]]  # int64 [rows of plain text]
    if not lengths.size:
        return []
    fill = lengths.sum() / (lengths.size * data.max_length)
    return [
        f"{lengths.size:,} rows of plain text are {fill:.1%} full (data.max_length"
        f" {data.max_length}); no row goes over the end of a document"
    ]


def describe_cuts(table: TokenTable, data: Data) -> list[str]:
    """Return in how many rows something was cut to fit data.max_length, one text per kind."""
    rows = len(table.lengths)
    descriptions = []
    for part, count in table.cuts.items():
        done = "passages were left out" if part == "passages" else f"the {part} was cut"
        descriptions.append(
            f"{done} in {count:,} of {rows:,} rows ({count / rows:.1%}), to fit data.max_length"
            f" {data.max_length}"
        )
    return descriptions


def describe_removals(removals: list[Removal], rows: int) -> list[str]:
    """Return how many of all rows were dropped for each kind of reason, one text per kind."""
    return [
        f"removed {count:,} of {rows:,} rows ({count / rows:.1%}): {reason}"
        for reason, count in count_reasons(removals).items()
    ]


def count_reasons(removals: list[Removal]) -> dict[str, int]:
    """Return how many examples were dropped for each kind of reason, most frequent first."""
    counts = Counter()
    for removal in removals:
        # The details of a row stand after a colon, or after "of" ("duplicate of FILE line 3").
        kind = removal.reason.partition(":")[0].partition(" of ")[0]
        counts[kind] += 1
    return dict(counts.most_common())
