"""The cache on disk: tokenized rows and plans, memory-mapped.

Each folder is named by a hash of what its content is made from, so a change makes a new folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from medqlora.batches.budgets import PlanError
from medqlora.batches.order import find_order
from medqlora.batches.plan import Plan, make_plan
from medqlora.core.config import Config, Data
from medqlora.core.environment import read_versions
from medqlora.core.files import find_problem, hash_file, hash_json, remove, write_manifest
from medqlora.data.examples import Evidence, MultipleChoice, OpenAnswer, Removal
from medqlora.prompts.rows import TokenTable

LOCK = "cache.lock"
# A kill leaves such names in the cache: folders aside, and the file through which rank 0 tells its
# progress.
UNFINISHED_ENTRY = re.compile(
    r"(tokens|prepared|plan|losses)-[0-9a-f]{24}\.[0-9a-f]+(\.old)?\.tmp|\.?shared-[0-9a-f]+\.json(\..*\.tmp)?"
)
# The tokens and plans depend on these packages and on the code of these wings.
PACKAGES = ("medqlora", "transformers", "tokenizers", "numpy")
WINGS = ("core", "data", "prompts", "batches")
TABLE_ARRAYS = ("ids", "offsets", "prompt_lengths", "examples", "names")


@functools.cache
def describe_code() -> list[Any]:
    """Return what decides the content of the cache beside its inputs: packages and our own code.

    The data side of this package is hashed file by file, because a version number stays the same
    between two commits.
    """
    versions = read_versions()
    package = Path(__file__).parent.parent
    files = [path for wing in WINGS for path in sorted((package / wing).rglob("*.py"))]
    return [
        [versions.get(name) for name in PACKAGES],
        [[path.name, hash_file(path)] for path in files],
    ]


@contextlib.contextmanager
def use_cache(cache: Path) -> Iterator[None]:
    """Tell other processes that this one may be writing to the cache, and clear up after dead ones.

    Every writer holds a shared lock on one file. Whoever gets the exclusive lock knows that nobody
    writes, so what is unfinished then was left by a kill. Without locks, or without a folder that
    can be written, nothing is cleared up; whoever writes says what is wrong.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((cache / LOCK).open("ab"))
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for path in cache.iterdir():
                    if UNFINISHED_ENTRY.fullmatch(path.name):
                        remove(path)
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def name_files(arrays: Iterable[str]) -> list[str]:
    """Return the files that save_arrays writes."""
    return [f"{name}.npy" for name in arrays]


def save_arrays(folder: Path, arrays: dict[str, np.ndarray], key: str = "") -> None:
    """Write one .npy file per array in `folder`, unless the folder is there and undamaged.

    The files are written to a folder aside, which is then renamed. So a folder is complete or
    absent, also after a kill, and several processes may write the same one. A damaged or foreign
    folder, or a file of its name, is replaced.

    Args:
        folder: The folder.
        arrays: The arrays by the names of their files.
        key: What the content is made from; the folder's manifest holds it beside sizes and hashes.

    Raises:
        PlanError: The disk refuses.
    """
    suffix = secrets.token_hex(8)
    aside = folder.with_name(f"{folder.name}.{suffix}.tmp")
    replaced = folder.with_name(f"{folder.name}.{suffix}.old.tmp")
    with use_cache(folder.parent):
        try:
            aside.mkdir(parents=True)
            for name, array in arrays.items():
                np.save(aside / f"{name}.npy", array)
            write_manifest(aside, {"key": key})
            # Another process may have been first; its folder of this name has the same content.
            if find_problem(folder, name_files(arrays), key=key) is not None:
                with contextlib.suppress(FileNotFoundError):
                    folder.rename(replaced)
                aside.rename(folder)
        except OSError as error:
            if find_problem(folder, name_files(arrays), key=key) is not None:
                raise PlanError(
                    f"data.cache_dir: cannot write {folder}: {error.strerror or error}; free space"
                    " or name another folder"
                ) from None
        finally:
            remove(aside)
            remove(replaced)


def load_arrays(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Open arrays of save_arrays, memory-mapped and read-only."""
    # All processes of a machine share the pages of a mapped file.
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}


@dataclass(frozen=True)
class Prepared:
    """The data of a run after reading, cleaning and tokenizing.

    Args:
        train: The tokenized training rows.
        eval: The tokenized evaluation rows; None without data.eval.
        repeats: How often each training row is seen per epoch, float64 [rows].
        test: The labelled questions of data.test, all of one kind.
        removals: Every record and example that was dropped.
        mixture: The rows and shares of each entry of data.train (see describe_mixture).
        hashes: SHA-256 of the training examples, the prompt and the tokenizer.
        folders: The cache folder of each table, by "train" and "eval".
        descriptions: What was read of each data entry, and what was cut, for the user.
    """

    train: TokenTable
    eval: TokenTable | None
    repeats: np.ndarray
    test: list[MultipleChoice] | list[OpenAnswer]
    removals: list[Removal]
    mixture: list[dict[str, Any]]
    hashes: dict[str, str]
    folders: dict[str, str]
    descriptions: list[str]


def load_table(folder: Path) -> tuple[TokenTable, list[Removal]]:
    """Open a table that `pipeline.tokenize` cached, with the removals of its tokenization."""
    notes = json.loads(str(np.load(folder / "names.npy")))
    arrays = load_arrays(folder, ["ids", "offsets", "prompt_lengths", "examples"])
    removals = [Removal(**removal) for removal in notes["removals"]]
    return TokenTable(**arrays, names=notes["names"], cuts=notes["cuts"]), removals


def save_prepared(data: Data, prepared: Prepared) -> str:
    """Write prepared data to the cache for the other processes of a run.

    Returns:
        The name of the cache folder, for load_prepared.
    """
    content = {
        "folders": prepared.folders,
        "hashes": prepared.hashes,
        "mixture": prepared.mixture,
        "test": [asdict(example) for example in prepared.test],
        "removals": [asdict(removal) for removal in prepared.removals],
        "descriptions": prepared.descriptions,
    }
    # The name is a hash of everything in the folder, so whoever writes the same name writes the
    # same content.
    key = hash_json([content, hashlib.sha256(prepared.repeats.tobytes()).hexdigest()])
    folder = Path(data.cache_dir).expanduser() / f"prepared-{key[:24]}"
    arrays = {"repeats": prepared.repeats, "facts": np.array(json.dumps(content))}
    if find_problem(folder, name_files(arrays), key=key) is not None:
        save_arrays(folder, arrays, key)
    return folder.name


def load_prepared(data: Data, name: str) -> Prepared:
    """Read what another process saved with save_prepared; its arrays are memory-mapped."""
    cache = Path(data.cache_dir).expanduser()
    content = json.loads(str(np.load(cache / name / "facts.npy")))
    tables = {role: load_table(cache / folder)[0] for role, folder in content["folders"].items()}
    return Prepared(
        train=tables["train"],
        eval=tables.get("eval"),
        repeats=load_arrays(cache / name, ["repeats"])["repeats"],
        test=[restore_question(row) for row in content["test"]],
        removals=[Removal(**removal) for removal in content["removals"]],
        mixture=content["mixture"],
        hashes=content["hashes"],
        folders=content["folders"],
        descriptions=content["descriptions"],
    )


def restore_question(row: dict[str, Any]) -> MultipleChoice | OpenAnswer:
    """Make a question again from its JSON, which has lists where the question has tuples."""
    fields_of_row = {}
    for key, value in row.items():
        fields_of_row[key] = tuple(value) if isinstance(value, list) else value
    fields_of_row["evidence"] = tuple([Evidence(**piece) for piece in row["evidence"]])
    kind = MultipleChoice if "options" in row else OpenAnswer
    return kind(**fields_of_row)


def prepare_plan(
    config: Config,
    prepared: Prepared,
    ranks: int,
    packed_tokens: int | None = None,
    losses: np.ndarray | None = None,
) -> tuple[Plan, str]:
    """Make the training plan, or open it where the cache holds it.

    Args:
        config: The configuration. Its training.max_tokens_per_batch is no longer "auto": it is the
            size of a rank's micro-batch in tokens.
        prepared: The prepared data.
        ranks: The number of processes.
        packed_tokens: The size in tokens of the bins that rows are packed in (see
            plan.choose_packing); the micro-batch by default.
        losses: The base's loss of each training row, for data.order easy_to_hard.

    Returns:
        The plan, memory-mapped, and the name of its cache folder, which holds its hash.
    """
    training = config.training
    data = config.data
    # The folder is named by a hash of these settings and the rows. An argument of make_plan that is
    # not among them would bring back the plan of another value.
    settings = {
        "capacity": packed_tokens or training.max_tokens_per_batch,
        "micro_tokens": training.max_tokens_per_batch,
        "global_tokens": training.global_batch_tokens,
        "ranks": ranks,
        "epochs": training.epochs,
        "max_steps": training.max_steps,
        "window": data.packing_window,
        "seed": training.seed,
        "packing": data.packing,
    }
    lengths = prepared.train.lengths  # int64 [rows]
    # A plan knows rows by their lengths, repeats and order alone, never by their content.
    rows = [lengths, prepared.repeats]
    order_by = find_order(data.order, lengths, losses)
    if order_by is not None:
        rows.append(order_by)
    rows_sha256 = hashlib.sha256(b"".join(array.tobytes() for array in rows)).hexdigest()
    key = hash_json([settings, rows_sha256, describe_code()])
    folder = Path(data.cache_dir).expanduser() / f"plan-{key[:24]}"
    if find_problem(folder, name_files(field.name for field in fields(Plan)), key=key) is not None:
        plan = make_plan(lengths, repeats=prepared.repeats, order_by=order_by, **settings)
        save_arrays(folder, asdict(plan), key)
    return load_plan(data, folder.name), folder.name


def load_plan(data: Data, name: str) -> Plan:
    """Open the plan of that name in the cache, memory-mapped."""
    folder = Path(data.cache_dir).expanduser() / name
    return Plan(**load_arrays(folder, [field.name for field in fields(Plan)]))
